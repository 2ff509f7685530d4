"""What tells who a patient is, and how to keep it out of every line that is shown or written.

A text is found in whatever case, with or without accents and separators, and a date in the usual orders. Parts of names
are found as well, short ones only as words of their own: "Ling" must not spoil "lingula".
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from glob import escape
from itertools import permutations
from typing import Any

from pipeline.io.dicom.elements import value_of

# Initials are found in too many innocent words.
SHORTEST_HIDDEN = 2
# Below this length a text is looked for between letters, or digits, of other kinds only.
SHORTEST_WITHIN_WORDS = 5
HIDDEN = "***"
PERSON_KEYWORDS = (
    "PatientName",
    "OtherPatientNames",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "RequestingPhysician",
    "OperatorsName",
)
NUMBER_KEYWORDS = ("PatientID", "OtherPatientIDs", "AccessionNumber")
IDENTITY_KEYWORDS = (
    *PERSON_KEYWORDS,
    *NUMBER_KEYWORDS,
    "PatientBirthDate",
    "InstitutionName",
    "InstitutionAddress",
)
# Family, given and middle name; titles ("MR" among them) tell nobody.
NUM_NAME_COMPONENTS = 3
# Of a number in parts, those of this length: people leave out prefixes.
SHORTEST_NUMBER = 4
# Of an institution's name, words of this length: "for" and "the" tell nothing.
SHORTEST_INSTITUTION_WORD = 5
_SEPARATORS = re.compile(r"[\W_]+")
# Not from one folder to the next; but dates have slashes.
_BETWEEN_WORDS = r"(?:[^\w/\\]|_|(?<=\d)/(?=\d))*"
_LETTERS_OR_DIGITS = re.compile(r"[^\W\d_]+|\d+")
_DATE = re.compile(r"(\d{4})(\d{2})(\d{2})")
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "æ": "ae", "œ": "oe", "ł": "l"})


def identity_of(dataset: Any) -> frozenset[str]:
    """The texts in a header that tell who the patient is, whole and in parts; to be hidden, never to be shown."""
    found: set[str] = set()
    for keyword in IDENTITY_KEYWORDS:
        for value in _values(dataset, keyword):
            found.add(value)
            if keyword in PERSON_KEYWORDS:
                found.update(_parts_of_name(value))
            elif keyword == "InstitutionName":
                found.update(part for part in _SEPARATORS.split(value) if len(part) >= SHORTEST_INSTITUTION_WORD)
            elif keyword in NUMBER_KEYWORDS:
                found.update(part for part in _SEPARATORS.split(value) if _is_number(part))
            elif keyword == "PatientBirthDate" and (date := _DATE.fullmatch(value)):
                year, month, day = date.groups()
                found.update((f"{year}-{month}-{day}", f"{day}.{month}.{year}", f"{month}/{day}/{year}"))
    return frozenset(value for value in found if len(value) >= SHORTEST_HIDDEN)


def _is_number(part: str) -> bool:
    return len(part) >= SHORTEST_NUMBER and any(letter.isdigit() for letter in part)


def _values(dataset: Any, keyword: str) -> Iterator[str]:
    """All values as text; what pydicom makes of several is a list, and a person's name is one value."""
    value = value_of(dataset, keyword)
    for one in value if isinstance(value, list) or hasattr(value, "insert") else [value]:
        text = "" if one is None else str(one).strip(" \0\r\n\t")
        if text:
            yield text


def _parts_of_name(name: str) -> Iterator[str]:
    """The words of each spelling (letters, ideograms, sounds) of a name, and any two of them in one."""
    for spelling in name.split("="):
        words = [word for part in spelling.split("^")[:NUM_NAME_COMPONENTS] for word in _SEPARATORS.split(part) if word]
        yield from words
        yield from (first + second for first, second in permutations(words[:4], 2))


def hide(line: str, identity: Iterable[str]) -> str:
    """`line` with every text of `identity` replaced."""
    shown, end = [], 0
    for start, stop in _spans(line, identity):
        shown += [line[end:start], HIDDEN]
        end = stop
    return "".join([*shown, line[end:]])


def pattern_without(line: str, identity: Iterable[str]) -> str:
    """A pattern for `fnmatch` that `line` fits, with a `?` for each letter of the texts of `identity`."""
    shown, end = [], 0
    for start, stop in _spans(line, identity):
        shown += [escape(line[end:start]), "?" * (stop - start)]
        end = stop
    return "".join([*shown, escape(line[end:])])


def _spans(line: str, identity: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Where texts of `identity` begin and end."""
    pattern = _pattern(identity if isinstance(identity, frozenset) else frozenset(identity))
    if pattern is None or not line:
        return
    folded, places = _folded_with_places(line)
    for found in pattern.finditer(folded):
        stop = places[found.end() - 1] + 1
        # Accents that stand for themselves belong to the letter before them.
        while stop < len(line) and unicodedata.combining(line[stop]):
            stop += 1
        yield places[found.start()], stop


@lru_cache(maxsize=256)
def _pattern(identity: frozenset[str]) -> re.Pattern[str] | None:
    """Whatever is to be hidden, longest first; None where there is nothing. Of folded text."""
    spellings = {fold(spelling) for text in identity for spelling in (text, text.casefold().translate(_UMLAUTS))}
    parts = {_part_pattern(spelling) for spelling in spellings}
    ordered = sorted(filter(None, parts), key=lambda part: (-len(part), part))
    return re.compile("|".join(ordered)) if ordered else None


def _part_pattern(text: str) -> str:
    """A pattern for one folded text, whatever separates its words; "" for what has too few letters."""
    words = _LETTERS_OR_DIGITS.findall(text)
    length = sum(map(len, words))
    if length < SHORTEST_HIDDEN:
        return ""
    pattern = _BETWEEN_WORDS.join(map(re.escape, words))
    if length >= SHORTEST_WITHIN_WORDS:
        return pattern
    first, last = (r"\d" if letter.isdigit() else r"[^\W\d_]" for letter in (words[0][0], words[-1][-1]))
    return f"(?<!{first}){pattern}(?!{last})"


def fold(text: str) -> str:
    """Lower case without accents."""
    return _folded_with_places(text)[0]


def _folded_with_places(text: str) -> tuple[str, list[int]]:
    """A text in lower case without accents, and for each of its letters the place in `text` that it comes from."""
    if text.isascii():
        return text.lower(), list(range(len(text)))
    letters: list[str] = []
    places: list[int] = []
    for place, letter in enumerate(text):
        plain = [part for part in unicodedata.normalize("NFKD", letter).casefold() if not unicodedata.combining(part)]
        letters += plain
        places += [place] * len(plain)
    return "".join(letters), places


def pseudonym(uid: str) -> str:
    """A short name for a UID that is always the same and leads back to nobody without the data themselves.

    UIDs are long and carry no name, so that the hash cannot be found by trying, as that of a patient's number can.
    """
    return hashlib.sha256(uid.encode()).hexdigest()[:8]
