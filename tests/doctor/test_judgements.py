"""The pure halves of the checks: each fails on facts that are wrong, and says what to do."""

import traceback

import pytest

from megatron_ft.doctor import judge, machine
from megatron_ft.doctor.machine import DriverFacts
from megatron_ft.doctor.result import Ended
from megatron_ft.models.machine import Machine

NODE = ("/dev/nvidia0",)


@pytest.mark.parametrize(
    "facts, outcome, words",
    [
        (DriverFacts(NODE, "13.0", "13.1", usable=True), "pass", "supports CUDA 13.1, torch was built for CUDA 13.0"),
        (DriverFacts(NODE, "12.8", "12.2", usable=True), "pass", "12.2"),  # minor releases work together
        (DriverFacts(NODE, "13.0", "12.4", usable=False), "fail", "too old; update it, or install a torch built for CUDA 12.4"),
        (DriverFacts(NODE, None, "12.4", usable=False), "fail", "built for the CPU: install torch's build for CUDA 12.4"),
        (DriverFacts(NODE, "12.8", None, usable=False), "fail", "no driver responds"),
        (DriverFacts(NODE, "12.8", "12.8", usable=False), "fail", "torch finds no GPU"),
        (DriverFacts((), None, None, usable=False), "skipped", "no NVIDIA GPU found"),
        (DriverFacts(NODE, "12.8", "12.8", usable=False, hidden=True), "skipped", "hidden"),
    ],
)  # fmt: skip
def test_driver(facts, outcome, words):
    found = machine.judge_driver(facts)
    assert found.outcome == outcome and words in found.detail, found


WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    "gpus, compiled, outcome, words",
    [
        ([("H100", (9, 0))] * 8, WHEEL, "pass", "8 x H100 (sm90)"),
        ([("A10", (8, 6)), ("H100", (9, 0))], WHEEL, "pass", "slowest"),
        ([("L4", (8, 9))], WHEEL, "pass", "sm89"),  # machine code of sm_86 runs on its generation
        ([("T4", (7, 5))], WHEEL, "fail", "flash kernels need sm80"),
        ([("B200", (10, 0))], WHEEL, "fail", "no kernels for B200"),
        ([("B200", (10, 0))], [*WHEEL, "compute_90"], "pass", "sm100"),
        ([("V100", (7, 0))], WHEEL, "fail", "no kernels for V100"),
        ([], [], "skipped", "CPU"),
    ],
)
def test_capability(gpus, compiled, outcome, words):
    found = machine.judge_capability(gpus, compiled)
    assert found.outcome == outcome and words in found.detail, found


def test_compiler():
    assert machine.judge_compiler(Machine(has_gpu=True, compiles=True)).outcome == "pass"
    assert machine.judge_compiler(Machine()).outcome == "skipped"
    found = machine.judge_compiler(
        Machine(has_gpu=True, lacks={"compiles": "Python.h is missing: install python3-dev"})
    )
    assert found.outcome == "fail" and "install python3-dev" in found.detail


GOOD = judge.Course((5.8, 2.6, 0.9), (7.3, 5.2, 3.2))


@pytest.mark.parametrize(
    "used, plain, words",
    [
        (judge.Course((5.8, float("nan"), 0.9), GOOD.norms), None, "not finite"),
        (judge.Course(GOOD.losses, (float("inf"), 1.0, 1.0)), None, "not finite"),
        (judge.Course((5.8, 5.8, 5.8), GOOD.norms), None, "does not fall"),
        (judge.Course((5.8, 2.7, 0.9), GOOD.norms), GOOD, "--no_fused_kernels"),
        (judge.Course(GOOD.losses, (7.4, 5.2, 3.2)), GOOD, "--no_fused_kernels"),
    ],
    ids=["loss is nan", "norm is inf", "no learning", "losses apart", "gradients apart"],
)
def test_steps(used, plain, words):
    found = judge.judge_steps(used, plain)
    assert found.outcome == "fail" and words in found.detail
    assert judge.judge_steps(GOOD, None).outcome == judge.judge_steps(GOOD, GOOD).outcome == "pass"


def test_layouts():
    assert judge.judge_layouts({"TP2": [2e-6, "a"], "DP2": [1e-7, "b"]}).outcome == "pass"
    for apart in (2e-4, float("nan"), float("inf")):
        found = judge.judge_layouts({"TP2": [2e-6, "a"], "DP2": [apart, "the.weight"]})
        assert found.outcome == "fail" and "DP2 differs most in the.weight" in found.detail


KILLED = "megatron-ft: error: rank 1 (process 77 on here) was ended by SIGKILL; the others are ended too\n"


def test_ends_of_runs():
    assert judge.judge_exit(Ended(0, "", "a warning"), 2, 0.5).outcome == "pass"
    for ended in (Ended(None, "", ""), Ended(1, "", "boom"), Ended(-11, "", ""), Ended(0, "", "Traceback (most ...")):
        assert judge.judge_exit(ended, 2, 0.5).outcome == "fail", ended
    assert judge.judge_killed(Ended(1, "", "log line\n" + KILLED), 77, 2.0).outcome == "pass"
    others = "megatron-ft finetune: error: rank 0 lost another process of the run\n"
    for ended in (Ended(None, "", KILLED), Ended(0, "", KILLED), Ended(1, "", ""), Ended(1, "", others + KILLED)):
        assert judge.judge_killed(ended, 77, 2.0).outcome == "fail", ended
    assert judge.judge_killed(Ended(1, "", KILLED), 78, 2.0).outcome == "fail"  # names another process


def scaled(*changes: dict) -> list[dict]:
    """Lines of metrics of a run whose scale halves until step 20; changes: {step: entries that are otherwise}."""
    steps = [
        {"iteration": n, "train/loss": 5.0, "train/skipped": int(n < 20), "train/loss_scale": 2.0 ** (32 - min(n, 20))}
        for n in range(1, judge.FP16_STEPS + 1)
    ]
    for number, entries in (pair for change in changes for pair in change.items()):
        steps[number - 1] |= entries
    return steps


@pytest.mark.parametrize(
    "steps, words",
    [
        (scaled()[:-1], "39 of 40 steps"),
        (scaled({n: {"train/skipped": 1} for n in range(1, 41)}), "overflowed in all 40 steps"),
        (scaled({1: {"train/skipped": 0}}), "before the first update"),
        (scaled({3: {"train/loss_scale": 2.0**32}}), "was not resumed"),
        (scaled({39: {"train/skipped": 1}}), "does not become stable"),
        (scaled({30: {"train/loss": None}}), "no loss in steps [30]"),
    ],
)
def test_fp16(steps, words):
    found = judge.judge_fp16(steps)
    assert found.outcome == "fail" and words in found.detail, found
    assert judge.judge_fp16(scaled()).outcome == "pass"


def stack(*files: str) -> list[traceback.FrameSummary]:
    return [traceback.FrameSummary(f"/x/{name}", 7, "f") for name in files]


def test_masks():
    found = judge.judge_masks({0.1: (0.9, 0, 0), 0.3: (0.7, 0, 0)})
    assert found.outcome == "pass" and "70.00% kept at rate 0.3" in found.detail
    for wrong in ((0.5, 12, 0), (0.7, 0, 12)):
        found = judge.judge_masks({0.1: (0.9, 0, 0), 0.3: wrong})
        assert found.outcome == "fail" and "12" in found.detail and "--no_fused_kernels" in found.detail


def test_host_waits():
    step = ("megatron_ft/doctor/efficiency.py", "megatron_ft/training/step.py", "torch/_tensor.py")
    found = judge.judge_waits([stack(*step), stack(*step), stack("torch/other.py")])
    assert (
        found.outcome == "pass"
        and "3 per step" in found.detail
        and "megatron_ft/training/step.py:7 (2x)" in found.detail
    )
    for file in ("megatron_ft/models/attention.py", "megatron/core/transformer/transformer_layer.py"):
        found = judge.judge_waits([stack(*step), stack(*step[:2], file, "torch/_tensor.py")])
        assert found.outcome == "fail" and "1 of 2 host waits" in found.detail and file in found.detail
    assert judge.judge_waits([]).outcome == "pass"


def test_recompilations():
    assert judge.judge_compilations([2, 4, 5, *[5] * 17]).outcome == "pass"
    found = judge.judge_compilations([2, 4, 5, 5, 6, *[6] * 15])
    assert found.outcome == "fail" and "in steps 5 of 20" in found.detail


def test_memory():
    assert judge.judge_memory(1.2e9, 1e9, True).outcome == "pass"
    assert judge.judge_memory(3e9, 1e9, False).outcome == judge.judge_memory(0.1e9, 1e9, False).outcome == "fail"
