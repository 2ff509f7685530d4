"""What tells who a patient is, and how to keep it out of every line that is shown or written."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from pipeline.io.dicom.elements import text

# Parts of names and numbers below this length are found in too many innocent words.
SHORTEST_HIDDEN = 3
HIDDEN = "***"
IDENTITY_KEYWORDS = (
    "PatientName",
    "PatientID",
    "OtherPatientNames",
    "OtherPatientIDs",
    "PatientBirthDate",
    "AccessionNumber",
    "InstitutionName",
    "InstitutionAddress",
    "ReferringPhysicianName",
)
_NAME_SEPARATORS = re.compile(r"[\^=\\\s,;_]+")


def identity_of(dataset: Any) -> frozenset[str]:
    """The texts in a header that tell who the patient is, whole and in parts; to be hidden, never to be shown."""
    found: set[str] = set()
    for keyword in IDENTITY_KEYWORDS:
        value = text(dataset, keyword)
        parts = [value, *_NAME_SEPARATORS.split(value)] if "Name" in keyword else [value]
        found.update(part for part in parts if len(part) >= SHORTEST_HIDDEN)
    return frozenset(found)


def hide(line: str, identity: Iterable[str]) -> str:
    """`line` with every text of `identity` replaced, in whatever case it stands."""
    for secret in sorted(identity, key=len, reverse=True):
        line = re.sub(re.escape(secret), HIDDEN, line, flags=re.IGNORECASE)
    return line


def pseudonym(uid: str, length: int = 8) -> str:
    """A short name for a UID that is always the same and leads back to nobody without the data themselves.

    UIDs are long and carry no name, so that the hash cannot be found by trying, as that of a patient's number can.
    """
    return hashlib.sha256(uid.encode()).hexdigest()[:length]
