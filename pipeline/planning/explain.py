"""A plan in words and tables, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.geometry import format_shape, format_spacing
from pipeline.plan import Plan, Rung
from pipeline.sizes import GIB


def describe_plan(plan: Plan) -> Group:
    """What the plan chose, what takes the memory, and why: print it with a rich console."""
    tables = [_choices(plan), _memory(plan)]
    if plan.candidates:
        tables.append(_rungs("What was looked at", plan.candidates, plan))
    if plan.fallbacks:
        tables.append(_rungs("Fallbacks, should memory run out", plan.fallbacks, plan))
    return Group(*tables, *(Text(f"- {note}") for note in plan.notes))


def _choices(plan: Plan) -> Table:
    table = Table(title=f"Plan for {plan.dataset_name}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for row in _choice_rows(plan):
        table.add_row(*row)
    return table


def _choice_rows(plan: Plan) -> list[tuple[str, str]]:
    network = plan.network
    coarse = "" if plan.anisotropic_axis is None else f" (axis {'ijk'[plan.anisotropic_axis]} resampled apart)"
    batch = f"{plan.batch_size} x {plan.accumulate_grad_batches} accumulated = {plan.effective_batch} effective"
    return [
        ("channels", ", ".join(f"{channel.name} ({channel.scheme})" for channel in plan.channels)),
        ("classes", f"{plan.num_classes}, background included"),
        ("target spacing", f"{format_spacing(plan.target_spacing)} mm{coarse}"),
        ("median case", format_shape(plan.median_shape)),
        ("patch", format_shape(plan.patch_size)),
        ("batch", batch),
        ("precision", plan.precision),
        ("run with", str(plan.execution)),
        ("optimizer", f"{plan.optimizer} with averaged weights" if plan.ema else plan.optimizer),
        ("network", f"{network.block} blocks {list(network.num_blocks_per_stage)}, {network.norm} norm"),
        ("features", " ".join(map(str, network.features_per_stage))),
        ("strides", ", ".join("".join(map(str, stride)) for stride in network.strides)),
        ("kernels", ", ".join("".join(map(str, kernel)) for kernel in network.kernel_sizes)),
    ]


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(title="Memory of one training step", title_justify="left")
    table.add_column("held by")
    table.add_column("GiB", justify="right")
    for part, num_bytes in memory.parts.items():
        table.add_row(part, f"{num_bytes / GIB:.3f}")
    table.add_row("overhead (estimate)", f"{memory.overhead_bytes / GIB:.3f}", end_section=True)
    table.add_row("predicted", f"{memory.required_bytes / GIB:.3f}", style="bold")
    found = plan.probe.fitting if plan.probe is not None else None
    if plan.probe is not None and found is not None and found.rung.is_same_step(plan.rung):
        table.add_row(f"measured on {plan.probe.device}", f"{found.measured_bytes / GIB:.3f}", style="bold")
    table.add_row("budget", f"{memory.budget_bytes / GIB:.3f}")
    if memory.host_bytes:
        table.add_row("host memory beside it", f"{memory.host_bytes / GIB:.3f}")
    return table


def _rungs(title: str, rungs: Sequence[Rung], plan: Plan) -> Table:
    """A row per rung; stages are counted from 1, the highest resolution."""
    table = Table(title=title, title_justify="left")
    for name in ("patch", "batch", "run with"):
        table.add_column(name)
    for name in ("GiB", "host GiB", "time"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for rung in rungs:
        is_chosen = rung.is_same_step(plan.rung)
        table.add_row(*_rung_cells(rung), _verdict(rung, plan, is_chosen), style="bold" if is_chosen else None)
    return table


def _rung_cells(rung: Rung) -> tuple[str, ...]:
    return (
        format_shape(rung.patch_size),
        f"{rung.batch_size} x {rung.accumulate_grad_batches}",
        str(rung.execution),
        f"{rung.required_bytes / GIB:.2f}",
        f"{rung.host_bytes / GIB:.2f}" if rung.host_bytes else "",
        f"{rung.relative_time:.2f}",
    )


def _verdict(rung: Rung, plan: Plan, is_chosen: bool) -> str:
    if is_chosen:
        return "chosen"
    return "yes" if rung.required_bytes <= plan.memory.budget_bytes else "no"
