"""Why the planner chose a rung, in sentences that a person can argue with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from pipeline.config import PlanConfig
from pipeline.datasets.class_order import ClassOrder
from pipeline.geometry import Shape3, format_shape
from pipeline.plan import ChannelPlan, Rung
from pipeline.planning.budget import format_need
from pipeline.planning.executions import OFFLOAD_TIME_FACTOR, RECOMPUTE_TIME_FACTOR, SLAB_TIME_FACTORS
from pipeline.planning.spacing import TargetGrid
from pipeline.sizes import GIB

AXIS_WORDS = ("left-right", "back-front", "down-up")
TOWARDS = ("right", "to the front", "up")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the search found.

    Attributes:
        rung: Chosen.
        patches: That came into question, the largest first; only the given one where one was given.
        candidates: The chosen rung and its alternatives.
        fallbacks: Rungs below the chosen one.
    """

    rung: Rung
    patches: tuple[Shape3, ...]
    candidates: tuple[Rung, ...]
    fallbacks: tuple[Rung, ...]

    @property
    def covers_volume(self) -> bool:
        """Whether the patch is the largest that could be asked for."""
        return self.rung.patch_size == self.patches[0]

    def plain(self) -> Rung | None:
        """The plain step of the chosen patch and batch, where it was looked at."""
        same = [rung for rung in self.candidates if rung.patch_size == self.rung.patch_size]
        return next((rung for rung in same if rung.batch_size == self.rung.batch_size and _is_plain(rung)), None)


def explain_choice(choice: Choice, config: PlanConfig, target: TargetGrid, budget_bytes: int) -> tuple[str, ...]:
    """Sentences on the patch, the way of running it, the batch, the memory and the fallbacks."""
    return (
        _patch_sentence(choice, config, target),
        *_plain_patch_sentence(choice, config, target),
        _execution_sentence(choice, budget_bytes),
        *_time_sentence(choice),
        *_host_sentence(choice),
        _batch_sentence(choice, config),
        *_batch_norm_sentence(choice, config),
        _memory_sentence(choice, config, budget_bytes),
        _fallback_sentence(choice),
    )


def explain_normalization(channels: tuple[ChannelPlan, ...], cropped_share: float) -> tuple[str, ...]:
    """A sentence on the body mask where there is one.

    Args:
        channels: Of the plan.
        cropped_share: Share of the median case's voxels that cropping leaves.
    """
    masked = [channel.name for channel in channels if channel.use_body_mask]
    if not masked:
        return ()
    return (
        f"Mean and spread of {', '.join(masked)} are taken over the body alone (voxels that are not 0, holes filled),"
        f" because cropping to it leaves {cropped_share:.0%} of the voxels of the median case.",
    )


def explain_mirroring(orders: Sequence[ClassOrder]) -> tuple[str, ...]:
    """A sentence for each axis that is not mirrored.

    Args:
        orders: Of the fingerprint.
    """
    return tuple(
        f"Axis {order.axis} ({AXIS_WORDS[order.axis]}) is not mirrored in training: {order.upper} lies further"
        f" {TOWARDS[order.axis]} than {order.lower} in {order.share:.0%} of {order.num_cases} cases, and mirroring"
        " would hide that. --augmentation.mirror_axes sets others."
        for order in orders
        if order.is_kept
    )


def _is_plain(rung: Rung) -> bool:
    return not any(rung.execution)


def _patch_sentence(choice: Choice, config: PlanConfig, target: TargetGrid) -> str:
    patch, median = format_shape(choice.rung.patch_size), format_shape(target.median_shape)
    if config.patch_size != "auto":
        return f"Patch {patch} was given (the median case is {median})."
    if choice.covers_volume:
        return f"Patch {patch} is the whole median case {median}, rounded up to the network's stride."
    larger = choice.candidates[0]
    return (
        f"Patch {patch} is the largest that fits in the aspect of the median case {median} and holds"
        f" {_share(choice.rung, target)} of its voxels; the next larger, {format_shape(larger.patch_size)}, would take"
        f" {format_need(larger.required_bytes)} in the leanest way that takes at most {config.max_relative_time:g}"
        f" times the plain step's time ({larger.execution})."
    )


def _share(rung: Rung, target: TargetGrid) -> str:
    return f"{prod(rung.patch_size) / prod(target.median_shape):.0%}"


def _plain_patch_sentence(choice: Choice, config: PlanConfig, target: TargetGrid) -> tuple[str, ...]:
    """What would be left of the field of view with the plain step."""
    if _is_plain(choice.rung) or config.patch_size != "auto":
        return ()
    smaller = [rung for rung in choice.candidates if prod(rung.patch_size) < prod(choice.rung.patch_size)]
    plain = next((rung for rung in smaller if _is_plain(rung)), None)
    if plain is None:
        return ("The plain step fits with no patch.",)
    return (
        f"The plain step fits up to {format_shape(plain.patch_size)}, {_share(plain, target)} of the median case's"
        " voxels; larger patches are bought with time.",
    )


def _execution_sentence(choice: Choice, budget_bytes: int) -> str:
    if _is_plain(choice.rung):
        return "Nothing is recomputed and no stage runs in slabs, because the plain step fits."
    plain, rung = choice.plain(), choice.rung
    need = f"the plain step of this patch would take {plain.required_bytes / GIB:.1f} GiB, and " if plain else ""
    return (
        f"The step is run with {rung.execution}, where stages are counted from 1, the highest resolution: {need}of the"
        f" ways that fit {budget_bytes / GIB:.1f} GiB it is the one with the least estimated time. Losses and gradients"
        " are those of the plain step."
    )


def _time_sentence(choice: Choice) -> tuple[str, ...]:
    rung = choice.rung
    if _is_plain(rung):
        return ()
    factors = []
    if rung.recompute_stages > rung.slab_stages:
        factors.append(f"{RECOMPUTE_TIME_FACTOR:.2f} for a recomputed stage")
    if rung.slab_stages:
        shown = sorted({f"{factor:.2f}" for factor in SLAB_TIME_FACTORS[: rung.slab_stages]})
        factors.append(f"{' to '.join(shown[:1] + shown[1:][-1:])} for a stage in slabs (not measured on a GPU)")
    if rung.offload_stages:
        factors.append(f"{OFFLOAD_TIME_FACTOR:.2f} on top for host memory (not measured)")
    return (
        f"A step is estimated to take {rung.relative_time:.2f} times as long as the plain one, by the operations of its"
        f" convolutions: {', '.join(factors)}.",
    )


def _host_sentence(choice: Choice) -> tuple[str, ...]:
    if not choice.rung.offload_stages:
        return ()
    return (
        f"Offload needs {choice.rung.host_bytes / GIB:.1f} GiB of pinned host memory beside what the data workers take;"
        " nothing without it fits this patch. --offload off plans without it.",
    )


def _batch_sentence(choice: Choice, config: PlanConfig) -> str:
    rung = choice.rung
    steps = f"Batch {rung.batch_size}, accumulated over {rung.accumulate_grad_batches} iteration(s), is an effective"
    if config.batch_size != "auto":
        covered = choice.covers_volume and config.patch_size == "auto" and _is_plain(rung)
        room = "; the volume is covered, so batch_size auto may put what is left of the budget to use"
        reason = f"batch_size is set to it{room if covered else ''}"
    elif not choice.covers_volume:
        reason = "memory goes to the field of view as long as the patch is smaller than the median case"
    else:
        covered = "the patch covers the median case" if config.patch_size == "auto" else "the patch was given"
        divisor = "" if config.effective_batch == "auto" else f", divides effective_batch {config.effective_batch}"
        reason = f"{covered}, so the batch is the largest that fits{divisor} and holds at most 5% of all voxels"
    return f"{steps} batch of {rung.effective_batch}: {reason}."


def _batch_norm_sentence(choice: Choice, config: PlanConfig) -> tuple[str, ...]:
    if config.norm != "batch" or choice.rung.batch_size > 1:
        return ()
    return (
        "Warning: with batch 1 a batch norm trains on the statistics of a single patch and predicts with running ones,"
        " which may differ much; --norm group does not depend on the batch, and so does a larger batch_size help.",
    )


def _memory_sentence(choice: Choice, config: PlanConfig, budget_bytes: int) -> str:
    required = choice.rung.required_bytes
    kind = "bf16 (auto; fp16 takes the same)" if config.precision == "auto" else config.precision
    optimizer = {"sgd": "SGD", "adamw": "AdamW"}[config.optimizer]
    average = " and averaged weights" if config.ema else ""
    return (
        f"Predicted {required / GIB:.2f} of {budget_bytes / GIB:.2f} GiB, metered for {kind} with {optimizer}{average};"
        " what the device adds to tensors (context, workspaces, fragmentation) is an estimate."
    )


def _fallback_sentence(choice: Choice) -> str:
    if not choice.fallbacks:
        return "No rung below this one would save enough to be worth a try: a training that runs out of memory ends."
    last = choice.fallbacks[-1]
    return (
        f"Should training run out of memory all the same, {len(choice.fallbacks)} rung(s) lie below, down to"
        f" {format_shape(last.patch_size)} with {last.execution} at {last.required_bytes / GIB:.2f} GiB."
    )
