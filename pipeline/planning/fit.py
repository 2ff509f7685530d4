"""Which patch fits for any network: plain, or with some of its modules recomputed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

from torch import nn

from pipeline.errors import InputError
from pipeline.geometry import Shape3, format_shape
from pipeline.networks.recompute import recompute_modules
from pipeline.plan import Precision
from pipeline.planning.budget import estimate_overhead_bytes, format_budget, format_need
from pipeline.planning.kept_bytes import propose_recompute
from pipeline.planning.meter import Loss, MakeOptimizer, OptimizerName, StepMemory, meter_step
from pipeline.planning.search import largest_fitting

Names = tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """A step that was metered.

    Attributes:
        patch_size: I, J, K.
        recompute: Names of the recomputed modules.
        memory: Of one step, by parts.
        required_bytes: Tensors and the device's estimated overhead.
    """

    patch_size: Shape3
    recompute: Names
    memory: StepMemory
    required_bytes: int


@dataclass(frozen=True)
class Fit:
    """The largest patch that fits.

    Attributes:
        best: With the first list of recomputed modules with which that patch fits, none where it fits plain.
        looked_at: Every step that was metered, in that order.
    """

    best: Trial
    looked_at: tuple[Trial, ...]


def patches_within(limit: Shape3, divisor: int | Shape3, *, smallest: int = 16) -> tuple[Shape3, ...]:
    """Patches that come into question, the largest first, each within the one before and near the limit's aspect.

    Args:
        limit: No patch is larger along any axis.
        divisor: Edges are multiples of it: the product of the network's strides.
        smallest: No edge is cut below this many voxels.

    Raises:
        InputError: The limit is below the divisor, or that below 1.
    """
    steps = (divisor, divisor, divisor) if isinstance(divisor, int) else divisor
    if min(steps) < 1:
        raise InputError(f"must be at least 1, got {format_shape(steps)}", where="divisor")
    patch = [edge - edge % step for edge, step in zip(limit, steps, strict=True)]
    if min(patch) < 1:
        raise InputError(f"{format_shape(limit)} holds no multiple of {format_shape(steps)}", where="limit")
    found = []
    while True:
        found.append((patch[0], patch[1], patch[2]))
        free = [axis for axis in range(3) if patch[axis] - steps[axis] >= max(smallest, steps[axis])]
        if not free:
            return tuple(found)
        axis = max(free, key=lambda axis: (patch[axis] / limit[axis], patch[axis]))
        patch[axis] -= steps[axis]


def largest_patch(
    network: nn.Module,
    loss: Loss,
    *,
    in_channels: int,
    budget_bytes: int,
    patch_sizes: Sequence[Shape3],
    precision: Precision = "bf16-mixed",
    optimizer: OptimizerName | MakeOptimizer = "sgd",
    recompute: Sequence[Sequence[str]] | Literal["auto"] = (),
) -> Fit:
    """The largest patch whose training step fits the budget, for any network; nothing is allocated.

    Args:
        network: Any network that `meter_step` can run; it is not changed.
        loss: Called with the network's output and a target (B, I, J, K) of class indices.
        in_channels: Of the network.
        budget_bytes: What the step may take, overhead included.
        patch_sizes: That the network can run, the largest first, such as `patches_within` gives.
        precision: As in the plan.
        optimizer: As for `meter_step`.
        recompute: Names of modules to recompute where a patch does not fit without, one list for each attempt, the last
            of them expected to be the leanest. "auto" proposes some: those that keep most, see `propose_recompute`.

    Raises:
        InputError: Not even the smallest patch fits, an option or name is wrong, or the network does not take a patch.
    """
    _check(patch_sizes, recompute)
    if recompute == "auto":
        recompute = _growing(propose_recompute(network, in_channels=in_channels, patch_size=patch_sizes[-1]))
    trials = _Trials(
        [_with_recompute(network, names) for names in [(), *recompute]],
        [(), *(tuple(names) for names in recompute)],
        lambda module, patch: meter_step(
            module, loss, patch_size=patch, in_channels=in_channels, precision=precision, optimizer=optimizer
        ),
    )
    return trials.search(patch_sizes, budget_bytes)


def _check(patch_sizes: Sequence[Shape3], recompute: object) -> None:
    if not patch_sizes:
        raise InputError("no patch is given", where="patch_sizes", fix="Give some, the largest first")
    for larger, smaller in pairwise(patch_sizes):
        if prod(smaller) >= prod(larger):
            raise InputError(
                f"{format_shape(smaller)} comes after {format_shape(larger)} and is not smaller",
                where="patch_sizes",
                fix="Give the largest first, each once",
            )
    if isinstance(recompute, str) and recompute != "auto":
        raise InputError(f'"{recompute}" is neither auto nor a list of lists of module names', where="recompute")


def _growing(names: Names) -> list[Names]:
    """The first name, the first two, four, and so on, and all of them."""
    counts = [2**power for power in range(len(names).bit_length())]
    return [names[:count] for count in sorted({*counts, len(names)}) if count <= len(names) and names]


def _with_recompute(network: nn.Module, names: Sequence[str]) -> nn.Module:
    return recompute_modules(copy.deepcopy(network), names) if names else network


class _Trials:
    """Steps by patch and list of recomputed modules, each metered once."""

    def __init__(
        self, networks: list[nn.Module], lists: list[Names], meter: Callable[[nn.Module, Shape3], StepMemory]
    ) -> None:
        self._networks, self._lists, self._meter = networks, lists, meter
        self._known: dict[tuple[Shape3, int], Trial] = {}

    def get(self, patch: Shape3, way: int) -> Trial:
        """The step with `patch` and the list of modules number `way`."""
        if (patch, way) not in self._known:
            memory = self._meter(self._networks[way], patch)
            required = memory.peak_bytes + estimate_overhead_bytes(memory.peak_bytes)
            self._known[patch, way] = Trial(patch, self._lists[way], memory, required)
        return self._known[patch, way]

    def search(self, patches: Sequence[Shape3], budget_bytes: int) -> Fit:
        """The largest patch that fits with the last list or, next above that, with any; with the first that does."""
        last = len(self._lists) - 1
        index, best = 0, self.get(patches[0], 0)
        if best.required_bytes > budget_bytes:
            sizes = [prod(patch) for patch in patches]
            found = largest_fitting(sizes, lambda at: self.get(patches[at], last).required_bytes, budget_bytes)
            index = len(patches) if found is None else found
            # The last list need not be the leanest: keeping inputs may cost more than recomputation saves.
            while index and self._first_fitting(patches[index - 1], budget_bytes):
                index -= 1
            if index == len(patches):
                raise self._nothing_fits(patches, budget_bytes)
            best = self._first_fitting(patches[index], budget_bytes) or best
        return Fit(best, tuple(self._known.values()))

    def _first_fitting(self, patch: Shape3, budget_bytes: int) -> Trial | None:
        trials = (self.get(patch, way) for way in range(len(self._lists)))
        return next((trial for trial in trials if trial.required_bytes <= budget_bytes), None)

    def _nothing_fits(self, patches: Sequence[Shape3], budget_bytes: int) -> InputError:
        trials = [self.get(patches[-1], way) for way in range(len(self._lists))]
        trial = min(trials, key=lambda trial: trial.required_bytes)
        how = f"with {len(trial.recompute)} module(s) recomputed" if trial.recompute else "plain"
        return InputError(
            f"no patch fits into {format_budget(budget_bytes)}; {format_shape(trial.patch_size)} {how} needs"
            f" {format_need(trial.required_bytes)}",
            where="budget_bytes",
            fix="Give a larger budget, smaller patches, or more modules to recompute",
        )
