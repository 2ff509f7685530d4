"""Options saved beside what they led to, so that a later call with others is noticed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import write_text
from pipeline.config import to_dict
from pipeline.errors import InputError


def write_config(path: Path, config: Any) -> None:
    """Save the options of a config dataclass as YAML, atomically."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def find_changes(path: Path, config: Any, *, harmless: Collection[str]) -> list[str]:
    """Options whose values differ from the saved ones, each as `dotted.key (was ..., now ...)`.

    Args:
        path: What `write_config` saved in an earlier call.
        config: The options of this call.
        harmless: Keys that may differ; one that ends in a dot stands for its whole group. Keys that the file does not
            have, because it is of an earlier version, may differ as well.

    Raises:
        InputError: The file holds no options.
    """
    try:
        before = _flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise InputError("holds no options of an earlier call", where=path, fix="Give another folder") from error
    changed = {key: value for key, value in _flatten(to_dict(config)).items() if before.get(key, value) != value}
    return [
        f"{key} (was {before[key]}, now {value})"
        for key, value in changed.items()
        if not any(key == free or (free.endswith(".") and key.startswith(free)) for free in harmless)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
