"""A plan in words and tables, for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.geometry import format_shape, format_spacing
from pipeline.plan import GIB, Plan


def describe_plan(plan: Plan) -> Group:
    """What the plan chose, what takes the memory, and why: print it with a rich console."""
    return Group(_choices(plan), _memory(plan), *(Text(f"- {note}") for note in plan.notes))


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
        ("recompute", f"{plan.recompute_stages} of {network.num_stages} stages"),
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
    table.add_row("predicted", f"{(memory.peak_bytes + memory.overhead_bytes) / GIB:.3f}", style="bold")
    table.add_row("budget", f"{memory.budget_bytes / GIB:.3f}")
    return table
