"""Series: the files of one, what is wrong with it, and its stack when nothing is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.io.dicom.frames import Stack
from pipeline.io.dicom.headers import Header
from pipeline.io.dicom.privacy import hide, pseudonym
from pipeline.io.dicom.stacks import arrange

MODALITIES = ("CT", "MR", "PT")
SECONDARY_CAPTURE_PREFIX = "1.2.840.10008.5.1.4.1.1.7"
# Words of ImageType by which scanners mark pictures of text, curves and renderings.
SCREEN_WORDS = ("SCREEN", "DOSE", "REPORT", "PROTOCOL", "CSA BLACK", "VRT", "CHART")
MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """The files of one series.

    Attributes:
        key: A short name that is always the same and tells nobody's identity.
        headers: One per file, sorted by path.
        left_out: Why this is no volume to train on or to segment (a scout, a report), "" for volumes.
        problems: What stands against reading it as a volume; sentences without a full stop.
        notes: What is worth knowing and stands against nothing.
        stack: The frames in order; None when there are problems, or the series is left out.
    """

    key: str
    headers: tuple[Header, ...]
    left_out: str = ""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stack: Stack | None = None

    @property
    def first(self) -> Header:
        """The header of the first file, for what all files share."""
        return self.headers[0]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that the volume is made of, sorted."""
        if self.stack is None:
            return tuple(header.path for header in self.headers)
        return tuple(sorted({frame.path for phase in self.stack.frames for frame in phase}))

    @property
    def identity(self) -> frozenset[str]:
        """Texts that tell who the patient is; never shown."""
        return identity_of_all(self.headers)

    @property
    def name(self) -> str:
        """The series for messages: `series 3 "T1 post" (MR, 4f2a9c81)`."""
        return name_of(self.headers)


def identity_of_all(headers: Iterable[Header]) -> frozenset[str]:
    """Texts that tell who the patients of several files are; never shown."""
    return frozenset[str]().union(*(header.identity for header in headers))


def key_of(headers: Sequence[Header]) -> str:
    """The pseudonym of a series; of its first instance, or of its places, where de-identification blanked the UIDs."""
    uid = headers[0].series_uid or min(header.instance_uid for header in headers)
    return pseudonym(uid or repr(sorted(frame.position for header in headers for frame in header.frames)))


def name_of(headers: Sequence[Header]) -> str:
    """A series for messages, without anything that tells the patient."""
    first = headers[0]
    identity = identity_of_all(headers)
    description = f' "{hide(first.description, identity)}"' if first.description else ""
    return f"series {hide(first.series_number, identity) or '?'}{description} ({first.modality}, {key_of(headers)})"


def group_by_series(headers: Iterable[Header]) -> list[tuple[Header, ...]]:
    """Files by series, in the order of the first of each.

    Where de-identification blanked the UIDs, files of one folder, patient, study and number are a series.
    """
    groups: dict[tuple[object, ...], list[Header]] = {}
    for header in headers:
        key: tuple[object, ...] = (header.series_uid, header.modality)
        if not header.series_uid:
            key = (*key, header.path.parent, header.patient_id, header.study_uid, header.series_number)
        groups.setdefault(key, []).append(header)
    return [tuple(group) for group in groups.values()]


def examine_series(headers: Sequence[Header], *, allow_tilt: bool = False) -> Series:
    """Find what a series is and what is wrong with it.

    Args:
        headers: Of all its files; at least one.
        allow_tilt: Take slices that are shifted evenly against each other.
    """
    headers = tuple(sorted(headers, key=lambda header: header.path))
    key, name = key_of(headers), name_of(headers)
    left_out = reason_to_leave_out(headers)
    if left_out:
        return Series(key=key, headers=headers, left_out=left_out)
    images = [header for header in headers if "LOCALIZER" not in header.image_type]
    scouts = len(headers) - len(images)
    notes = (f"{scouts} scout image(s) in the series are left out",) if scouts else ()
    problems = (*_file_problems(images), *_mixture_problems(images), *_format_problems(images))
    if problems:
        return Series(key=key, headers=headers, problems=problems, notes=notes)
    frames = [frame for header in images for frame in header.frames]
    if images[0].modality == "CT" and len({(frame.slope, frame.intercept) for frame in frames}) > 1:
        notes = (*notes, "RescaleSlope or RescaleIntercept changes from slice to slice, which is rare in CT")
    pixels = images[0].pixels
    if pixels is None:
        raise ValueError("a series without problems has pixels")
    found = arrange(name, frames, pixels, allow_tilt=allow_tilt)
    stack = found.stack
    if stack is not None:
        notes = (*notes, *_count_notes(images, stack))
        first = images[0]
        stack = replace(stack, series_uid=first.series_uid, frame_of_reference=first.frame_of_reference)
    return Series(key=key, headers=headers, problems=found.problems, notes=notes, stack=stack)


def _count_notes(headers: Sequence[Header], stack: Stack) -> list[str]:
    """Where the header counts other slices than there are: part of the series may not have been exported."""
    found, num_slices = [], stack.grid.shape[2]
    counted = max(header.num_slices for header in headers)
    if counted > num_slices:
        found.append(f"the header counts {counted} slices, of which {num_slices} are here")
    said = headers[0].slice_distance
    if num_slices > 1 and said and stack.grid.spacing[2] > 1.5 * said:
        apart = stack.grid.spacing[2]
        found.append(f"the header says that slices are {said:.4g} mm apart, and they are {apart:.4g} mm")
    return found


def reason_to_leave_out(headers: Sequence[Header]) -> str:
    """What a series is when it is no volume: a scout, a picture, a report; "" when it may be one."""
    first = headers[0]
    if all(header.pixels is None and not header.problem for header in headers):
        return f"no image ({first.modality or 'unknown modality'})"
    if all(header.sop_class.startswith(SECONDARY_CAPTURE_PREFIX) for header in headers):
        colours = {header.pixels.photometric for header in headers if header.pixels and header.pixels.samples > 1}
        return f"secondary capture in colours ({', '.join(sorted(colours))})" if colours else "secondary capture"
    if all("LOCALIZER" in header.image_type for header in headers):
        return "scout (localizer)"
    if all(_is_screen(header) for header in headers):
        return "derived screen"
    if first.modality not in MODALITIES:
        return f"modality {first.modality or 'unknown'}; {', '.join(MODALITIES)} are read"
    return ""


def _is_screen(header: Header) -> bool:
    # A scanner's own slices are none, whatever other words ("LOW_DOSE") it has for them.
    if header.image_type[:2] == ("ORIGINAL", "PRIMARY"):
        return False
    return any(word in value for value in header.image_type for word in SCREEN_WORDS)


def _file_problems(headers: Sequence[Header]) -> list[str]:
    """One sentence for each thing that is wrong with files by themselves."""
    counts: dict[str, list[Header]] = {}
    for header in headers:
        problem = header.problem or ("hold no image" if header.pixels is None else "")
        if problem:
            counts.setdefault(problem, []).append(header)
    return [f"{_files(found, len(headers))} {problem}" for problem, found in counts.items()]


def _files(found: Sequence[Header], total: int) -> str:
    identity = identity_of_all(found)
    names = ", ".join(hide(header.path.name, identity) for header in found[:MOST_NAMED])
    more = ", ..." if len(found) > MOST_NAMED else ""
    return f"{len(found)} of {total} files ({names}{more}):"


def _mixture_problems(headers: Sequence[Header]) -> list[str]:
    """Files of several patients, studies or frames of reference, and the same file twice."""
    found = []
    for attribute, what in (
        ("patient_id", "patients"),
        ("study_uid", "studies"),
        ("frame_of_reference", "frames of reference"),
    ):
        count = len({getattr(header, attribute) for header in headers})
        if count > 1:
            found.append(f"the files belong to {count} different {what}")
    instances = Counter(header.instance_uid for header in headers if header.instance_uid)
    doubled = sum(count > 1 for count in instances.values())
    for uid in {header.concatenation_uid for header in headers}:
        parts = {header.part for header in headers if header.concatenation_uid == uid}
        total, here = max(count for _, count in parts), len({number for number, _ in parts})
        if here < total:
            found.append(f"{total - here} of the {total} files that it was split into are missing")
    if doubled:
        found.append(f"{doubled} slice(s) are there more than once, as copies of the same file")
    return found


def _format_problems(headers: Sequence[Header]) -> list[str]:
    """Pixels that are no intensities, or not stored alike in all files."""
    formats = {header.pixels for header in headers if header.pixels is not None}
    found = []
    if len(formats) > 1:
        sizes = {(pixels.columns, pixels.rows) for pixels in formats}
        shown = ", ".join(f"{columns} x {rows}" for columns, rows in sorted(sizes))
        what = f"different sizes ({shown})" if len(sizes) > 1 else "pixels that are stored in different ways"
        found.append(f"the files have {what}")
    for pixels in formats:
        if pixels.samples != 1 or pixels.photometric not in ("MONOCHROME1", "MONOCHROME2", ""):
            found.append(f"the pixels are colours ({pixels.photometric}), not intensities")
        elif pixels.bits_allocated not in (8, 16, 32) or pixels.high_bit != pixels.bits_stored - 1:
            found.append(
                f"the pixels are stored in a way that is not supported ({pixels.bits_stored} of "
                f"{pixels.bits_allocated} bits, high bit {pixels.high_bit})"
            )
    return sorted(set(found))
