"""Versioned JSON files between the stages: strict reading, atomic writing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryFile
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import InputError

Artifact = TypeVar("Artifact")


@contextmanager
def atomic_path(path: Path, *, sync_folder: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place, fsynced, when the block ends well.

    When the block raises, the temporary file is removed and what stood at `path` is untouched.

    Args:
        path: Of the file.
        sync_folder: Make the name safe from a power cut as well; not needed where another file of the folder follows
            that does, and without which this one counts nothing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    # The suffix stays at the end because writers such as nibabel choose the format by it. On a shared file system a
    # process id would not do: another node may have given out the same.
    temporary = path.with_name(f".{secrets.token_hex(4)}.partial.{path.name}")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    if sync_folder:
        # Some network file systems cannot sync a folder; the file itself is safe by then.
        with suppress(OSError):
            _fsync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path` that takes its place when the block ends well; what stood there is removed.

    When the block raises, the new folder is removed and what stood at `path` is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    mark = secrets.token_hex(4)
    temporary, old = (path.with_name(f".{mark}.{kind}.{path.name}") for kind in ("partial", "old"))
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file)
        if path.exists():
            # No file system replaces a folder that holds something in one step; between these two it is at `old`.
            path.rename(old)
        temporary.rename(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise _unwritable(path, error) from error
    finally:
        rmtree(temporary, ignore_errors=True)
    rmtree(old, ignore_errors=True)
    with suppress(OSError):
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> InputError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "Free some space or choose another folder" if is_full else "Check the folder and its permissions"
    return InputError(f"cannot write ({error.strerror or error})", where=path, fix=fix)


def check_writable(folder: Path, *, fix: str) -> None:
    """Make a folder where it is missing, and try to write there: before anything is computed that goes there.

    Args:
        folder: The folder.
        fix: What the user can do where it cannot be written to.

    Raises:
        InputError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot be written to ({error.strerror})", where=folder, fix=fix) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically.

    Raises:
        InputError: It holds the name of a file that is no UTF-8, so nobody could read it back.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        name = repr(text[max(0, error.start - 20) : error.end + 10])
        what = f"cannot be written: the name of a file or folder is no UTF-8 (in {name})"
        raise InputError(what, where=path, fix="Rename it") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_json(artifact: Any) -> str:
    """The artifact as JSON a person can read; short lists stay on one line."""
    plain = _adapter(cast(Hashable, type(artifact))).dump_python(artifact, mode="json")
    return _render(plain, "") + "\n"


def _render(value: Any, indent: str) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or (isinstance(value, list) and len(indent + flat) <= 100):
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        rows = [f"{inner}{json.dumps(str(key))}: {_render(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _render(item, inner) for item in value) + f"\n{indent}]"


def write_artifact(path: Path, artifact: Any) -> None:
    """Write a dataclass as JSON, atomically."""
    write_text(path, to_json(artifact))


def read_artifact(path: Path, kind: type[Artifact]) -> Artifact:
    """Read a dataclass strictly: unknown, missing and mistyped keys are all named at once; a key stands once.

    Raises:
        InputError: The file is missing, is not JSON, has another schema version, or does not fit `kind`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        plain = json.loads(text, object_pairs_hook=_unique_keys)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=path) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"is not valid JSON ({error})", where=path) from error
    except InputError as error:
        raise InputError(error.what, where=path, fix=error.fix) from error
    _check_version(path, plain, kind)
    try:
        artifact: Artifact = _adapter(cast(Hashable, kind)).validate_json(text)
    except ValidationError as error:
        raise InputError(_describe(error), where=path, fix="Correct the file, or write it anew") from error
    except InputError as error:
        raise InputError(error.what, where=path, fix=error.fix) from error
    return artifact


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which Python would silently keep the last of equal keys."""
    plain = dict(pairs)
    if len(plain) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = ", ".join(f'"{key}"' for key, count in counts.items() if count > 1)
        raise InputError(f"{twice}: stands more than once in the same object", fix="Keep one of them")
    return plain


def _check_version(path: Path, plain: Any, kind: type[Any]) -> None:
    expected = getattr(kind, "SCHEMA_VERSION", None)
    if expected is None:
        return
    if not isinstance(plain, dict):
        raise InputError(f"an object {{...}} is expected, got {json.dumps(plain)[:20]}", where=path)
    found = plain.get("schema_version")
    if found != expected:
        raise InputError(
            f"has schema version {found}, this voxfit reads version {expected}",
            where=path,
            fix=f"Write a new {path.name} with this version",
        )


def _describe(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(whole file)"
        text = item["msg"].replace("Unexpected keyword argument", "unknown key").replace("Field required", "missing")
        problems.append(f"{key}: {text[:1].lower()}{text[1:]}")
    return "; ".join(problems)


def content_hash(*parts: Any) -> str:
    """A short stable hash of plain values, for keys of what was computed from them."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
