"""What the checks' measurements come to: pure functions over plain data, which know neither torch nor the engine."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ft.doctor.result import Ended, Found, failed, passed

STEPS = 8
FALLS_TO = 0.5
"""Of the first loss, at most, on rows that are seen again and again: on a CPU it falls below a hundredth."""
LOSSES_APART = 0.01
"""Largest difference of a step's loss, as a part of the first. On a CPU, bf16 and fp32 are 0.002 apart."""
NORMS_APART = 0.005
"""Largest relative difference of the first step's gradient norm: bf16 and fp32 are 0.0005 apart, LIMA dropout and none 0.019."""
TOLERANCE = 1e-4
"""As verify-invariance has it: fp32, relative."""
LEAVES = 30.0
"""Seconds from the last step, or from the death of a rank, until all processes have to be gone: two on a quiet CPU, eight on a busy one."""
FP16_STEPS, FP16_SAVED_AT = 40, 2
"""A scale of 2^32 halves after each overflow but the first; 2^16 and below overflow nothing here."""
SETTLED = 5
"""Last steps, which all have to be updates."""
WITHIN_LAYERS = (
    "megatron/core/transformer/transformer_layer.py",
    *(f"megatron_ft/models/{name}.py" for name in ("attention", "dropout", "kernels", "norms", "parallel_block")),
)
"""A wait below one of these files comes once a layer and microbatch: the GPU then idles while the host catches up."""
_OURS = ("megatron_ft/", "megatron/core/")
WARM_UP = 3
"""Steps in which kernels may be compiled: of the first shapes, then of any (dynamic) shape."""
RATIO = (0.4, 2.5)
"""Of measured memory to planned, beyond which the plan is of no use."""


@dataclass(frozen=True)
class Course:
    """Of some steps over the same rows."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]


def judge_steps(used: Course, plain: Course | None) -> Found:
    """Pure. plain: of --no_fused_kernels; None where nothing is compiled, and both are the same."""
    first, last = used.losses[0], used.losses[-1]
    fell = f"loss {first:.3f} -> {last:.3f} in {len(used.losses)} steps"
    if not all(map(math.isfinite, (*used.losses, *used.norms))):
        return failed(f"a loss or gradient norm is not finite: {used.losses}, {used.norms}")
    if last > FALLS_TO * first:
        return failed(f"{fell}: it does not fall as it should, though the rows are the same every time")
    if plain is None:
        return passed(f"{fell}; nothing is compiled on a CPU, so there is no second path to compare with")
    losses = max(abs(one - other) for one, other in zip(used.losses, plain.losses, strict=True)) / abs(plain.losses[0])
    norm = abs(used.norms[0] - plain.norms[0]) / plain.norms[0]
    apart = f"{fell}; from --no_fused_kernels losses are {losses:.2%}, the first gradient norm is {norm:.2%} apart"
    if not (losses <= LOSSES_APART and norm <= NORMS_APART):
        return failed(f"{apart} (bounds {LOSSES_APART:.1%}, {NORMS_APART:.1%}): train with --no_fused_kernels")
    return passed(apart)


def judge_masks(found: dict[float, tuple[float, int, int]]) -> Found:
    """Pure. found: rate -> (share of entries kept, entries with another fate than on the CPU forward, backward)."""
    kept = ", ".join(f"{share:.2%} kept at rate {rate}" for rate, (share, *_) in found.items())
    forward, backward = (sum(one[part] for one in found.values()) for part in (1, 2))
    if forward or backward:
        return failed(
            f"{kept}; {forward} entries have another fate than on the CPU, and {backward} of the gradient's: "
            "train with --no_fused_kernels"
        )
    return passed(f"{kept}; the same entries as on the CPU, forward and backward")


def judge_layouts(found: dict[str, list]) -> Found:
    """Pure. found: as on_ranks writes it."""
    far = {name: where for name, (apart, where) in found.items() if not apart <= TOLERANCE}
    listed = ", ".join(f"{name} {apart:.0e}" for name, (apart, _) in found.items())
    if far:
        name, where = next(iter(far.items()))
        return failed(
            f"{listed} from one process (bound {TOLERANCE:.0e}); {name} differs most in {where}: do not train so"
        )
    return passed(f"{listed} from one process (bound {TOLERANCE:.0e})")


def judge_exit(ended: Ended, count: int, seconds: float) -> Found:
    """Pure. seconds: from the last step."""
    processes = f"{count} process{'es' if count > 1 else ''}"
    if ended.code is None:
        return failed(
            f"{processes}: not all gone {LEAVES:.0f} s after the last step; kill them, and report where they hang"
        )
    if ended.code != 0 or "Traceback" in ended.err:
        return failed(f"{processes}: exit code {ended.code}: {ended.said}")
    return passed(f"{processes} gone {seconds:.1f} s after the last step, exit code 0")


def judge_killed(ended: Ended, pid: int, seconds: float) -> Found:
    """Pure. pid: of the rank that was killed; seconds: until all were gone."""
    if ended.code is None:
        return failed(f"not all processes are gone {LEAVES:.0f} s after one was killed: kill them, and report this")
    first = next((line for line in ended.err.splitlines() if "error: " in line), "")
    if ended.code != 1 or f"(process {pid} on " not in first or "SIGKILL" not in first:
        return failed(
            f"exit code {ended.code} instead of 1, or the first line does not name process {pid}: {first or 'it is not there'}"
        )
    return passed(
        f"all gone after {seconds:.1f} s, exit code 1, and the first line says so: {first.partition('error: ')[2]}"
    )


def judge_fp16(steps: Sequence[dict]) -> Found:
    """Pure. steps: lines of metrics.jsonl, the first FP16_SAVED_AT of them before the save."""
    scales = [step["train/loss_scale"] for step in steps]
    updated = [step["iteration"] for step in steps if not step["train/skipped"]]
    course = f"scale {scales[0]:.3g} -> {scales[-1]:.3g}"
    if len(steps) != FP16_STEPS:
        return failed(f"{course}: {len(steps)} of {FP16_STEPS} steps were taken")
    if not updated:
        return failed(f"{course}: not one of {FP16_STEPS} steps had gradients without an overflow")
    if updated[0] <= FP16_SAVED_AT:
        return failed(
            f"{course}: step {updated[0]} was updated, so nothing was saved before the first update: report this"
        )
    if scales[FP16_SAVED_AT] > scales[FP16_SAVED_AT - 1]:
        return failed(f"{course}: resuming forgot the scale, it went up to {scales[FP16_SAVED_AT]:.3g}")
    lost = [step["iteration"] for step in steps if step["train/loss"] is None]
    if lost or updated[-SETTLED:] != list(range(FP16_STEPS - SETTLED + 1, FP16_STEPS + 1)):
        return failed(f"{course}: updated in steps {updated}, without a loss in steps {lost}: it does not settle")
    return passed(
        f"{course}, first update in step {updated[0]}; saved and resumed after step {FP16_SAVED_AT}, before it"
    )


def judge_waits(stacks: Sequence[Sequence[traceback.FrameSummary]]) -> Found:
    """Pure. stacks: of the operations that waited, outermost call first."""
    places = Counter(map(_place, stacks))
    listed = ", ".join(f"{place}" + (f" ({count}x)" if count > 1 else "") for place, count in places.most_common())
    within = [stack for stack in stacks if any(frame.filename.endswith(WITHIN_LAYERS) for frame in stack)]
    if within:
        return failed(
            f"{len(within)} of {len(stacks)} host waits of a step are within layers, which stalls the GPU in each: {listed}"
        )
    return passed(f"{len(stacks)} a step, none within a layer" + (f": {listed}" if listed else ""))


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of ours or of the engine's."""
    for frame in reversed(stack):
        for mark in _OURS:
            if mark in frame.filename and "/doctor/" not in frame.filename:
                return f"{mark}{frame.filename.rpartition(mark)[2]}:{frame.lineno}"
    return "elsewhere"


def judge_compilations(graphs: Sequence[int]) -> Found:
    """Pure. graphs: compiled so far, after each step."""
    late = [number + 1 for number in range(WARM_UP, len(graphs)) if graphs[number] > graphs[number - 1]]
    if late:
        return failed(
            f"compiled again in steps {', '.join(map(str, late))} of {len(graphs)} ({graphs[-1]} graphs): each costs seconds; "
            f"train with --no_fused_kernels, and see TORCH_LOGS=recompiles for the cause"
        )
    return passed(f"{graphs[-1]} graphs, all compiled in the first {WARM_UP} of {len(graphs)} steps")


def judge_memory(used: float, planned: float, resident: bool) -> Found:
    """Pure. Both in bytes, without the context, libraries and reserve. resident: of a process on the CPU, in fp32."""
    ratio = used / planned
    said = f"{used / 1e9:.2f} GB used, {planned / 1e9:.2f} GB planned: {ratio:.2f} times"
    low, high = RATIO
    if not low <= ratio <= high:
        return failed(f"{said}, outside {low} to {high}: do not rely on megatron-ft plan here, and report this")
    return passed(said + (" (the process's resident memory, in fp32)" if resident else ""))
