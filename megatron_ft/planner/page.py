"""A plan as text: tables in a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from megatron_ft.planner.known import Gpu

if TYPE_CHECKING:
    from rich.table import Table

_GB = 1e9


def show(plan: dict[str, Any], gpu: Gpu) -> None:
    """Print a plan. plan: the JSON content from commands/plan.py."""
    from rich.console import Console

    out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    layout, limit = plan["layout"], plan["gpu"]["memory_bytes"]
    chunks = f", {layout['chunks_a_stage']} chunks per stage" if layout["chunks_a_stage"] > 1 else ""
    context = f" x CP {layout['cp']}" if layout["cp"] > 1 else ""
    out.print(
        f"[bold]{plan['model']}[/]: {plan['parameters']:,} parameters on {plan['gpus']} x {plan['gpu']['kind']} "
        f"({limit / _GB:.0f} GB): TP {layout['tp']} x PP {layout['pp']}{context} x DP {layout['dp']}{chunks}"
    )
    if own := plan.get("adapters"):
        out.print(f"LoRA of rank {own['rank']}: {own['parameters']:,} parameters are trained, the model is frozen")
    out.print(_stages(plan, limit))
    out.print(_verdict(plan, limit))
    for line in _figures(plan, gpu):
        out.print(line)
    if plan["proposals"]:
        out.print(f"\nOther layouts of {plan['gpus']} GPUs that fit, the fastest first (estimated):")
        out.print(_proposals(plan))
        out.print(f"flags of the first one: {plan['proposals'][0]['flags']}", soft_wrap=True)
    else:
        out.print(
            f"\nNo layout of {plan['gpus']} GPUs of this size fits: use more GPUs, larger GPUs, or a smaller --seq_length."
        )


def _stages(plan: dict[str, Any], limit: float) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE,
        caption="GB on each GPU of a stage; the total includes 3 GB for driver, buffers and fragmentation",
    )
    for name in (
        "stage",
        "layers",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "working",
        "total",
        "",
    ):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for number, stage in enumerate(plan["stages"], 1):
        sizes = (f"{stage[name] / _GB:.1f}" for name in ("weights", "gradients", "optimizer", "activations", "working"))
        share = stage["total"] / limit
        colour = "green" if share <= 0.9 else "yellow" if share <= 1 else "red"
        table.add_row(
            str(number), str(stage["layers"]), f"{stage['parameters']:,}", *sizes, f"{stage['total'] / _GB:.1f}",
            f"[{colour}]{_bar(share)}[/] {share:.0%}",
        )  # fmt: skip
    return table


def _bar(share: float, width: int = 10) -> str:
    full = min(width, round(share * width))
    return "█" * full + "░" * (width - full)


def _verdict(plan: dict[str, Any], limit: float) -> str:
    most = max(stage["total"] for stage in plan["stages"])
    if most <= limit:
        return f"[green]fits[/]: {most / _GB:.1f} of {limit / _GB:.1f} GB on the fullest GPU"
    return f"[red]does not fit[/]: the fullest GPU needs {most / _GB:.1f} GB and has {limit / _GB:.1f} GB"


def _figures(plan: dict[str, Any], gpu: Gpu) -> list[str]:
    by = plan["activations_by_recompute"]
    first = ", ".join(f"{how} {sizes[0] / _GB:.1f}" for how, sizes in by.items())
    seconds = plan["seconds_per_step"]
    total = sum(seconds.values())
    time = f"step         about {total:.1f} s ({seconds['compute']:.1f} computing at 45% of {gpu.tflops:.0f} TFLOP/s or less, "
    time += f"{seconds['waiting']:.1f} waiting, {seconds['communication']:.1f} communicating), estimated, not measured"
    if plan["train_iters"]:
        time += f"; {plan['train_iters']:,} steps: {total * plan['train_iters'] / 3600:.0f} h"
    return [
        f"recompute    GB of activations on the first stage: {first}",
        f"batch        {plan['global_batch_size']} rows x {plan['seq_length']} = {plan['tokens_per_step']:,} tokens per step, in "
        f"{plan['microbatches']} microbatches of {plan['micro_batch_size']}",
        f"bubble       {plan['bubble']:.1%} of a step, in which a stage waits for others",
        time,
        *(_base(plan["base"], "adapters" in plan) if plan["base"] else []),
        *(_saves(plan) if "adapters" in plan or not plan["base"] else []),
    ]


def _base(base: dict[str, int], adapters: bool) -> list[str]:
    sizes = f"{base['nf4'] / _GB:.1f} GB, with --double_quant {base['nf4_double_quant'] / _GB:.1f} GB"
    without = "" if adapters else "; adapters are not counted (--lora_rank)"
    return [f"base         frozen, NF4: 4.5 bits per weight of the linears; on disk {sizes}{without}"]


def _saves(plan: dict[str, Any]) -> list[str]:
    saved = plan["checkpoint"]
    return [
        f"checkpoint   {saved['bytes'] / _GB:,.0f} GB in about {saved['files']} files: weights {saved['weights'] / _GB:,.0f}, "
        f"optimizer {saved['optimizer'] / _GB:,.0f}",
        f"host memory  {plan['host_memory_at_a_save'] / _GB:,.1f} GB per node at a save, at most twice as much with --async_save",
    ]


def _proposals(plan: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in ("", "TP", "PP", "DP", "chunks", "micro batch", "recompute", "bubble", "GB", "s per step"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, one in enumerate(plan["proposals"], 1):
        table.add_row(
            str(number), str(one["tp"]), str(one["pp"]), str(one["dp"]), str(one["chunks"]), str(one["micro_batch"]),
            one["recompute"], f"{one['bubble']:.1%}", f"{one['memory'] / _GB:.1f}", f"{one['seconds']:.1f}",
        )  # fmt: skip
    return table
