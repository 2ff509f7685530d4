"""`voxfit` and `python -m pipeline`: ready to be stopped before anything is imported that takes time."""

import gc
import sys
from collections.abc import Sequence

from pipeline.stop_signals import STOPPED_LINE, let_imports, raised_signal, stop_signals_raised

# Of younger objects. Python's 10 let a plan look for garbage in everything that PyTorch is made of eight times, which
# took 0.9 of its 11 s. A training that runs out of memory makes a full one itself.
COLLECTIONS_BEFORE_A_FULL_ONE = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, which is 75 for a signal however early it comes."""
    gc.set_threshold(*gc.get_threshold()[:2], COLLECTIONS_BEFORE_A_FULL_ONE)
    try:
        with stop_signals_raised():
            from pipeline.cli import main as run_command_line

            return run_command_line(arguments)
    except BaseException as error:
        if not raised_signal() and not isinstance(error, KeyboardInterrupt):
            raise
        let_imports()
        return _stopped()


def _stopped() -> int:
    from pipeline.errors import StoppedError
    from pipeline.requeue import requeue_after

    print(STOPPED_LINE, file=sys.stderr)
    requeue_after(raised_signal())
    return StoppedError.exit_code


if __name__ == "__main__":
    sys.exit(main())
