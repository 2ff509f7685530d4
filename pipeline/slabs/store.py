"""Tensors kept as slabs of rows, on the device or in host memory.

Slabs are separate tensors, so that a tensor can be freed while another of the same size is filled, slab by slab, and
an allocator hands out blocks of one size again and again. Shapes: (B, C, I, J, K), rows along I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from pipeline.sizes import MIB
from pipeline.slabs.backward import ONE_PASS
from pipeline.slabs.host import allocate_on_host

# Temporaries of a slab come to about four times its bytes; more slabs than this save little and cost a call each. Above
# 32 MiB the C library gives a block on a CPU back at once: with smaller slabs a process took up to a third more.
SLAB_BYTES = 48 * MIB
MAX_SLABS = 24
SMALLEST_SLAB_ROWS = 4
# Slabs end where strides of 2 do, so that rows of two resolutions correspond.
ROWS_MULTIPLE = 2


def slab_rows(shape: torch.Size, dtype: torch.dtype) -> int:
    """Rows of a slab of a tensor (B, C, I, J, K): some 48 MiB or a 24th, an even number, alike for all but the last."""
    batch, channels, rows, *plane = shape
    plane_bytes = batch * channels * plane[0] * plane[1] * dtype.itemsize
    wanted = max(SMALLEST_SLAB_ROWS, SLAB_BYTES // plane_bytes)
    number = min(MAX_SLABS, max(1, round(rows / wanted)))
    height = -(-rows // number)
    return min(rows, -(-height // ROWS_MULTIPLE) * ROWS_MULTIPLE)


def slab_ranges(rows: int, height: int) -> Iterator[tuple[int, int]]:
    """Start and stop of every slab."""
    return ((start, min(start + height, rows)) for start in range(0, rows, height))


class RawRows(Protocol):
    """Rows of a tensor, wherever they come from."""

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop on the device."""

    def write(self, start: int, rows: Tensor) -> None:
        """Put other rows in the place of those from `start` on."""

    def free(self, start: int, stop: int) -> None:
        """Rows start to stop will not be read again."""


class RecomputedRows:
    """Rows that are computed anew at every reading.

    Args:
        compute: From start and stop to the rows.
    """

    def __init__(self, compute: Callable[[int, int], Tensor]) -> None:
        self.read = compute

    def write(self, start: int, rows: Tensor) -> None:
        """Nothing is kept."""

    def free(self, start: int, stop: int) -> None:
        """Nothing is kept."""


class SlabStore:
    """A tensor (B, C, I, J, K) as slabs, which exist from the first writing to them until they are freed.

    Args:
        shape: Of the whole tensor.
        dtype: Of the whole tensor.
        device: Where rows are read to.
        on_host: Keep the slabs in host memory (pinned for a GPU).
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, *, on_host: bool = False) -> None:
        self.shape, self.dtype, self.device, self.on_host = shape, dtype, device, on_host
        self.height = slab_rows(shape, dtype)
        self._slabs: dict[int, Tensor] = {}
        self._freed: set[int] = set()

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Start and stop of every slab."""
        return slab_ranges(self.shape[2], self.height)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop on the device; a view where they lie in one slab on the device. Missing rows are zero."""
        pieces = [self._piece(slab, first, last) for slab, first, last in self._pieces(start, stop)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def write(self, start: int, rows: Tensor) -> None:
        """Put rows from `start` on in place of what is there; the tensor itself is kept where it is a new slab."""
        for slab, first, last in self._pieces(start, start + rows.shape[2]):
            offset = slab * self.height - start
            piece = rows[:, :, offset + first : offset + last]
            if slab in self._slabs:
                self._put(slab, first, last, piece)
            elif last - first == self._rows_of(slab):
                self._slabs[slab] = self._kept(piece)
            else:
                self._slabs[slab] = self._zeros(slab)
                self._put(slab, first, last, piece)

    def add(self, start: int, rows: Tensor, *, only_missing: bool = False) -> None:
        """Add rows from `start` on to what is there; the tensor itself is kept where it is a slab.

        Args:
            start: First row.
            rows: (B, C, n, J, K).
            only_missing: Leave slabs that are there as they are, where rows hold no values.
        """
        for slab, first, last in self._pieces(start, start + rows.shape[2]):
            if only_missing and slab in self._slabs:
                continue
            offset = slab * self.height - start
            piece = rows[:, :, offset + first : offset + last]
            if slab not in self._slabs:
                self.write(slab * self.height + first, piece)
            elif self.on_host:
                self._put(slab, first, last, self._piece(slab, first, last).add_(piece))
            else:
                self._slabs[slab][:, :, first:last] += piece

    def free(self, start: int, stop: int) -> None:
        """Drop every slab that ends in rows start to stop."""
        for slab, _, last in self._pieces(start, stop):
            if last == self._rows_of(slab):
                self._slabs.pop(slab, None)
                self._freed.add(slab)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Slabs that hold rows start to stop, with the rows within each."""
        for slab in range(start // self.height, -(-stop // self.height)):
            first = slab * self.height
            yield slab, max(start - first, 0), min(stop - first, self.height)

    def _piece(self, slab: int, first: int, last: int) -> Tensor:
        kept = self._slabs.get(slab)
        if slab in self._freed:
            raise RuntimeError(f"these rows were freed in a backward pass; {ONE_PASS}")
        if kept is None:
            batch, channels, _, *plane = self.shape
            return torch.zeros(batch, channels, last - first, *plane, dtype=self.dtype, device=self.device)
        if not self.on_host:
            return kept[:, :, first:last]
        # A copy on a CPU too, so that what is metered there holds for a GPU.
        rows = kept[first:last].to(self.device, non_blocking=True, copy=True)
        return rows.movedim(0, 2).contiguous()

    def _put(self, slab: int, first: int, last: int, piece: Tensor) -> None:
        if self.on_host:
            self._slabs[slab][first:last].copy_(_rows_first(piece.to(self.dtype)), non_blocking=True)
        else:
            self._slabs[slab][:, :, first:last] = piece

    def _rows_of(self, slab: int) -> int:
        return min(self.height, self.shape[2] - slab * self.height)

    def _zeros(self, slab: int) -> Tensor:
        batch, channels, _, *plane = self.shape
        zeros = torch.zeros(batch, channels, self._rows_of(slab), *plane, dtype=self.dtype, device=self.device)
        return self._kept(zeros)

    def _kept(self, piece: Tensor) -> Tensor:
        # Never a view of something larger, which would stay alive with it.
        piece = piece.to(self.dtype)
        if not self.on_host:
            is_alone = piece.untyped_storage().nbytes() == piece.nbytes and piece.is_contiguous()
            return piece if is_alone else piece.clone(memory_format=torch.contiguous_format)
        rows = _rows_first(piece)
        return allocate_on_host(rows).copy_(rows, non_blocking=True)


def _rows_first(piece: Tensor) -> Tensor:
    """Rows as the first axis: a range of them is then one piece of memory, and copies keep the order of the stream.

    Torch would gather pieces that are not contiguous on the host at once, perhaps before an earlier copy has arrived.
    """
    return piece.movedim(2, 0).contiguous()
