"""What errors of other libraries and our own become within a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import LONGEST_REASON, InputError, first_line, in_words


@pytest.mark.parametrize(
    ("error", "line", "words"),
    [
        (ValueError("\n  bad size  \nat line 7"), "bad size", "ValueError: bad size"),
        (RuntimeError(), "RuntimeError", "RuntimeError"),
        (OSError(" \n"), "OSError", "OSError"),
        (MemoryError(), "MemoryError", "memory ran out"),
        (MemoryError("no 9 GiB"), "no 9 GiB", "memory ran out: no 9 GiB"),
        (InputError("is torn", where="a.nii"), "a.nii: is torn", "a.nii: is torn"),
    ],
)
def test_errors_are_their_first_line_behind_their_type_unless_ours(error: Exception, line: str, words: str) -> None:
    assert (first_line(error), in_words(error)) == (line, words)


def test_a_page_in_a_line_is_cut_but_never_what_a_user_is_to_do() -> None:
    assert first_line(RuntimeError("x" * 9999)) == "x" * LONGEST_REASON
    own = InputError("is damaged", where=Path("y" * LONGEST_REASON), fix="Export it again")
    assert first_line(own).endswith("Export it again")
