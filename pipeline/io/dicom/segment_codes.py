"""Coded terms for classes, from their names: SNOMED CT as pydicom ships it, or an honest private code.

A name matches a term when both hold the same words, in any order ("lung_upper_lobe_left" is "Upper lobe of lung" and
left). Nothing is matched by likeness: a wrong code is worse than none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from pipeline.plan import Code, SegmentCode

PRIVATE_SCHEME = "99VOXFIT"
LONGEST_VALUE, LONGEST_MEANING = 16, 64

_Words = frozenset[str]

# Context groups of segmented property types, with the category of CID 7150 that each belongs to.
_GROUPS = (
    (7192, "AnatomicalStructure"),
    (7191, "Tissue"),
    (7194, "MorphologicallyAbnormalStructure"),
    (7197, "BodySubstance"),
)
# Words that say which one of a kind; pydicom's keywords.
_MODIFIERS = {"left": "Left", "right": "Right", "anterior": "Anterior", "posterior": "Posterior"}
_FILLERS = {"of", "the", "and", "structure"}
# Spellings of one word.
_SPELLINGS = {
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "metastasis": "secondary neoplasm",
    "metastases": "secondary neoplasm",
    "oedema": "edema",
    "oesophagus": "esophagus",
    "haemorrhage": "hemorrhage",
    "grey": "gray",
    "clavicula": "clavicle",
    "vertebrae": "vertebra",
    "kidneys": "kidney",
    "lungs": "lung",
    "brainstem": "brain stem",
}
# Names in use that hold other words than the term does: pydicom's keywords of SCT.
_ALIASES = {
    "urinary bladder": "Bladder",
    "thyroid gland": "Thyroid",
    "pituitary gland": "Pituitary",
    "small bowel": "SmallIntestine",
    "lung middle lobe right": "MiddleLobeOfRightLung",
    "brachiocephalic trunk": "BrachiocephalicTrunk",
    "brachiocephalic vein": "BrachiocephalicVein",
    "portal vein": "PortalVein",
    "pulmonary vein": "PulmonaryVein",
    "iliac vena": "IliacVein",
    "atrial appendage left": "LeftAuricularAppendage",
    "atrial appendage right": "RightAuricularAppendage",
    "heart atrium left": "LeftAtrium",
    "heart atrium right": "RightAtrium",
    "heart ventricle left": "LeftVentricle",
    "heart ventricle right": "RightVentricle",
    "pallidum": "GlobusPallidus",
    "csf": "CerebrospinalFluid",
    "optic nerve": "OpticNerve",
    "costal cartilage": "CostalCartilage",
    "airway": "AirwayStructure",
}
_VOLUMES = {"gtv": "GrossTumorVolume", "gross neoplasm volume": "GrossTumorVolume"}
# Terms of the groups whose words alone may mean another thing: a ventricle of the heart or of the brain.
_AMBIGUOUS = {
    *("ventricle", "head", "neck", "body", "trunk", "face", "media", "normal", "background", "organ", "tissue"),
    *("joint", "nucleus", "apex", "base", "tail", "lumen", "cortex", "back", "arm", "leg", "atrium", "pelvis", "hip"),
    *("baffle", "carina", "hiatus", "orbital", "stripe", "phantom", "gas", "intima", "adventitia", "flank"),
}
_LEVEL = re.compile(r"[ctl]\d{1,2}")


def suggest_segment_codes(class_names: Iterable[str]) -> dict[str, SegmentCode]:
    """Codes for classes by their names.

    A name that is surely one of SNOMED's terms gets it, with left, right, anterior or posterior as the modifier unless
    the term itself says so. Numbers of ribs have no terms there: such classes share the one for a rib, and their names
    tell them apart. Every other name gets a private code whose meaning is the name.

    Args:
        class_names: Without the background.
    """
    return {name: _known_code(name) or private_code(name) for name in class_names}


def private_code(name: str) -> SegmentCode:
    """A code of our own for a name that no term is known for; it tells that it is private, and nothing else."""
    plain = re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")
    if len(plain) > LONGEST_VALUE or plain.lower() != name.lower():
        # Two names must not meet in one value.
        digest = hashlib.sha256(name.encode()).hexdigest()[:6].upper()
        plain = f"{plain[: LONGEST_VALUE - len(digest) - 1].rstrip('_')}_{digest}".lstrip("_")
    kind = Code(value=plain, scheme=PRIVATE_SCHEME, meaning=clean_text(name))
    # The one category that is true of any region, whatever it shows.
    return SegmentCode(category=_category("SpatialAndRelationalConcept"), type=kind)


def clean_text(name: str) -> str:
    """`name` as a text that DICOM can hold: at most 64 characters, none of them for control, no backslash."""
    printable = "".join(c if c.isprintable() and c != "\\" else " " for c in name)
    return " ".join(printable.split())[:LONGEST_MEANING].strip() or "unnamed"


def _known_code(name: str) -> SegmentCode | None:
    words = _words(name)
    if (whole := _term(words)) is not None:
        return whole
    modifiers = [word for word in words if word in _MODIFIERS]
    rest = [word for word in words if word not in _MODIFIERS]
    kind = _term(rest) or _lesion(rest)
    if kind is None or len(modifiers) > 1:
        return None
    modifier = _concept(_MODIFIERS[modifiers[0]]) if modifiers else None
    return SegmentCode(category=kind.category, type=kind.type, modifier=modifier)


def _words(name: str) -> list[str]:
    """Lower-case words; camel case, underscores, dashes and dots part them; spellings are made one."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W_]+", parted.lower())
    return " ".join(_SPELLINGS.get(word, word) for word in words).split()


def _term(words: list[str]) -> SegmentCode | None:
    """The term that holds just these words, the last of them perhaps in the plural here."""
    for each in (words, _singular(words)) if words else ():
        found = _index().get(frozenset(each)) or _numbered(each)
        if found is not None and len(set(each)) == len(each):
            return found
    return None


def _singular(words: list[str]) -> list[str]:
    return [*words[:-1], _SPELLINGS.get(words[-1][:-1], words[-1][:-1])] if words and words[-1].endswith("s") else words


def _numbered(words: list[str]) -> SegmentCode | None:
    """A vertebra by its level, or a rib by its number."""
    if len(words) != 2:
        return None
    kind, which = words
    if kind == "vertebra" and _LEVEL.fullmatch(which):
        return _structure(f"{which.upper()}Vertebra")
    return _structure("Rib") if kind == "rib" and which.isdigit() and 1 <= int(which) <= 12 else None


def _lesion(words: list[str]) -> SegmentCode | None:
    """An abnormal structure of a known place ("liver tumor"): the kind is sure; the place stays in the name."""
    kind, place = _term(words[-1:]), _term(words[:-1])
    is_abnormal = kind is not None and kind.category == _category("MorphologicallyAbnormalStructure")
    return kind if is_abnormal and place is not None else None


@cache
def _index() -> dict[_Words, SegmentCode]:
    """Terms by their words; what two terms share is nobody's."""
    index: dict[_Words, SegmentCode] = {}
    shared: set[_Words] = set()
    for group, category in _GROUPS:
        for code in _concepts(group):
            words = frozenset(_words(code.meaning)) - _FILLERS
            if words in index and index[words].type.value != code.value:
                shared |= {words} if index[words].category == _category(category) else set()
            index.setdefault(words, SegmentCode(category=_category(category), type=code))
    for word in _AMBIGUOUS:
        index.pop(frozenset([word]), None)
    for words in shared:
        index.pop(words, None)
    for name, keyword in _ALIASES.items():
        if (found := _structure(keyword)) is not None:
            index[frozenset(_words(name))] = found
    for name, keyword in _VOLUMES.items():
        if (volume := _concept(keyword)) is not None:
            concept = _category("SpatialAndRelationalConcept")
            index[frozenset(_words(name))] = SegmentCode(category=concept, type=volume)
    return index


def _structure(keyword: str) -> SegmentCode | None:
    """The term of a keyword with the category of its group, an anatomical structure where it is in none."""
    code = _concept(keyword)
    if code is None:
        return None
    categories = (category for group, category in _GROUPS if code.value in _values(group))
    return SegmentCode(category=_category(next(categories, "AnatomicalStructure")), type=code)


@cache
def _values(group: int) -> frozenset[str]:
    return frozenset(code.value for code in _concepts(group))


def _category(keyword: str) -> Code:
    code = _concept(keyword)
    assert code is not None, keyword
    return code


@cache
def _concepts(group: int) -> tuple[Code, ...]:
    from pydicom.sr.codedict import codes

    members = getattr(codes, f"CID{group}")
    found = []
    for keyword in members.dir():
        # A keyword that stands for several codes is no sure match.
        with suppress(AttributeError, RuntimeError):
            found.append(_code(getattr(members, keyword)))
    return tuple(code for code in found if not code.problems())


@cache
def _concept(keyword: str) -> Code | None:
    from pydicom.sr.codedict import codes

    try:
        return _code(getattr(codes.SCT, keyword))
    except (AttributeError, RuntimeError):
        return None


def _code(concept: Any) -> Code:
    return Code(value=concept.value, scheme=concept.scheme_designator, meaning=concept.meaning)
