"""What a program of a Triton kernel works on."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_of_program(num_voxels, rows):
    """First voxel of this program's block of `rows`, and the one behind its last, in int64: volumes are large."""
    start = tl.program_id(0).to(tl.int64) * rows
    return start, tl.minimum(start + rows, num_voxels)
