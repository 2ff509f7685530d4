"""An examination as tables for a terminal, or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import to_json
from pipeline.doctor.examination import Examination
from pipeline.doctor.facts import Section
from pipeline.doctor.parts import Part
from pipeline.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def describe_examination(found: Examination) -> Group | str:
    """Tables, then what the job would take, then everything that is wrong; or JSON."""
    if found.as_json:
        return to_json(_plain(found)).rstrip()
    from rich.console import Group
    from rich.text import Text

    lines = [Text(line) for line in found.prospects]
    if found.step is not None and found.step.job is None:
        lines = [Text("what the whole training would take is not known: a part of the step failed")]
    advice = [Text(f"! {line}") for line in found.advice] or [Text("nothing is wrong here, as far as this looks")]
    return Group(*(_facts(section) for section in found.sections), *_step(found), *lines, *advice)


def _facts(section: Section) -> Table:
    from rich.table import Table

    table = Table(title=section.title, title_justify="left", show_header=False, box=None, pad_edge=False)
    # A path that does not fit goes on in the next line.
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for fact in section.facts:
        table.add_row(f"  {fact.name}", f"{'! ' if fact.advice else ''}{fact.text}")
    return table


def _step(found: Examination) -> Iterator[Table]:
    if found.step is None:
        return
    from rich.table import Table

    table = Table("part", "of what", "one takes", "rate", "RAM, VRAM peak", title="one real step", title_justify="left")
    for part in found.step.parts:
        table.add_row(*_cells(part))
    yield table


def _cells(part: Part) -> tuple[str, ...]:
    if part.problem:
        return (part.name, f"! {part.problem}")
    vram = f", {format_bytes(part.peak_vram_bytes)}" if part.peak_vram_bytes else ""
    memory = f"{format_bytes(part.peak_ram_bytes)}{vram}" if part.peak_ram_bytes else ""
    return (part.name, part.what, "" if part.seconds is None else f"{part.seconds:.3g} s", part.rate, memory)


def _plain(found: Examination) -> dict[str, Any]:
    facts = {section.title: {fact.name: fact.value for fact in section.facts} for section in found.sections}
    step = found.step
    return {
        "facts": facts,
        "parts": [asdict(part) for part in step.parts] if step is not None else [],
        "whole_job": {**asdict(step.job), "seconds": step.job.seconds} if step is not None and step.job else None,
        "prospects": list(found.prospects),
        "advice": list(found.advice),
    }
