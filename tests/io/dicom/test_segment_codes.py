"""Coded terms for class names: sure matches, honest private codes, and never a wrong guess."""

from __future__ import annotations

import re

import pytest

from pipeline.io.dicom.segment_codes import PRIVATE_SCHEME, clean_text, private_code, suggest_segment_codes
from pipeline.plan import SegmentCode

ANATOMY, TISSUE, ABNORMAL = "91723000", "85756007", "49755003"
LEFT, RIGHT, ANTERIOR = "7771000", "24028007", "255549009"
# Names as a large whole-body dataset uses them; the last ones have no term in the shipped dictionary.
WHOLE_BODY = """
spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_left lung_upper_lobe_left
lung_middle_lobe_right esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate
sacrum vertebrae_L5 vertebrae_T12 vertebrae_C1 heart aorta inferior_vena_cava iliac_artery_left humerus_right
scapula_left clavicula_left femur_right spinal_cord brain rib_left_4 rib_right_12 sternum costal_cartilages
hip_left gluteus_maximus_left autochthon_right iliopsoas_left portal_vein_and_splenic_vein
"""
NAMES = tuple(re.findall(r"\S+", WHOLE_BODY))
UNKNOWN = ("hip_left", "gluteus_maximus_left", "autochthon_right", "iliopsoas_left", "portal_vein_and_splenic_vein")


def suggest(name: str) -> SegmentCode:
    return suggest_segment_codes([name])[name]


@pytest.mark.parametrize(
    ("name", "category", "value", "modifier"),
    [
        ("liver", ANATOMY, "10200004", None),
        ("LIVER", ANATOMY, "10200004", None),
        ("kidney_left", ANATOMY, "64033007", LEFT),
        ("left kidney", ANATOMY, "64033007", LEFT),
        ("Left_Kidney", ANATOMY, "64033007", LEFT),
        ("KidneyRight", ANATOMY, "64033007", RIGHT),
        ("right-kidney", ANATOMY, "64033007", RIGHT),
        ("kidneys", ANATOMY, "64033007", None),
        ("lung_upper_lobe_left", ANATOMY, "45653009", LEFT),
        # The term itself says which one it is.
        ("lung_middle_lobe_right", ANATOMY, "72481006", None),
        ("heart_atrium_left", ANATOMY, "82471001", None),
        ("left ventricle", ANATOMY, "87878005", None),
        ("vertebrae_L5", ANATOMY, "49668003", None),
        ("vertebra C1", ANATOMY, "14806007", None),
        ("rib_left_4", ANATOMY, "113197003", LEFT),
        ("hippocampus", ANATOMY, "5366008", None),
        ("hippocampus_anterior", ANATOMY, "5366008", ANTERIOR),
        ("oesophagus", ANATOMY, "32849002", None),
        ("bone", TISSUE, "3138006", None),
        ("muscle", TISSUE, "91727004", None),
        ("tumour", ABNORMAL, "108369006", None),
        ("tumor", ABNORMAL, "108369006", None),
        ("lesions", ABNORMAL, "52988006", None),
        ("oedema", ABNORMAL, "79654002", None),
        ("liver_tumor", ABNORMAL, "108369006", None),
        ("kidney_cyst_left", ABNORMAL, "367643001", LEFT),
        ("GTV", "309825002", "228791009", None),
    ],
)
def test_known_names_get_their_term(name: str, category: str, value: str, modifier: str | None) -> None:
    code = suggest(name)
    assert (code.category.value, code.type.value, code.type.scheme) == (category, value, "SCT")
    assert (code.modifier.value if code.modifier else None) == modifier


@pytest.mark.parametrize(
    "name",
    [
        "Anterior",  # of what?
        "ventricle",  # of the heart or of the brain
        "hip",  # the bone or the region
        "caudate",  # the nucleus or the lobe of the liver
        "head",  # of the body, the pancreas or the femur
        "L5",
        "vertebrae_L9",
        "rib_left_13",
        "rib_4_5",
        "left_right_kidney",
        "liver_liver",
        "enhancing_tumor",
        "peritumoral edema",
        "GTV_primary",
        "kidneystone",
        "class_1",
        "1",
    ],
)
def test_a_name_without_a_sure_match_gets_a_private_code_that_says_the_name(name: str) -> None:
    code = suggest(name)
    assert (code.type.scheme, code.type.meaning) == (PRIVATE_SCHEME, name)
    assert code.modifier is None
    # The category says no more than is known: a region in space.
    assert code.category.value == "309825002"
    assert code.problems() == []


def test_most_names_of_a_whole_body_dataset_are_matched() -> None:
    codes = suggest_segment_codes(NAMES)
    assert tuple(codes) == NAMES
    unknown = [name for name, code in codes.items() if code.type.scheme == PRIVATE_SCHEME]
    assert tuple(unknown) == UNKNOWN
    assert len(NAMES) - len(unknown) == 36
    assert not [code for code in codes.values() if code.problems()]


def test_private_values_tell_names_apart_and_fit_their_field() -> None:
    names = ["foo", "foo bar", "foo_bar", "foo-bar", "a" * 40, "a" * 41, "肝臓", "脾臓", "_", "back\\slash", "x\ny"]
    codes = [private_code(name) for name in names]
    assert len({code.type.value for code in codes}) == len(names)
    assert not [code.problems() for code in codes if code.problems()]
    assert private_code("foo").type.value == "FOO"
    assert private_code("foo bar") == private_code("foo bar")


@pytest.mark.parametrize(
    ("name", "text"), [("a\\b", "a b"), (" x \n y ", "x y"), ("z" * 70, "z" * 64), ("\\", "unnamed"), ("é", "é")]
)
def test_text_is_cut_to_what_dicom_can_hold(name: str, text: str) -> None:
    assert clean_text(name) == text
