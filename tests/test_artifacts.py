"""Atomic writing, on a disk that really fills up, and strict reading."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline.artifacts import (
    atomic_folder,
    atomic_path,
    content_hash,
    file_hash,
    read_artifact,
    to_json,
    write_artifact,
    write_text,
)
from pipeline.errors import InputError
from pipeline.plan import Record
from tests.conftest import file_size_limit


@dataclass(frozen=True, kw_only=True)
class Inner(Record):
    name: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Example(Record):
    SCHEMA_VERSION: ClassVar[int] = 3
    schema_version: int = 3
    shape: tuple[int, int, int]
    inner: tuple[Inner, ...]
    by_case: dict[str, float]


EXAMPLE = Example(shape=(40, 32, 24), inner=(Inner(name="a"), Inner(name="ü", weight=0.1)), by_case={"case_1": 1 / 3})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skipped where mounting one is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_written_artifact_reads_back_equal(tmp_path: Path):
    write_artifact(tmp_path / "new" / "folder" / "a.json", EXAMPLE)
    assert read_artifact(tmp_path / "new" / "folder" / "a.json", Example) == EXAMPLE


def test_the_name_of_a_file_that_is_no_utf_8_is_one_clear_line_and_nothing_is_written(tmp_path: Path):
    write_artifact(tmp_path / "a.json", EXAMPLE)
    odd = Example(shape=(1, 2, 3), inner=(Inner(name=os.fsdecode(b"caf\xe9")),), by_case={})
    with pytest.raises(InputError, match=r"no UTF-8 \(in .*caf\\udce9"):
        write_artifact(tmp_path / "a.json", odd)
    assert read_artifact(tmp_path / "a.json", Example) == EXAMPLE
    assert len(list(tmp_path.iterdir())) == 1


def test_the_json_is_for_people_to_read():
    text = to_json(EXAMPLE)
    assert '  "shape": [40, 32, 24],\n' in text
    assert "ü" in text
    assert json.loads(text)["by_case"] == {"case_1": 1 / 3}


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "good")

    def fail_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_text() == "good"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_nothing_is_at_the_place_before_the_block_ends(tmp_path: Path):
    path = tmp_path / "a.nii.gz"
    with atomic_path(path) as temporary:
        temporary.write_text("text")
        assert not path.exists()
        assert temporary.parent == path.parent
        assert temporary.name.endswith(".nii.gz")
    assert path.read_text() == "text"


def assert_survives_a_full_disk(path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"cannot write \(.*\)\. Free some space or choose another folder"):
        write_text(path, text)
    assert path.read_text() == "good"
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_file_and_one_clear_line(small_disk: Path):
    write_text(small_disk / "a.txt", "good")
    assert_survives_a_full_disk(small_disk / "a.txt", "x" * 200_000)


def test_an_exceeded_limit_leaves_the_old_file_and_one_clear_line(tmp_path: Path):
    write_text(tmp_path / "a.txt", "good")
    with file_size_limit(1000):
        assert_survives_a_full_disk(tmp_path / "a.txt", "x" * 200_000)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"a\.txt: cannot write .*Check the folder"):
        write_text(tmp_path / "file" / "a.txt", "text")


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "good")
    child = os.fork()
    if child == 0:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert path.read_text() == "good"
    write_text(path, "better")
    assert path.read_text() == "better"


def changed(**changes: object) -> str:
    plain = {**json.loads(to_json(EXAMPLE)), **changes}
    return json.dumps({key: value for key, value in plain.items() if value != "remove"})


def test_all_wrong_keys_are_named_at_once(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(changed(shape="remove", extra=1, by_case={"case_1": "high"}, inner=[{"name": 5, "wieght": 2.0}]))
    with pytest.raises(InputError) as caught:
        read_artifact(path, Example)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for part in (
        "shape: missing",
        "extra: unknown key",
        "by_case.case_1",
        "inner.0.name",
        "inner.0.wieght: unknown key",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("shape", [[40, 32], [40, 32, 24, 1], ["40", 32, 24], [40.5, 32, 24], [True, 32, 24]])
def test_a_shape_is_three_whole_numbers(shape: list[object], tmp_path: Path):
    (tmp_path / "a.json").write_text(changed(shape=shape))
    with pytest.raises(InputError, match="shape"):
        read_artifact(tmp_path / "a.json", Example)


@pytest.mark.parametrize("version", [2, 4, "3", None, "remove"])
def test_another_schema_version_is_said_before_anything_else(version: object, tmp_path: Path):
    (tmp_path / "a.json").write_text(changed(schema_version=version, shape="remove"))
    with pytest.raises(InputError, match=r"has schema version .*, this voxfit reads version 3\. Write a new a\.json"):
        read_artifact(tmp_path / "a.json", Example)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not valid JSON"),
        (b'{"shape": [1', "not valid JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", r"an object \{\.\.\.\} is expected, got \[\]"),
        (b"null", r"an object \{\.\.\.\} is expected, got null"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_other_content_is_one_clear_line(content: bytes, what: str, tmp_path: Path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=what):
        read_artifact(tmp_path / "a.json", Example)


def test_a_key_that_stands_twice_is_named_instead_of_the_last_one_winning(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(to_json(EXAMPLE).replace('"weight": 0.1', '"weight": 0.1, "name": "b"'))
    with pytest.raises(InputError, match=r'"name": stands more than once.*Keep one') as caught:
        read_artifact(path, Example)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused_with_its_key(number: str, tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(to_json(EXAMPLE).replace("0.1", number))
    with pytest.raises(InputError, match=r"inner\.1\.weight: input should be a finite number"):
        read_artifact(path, Example)


@pytest.mark.parametrize("name", ["none.json", "."])
def test_a_missing_file_or_a_folder_is_one_clear_line(name: str, tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        read_artifact(tmp_path / name, Example)


def test_hashes_change_with_content_and_not_with_key_order(tmp_path: Path):
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2}) != content_hash({"a": "2"})
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "made") as folder:
        (folder / "one").write_text("1")
    with atomic_folder(tmp_path / "deep" / "made") as folder:
        (folder / "two").write_text("2")
    assert [item.name for item in (tmp_path / "deep" / "made").iterdir()] == ["two"]
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "deep" / "made") as folder:
        (folder / "three").write_text(str(1 / 0))
    assert [item.name for item in (tmp_path / "deep" / "made").iterdir()] == ["two"]
    assert [item.name for item in (tmp_path / "deep").iterdir()] == ["made"]


def test_a_folder_that_the_disk_has_no_room_for_leaves_the_earlier_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "one").write_text("1")
    with (
        pytest.raises(InputError, match="cannot write"),
        file_size_limit(1000),
        atomic_folder(tmp_path / "made") as new,
    ):
        (new / "large").write_bytes(bytes(5000))
    assert [item.name for item in (tmp_path / "made").iterdir()] == ["one"]
    assert [item.name for item in tmp_path.iterdir()] == ["made"]
