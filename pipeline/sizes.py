"""Amounts of memory: bytes in the units that people read and write."""

from __future__ import annotations

import re

MIB = 1024**2
GIB = 1024**3
# Vendors print "24GB" on a card that holds 24 GiB, so both spellings mean the binary unit.
_UNITS = {"": GIB, "G": GIB, "GB": GIB, "GIB": GIB, "M": MIB, "MB": MIB, "MIB": MIB}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes from an amount of memory such as "24GiB", "24GB", "24" or "512 MiB"; 0 where the text is none.

    A number without a unit counts GiB, and GB means GiB, as it does on a graphics card's box.
    """
    match = _AMOUNT.fullmatch(text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    return int(float(match.group(1)) * unit) if match and unit else 0


def format_bytes(num_bytes: float) -> str:
    """Memory as people say it: `3.2 GiB`, below a tenth of one `40 MiB`."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / MIB:.3g} MiB"
