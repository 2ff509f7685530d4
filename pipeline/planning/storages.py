"""Live tensor storages, counted while a step runs on them, whether they are real or fake."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipeline.networks.convolution_workspace import LARGEST_KEPT_BYTES, estimate_cpu_workspace
from pipeline.slabs.host import is_allocating_on_host, pinned_bytes

HOST = "host"


@dataclass(eq=False, slots=True)
class _Storage:
    """A live storage; `part` is what it turned out to hold, which may only be known after it was made."""

    reference: weakref.ref[UntypedStorage]
    num_bytes: int
    part: str


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of every storage that an operator returns, from its making until it is freed.

    Views share their storage and count once. What an operator allocates and frees inside itself is not seen; only the
    process's peak has an estimate of it. Buffers that `pipeline.slabs.host` makes are host memory and count apart.
    Finalizers on storages under a dispatch mode are the idea of PyTorch's own `torch.distributed._tools.mem_tracker`.

    Attributes:
        part: What storages made from now on hold, until `claim` says better.
        live_bytes: Bytes of the device that are live now.
        peak_bytes: Most of them that were live at one time.
        host_bytes: Bytes of host buffers that are live now.
        peak_host_bytes: Most of them that were live at one time.
        peak_pinned_bytes: What they take of pinned memory, which goes by sizes and is kept for the next step.
        peak_process_bytes: Most bytes that a process on a CPU takes at one time: blocks above `LARGEST_KEPT_BYTES`
            that are live, host buffers and what was allocated inside operators among them, and a heap as large as
            the smaller ones ever needed. Measured steps took up to 5 % more, by gaps in the heap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "working"
        self.live_bytes = self.host_bytes = 0
        self.peak_bytes = self.peak_host_bytes = self.peak_process_bytes = 0
        self._live: dict[int, _Storage] = {}
        self._at_peak: list[tuple[_Storage, int]] = []
        self._is_at_peak = False
        self._small_bytes = self._heap_bytes = 0
        # Host buffers by size: live now, and most at one time.
        self._buffers: dict[int, list[int]] = {}

    @property
    def peak_pinned_bytes(self) -> int:
        """See `pipeline.slabs.host`."""
        return sum(pinned_bytes(most, num_bytes) for num_bytes, (_, most) in self._buffers.items())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled, and torch's guard against it costs a tenth of the time.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # Asked several times per operator; the fake mode's own answer takes far longer.
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        self._count(_tensors(result))
        self._note_process(estimate_cpu_workspace(func, args, result))
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count storages of `tensors` that are new, under the present `part`."""
        self._count(tensors)
        self._note_process(0)

    def claim(self, tensors: Iterable[Tensor], part: str, *, made_as: str | None = None) -> None:
        """Say that the storages of `tensors` hold `part`, whatever they were made for; new ones are counted.

        Args:
            tensors: Real or fake.
            part: What they hold.
            made_as: Leave out storages that hold something else than this.
        """
        kept, self.part = self.part, part
        listed = list(tensors)
        self.count(listed)
        for tensor in listed:
            storage = self._live[tensor.untyped_storage()._cdata]
            if storage.part != HOST and made_as in (None, storage.part):
                storage.part = part
        self.part = kept

    def claim_live(self, *, made_as: str, part: str) -> None:
        """Say that what was made as `made_as` and is still live holds `part`."""
        for storage in self._live.values():
            if storage.part == made_as:
                storage.part = part

    def restart_peak(self) -> None:
        """Forget the peaks so far."""
        self.peak_bytes, self.peak_host_bytes = self.live_bytes, self.host_bytes
        self._heap_bytes = self._small_bytes
        self.peak_process_bytes = self.live_bytes + self.host_bytes
        self._buffers = {num_bytes: [live, live] for num_bytes, (live, _) in self._buffers.items()}
        self._is_at_peak = True

    def peak_parts(self) -> dict[str, int]:
        """Bytes at the peak by part, with what each storage is known to hold by now; they add up to the peak."""
        self._keep_peak()
        parts: dict[str, int] = {}
        for storage, num_bytes in self._at_peak:
            parts[storage.part] = parts.get(storage.part, 0) + num_bytes
        return parts

    def _count(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is None:
                self._add(storage)
            elif known.num_bytes != storage.nbytes():
                self._keep_peak()
                self._change(known.part, -known.num_bytes)
                known.num_bytes = storage.nbytes()
                self._change(known.part, known.num_bytes)
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self._is_at_peak = True
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)

    def _note_process(self, inside_bytes: int) -> None:
        large_bytes = self.live_bytes + self.host_bytes - self._small_bytes
        # What operators allocate inside are two blocks or more.
        if inside_bytes > 2 * LARGEST_KEPT_BYTES:
            large_bytes, inside_bytes = large_bytes + inside_bytes, 0
        self._heap_bytes = max(self._heap_bytes, self._small_bytes + inside_bytes)
        self.peak_process_bytes = max(self.peak_process_bytes, large_bytes + self._heap_bytes)

    def _add(self, storage: UntypedStorage) -> None:
        key, part = storage._cdata, HOST if is_allocating_on_host() else self.part
        reference = weakref.ref(storage, lambda _: self._remove(key))
        self._live[key] = _Storage(reference, storage.nbytes(), part)
        self._change(part, storage.nbytes())

    def _remove(self, key: int) -> None:
        self._keep_peak()
        storage = self._live.pop(key)
        self._change(storage.part, -storage.num_bytes)

    def _change(self, part: str, num_bytes: int) -> None:
        if part == HOST:
            self.host_bytes += num_bytes
            live_and_most = self._buffers.setdefault(abs(num_bytes), [0, 0])
            live_and_most[0] += 1 if num_bytes > 0 else -1
            live_and_most[1] = max(live_and_most)
        else:
            self.live_bytes += num_bytes
        if abs(num_bytes) <= LARGEST_KEPT_BYTES:
            self._small_bytes += num_bytes

    def _keep_peak(self) -> None:
        """Keep what is live at the peak; called when it is about to be left, for the list is long."""
        if self._is_at_peak:
            self._at_peak = [(storage, storage.num_bytes) for storage in self._live.values() if storage.part != HOST]
            self._is_at_peak = False


def _tensors(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        return (result,)
    return [leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)]
