from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from pipeline.quick_imports import quick_imports


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    yield
    gc.enable()


def test_the_collector_rests_in_the_block_and_works_after_it() -> None:
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_works_after_an_import_that_fails() -> None:
    with pytest.raises(ModuleNotFoundError), quick_imports():
        import pipeline.no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_a_block_in_a_block_leaves_the_rest_of_the_outer_one() -> None:
    with quick_imports():
        with quick_imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_somebody_turned_off_stays_so() -> None:
    gc.disable()
    with quick_imports():
        pass
    assert not gc.isenabled()
