"""A config as plain values."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested values for YAML and JSON."""
    plain: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        plain[item.name] = to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
    return plain
