"""What tells a patient is hidden however it is spelled, and innocent words are not."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from pydicom.dataset import Dataset

from pipeline.io.dicom.privacy import hide, identity_of, pattern_without


@pytest.fixture(scope="module")
def identity() -> frozenset[str]:
    header = Dataset()
    header.PatientName = "Müller-Grün^José Li^^Dr"
    header.OtherPatientNames = ["Doe^Jane", "Roe^J"]
    header.PatientID, header.OtherPatientIDs = "PID-4711", ["AB12345", "X-99"]
    header.PatientBirthDate, header.AccessionNumber = "19560312", "ACC 77/0815"
    header.InstitutionName, header.ReferringPhysicianName = "Klinikum für die Ruhe", "Salbader^Ottokar"
    return identity_of(header)


@pytest.mark.parametrize(
    "text",
    [
        "Müller-Grün^José Li",
        "JOSE MULLER",
        "Mueller",
        "gruen",
        "Mu\u0308ller",
        "josemuller",
        "Li",
        "Jane_Doe",
        "JaneDoe",
        "PID4711",
        "pid_4711",
        "4711",
        "ab-12345",
        "X99",
        "19560312",
        "1956-03-12",
        "12.03.1956",
        "03/12/1956",
        "acc-77-0815",
        "Klinikum",
        "OTTOKAR",
    ],
)
def test_each_spelling_is_hidden_with_its_accents(identity: frozenset[str], text: str) -> None:
    for line in (text, f"T1 {text} post", f"a/{text}_0001.dcm"):
        assert hide(line, identity) == line.replace(text, hide(text, identity))
        assert not any(letter.isalnum() for letter in hide(text, identity)), hide(text, identity)


@pytest.mark.parametrize("text", ["Lingula", "T1 TSE Dr", "für die", "janes", "roentgen", "14711", "series 99", ""])
def test_words_that_only_hold_parts_of_a_short_name_are_not(identity: frozenset[str], text: str) -> None:
    assert hide(text, identity) == text


def test_what_does_not_lie_in_one_name_of_a_folder_is_not_taken_for_one(identity: frozenset[str]) -> None:
    assert hide("pid/4711", frozenset({"PID-4711"})) == "pid/4711"


def test_nothing_is_hidden_where_nothing_is_known() -> None:
    assert hide("Müller", frozenset()) == "Müller"
    assert identity_of(Dataset()) == frozenset()


def test_a_pattern_fits_the_name_and_tells_only_its_length(identity: frozenset[str]) -> None:
    pattern = pattern_without("GTV [Müller] *", identity)
    assert pattern == "GTV [[]??????] [*]"
    assert fnmatchcase("GTV [Müller] *", pattern)
    assert not fnmatchcase("GTV [Müllers] *", pattern)
    assert not fnmatchcase("GTV [Müller] x", pattern)
