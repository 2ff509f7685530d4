"""Facts about where this runs: each found out on its own, so that one that cannot be does not end the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.durations import format_duration
from pipeline.errors import in_words
from pipeline.plan import Record


@dataclass(frozen=True, kw_only=True)
class Fact(Record):
    """Something that was found out.

    Attributes:
        name: What about.
        text: As a person reads it.
        value: As a program reads it; None where there is none, or it could not be found out.
        advice: What is wrong with it and what to do; "" where all is well.
    """

    name: str
    text: str
    value: Any = None
    advice: str = ""


class Section(NamedTuple):
    """Facts that belong together."""

    title: str
    facts: tuple[Fact, ...]


Finder = Callable[[], Iterator[Fact]]


def find(title: str, finders: Mapping[str, Finder]) -> Section:
    """The facts of all finders, by what they look for; where one fails, that is a fact as well."""
    return Section(title, tuple(fact for name, finder in finders.items() for fact in _found(name, finder)))


def _found(name: str, finder: Finder) -> Iterator[Fact]:
    try:
        yield from finder()
    # Nothing that goes wrong here is a reason to say less about the rest.
    except Exception as error:
        yield Fact(name=name, text=f"could not be found out ({in_words(error)})")


def in_seconds(seconds: float) -> str:
    """A time as people say it, also a short one."""
    return f"{seconds:.2g} s" if seconds < 60 else format_duration(seconds)
