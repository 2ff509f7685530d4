"""Pages from templates of this folder: one look, one way to sort tables, nothing fetched from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined


class Cell(NamedTuple):
    """A number in a table: as text, and as what it is sorted by."""

    text: str
    value: float


def number_cell(value: float, digits: int, *, sign: bool = False) -> Cell:
    """A number with so many digits after the point, or a dash for NaN."""
    return Cell("–" if np.isnan(value) else f"{value:{'+' if sign else ''}.{digits}f}", value)


def render_page(template: str, **values: Any) -> str:
    """The page of a template beside this file; every value is escaped, and one that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
