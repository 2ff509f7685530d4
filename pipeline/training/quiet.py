"""Lightning without its chatter: what it says on start is either said by our own log or no news."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")
# Advice for other ways of training; each is a deliberate choice here.
NO_NEWS = (
    r".*does not have many workers.*",
    r".*GPU available but not used.*",
    r".*smaller than the logging interval.*",
    r".*lr_scheduler.step\(\).* before .*optimizer.step\(\).*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*pin_memory.*no accelerator is found.*",
    r".*`srun` command is available on your system but is not used.*",
    # The sampler knows where to go on, without what Lightning looks for.
    r".*resuming from a checkpoint that ended before the epoch ended.*",
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Let only warnings that matter through while the context is open."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for pattern in NO_NEWS:
            warnings.filterwarnings("ignore", message=pattern)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
