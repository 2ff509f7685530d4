"""Reading and writing DICOM without a word: what the libraries warn of and log holds values of headers."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import InputError

_LOGGERS = ("pydicom", "highdicom")


class _Silence:
    """What is silent now, for how many blocks of all threads."""

    lock = threading.Lock()
    num_blocks = 0
    undo = ExitStack()


def _forget_lock() -> None:
    """Another thread may hold it where a process forks."""
    _Silence.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)


@contextmanager
def quiet_dicom() -> Iterator[None]:
    """Silence warnings and the loggers of pydicom and highdicom within the block: a patient's name must not leak.

    Not to be held across a `yield` of a generator, whose caller would be silenced with it. The state is the process's
    and not a thread's: it is silent from the first block of any thread to the end of the last.
    """
    with _Silence.lock:
        if _Silence.num_blocks == 0:
            _begin_silence(_Silence.undo)
        _Silence.num_blocks += 1
    try:
        yield
    finally:
        with _Silence.lock:
            _Silence.num_blocks -= 1
            if _Silence.num_blocks == 0:
                _Silence.undo.close()


def _begin_silence(undo: ExitStack) -> None:
    from pydicom.config import disable_value_validation

    undo.enter_context(warnings.catch_warnings())
    undo.enter_context(disable_value_validation())
    warnings.simplefilter("ignore")
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL + 1)


@contextmanager
def errors_named(path: Path, otherwise: str, *, fix: str) -> Iterator[None]:
    """Within `quiet_dicom`, whatever goes wrong becomes one `InputError` that holds no value of a header.

    Args:
        path: The file, for messages.
        otherwise: What is said of errors that are not of the file system.
        fix: What the user can do.
    """
    try:
        with quiet_dicom():
            yield
    except InputError as error:
        raise InputError(error.what, where=error.where or path.name, fix=error.fix or fix) from None
    except FileNotFoundError:
        raise InputError("there is no such file", where=path.name) from None
    except OSError as error:
        # Some of pydicom's own errors are OSErrors without a number.
        raise InputError(
            f"cannot be read ({error.strerror})" if error.errno else otherwise, where=path.name, fix=fix
        ) from None
    except MemoryError:
        raise
    except Exception:
        # Any of dozens of types, depending on the byte that is wrong; the text may hold the patient's name.
        raise InputError(otherwise, where=path.name, fix=fix) from None
