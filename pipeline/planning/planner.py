"""From a fingerprint and a memory budget to a plan, with the reasons in sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from statistics import median

from pipeline.artifacts import content_hash, to_json
from pipeline.config import PlanConfig
from pipeline.datasets.class_order import mirror_axes
from pipeline.datasets.fingerprint import ChannelStatistics, Fingerprint
from pipeline.errors import InputError
from pipeline.geometry import Shape3, format_shape
from pipeline.io.dicom.segment_codes import suggest_segment_codes
from pipeline.plan import ChannelPlan, NormalizationScheme, Plan, Rung
from pipeline.planning.budget import format_budget, format_need
from pipeline.planning.candidates import patch_candidates
from pipeline.planning.ladder import list_candidates, list_fallbacks
from pipeline.planning.reasons import Choice, explain_choice, explain_mirroring, explain_normalization
from pipeline.planning.rung_meter import RungMeter
from pipeline.planning.search import Families, choose_batch, choose_rung, leanest_ways
from pipeline.planning.spacing import TargetGrid, make_target_grid
from pipeline.planning.topology import round_up_patch

# nnU-Net's bound: with more, an iteration sees so much of a small dataset at once that the batches repeat themselves.
LARGEST_DATASET_SHARE = 0.05
# nnU-Net's bound too: where cropping to what is not 0 leaves less of the median case, the rest is air or was masked.
LARGEST_BODY_SHARE = 0.75
# Patches that the error names when not even the smallest fits.
NUM_NAMED = 3
TOO_SMALL = "Check the shapes and spacings of the cases, or set target_spacing"
_CT_WORD = re.compile(r"(?<![a-z0-9])ct(?![a-z0-9])", re.IGNORECASE)


def make_plan(fingerprint: Fingerprint, config: PlanConfig, *, budget_bytes: int, budget_note: str = "") -> Plan:
    """The plan for a dataset under a memory budget.

    Args:
        fingerprint: What the dataset holds.
        config: What the person fixed; "auto" leaves it to the planner.
        budget_bytes: Memory that one training step may take on the device, overhead included.
        budget_note: Where the budget comes from; becomes the plan's first note.

    Raises:
        InputError: No patch fits the budget, or a fixed patch or spacing cannot be used.
    """
    target = _target_grid(fingerprint, config)
    meter = RungMeter(
        config=config,
        in_channels=len(fingerprint.channel_names),
        num_classes=len(fingerprint.labels),
        spacing=target.spacing,
    )
    channels = _channel_plans(fingerprint, config)
    choice = _choose(meter, fingerprint, target, budget_bytes)
    return Plan(
        dataset_name=fingerprint.dataset_name,
        fingerprint_hash=content_hash(to_json(fingerprint)),
        channels=channels,
        labels=dict(fingerprint.labels),
        segment_codes=suggest_segment_codes(list(fingerprint.labels)[1:]),
        ignore_value=fingerprint.ignore_value,
        target_spacing=target.spacing,
        anisotropic_axis=target.anisotropic_axis,
        median_shape=target.median_shape,
        patch_size=choice.rung.patch_size,
        mirror_axes=mirror_axes(fingerprint.class_orders),
        batch_size=choice.rung.batch_size,
        accumulate_grad_batches=choice.rung.accumulate_grad_batches,
        precision=config.precision,
        **choice.rung.execution._asdict(),
        optimizer=config.optimizer,
        ema=config.ema,
        network=meter.network_plan(choice.rung.patch_size),
        memory=meter.memory_plan(choice.rung, budget_bytes=budget_bytes),
        candidates=choice.candidates,
        fallbacks=choice.fallbacks,
        notes=(
            *([budget_note] if budget_note else []),
            target.reason,
            *explain_normalization(channels, _cropped_share(fingerprint)),
            *explain_choice(choice, config, target, budget_bytes),
            *explain_mirroring(fingerprint.class_orders),
        ),
    )


def _target_grid(fingerprint: Fingerprint, config: PlanConfig) -> TargetGrid:
    if not fingerprint.cases:
        raise InputError("no case is left to plan with", where=fingerprint.dataset_name)
    if isinstance(config.target_spacing, str):
        return make_target_grid(fingerprint.cases)
    if min(config.target_spacing) <= 0:
        raise InputError(f"must be positive, got {list(config.target_spacing)}", where="target_spacing")
    return make_target_grid(fingerprint.cases, spacing=config.target_spacing)


def _patches(config: PlanConfig, target: TargetGrid) -> tuple[Shape3, ...]:
    """Patches that come into question, the largest first; only the given one where one is given."""
    if isinstance(config.patch_size, str):
        return patch_candidates(target.median_shape, target.spacing)
    given = config.patch_size
    suitable = round_up_patch((max(1, given[0]), max(1, given[1]), max(1, given[2])), target.spacing)
    if given != suitable:
        raise InputError(
            f"{format_shape(given)} is not a multiple of the stride of its network",
            where="patch_size",
            fix=f"The next larger that is: {format_shape(suitable)}",
        )
    return (given,)


def _choose(meter: RungMeter, fingerprint: Fingerprint, target: TargetGrid, budget_bytes: int) -> Choice:
    """The rung of the plan and what stands around it."""
    config, patches = meter.config, _patches(meter.config, target)
    if problems := meter.network_plan(patches[0]).patch_problems(patches[0]):
        median = f"the median case is {format_shape(target.median_shape)} at the target spacing"
        raise InputError(f"{'; '.join(problems)} ({median})", where=fingerprint.dataset_name, fix=TOO_SMALL)
    batch_size = 1 if isinstance(config.batch_size, str) else config.batch_size
    ways = [_fast_enough(meter.families(patch, batch_size), config.max_relative_time) for patch in patches]
    rung = choose_rung(ways, meter.required_bytes, budget_bytes)
    if rung is None:
        raise _nothing_fits(meter, ways, budget_bytes)
    if config.batch_size == "auto" and rung.patch_size == patches[0]:
        largest = _largest_batch(fingerprint, target, rung.patch_size)
        rung = choose_batch(
            rung, meter.required_bytes, budget_bytes, effective_batch=config.effective_batch, largest=largest
        )
    return Choice(
        rung=meter.weighed(rung),
        patches=patches,
        candidates=list_candidates(meter, rung, patches, budget_bytes, searched_batch=batch_size),
        fallbacks=list_fallbacks(meter, rung),
    )


def _fast_enough(families: Families, max_relative_time: float) -> Families:
    """The ways that take at most `max_relative_time`; the plain one always does."""
    kept = [[way for way in family if way.relative_time <= max_relative_time] for family in families]
    return [family for family in kept if family]


def _nothing_fits(meter: RungMeter, ways: Sequence[Families], budget_bytes: int) -> InputError:
    batch_size, is_given = ways[0][0][0].batch_size, meter.config.patch_size != "auto"
    named = [_leanest(meter, families, needs_host) for needs_host in (False, True) for families in ways[-NUM_NAMED:]]
    needs = ", ".join(_need(meter, rung) for rung in named if rung is not None)
    subject = f"patch_size {format_shape(ways[0][0][0].patch_size)} does not fit" if is_given else "no patch fits"
    return InputError(
        f"{subject} into {format_budget(budget_bytes)} with batch {batch_size}; {needs}",
        where="vram",
        fix=f"Give {'a smaller patch_size or ' if is_given else ''}a larger budget{_allowed_more(meter.config)}, or"
        f" lower base_features or max_features{' or batch_size' if batch_size > 1 else ''}",
    )


def _leanest(meter: RungMeter, families: Families, needs_host: bool) -> Rung | None:
    ways = [way for way in leanest_ways(families) if (way.offload_stages > 0) == needs_host]
    return min(ways, key=meter.required_bytes, default=None)


def _allowed_more(config: PlanConfig) -> str:
    """Options that leave ways of running the stages out, as far as they may."""
    host = "" if config.offload == "auto" else ", allow --offload auto"
    return f"{host}, raise max_relative_time ({config.max_relative_time:g})"


def _need(meter: RungMeter, rung: Rung) -> str:
    return f"{format_shape(rung.patch_size)} ({rung.execution}) needs {format_need(meter.required_bytes(rung))}"


def _largest_batch(fingerprint: Fingerprint, target: TargetGrid, patch_size: Shape3) -> int:
    dataset_voxels = prod(target.median_shape) * len(fingerprint.cases)
    return max(1, int(LARGEST_DATASET_SHARE * dataset_voxels / prod(patch_size)))


def _channel_plans(fingerprint: Fingerprint, config: PlanConfig) -> tuple[ChannelPlan, ...]:
    pairs = zip(fingerprint.channel_names, fingerprint.channels, strict=True)
    use_body_mask = _cropped_share(fingerprint) < LARGEST_BODY_SHARE
    return tuple(_channel_plan(name, statistics, config, use_body_mask) for name, statistics in pairs)


def _cropped_share(fingerprint: Fingerprint) -> float:
    """Share of a case's voxels that cropping to the box of what is not 0 leaves; the median over cases."""
    return median(prod(case.cropped_shape) / prod(case.shape) for case in fingerprint.cases)


def _channel_plan(name: str, statistics: ChannelStatistics, config: PlanConfig, use_body_mask: bool) -> ChannelPlan:
    scheme = normalization_scheme(name) if config.normalization == "auto" else config.normalization
    if scheme != "ct":
        return ChannelPlan(name=name, scheme=scheme, use_body_mask=use_body_mask and scheme == "zscore")
    return ChannelPlan(
        name=name,
        scheme=scheme,
        lower=statistics.lower,
        upper=statistics.upper,
        mean=statistics.mean,
        # A constant channel has no spread to divide by.
        std=statistics.std or 1.0,
    )


def normalization_scheme(channel_name: str) -> NormalizationScheme:
    """How a channel is normalised: "ct" where its name holds the word CT, "zscore" per case otherwise.

    Values of a CT mean the same in every case, so the dataset's own statistics serve for all.
    """
    return "ct" if _CT_WORD.search(channel_name) else "zscore"
