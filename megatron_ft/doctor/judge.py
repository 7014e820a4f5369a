"""Results of the checks from their measurements: pure functions of plain data, without torch or the engine."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ft.doctor.result import Ended, Found, failed, passed
from megatron_ft.wording import counted, size

STEPS = 8
FALLS_TO = 0.5
"""Largest accepted ratio of last to first loss over repeated rows. On a CPU it is below 0.01."""
LOSSES_APART = 0.01
"""Largest accepted difference of a step's loss, relative to the first loss. On a CPU, bf16 and fp32 differ by 0.002."""
NORMS_APART = 0.005
"""Largest accepted relative difference of the first gradient norm. bf16 and fp32 differ by 0.0005, with and without LIMA dropout
by 0.019."""
TOLERANCE = 1e-4
"""Largest accepted relative difference in fp32, as in verify-invariance."""
LEAVES = 30.0
"""Seconds after the last step, or the death of a rank, in which all processes must end: 2 on an idle CPU, 8 on a busy one."""
FP16_STEPS, FP16_SAVED_AT = 40, 2
"""A loss scale of 2^32 is halved after each overflow but the first; 2^16 and below do not overflow here."""
SETTLED = 5
"""Number of last steps that must all update the weights."""
WITHIN_LAYERS = (
    "megatron/core/transformer/transformer_layer.py",
    *(f"megatron_ft/models/{name}.py" for name in ("attention", "dropout", "kernels", "norms", "parallel_block")),
)
"""A wait in one of these files occurs in each layer and microbatch, and the GPU idles in each."""
_OURS = ("megatron_ft/", "megatron/core/")
WARM_UP = 3
"""Number of first steps in which kernels may be compiled: for the first shapes, then for dynamic shapes."""
RATIO = (0.4, 2.5)
"""Accepted range of the ratio of measured to planned memory."""


@dataclass(frozen=True)
class Course:
    """Losses and gradient norms of some steps over the same rows."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]


def judge_steps(used: Course, plain: Course | None) -> Found:
    """Judge the losses of compiled kernels. plain: those of --no_fused_kernels; None if nothing is compiled."""
    first, last = used.losses[0], used.losses[-1]
    fell = f"loss {first:.3f} -> {last:.3f} in {counted(len(used.losses), 'step')}"
    if not all(map(math.isfinite, (*used.losses, *used.norms))):
        return failed(f"a loss or gradient norm is not finite: {used.losses}, {used.norms}")
    if last > FALLS_TO * first:
        return failed(f"{fell}: the loss does not fall enough, although the rows are the same in every step")
    if plain is None:
        return passed(f"{fell}; nothing is compiled on a CPU, so there is nothing to compare with")
    losses = max(abs(one - other) for one, other in zip(used.losses, plain.losses, strict=True)) / abs(plain.losses[0])
    norm = abs(used.norms[0] - plain.norms[0]) / plain.norms[0]
    apart = f"{fell}; losses differ from --no_fused_kernels by {losses:.2%}, the first gradient norm by {norm:.2%}"
    if not (losses <= LOSSES_APART and norm <= NORMS_APART):
        return failed(f"{apart} (bounds {LOSSES_APART:.1%}, {NORMS_APART:.1%}): train with --no_fused_kernels")
    return passed(apart)


def judge_masks(found: dict[float, tuple[float, int, int]]) -> Found:
    """Judge dropout masks. found: rate -> (share of entries kept, entries that differ from the CPU's mask: forward, backward)."""
    shares = ", ".join(f"{share:.2%} kept at rate {rate}" for rate, (share, *_) in found.items())
    forward, backward = (sum(one[part] for one in found.values()) for part in (1, 2))
    if forward or backward:
        return failed(
            f"{shares}; {forward} entries differ from the CPU's mask, and {backward} of the gradient's: "
            "train with --no_fused_kernels"
        )
    return passed(f"{shares}; the same entries as on the CPU, forward and backward")


def judge_layouts(found: dict[str, list]) -> Found:
    """Judge layouts. found: the output of layouts.on_ranks."""
    far = {name: where for name, (apart, where) in found.items() if not apart <= TOLERANCE}
    listed = ", ".join(f"{name} {apart:.0e}" for name, (apart, _) in found.items())
    if far:
        name, where = next(iter(far.items()))
        return failed(
            f"{listed} from one process (bound {TOLERANCE:.0e}); {name} differs most in {where}: do not train in this layout"
        )
    return passed(f"{listed} from one process (bound {TOLERANCE:.0e})")


def judge_exit(ended: Ended, count: int, seconds: float) -> Found:
    """Judge the end of a run. seconds: from the last step."""
    processes = f"{count} process{'es' if count > 1 else ''}"
    if ended.code is None:
        return failed(
            f"{processes}: not all have ended {LEAVES:.0f} s after the last step; kill them, and report where they hang"
        )
    if ended.code != 0 or "Traceback" in ended.err:
        return failed(f"{processes}: exit code {ended.code}: {ended.reason}")
    return passed(f"{processes} ended {seconds:.1f} s after the last step, exit code 0")


def judge_killed(ended: Ended, pid: int, seconds: float) -> Found:
    """Judge the end of a run after a kill. pid: of the killed rank. seconds: until all processes had ended."""
    if ended.code is None:
        return failed(f"not all processes have ended {LEAVES:.0f} s after one was killed: kill them, and report this")
    first = next((line for line in ended.err.splitlines() if "error: " in line), "")
    if ended.code != 1 or f"(process {pid} on " not in first or "SIGKILL" not in first:
        return failed(
            f"exit code {ended.code} instead of 1, or the first line does not name process {pid}: {first or 'there is none'}"
        )
    return passed(
        f"all ended after {seconds:.1f} s, exit code 1, and the first line names it: {first.partition('error: ')[2]}"
    )


def judge_fp16(steps: Sequence[dict]) -> Found:
    """Judge an fp16 run. steps: lines of metrics.jsonl, the first FP16_SAVED_AT of them before the save."""
    scales = [step["train/loss_scale"] for step in steps]
    updated = [step["iteration"] for step in steps if not step["train/skipped"]]
    course = f"scale {scales[0]:.3g} -> {scales[-1]:.3g}"
    if len(steps) != FP16_STEPS:
        return failed(f"{course}: {len(steps)} of {FP16_STEPS} steps were taken")
    if not updated:
        return failed(f"{course}: the gradients overflowed in all {FP16_STEPS} steps")
    if updated[0] <= FP16_SAVED_AT:
        return failed(
            f"{course}: step {updated[0]} updated the weights, so the save did not come before the first update: report this"
        )
    if scales[FP16_SAVED_AT] > scales[FP16_SAVED_AT - 1]:
        return failed(f"{course}: the loss scale was not resumed, it rose to {scales[FP16_SAVED_AT]:.3g}")
    lost = [step["iteration"] for step in steps if step["train/loss"] is None]
    if lost or updated[-SETTLED:] != list(range(FP16_STEPS - SETTLED + 1, FP16_STEPS + 1)):
        return failed(
            f"{course}: updates in steps {updated}, no loss in steps {lost}: the loss scale does not become stable"
        )
    return passed(
        f"{course}, first update in step {updated[0]}; saved and resumed after step {FP16_SAVED_AT}, before it"
    )


def judge_waits(stacks: Sequence[Sequence[traceback.FrameSummary]]) -> Found:
    """Judge host waits. stacks: of the operations that waited, outermost call first."""
    places = Counter(map(_place, stacks))
    listed = ", ".join(f"{place}" + (f" ({count}x)" if count > 1 else "") for place, count in places.most_common())
    within = [stack for stack in stacks if any(frame.filename.endswith(WITHIN_LAYERS) for frame in stack)]
    if within:
        return failed(
            f"{len(within)} of {len(stacks)} host waits of a step are within layers, which stalls the GPU in each: {listed}"
        )
    return passed(f"{len(stacks)} per step, none within a layer" + (f": {listed}" if listed else ""))


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    """Return the innermost line of this project or the engine."""
    for frame in reversed(stack):
        for mark in _OURS:
            if mark in frame.filename and "/doctor/" not in frame.filename:
                return f"{mark}{frame.filename.rpartition(mark)[2]}:{frame.lineno}"
    return "elsewhere"


def judge_compilations(graphs: Sequence[int]) -> Found:
    """Judge compilations. graphs: number compiled so far, after each step."""
    late = [number + 1 for number in range(WARM_UP, len(graphs)) if graphs[number] > graphs[number - 1]]
    if late:
        return failed(
            f"compiled again in steps {', '.join(map(str, late))} of {len(graphs)} ({graphs[-1]} graphs): each costs seconds; "
            f"train with --no_fused_kernels, and see TORCH_LOGS=recompiles for the cause"
        )
    return passed(f"{graphs[-1]} graphs, all compiled in the first {WARM_UP} of {len(graphs)} steps")


def judge_memory(used: float, planned: float, resident: bool) -> Found:
    """Judge memory, in bytes, without context, libraries and reserve. resident: `used` is resident memory on a CPU, in fp32."""
    ratio = used / planned
    measured = f"{size(used)} used, {size(planned)} planned: ratio {ratio:.2f}"
    low, high = RATIO
    if not low <= ratio <= high:
        return failed(
            f"{measured}, outside {low} to {high}: do not rely on megatron-ft plan on this machine, and report this"
        )
    return passed(measured + (" (the process's resident memory, in fp32)" if resident else ""))
