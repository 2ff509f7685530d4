"""Why the planner chose a rung, in sentences that a person can argue with."""

from __future__ import annotations

from math import prod

from pipeline.geometry import Shape3, format_shape
from pipeline.plan import GIB, ChannelPlan
from pipeline.planning.candidates import Rung
from pipeline.planning.rung_meter import RungMeter
from pipeline.planning.spacing import TargetGrid


def explain_choice(
    meter: RungMeter, rung: Rung, patches: tuple[Shape3, ...], target: TargetGrid, budget_bytes: int
) -> tuple[str, ...]:
    """Sentences on the patch, the recomputation, the batch and the memory."""
    return (
        _patch_sentence(meter, rung, patches, target),
        _recompute_sentence(meter, rung, budget_bytes),
        _batch_sentence(meter, rung, patches),
        _memory_sentence(meter, rung, budget_bytes),
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


def _patch_sentence(meter: RungMeter, rung: Rung, patches: tuple[Shape3, ...], target: TargetGrid) -> str:
    patch, median = format_shape(rung.patch_size), format_shape(target.median_shape)
    if meter.config.patch_size != "auto":
        return f"Patch {patch} was given (the median case is {median})."
    network = meter.network_plan(rung.patch_size)
    if rung.patch_size == patches[0]:
        stride = format_shape(network.total_stride)
        return f"Patch {patch} is the whole median case {median}, rounded up to the network's stride {stride}."
    larger = meter.fully_recomputed(
        Rung(patch_size=patches[patches.index(rung.patch_size) - 1], batch_size=rung.batch_size)
    )
    share = prod(rung.patch_size) / prod(target.median_shape)
    return (
        f"Patch {patch} is the largest that fits in the aspect of the median case {median} and holds {share:.0%} of its"
        f" voxels; the next larger, {format_shape(larger.patch_size)}, would take"
        f" {meter.required_bytes(larger) / GIB:.1f} GiB with every stage recomputed."
    )


def _recompute_sentence(meter: RungMeter, rung: Rung, budget_bytes: int) -> str:
    if not rung.recompute_stages:
        return "No stage is recomputed, because the step fits without."
    plain = Rung(patch_size=rung.patch_size, batch_size=rung.batch_size)
    return (
        f"The {rung.recompute_stages} highest-resolution stages are recomputed in the backward pass: without it this"
        f" patch would take {meter.required_bytes(plain) / GIB:.1f} GiB of {budget_bytes / GIB:.1f}. A step takes about"
        f" {meter.relative_time(rung):.2f} times as long (4/3 of the recomputed stages' operations)."
    )


def _batch_sentence(meter: RungMeter, rung: Rung, patches: tuple[Shape3, ...]) -> str:
    accumulate = meter.accumulate_grad_batches(rung)
    steps = f"Batch {rung.batch_size}, accumulated over {accumulate} iteration(s), is an effective batch of "
    total = rung.batch_size * accumulate
    if meter.config.batch_size != "auto":
        covered = rung.patch_size == patches[0] and meter.config.patch_size == "auto" and not rung.recompute_stages
        room = "; the volume is covered, so batch_size auto would put what is left of the budget to use"
        reason = f"batch_size is set to it{room if covered else ''}"
    elif rung.patch_size != patches[0]:
        reason = "memory goes to the field of view as long as the patch is smaller than the median case"
    else:
        reason = "the patch covers the median case, so the batch fills the budget (at most 5% of all voxels)"
    return f"{steps}{total}: {reason}."


def _memory_sentence(meter: RungMeter, rung: Rung, budget_bytes: int) -> str:
    memory, required = meter.memory(rung), meter.required_bytes(rung)
    kind = "bf16 (auto; fp16 takes the same)" if meter.config.precision == "auto" else meter.config.precision
    state = memory.parts["parameters"] / GIB
    return (
        f"Predicted {required / GIB:.2f} of {budget_bytes / GIB:.2f} GiB: {memory.peak_bytes / GIB:.2f} GiB of tensors,"
        f" metered for {kind} with SGD, and {(required - memory.peak_bytes) / GIB:.2f} GiB for context, workspaces and"
        f" fragmentation (estimated, not yet measured on a GPU). AdamW or averaged weights (EMA) add {state:.2f} GiB"
        " each."
    )
