"""Reading and writing DICOM without a word: what the libraries warn of and log holds values of headers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError

_LOGGERS = ("pydicom", "highdicom")


@contextmanager
def quiet_dicom() -> Iterator[None]:
    """Silence warnings and the loggers of pydicom and highdicom within the block: a patient's name must not leak.

    Not to be held across a `yield` of a generator, whose caller would be silenced with it. The state is the process's
    and not a thread's, so that threads decode inside of one such block.
    """
    from pydicom.config import disable_value_validation

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


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
