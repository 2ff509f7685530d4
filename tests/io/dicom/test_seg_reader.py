"""Segmentations that are read: exact counts of real files, and placement by geometry of made-up ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.utils import pack_bits
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from pipeline.errors import InputError
from pipeline.geometry import Grid, cropped_grid
from pipeline.io.dicom.headers import read_header
from pipeline.io.dicom.seg_reader import iter_segments

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACING = (0.7, 1.3, 2.5)
ORIGIN = (-12.5, 7.25, 101.0)
SHAPE = (7, 5, 4)
PATIENT = "Doe^Jane"


def make_grid(shape: tuple[int, int, int] = SHAPE) -> Grid:
    lps = np.diag([*SPACING, 1.0])
    lps[:3, 3] = ORIGIN
    return Grid(shape, LPS_TO_RAS @ lps)


def item(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def make_seg(
    path: Path,
    frames: list[tuple[int, Any, np.ndarray]],
    *,
    kind: str = "BINARY",
    cosines: Any = (1, 0, 0, 0, 1, 0),
    spacing: Any = (SPACING[1], SPACING[0]),
    names: Any = ("one", "two"),
    edit: Callable[[Dataset], None] = lambda dataset: None,
) -> Path:
    """A segmentation of (segment number, position LPS, pixels (rows, columns)), without this project's writer."""
    pixels = np.stack([frame for _, _, frame in frames]).astype(np.uint8)
    bits = 1 if kind == "BINARY" else 8
    suffix = "7" if kind == "LABELMAP" else "4"
    dataset = item(
        SOPClassUID=f"1.2.840.10008.5.1.4.1.1.66.{suffix}",
        SOPInstanceUID=generate_uid(),
        FrameOfReferenceUID="1.2.3",
        PatientName=PATIENT,
        SegmentationType=kind,
        NumberOfFrames=len(frames),
        Rows=pixels.shape[1],
        Columns=pixels.shape[2],
        BitsAllocated=bits,
        BitsStored=bits,
        HighBit=bits - 1,
        SamplesPerPixel=1,
        PixelRepresentation=0,
        PhotometricInterpretation="MONOCHROME2",
        SegmentSequence=[item(SegmentNumber=n, SegmentLabel=name) for n, name in enumerate(names, 1)],
        SharedFunctionalGroupsSequence=[
            item(
                PlaneOrientationSequence=[item(ImageOrientationPatient=list(cosines))],
                PixelMeasuresSequence=[item(PixelSpacing=list(spacing))],
            )
        ],
        PerFrameFunctionalGroupsSequence=[_group(kind, number, position) for number, position, _ in frames],
        PixelData=pack_bits(pixels) if bits == 1 else pixels.tobytes() + b"\0" * (pixels.size % 2),
    )
    dataset["PixelData"].VR = "OB"
    if kind == "FRACTIONAL":
        dataset.SegmentationFractionalType, dataset.MaximumFractionalValue = "PROBABILITY", 200
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    edit(dataset)
    dataset.save_as(path, enforce_file_format=True)
    return path


def _group(kind: str, number: int, position: Any) -> Dataset:
    group = item(PlanePositionSequence=[item(ImagePositionPatient=[float(x) for x in position])])
    if kind != "LABELMAP":
        group.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=number)]
    return group


def position_of(i: float = 0, j: float = 0, k: float = 0) -> tuple[float, ...]:
    """LPS place of a voxel of the image."""
    return tuple(origin + index * step for origin, index, step in zip(ORIGIN, (i, j, k), SPACING, strict=True))


def random_mask(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


def slices_of(mask: np.ndarray, number: int = 1) -> list[tuple[int, Any, np.ndarray]]:
    """Axial frames of a mask (i, j, k) on the image's grid."""
    return [(number, position_of(k=k), mask[:, :, k].T) for k in range(mask.shape[2])]


def read(path: Path, grid: Grid | None = None, **options: Any) -> dict[str, np.ndarray]:
    options = {"wanted": lambda name: True, **options}
    return {s.name: s.mask for s in iter_segments(path, grid or make_grid(), **options)}


# ---- placement


def test_frames_that_do_not_fill_whole_bytes_come_back(tmp_path: Path) -> None:
    first, second = random_mask(), random_mask(seed=1)
    masks = read(make_seg(tmp_path / "a.dcm", [*slices_of(first), *slices_of(second, 2)]))
    np.testing.assert_array_equal(masks["one"], first)
    np.testing.assert_array_equal(masks["two"], second)


def test_the_order_of_frames_means_nothing(tmp_path: Path) -> None:
    mask = random_mask()
    frames = [slices_of(mask)[k] for k in (2, 0, 3, 1)]
    np.testing.assert_array_equal(read(make_seg(tmp_path / "a.dcm", frames))["one"], mask)


def test_missing_frames_are_background_and_a_segment_without_any_is_empty(tmp_path: Path) -> None:
    mask = random_mask()
    masks = read(make_seg(tmp_path / "a.dcm", [slices_of(mask)[k] for k in (0, 3)]))
    np.testing.assert_array_equal(masks["one"][:, :, [0, 3]], mask[:, :, [0, 3]])
    assert not masks["one"][:, :, 1:3].any()
    assert not masks["two"].any()


@pytest.mark.parametrize("flip_i", [False, True])
@pytest.mark.parametrize("flip_j", [False, True])
@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (0, 2), (2, 1), (1, 2), (2, 0)])
def test_flipped_and_permuted_frames_find_their_voxels(
    axes: tuple[int, int], flip_i: bool, flip_j: bool, tmp_path: Path
) -> None:
    mask, (u, v) = random_mask(), axes
    normal = 3 - u - v
    frames = []
    for layer in range(SHAPE[normal]):
        plane = np.take(mask, layer, axis=normal)
        plane = plane.T if u < v else plane  # (v, u) = (rows, columns)
        start = np.zeros(3)
        start[normal], start[u], start[v] = layer, (SHAPE[u] - 1) * flip_i, (SHAPE[v] - 1) * flip_j
        plane = plane[:: -1 if flip_j else 1, :: -1 if flip_i else 1]
        frames.append((1, position_of(*start), plane))
    cosines = np.concatenate([np.eye(3)[u] * (-1 if flip_i else 1), np.eye(3)[v] * (-1 if flip_j else 1)])
    path = make_seg(tmp_path / "a.dcm", frames, cosines=cosines, spacing=(SPACING[v], SPACING[u]))
    np.testing.assert_array_equal(read(path)["one"], mask)


def test_an_oblique_image_gets_its_segmentation_by_the_same_angles(tmp_path: Path) -> None:
    row, column = np.array([0.96, 0.28, 0.0]), np.array([-0.224, 0.768, 0.6])
    axes = np.column_stack([row * SPACING[0], column * SPACING[1], np.cross(row, column) * SPACING[2]])
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = axes, ORIGIN
    mask = random_mask()
    frames = [(1, np.array(ORIGIN) + axes[:, 2] * k, mask[:, :, k].T) for k in range(SHAPE[2])]
    path = make_seg(tmp_path / "a.dcm", frames, cosines=[*row, *column])
    np.testing.assert_array_equal(read(path, Grid(SHAPE, LPS_TO_RAS @ lps))["one"], mask)


def test_a_cropped_segmentation_is_placed_in_the_whole_image(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, bool)
    mask[2:6, 1:4, 1:3] = random_mask((4, 3, 2))
    frames = [(1, position_of(2, 1, k), mask[2:6, 1:4, k].T) for k in (1, 2)]
    np.testing.assert_array_equal(read(make_seg(tmp_path / "a.dcm", frames))["one"], mask)


def test_a_segmentation_may_reach_out_of_the_image_with_nothing_set(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, bool)
    mask[3:5, 2:4, 1:3] = True
    path = make_seg(tmp_path / "a.dcm", slices_of(mask))
    cut = cropped_grid(make_grid(), (2, 1, 1), (4, 3, 2))
    np.testing.assert_array_equal(read(path, cut)["one"], mask[2:6, 1:4, 1:3])


@pytest.mark.parametrize(("start", "far"), [((0, 0, 2), "2 voxels"), ((3, 0, 0), "3 voxels"), ((0, 1, 0), "1 voxel")])
def test_set_voxels_outside_of_the_image_are_refused(start: Any, far: str, tmp_path: Path) -> None:
    path = make_seg(tmp_path / "a.dcm", slices_of(np.ones(SHAPE, bool)))
    cut = cropped_grid(make_grid(), start, tuple(n - s for n, s in zip(SHAPE, start, strict=True)))
    with pytest.raises(InputError, match=f"reaches out of the image by {far}"):
        read(path, cut)


def test_a_lattice_off_by_less_than_a_tenth_of_a_voxel_is_the_same(tmp_path: Path) -> None:
    mask = random_mask()
    frames = [(1, position_of(0.09, -0.09, k + 0.09), mask[:, :, k].T) for k in range(SHAPE[2])]
    np.testing.assert_array_equal(read(make_seg(tmp_path / "a.dcm", frames))["one"], mask)


@pytest.mark.parametrize(
    ("offset", "spacing", "far"),
    [
        ((0.5, 0, 0), (1.3, 0.7), r"off by up to 0\.5 voxels \(0\.35 mm\)"),
        ((0, 0, 0.2), (1.3, 0.7), r"off by up to 0\.2 voxels \(0\.5 mm\)"),
        ((0, 0, 0), (1.3, 0.75), r"off by up to 0\.429 voxels"),
        ((0, 0, 0), (0.7, 1.3), r"off by up to 5\.14 voxels"),
    ],
)
def test_another_lattice_is_refused_and_the_message_says_how_far(
    offset: Any, spacing: Any, far: str, tmp_path: Path
) -> None:
    mask = np.zeros(SHAPE, bool)
    frames = [(1, position_of(offset[0], offset[1], offset[2] + k), mask[:, :, k].T) for k in range(SHAPE[2])]
    with pytest.raises(InputError, match=far):
        read(make_seg(tmp_path / "a.dcm", frames, spacing=spacing))


def test_thicker_slices_than_the_images_are_refused(tmp_path: Path) -> None:
    def declare(dataset: Dataset) -> None:
        dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = 2 * SPACING[2]

    frames = [(1, position_of(k=2 * k), random_mask()[:, :, k].T) for k in range(4)]
    with pytest.raises(InputError, match=r"slices are 5 mm apart, the image's 2\.5 mm"):
        read(make_seg(tmp_path / "a.dcm", frames, edit=declare), make_grid((7, 5, 8)))
    # Without the declaration these are gaps of a sparse segment.
    assert read(make_seg(tmp_path / "b.dcm", frames), make_grid((7, 5, 8)))["one"][:, :, ::2].any()


def test_two_frames_of_a_segment_at_one_place_are_refused(tmp_path: Path) -> None:
    frames = slices_of(random_mask())
    with pytest.raises(InputError, match="two frames of segment 1 at one place"):
        read(make_seg(tmp_path / "a.dcm", [*frames, frames[2]]))
    with pytest.raises(InputError, match="two frames at one place"):
        read(make_seg(tmp_path / "b.dcm", [*frames, frames[2]], kind="LABELMAP"))


def test_segments_come_one_at_a_time_and_unwanted_ones_are_not_decoded(tmp_path: Path) -> None:
    good = slices_of(random_mask())
    far = [(2, position_of(0.5, 0, k), frame) for k, (_, _, frame) in enumerate(good)]
    path = make_seg(tmp_path / "a.dcm", [*good, *far])
    assert list(read(path, wanted=lambda name: name == "one")) == ["one"]
    with pytest.raises(InputError, match="off by"):
        read(path)


# ---- kinds


@pytest.mark.parametrize("threshold", [0.25, 0.5, 1.0])
def test_a_fraction_at_the_threshold_is_inside(threshold: float, tmp_path: Path) -> None:
    fractions = np.random.default_rng(0).choice([0, 49, 50, 99, 100, 101, 200], SHAPE)
    path = make_seg(tmp_path / "a.dcm", slices_of(fractions), kind="FRACTIONAL")
    np.testing.assert_array_equal(read(path, threshold=threshold)["one"], fractions >= threshold * 200)


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1.0])
def test_a_threshold_that_says_nothing_is_refused(threshold: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threshold"):
        read(make_seg(tmp_path / "a.dcm", slices_of(random_mask())), threshold=threshold)


def test_a_label_map_holds_its_segments_and_no_background(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).choice([0, 1, 2], SHAPE)
    masks = read(make_seg(tmp_path / "a.dcm", slices_of(labels)[:3], kind="LABELMAP"))
    labels[:, :, 3] = 0
    assert list(masks) == ["one", "two"]
    np.testing.assert_array_equal(masks["one"], labels == 1)
    np.testing.assert_array_equal(masks["two"], labels == 2)


def test_the_padding_value_of_a_label_map_is_its_background(tmp_path: Path) -> None:
    def pad(dataset: Dataset) -> None:
        dataset.PixelPaddingValue = 2

    labels = np.random.default_rng(0).choice([1, 2], SHAPE)
    path = make_seg(tmp_path / "a.dcm", slices_of(labels)[:3], kind="LABELMAP", edit=pad)
    masks = read(path)
    assert list(masks) == ["one"]
    np.testing.assert_array_equal(masks["one"][:, :, :3], labels[:, :, :3] == 1)
    assert not masks["one"][:, :, 3].any()
    assert read_header(path).structure_names == ("one",)


def test_compressed_frames_are_decoded(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).choice([0, 1, 2], SHAPE)
    path = make_seg(tmp_path / "a.dcm", slices_of(labels), kind="LABELMAP")
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless, encoding_plugin="pydicom")
    dataset.save_as(tmp_path / "b.dcm")
    np.testing.assert_array_equal(read(tmp_path / "b.dcm")["two"], labels == 2)


def test_the_header_is_told_without_the_pixels(tmp_path: Path) -> None:
    def refer(dataset: Dataset) -> None:
        dataset.ReferencedSeriesSequence = [item(SeriesInstanceUID="1.2.9")]
        del dataset.PixelData

    path = make_seg(tmp_path / "a.dcm", slices_of(random_mask()), edit=refer)
    header = read_header(path)
    assert header.frame_of_reference == "1.2.3"
    assert (header.structure_names, header.referenced_series) == (("one", "two"), ("1.2.9",))


# ---- damage


def deleted(*keywords: str) -> Callable[[Dataset], None]:
    def edit(dataset: Dataset) -> None:
        for keyword in keywords[:-1]:
            dataset = dataset[keyword].value[0]
        del dataset[keywords[-1]]

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (deleted("SegmentSequence"), "has no SegmentSequence"),
        (deleted("SegmentationType"), "has no SegmentationType"),
        (deleted("NumberOfFrames"), "has no NumberOfFrames"),
        (deleted("SharedFunctionalGroupsSequence"), "has no SharedFunctionalGroupsSequence"),
        (deleted("PerFrameFunctionalGroupsSequence"), "has no PerFrameFunctionalGroupsSequence"),
        (deleted("SharedFunctionalGroupsSequence", "PixelMeasuresSequence"), "has no PixelMeasuresSequence"),
        (deleted("SharedFunctionalGroupsSequence", "PlaneOrientationSequence"), "has no PlaneOrientationSequence"),
        (deleted("PerFrameFunctionalGroupsSequence", "PlanePositionSequence"), "has no PlanePositionSequence"),
        (deleted("PerFrameFunctionalGroupsSequence", "SegmentIdentificationSequence"), "has no SegmentIdent"),
        (deleted("SegmentSequence", "SegmentNumber"), "has no SegmentNumber"),
        (deleted("Rows"), "has no Rows"),
        (deleted("PixelData"), "is damaged"),
        (deleted("BitsAllocated"), "is damaged"),
        (lambda dataset: setattr(dataset, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"), "not a DICOM segmentation"),
        (lambda dataset: setattr(dataset, "NumberOfFrames", 3), "another number of frames"),
        (lambda dataset: setattr(dataset, "Rows", 4000), "is truncated"),
        (lambda dataset: setattr(dataset, "SegmentationType", "OTHER"), "SegmentationType"),
        (lambda dataset: dataset.SegmentSequence.pop(0), "segment 1, which it does not describe"),
        (lambda dataset: setattr(dataset.SegmentSequence[0], "SegmentNumber", 2), "two segments with one number"),
    ],
)
def test_what_is_missing_or_wrong_is_said_in_one_line(edit: Any, words: str, tmp_path: Path) -> None:
    path = make_seg(tmp_path / "a.dcm", slices_of(random_mask()), edit=edit)
    with pytest.raises(InputError, match=words) as caught:
        read(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert PATIENT not in str(caught.value)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_a_truncated_file_is_an_input_error_wherever_it_ends(kind: str, tmp_path: Path) -> None:
    whole = make_seg(tmp_path / "whole.dcm", slices_of(random_mask()), kind=kind).read_bytes()
    path = tmp_path / "a.dcm"
    ends = [*range(0, len(whole) - 40, 37), *range(len(whole) - 40, len(whole) - 2)]
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(InputError):
            read(path)


def test_changed_bytes_never_end_in_another_exception(tmp_path: Path) -> None:
    whole = make_seg(tmp_path / "whole.dcm", slices_of(random_mask())).read_bytes()
    rng = np.random.default_rng(3)
    said = []
    for _ in range(300):
        broken = bytearray(whole)
        for place in rng.integers(132, len(whole), 3):
            broken[place] = rng.integers(256)
        (tmp_path / "a.dcm").write_bytes(broken)
        try:
            read(tmp_path / "a.dcm")
        except InputError as error:
            said.append(str(error))
    assert len(said) > 50
    assert not [line for line in said if PATIENT in line or "\n" in line]


def test_files_that_are_no_segmentation_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_text("no DICOM at all")
    for path in (tmp_path / "a.dcm", tmp_path / "gone.dcm", tmp_path):
        with pytest.raises(InputError):
            read(path)


# ---- real files


def read_nrrd(path: Path) -> tuple[np.ndarray, Grid]:
    nrrd = pytest.importorskip("nrrd")
    array, header = nrrd.read(path)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.array(header["space directions"]).T, header["space origin"]
    assert header["space"] == "left-posterior-superior"
    return array, Grid(array.shape, LPS_TO_RAS @ affine)


def image_grid(paths: list[Path]) -> Grid:
    """Of axial classic files with identity orientation."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    headers.sort(key=lambda header: float(header.ImagePositionPatient[2]))
    places = np.array([header.ImagePositionPatient for header in headers], float)
    lps = np.diag([*map(float, headers[0].PixelSpacing[::-1]), places[1, 2] - places[0, 2], 1.0])
    lps[:3, 3] = places[0]
    return Grid((headers[0].Columns, headers[0].Rows, len(headers)), LPS_TO_RAS @ lps)


@pytest.mark.parametrize(
    ("seg", "nrrd", "image", "voxels"),
    [
        ("liver.dcm", "liver_seg.nrrd", "ct-3slice", {"Liver": 107098}),
        ("23x38x3/seg/label.seg", "23x38x3/nrrd/label.nrrd", "23x38x3/image", {"Liver": 322}),
        ("24x38x3/seg/label.seg", "24x38x3/nrrd/label.nrrd", "24x38x3/image", {"Liver": 315}),
        ("sparse-labelmap-ppv5.dcm", "sparse_labelmap_ppv5_seg.nrrd", "24x38x3/image", {"Liver": 630}),
        ("sparse-labelmap-noppv.dcm", "sparse_labelmap_noppv_seg.nrrd", "24x38x3/image", {"Liver": 630}),
    ],
)
def test_real_segmentations_equal_their_nrrd_voxel_by_voxel(
    seg: str, nrrd: str, image: str, voxels: dict[str, int], shared_data: Path
) -> None:
    folder = shared_data / "dicom" / "seg_dcmqi"
    expected, grid = read_nrrd(folder / nrrd)
    of_image = image_grid(sorted((folder / image).glob("*.dcm")))
    assert of_image.shape == grid.shape
    assert of_image.distance_mm(grid) <= 1e-3
    masks = read(folder / seg, grid)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == voxels
    np.testing.assert_array_equal(masks["Liver"], expected == 1)
    assert read_header(folder / seg).structure_names == ("Liver",)


def test_overlapping_segments_stay_whole(shared_data: Path) -> None:
    folder = shared_data / "dicom" / "seg_dcmqi"
    files = [read_nrrd(folder / f"partial_overlaps-{number}.nrrd") for number in (1, 2, 3)]
    masks = list(iter_segments(folder / "partial_overlaps.dcm", files[0][1], wanted=lambda name: True))
    assert [int(s.mask.sum()) for s in masks] == [9602, 11888, 10743, 6693, 4713]
    for structure in masks:
        hits = [np.array_equal(structure.mask, array == structure.number) for array, _ in files]
        assert hits.count(True) == 1
    assert np.sum([s.mask for s in masks], axis=0).max() > 1


def highdicom_grid(path: Path) -> Grid:
    """The lattice that highdicom makes of a file's frames, with k as it counts them."""
    import highdicom

    geometry = highdicom.seg.segread(path).get_volume_geometry()
    # Its axes are (slice, row, column).
    affine = geometry.affine[:, [2, 1, 0, 3]]
    slices, rows, columns = geometry.spatial_shape
    return Grid((columns, rows, slices), LPS_TO_RAS @ affine)


@pytest.mark.parametrize(
    "name",
    [
        "seg_image_ct_binary.dcm",
        "seg_image_ct_binary_overlap.dcm",
        "seg_image_ct_binary_fractional.dcm",
        "seg_image_ct_true_fractional.dcm",
        "seg_image_ct_binary_single_frame.dcm",
    ],
)
def test_real_segmentations_equal_what_highdicom_makes_of_them(name: str, shared_data: Path) -> None:
    import highdicom

    path = shared_data / "dicom" / "seg_highdicom" / name
    grid = highdicom_grid(path)
    volume = highdicom.seg.segread(path).get_volume(combine_segments=False, rescale_fractional=True)
    expected = np.moveaxis(volume.array, -1, 0) >= 0.5
    for structure in iter_segments(path, grid, wanted=lambda name: True):
        np.testing.assert_array_equal(structure.mask, expected[structure.number - 1].T)
        assert structure.mask.any()


def test_overlapping_segments_of_a_sparse_file_overlap(shared_data: Path) -> None:
    path = shared_data / "dicom" / "seg_highdicom" / "seg_image_ct_binary_overlap.dcm"
    first, second = iter_segments(path, highdicom_grid(path), wanted=lambda name: True)
    assert (int(first.mask.sum()), int(second.mask.sum())) == (64, 16)
    assert (first.mask & second.mask).any()
