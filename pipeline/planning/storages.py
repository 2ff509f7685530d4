"""Live tensor storages, counted while a step runs on them, whether they are real or fake."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(eq=False)
class _Storage:
    """A live storage; `part` is what it turned out to hold, which may only be known after it was made."""

    reference: weakref.ref[UntypedStorage]
    num_bytes: int
    part: str


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of every storage that an operator returns, from its making until it is freed.

    Views share their storage and count once. What an operator allocates and frees inside itself is not seen. The idea
    of finalizers on storages under a dispatch mode is that of PyTorch's own `torch.distributed._tools.mem_tracker`.

    Attributes:
        part: What storages made from now on hold, until `claim` says better.
        live_bytes: Bytes that are live now.
        peak_bytes: Most bytes that were live at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "working"
        self.live_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, _Storage] = {}
        self._at_peak: tuple[_Storage, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor))
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count storages of `tensors` that are new, under the present `part`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is None:
                self._add(storage)
            elif known.num_bytes != storage.nbytes():
                self.live_bytes += storage.nbytes() - known.num_bytes
                known.num_bytes = storage.nbytes()
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self._at_peak = tuple(self._live.values())

    def claim(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say that the storages of `tensors` hold `part`, whatever they were made for; new ones are counted."""
        kept, self.part = self.part, part
        listed = list(tensors)
        self.count(listed)
        for tensor in listed:
            self._live[tensor.untyped_storage()._cdata].part = part
        self.part = kept

    def claim_live(self, *, made_as: str, part: str) -> None:
        """Say that what was made as `made_as` and is still live holds `part`."""
        for storage in self._live.values():
            if storage.part == made_as:
                storage.part = part

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.live_bytes
        self._at_peak = tuple(self._live.values())

    def peak_parts(self) -> dict[str, int]:
        """Bytes at the peak by part, with what each storage is known to hold by now; they add up to the peak."""
        parts: dict[str, int] = {}
        for storage in self._at_peak:
            parts[storage.part] = parts.get(storage.part, 0) + storage.num_bytes
        return parts

    def _add(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        reference = weakref.ref(storage, lambda _: self._remove(key))
        self._live[key] = _Storage(reference, storage.nbytes(), self.part)
        self.live_bytes += storage.nbytes()

    def _remove(self, key: int) -> None:
        self.live_bytes -= self._live.pop(key).num_bytes
