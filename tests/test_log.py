"""Log lines where they belong: a file in plain lines, and never a traceback because a line could not be written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import InputError, StoppedError
from pipeline.log import configure_logging, get_logger, log_to_file, track


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    """The logger as it is in a new process, whatever tests before this one configured."""
    logger = get_logger()
    before = logger.level, list(logger.handlers), logger.propagate
    logger.setLevel(logging.NOTSET)
    logger.handlers[:], logger.propagate = [], True
    yield
    logger.setLevel(before[0])
    logger.handlers[:], logger.propagate = before[1:]


def test_information_reaches_the_file_without_the_command_line(tmp_path: Path) -> None:
    with log_to_file(tmp_path / "run" / "log.txt"):
        get_logger("train").info("epoch 1")
    get_logger("train").info("after the run")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "INFO epoch 1" in text
    assert "after" not in text


def test_what_ended_a_command_stands_in_its_log(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with pytest.raises(StoppedError), log_to_file(path):
        raise StoppedError("stopped on request")
    with pytest.raises(ZeroDivisionError), log_to_file(path):
        print(1 / 0)
    text = path.read_text()
    assert "ERROR stopped on request" in text
    assert "ZeroDivisionError" in text
    assert text.count("Traceback") == 1


def test_a_log_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), log_to_file(tmp_path / "file" / "log.txt"):
        pass


def test_a_full_disk_drops_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with log_to_file(Path("/dev/full")):
        get_logger().info("a line")
    assert "Traceback" not in capsys.readouterr().err


def test_progress_without_a_terminal_is_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="voxfit"):
        assert list(track(range(3), description="preprocess", total=3)) == [0, 1, 2]
    assert caplog.messages == ["preprocess: 3 of 3"]


def test_lines_go_to_what_standard_error_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    get_logger().info("a line")
    assert capsys.readouterr().err.endswith(" a line\n")
    configure_logging()
    get_logger().info("another")
    assert capsys.readouterr().err.count("another") == 1
