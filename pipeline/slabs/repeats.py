"""What need not be done on tensors without values: work on slabs that takes the same memory as on their neighbours.

Metering a step runs it on fake tensors, where every operation costs time and none computes anything. Slabs of one size
take the same memory one after the other, and what is kept of them grows or falls steadily, so the peak lies at the
first slabs (the second finds what the first has left) or at the last. Those are worked on; of the others only what is
kept is made.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

WORKED_ON = 2


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers and not only a shape."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def is_repeat(tensor: Tensor, start: int, stop: int, *, height: int, num_rows: int) -> bool:
    """Whether work on rows start to stop of a tensor without values can be left out.

    Args:
        tensor: What would be worked on.
        start: First row.
        stop: Row behind the last one.
        height: Rows of a slab.
        num_rows: Rows of all slabs.
    """
    return start >= WORKED_ON * height and stop <= num_rows - WORKED_ON * height and not has_values(tensor)
