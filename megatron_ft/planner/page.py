"""A plan as text: tables in a terminal, plain text elsewhere. Fits into 80 columns."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from megatron_ft.planner.known import CPU, Gpu
from megatron_ft.wording import counted, part_of, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GB = 1e9
WIDE = 112
"""Columns from which the table of stages has whole numbers and bars."""
MOST_STAGES = 8
"""Stages that are shown one by one."""
LONG_WAIT = 0.3
"""Share of a step from which a larger batch is suggested."""


def show(plan: dict[str, Any], gpu: Gpu) -> None:
    """Print a plan. plan: the JSON content from commands/plan.py."""
    from rich.console import Console

    elsewhere = shutil.get_terminal_size((120, 0)).columns  # that of $COLUMNS where it is set
    out = Console(width=None if sys.stdout.isatty() else elsewhere, highlight=False)
    limit = plan["gpu"]["memory_bytes"]
    for line in _head(plan, limit):
        out.print(line)
    out.print(_stages(plan, limit, out.width >= WIDE))
    out.print(_verdict(plan, limit))
    for line in _figures(plan, gpu):
        print(
            textwrap.fill(line, out.width, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)
        )
    out.print()
    if plan["proposals"]:
        _show_proposals(out, plan, limit)
    else:
        print(textwrap.fill(_remedy(plan, limit), out.width, break_long_words=False, break_on_hyphens=False))


def _head(plan: dict[str, Any], limit: float) -> list[str]:
    layout = plan["layout"]
    where = _count(plan) if plan["gpu"]["kind"] == CPU else f"{plan['gpus']} x {plan['gpu']['kind']}"
    chunks = f", {layout['chunks_a_stage']} chunks per stage" if layout["chunks_a_stage"] > 1 else ""
    context = f" x CP {layout['cp']}" if layout["cp"] > 1 else ""
    lines = [
        f"[bold]{plan['model']}[/]: {plan['parameters']:,} parameters on {where} "
        f"({limit / _GB:.0f} GB): TP {layout['tp']} x PP {layout['pp']}{context} x DP {layout['dp']}{chunks}"
    ]
    if own := plan.get("adapters"):
        lines.append(f"LoRA of rank {own['rank']}: {own['parameters']:,} parameters are trained, the model is frozen")
    if theirs := plan.get("teacher"):
        lines.append(f"teacher {theirs['model']}: {theirs['parameters']:,} parameters, frozen, beside the model")
    if plan["chosen"]:
        why = "the fastest that is estimated to fit" if plan["proposals"] else "which needs least memory"
        parts = "all layers" if plan["recompute"] == "full" else plan["recompute"]
        again = "" if parts == "none" else f", recomputing {parts}"
        lines.append(f"No layout was given: this is the one, {why}{again}")
    return lines


def _stages(plan: dict[str, Any], limit: float, wide: bool) -> Table:
    from rich import box
    from rich.table import Table

    rows = _grouped(plan["stages"])
    more = "; of several stages the fullest" if len(rows) < len(plan["stages"]) else ""
    table = Table(
        box=box.SIMPLE if wide else None, pad_edge=wide, padding=(0, 1, 0, 1 if wide else 0), caption_justify="left",
        caption=f"GB on each GPU of a stage; the total includes 3 GB for driver, buffers and fragmentation{more}",
    )  # fmt: skip
    names = (
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
    )
    for name, short in zip(names, (*names[:4], "grads", "optim.", "activ.", *names[7:]), strict=True):
        table.add_column(name if wide else short, justify="right" if name else "left", no_wrap=True)
    for name, stage in rows:
        sizes = (f"{stage[part] / _GB:.1f}" for part in ("weights", "gradients", "optimizer", "activations", "working"))
        share = stage["total"] / limit
        colour = "green" if share <= 0.9 else "yellow" if share <= 1 else "red"
        bar = f"[{colour}]{_bar(share)}[/] " if wide else ""
        table.add_row(
            name, str(stage["layers"]), f"{stage['parameters']:,}", *sizes, f"{stage['total'] / _GB:.1f}",
            f"{bar}[{colour}]{share:.0%}[/]",
        )  # fmt: skip
    return table


def _grouped(stages: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return (number, stage). Of many, those within the pipeline with equal layers are one row, the fullest of them."""
    last = len(stages)
    if last <= MOST_STAGES:
        return [(str(number), stage) for number, stage in enumerate(stages, 1)]
    runs: list[list[int]] = []
    for number in range(2, last):
        if runs and stages[number - 1]["layers"] == stages[runs[-1][0] - 1]["layers"]:
            runs[-1].append(number)
        else:
            runs.append([number])
    within = [
        (f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}", max((stages[n - 1] for n in run), key=lambda one: one["total"]))
        for run in runs
    ]  # fmt: skip
    return [("1", stages[0]), *within, (str(last), stages[-1])]


def _bar(share: float, width: int = 10) -> str:
    full = min(width, round(share * width))
    return "█" * full + "░" * (width - full)


def _verdict(plan: dict[str, Any], limit: float) -> str:
    most = max(stage["total"] for stage in plan["stages"])
    what, its = ("process", "it may use") if plan["gpu"]["kind"] == CPU else ("GPU", "has")
    if most <= limit:
        return f"[green]fits[/]: {part_of(most, limit)} on the fullest {what}"
    text = f"[red]does not fit[/]: the fullest {what} needs {most / _GB:.1f} GB and {its} {limit / _GB:.1f} GB"
    if other := plan["fits_with"]:
        text += f"; {other['memory'] / _GB:.1f} GB with {other['flags']}"
    return text


def _figures(plan: dict[str, Any], gpu: Gpu) -> list[str]:
    by = plan["activations_by_recompute"]
    first = ", ".join(f"{how} {sizes[0] / _GB:.1f}" for how, sizes in by.items())
    rows, tokens = counted(plan["global_batch_size"], "row"), counted(plan["tokens_per_step"], "token")
    batch = f"{rows} x {plan['seq_length']} = {tokens} per step, in {counted(plan['microbatches'], 'microbatch')} of "
    return [
        f"recompute    GB of activations on the first stage: {first}",
        f"batch        {batch}{plan['micro_batch_size']}",
        *([_bubble(plan)] if plan["layout"]["pp"] > 1 else []),
        *(_time(plan, gpu) if plan["seconds_per_step"] else []),
        *(_base(plan["base"], "adapters" in plan) if plan["base"] else []),
        *(_saves(plan) if "adapters" in plan or not plan["base"] else []),
    ]


def _bubble(plan: dict[str, Any]) -> str:
    text = f"bubble       {plan['bubble']:.1%} of a step, in which a stage waits for others"
    if plan["bubble"] < LONG_WAIT:
        return text
    wait, chunks = plan["layout"]["pp"] - 1, plan["layout"]["chunks_a_stage"]
    then = wait / (8 * chunks * plan["microbatches"] + wait)
    return f"{text}; {then:.1%} with --global_batch_size {8 * plan['global_batch_size']}"


def _time(plan: dict[str, Any], gpu: Gpu) -> list[str]:
    seconds = plan["seconds_per_step"]
    total = sum(seconds.values())
    time = f"step         about {total:.1f} s ({seconds['compute']:.1f} computing at 45% of {gpu.tflops:.0f} TFLOP/s or less, "
    time += f"{seconds['waiting']:.1f} waiting, {seconds['communication']:.1f} communicating), estimated, not measured"
    if plan["train_iters"]:
        time += f"; {counted(plan['train_iters'], 'step')}: {total * plan['train_iters'] / 3600:.0f} h"
    return [time]


def _base(base: dict[str, int], adapters: bool) -> list[str]:
    sizes = f"{size(base['nf4'])}, with --double_quant {size(base['nf4_double_quant'])}"
    without = "" if adapters else "; adapters are not counted (--lora_rank)"
    return [f"base         frozen, NF4: 4.5 bits per weight of the linears; on disk {sizes}{without}"]


def _saves(plan: dict[str, Any]) -> list[str]:
    saved = plan["checkpoint"]
    return [
        f"checkpoint   {size(saved['bytes'])} in about {counted(saved['files'], 'file')}: weights {size(saved['weights'])}, "
        f"optimizer {size(saved['optimizer'])}",
        f"host memory  {size(plan['host_memory_at_a_save'])} per node at a save, at most twice as much with --async_save",
    ]


def _show_proposals(out: Console, plan: dict[str, Any], limit: float) -> None:
    fits = max(stage["total"] for stage in plan["stages"]) <= limit
    others = [one for one in plan["proposals"] if one["flags"] != plan["flags"]]
    if others or not fits:
        order = ", the fastest first (estimated)" if len(others) > 1 else ""
        out.print(f"{'Other layouts' if fits else 'Layouts'} of {_count(plan)} that fit{order}:")
        out.print(_proposals(others, out.width >= WIDE))
    this = (fits and plan["chosen"]) or not others
    which, flags = ("this layout", plan["flags"]) if this else ("the first one", others[0]["flags"])
    out.print(f"flags of {which}: {flags}", soft_wrap=True, markup=False)
    if any(one["cp"] > 1 for one in plan["proposals"]):
        out.print("CP needs Transformer Engine, and rows of one sample (--no_packing)")


def _count(plan: dict[str, Any]) -> str:
    if plan["gpu"]["kind"] == CPU:
        return f"{counted(plan['gpus'], 'process')} on this machine"
    return counted(plan["gpus"], "GPU")


def _proposals(proposals: list[dict[str, Any]], wide: bool) -> Table:
    from rich import box
    from rich.table import Table

    context, timed = any(one["cp"] > 1 for one in proposals), any(one["seconds"] for one in proposals)
    table = Table(box=box.SIMPLE if wide else None, pad_edge=wide, padding=(0, 1, 0, 1 if wide else 0))
    names = ("", "TP", "PP", *(["CP"] * context), "DP", "chunks", "micro batch", "recompute", "bubble", "GB")
    for name in (*names, *(["s per step"] * timed)):
        table.add_column(name, justify="right", no_wrap=True)
    for number, one in enumerate(proposals, 1):
        table.add_row(
            str(number), str(one["tp"]), str(one["pp"]), *([str(one["cp"])] * context), str(one["dp"]), str(one["chunks"]),
            str(one["micro_batch"]), one["recompute"], f"{one['bubble']:.1%}", f"{one['memory'] / _GB:.1f}",
            *([f"{one['seconds']:.1f}"] if timed else []),
        )  # fmt: skip
    return table


def _remedy(plan: dict[str, Any], limit: float) -> str:
    text = f"No layout of {_count(plan)} of {limit / _GB:.0f} GB fits, with any recomputation. "
    if not plan["remedies"]:
        return text + "Neither more GPUs nor shorter rows nor adapters would do: choose a smaller model."
    first, *others = (
        f"{one['words']} ({one['flags']}), {one['memory'] / _GB:.1f} GB on the fullest" for one in plan["remedies"]
    )
    freely = "" if plan["chosen"] or plan["gpus"] == 1 else ", without the given layout"
    return f"{text}The smallest change that does{freely}: {first}." + (f" Or: {'; '.join(others)}." if others else "")
