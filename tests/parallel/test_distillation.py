"""A resident teacher: the same loss and gradients in every layout, as transformers and torch compute them, and what a run leaves."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parallel.jobs import SEQ_LENGTH, finetune, make_llama, read_metrics, to_checkpoint, to_hf
from tests.parallel.test_against_transformers import samples_of
from tests.parallel.test_invariance import FALCON, LLAMA, TOLERANCE

WIDER = dataclasses.replace(LLAMA, hidden_size=96, num_attention_heads=12, ffn_hidden_size=192, num_layers=8)
PAIRS = {
    "a wider and deeper teacher": (LLAMA, WIDER),
    "other activation, tied": (dataclasses.replace(FALCON, activation="relu"), FALCON),
}
LAYOUTS = {
    "TP2 + sequence parallel": 2, "PP2": 2, "PP4": 4, "PP2, interleaved": 2, "PP2, uneven": 2,
    "TP2 x PP2 + sequence parallel": 4, "DP2": 2, "two rows at once": 1,
}  # fmt: skip


def measure(case, student, teacher):
    from megatron_ft.models.distilled_loss import Mix
    from megatron_ft.training import invariance
    from megatron_ft.training.objectives.distillation import Distillation

    objective = Distillation(Mix(0.5, 0.7, 2.0))
    return invariance.measure(invariance.Problem(student, objective=objective, teacher=teacher), case)


@pytest.fixture(scope="module")
def pools(one_rank, four_ranks):
    from tests.ranks import Ranks

    two = Ranks(2)
    yield {1: one_rank, 2: two, 4: four_ranks}
    two.close()


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.works("teacher", "packing", ["SP", "PP", "VPP", "uneven stages", "DP"])
@pytest.mark.works("teacher", "Falcon", "ReLU", "tied embeddings", ["SP", "PP", "VPP", "DP"])
def test_every_layout_computes_the_same(kind, pools):
    from megatron_ft.commands.verify_invariance import cases_for
    from megatron_ft.training.invariance import Case, compare

    (reference,) = pools[1].run(measure, Case("one", 1), *PAIRS[kind])
    cases = [case for case in cases_for(LLAMA) if case.name in LAYOUTS and case.packing]
    assert {case.name for case in cases} == set(LAYOUTS)
    for case in cases:
        found = compare(reference, pools[case.processes].run(measure, case, *PAIRS[kind])[0])
        assert found.largest < TOLERANCE, (case.name, found)


@pytest.fixture(scope="module")
def hf_teacher(tmp_path_factory):
    """Wider, deeper, of the same vocabulary."""
    sizes = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 8}
    return make_llama(tmp_path_factory.mktemp("teacher") / "hf", **sizes)


@pytest.fixture(scope="module")
def teacher(hf_teacher, tmp_path_factory):
    return to_checkpoint(hf_teacher, tmp_path_factory.mktemp("teacher") / "checkpoint", "torch_dist", 1, 1)


def train(layout, load, shards, save, until, flags):
    finetune(
        layout, load=load, data_path=[shards], save=save, train_iters=until, lr_decay_iters=10, report=False, **flags
    )


MIX = {"kd_weight": 0.7, "ce_weight": 0.5, "kd_temperature": 2.0}


def distilled_step(layout, load, shards, teacher):
    """(loss, ce, kl, gradients by name, without padding) of the first step, from the rank that has them."""
    from unittest import mock

    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.training import invariance, setup
    from megatron_ft.training.step import Stepper

    arch, step, found = describe(find_checkpoint(Path(load))).architecture, Stepper.train, []

    def measured(stepper, *args, **options):
        result = step(stepper, *args, **options)
        found.append((result.loss, result.more, invariance._gathered(setup.bare(stepper.model), arch)))
        return result

    with mock.patch.object(Stepper, "train", measured):
        flags = {"packing": False, "teacher": teacher, "clip_grad": 0.0, **MIX}
        train(layout, load, shards, None, 1, flags)
    return found[0]


def distilled_step_in_fp64(*arguments):
    """The same with weights, activations and gradients in fp64, which no flag offers: what is left is not rounding."""
    from unittest import mock

    from megatron_ft.commands import finetune_rank
    from megatron_ft.training import setup

    config = setup.DistributedDataParallelConfig
    with (
        mock.patch.object(setup, "dtype_of", lambda numerics: torch.float64),
        mock.patch.object(
            setup, "DistributedDataParallelConfig", lambda **fields: config(**fields | {"grad_reduce_in_fp32": False})
        ),
        mock.patch.object(finetune_rank, "weight_hashes", lambda *_: {}),  # they know no fp64
    ):
        return distilled_step(*arguments)


@pytest.fixture(scope="module")
def students(llama, checkpoint, tmp_path_factory):
    """kind -> (Hugging Face folder, checkpoint). The teacher is untied."""
    folder = tmp_path_factory.mktemp("tied")
    tied = make_llama(folder / "hf", tie_word_embeddings=True)
    return {
        "untied": (llama, checkpoint),
        "tied": (tied, to_checkpoint(tied, folder / "checkpoint", "torch_dist", 1, 1)),
    }


@pytest.fixture(scope="module")
def theirs(students, hf_teacher, shards):
    """kind of student -> (ce, kl, gradients) of the first step with transformers and torch in fp64, norms and angles too."""
    from unittest import mock

    from transformers.models.llama import modeling_llama as theirs

    norm = mock.patch.object(theirs.LlamaRMSNorm, "forward", norm_in_fp64)
    angles = mock.patch.object(theirs.LlamaRotaryEmbedding, "forward", angles_in_fp64)
    with norm, angles:
        return {kind: step_of_transformers(hf, hf_teacher, shards) for kind, (hf, _) in students.items()}


def norm_in_fp64(norm, x):
    """transformers' own computes in fp32 whatever its input is: gradients change by up to 2e-7."""
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def angles_in_fp64(embedding, x, position_ids):
    theta, size = embedding.config.rope_parameters["rope_theta"], embedding.config.head_dim
    pairs = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = (position_ids[..., None] * pairs).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def step_of_transformers(student, hf_teacher, shards):
    from transformers import LlamaForCausalLM

    from megatron_ft.data.roles import ASSISTANT
    from megatron_ft.data.shards import open_shards

    model, of = (LlamaForCausalLM.from_pretrained(one, dtype=torch.float64) for one in (student, hf_teacher))
    opened, sums, weight = open_shards(shards), [0.0, 0.0], 0
    temperature = MIX["kd_temperature"]
    for sample in samples_of(shards, 0):
        tokens, roles = opened.tokens(sample)[: SEQ_LENGTH + 1], opened.roles(sample)[: SEQ_LENGTH + 1]
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        logits = model(input_ids=ids[:, :-1]).logits[0]
        with torch.no_grad():
            log_p = (of(input_ids=ids[:, :-1]).logits[0] / temperature).log_softmax(-1)
        mask = torch.from_numpy((roles[1:] == ASSISTANT).astype(np.float64))
        ce = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        log_q = (logits / temperature).log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        sums = [sums[0] + (ce * mask).sum(), sums[1] + (kl * mask).sum()]
        weight += int(mask.sum())
    ce, kl = (one / weight for one in sums)
    (MIX["ce_weight"] * ce + MIX["kd_weight"] * temperature**2 * kl).backward()
    return float(ce), float(kl), {name: p.grad for name, p in model.named_parameters()}


def in_our_names(gradients, root):
    """transformers' gradients as those of our tensors: a family's rules reorder numbers, so they hold for gradients too."""
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.models.families import family_of
    from megatron_ft.models.weights import placed_rules

    arch = describe(find_checkpoint(Path(root))).architecture
    return {
        f"model.{placed.dist_key}": placed.rule.to_megatron(arch, [gradients[name] for name in placed.hf_keys]).numpy()
        for placed in placed_rules(arch, family_of(arch).rules(arch))
    }


@pytest.mark.parametrize("student", ["untied", "tied"])
@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=["one process", "TP2xPP2"])
@pytest.mark.parametrize("kind", ["fp32", "fp64"])
def test_as_transformers_computes_it(kind, layout, student, students, theirs, one_rank, four_ranks, teacher, shards):
    """Loss, its parts, and every gradient: also of the fused query, key and value, and of gate and up.

    In fp32 the norm of the difference is up to 7.1e-7 of the gradient's, its largest entry 9.2e-7 of the gradient's largest: rounding, for
    transformers in fp32 is 5.9e-7 and 7.7e-7 off. In fp64 the largest is 1.0e-7: the tables of the rotary embedding are in fp32.
    """
    pool, load = four_ranks if layout == (2, 2) else one_rank, students[student][1]
    ce, kl, gradients = theirs[student]
    step, largest = (distilled_step_in_fp64, 3e-7) if kind == "fp64" else (distilled_step, 2e-6)
    results = pool.run(step, layout, load, shards, teacher)
    loss, more, _ = results[-1]
    assert abs(more["ce"] - ce) < 1e-6 and abs(more["kl"] - kl) < 1e-6
    assert abs(loss / (0.5 * ce + 0.7 * 4 * kl) - 1) < 1e-6
    assert {"ce_by_role/assistant", "kl_by_role/assistant", "kl_by_position/0-127"} <= more.keys()
    ours = next(found for _, _, found in results if found is not None)
    expected = in_our_names(gradients, load)
    assert ours.keys() == expected.keys() and len(expected) == 4 * 6 + 3 - (student == "tied")
    for name, value in expected.items():
        off = ours[name] - value
        assert np.linalg.norm(off) < 1e-6 * np.linalg.norm(value), name
        assert abs(off).max() < largest * abs(value).max(), name


def test_nothing_to_learn_from_oneself(four_ranks, checkpoint, shards):
    """KL and gradient are exactly 0, also in bf16, where both models are rounded alike."""
    for flags in ({}, {"bf16": True, "use_distributed_optimizer": True}):
        found = four_ranks.run(own_teacher, checkpoint, shards, flags)
        assert all(norm == 0 for _, norm in found) and found[-1][0] == 0


def own_teacher(load, shards, flags):
    """(KL, gradient norm) of the first step."""
    from unittest import mock

    from megatron_ft.training.step import Stepper

    step, found = Stepper.train, []

    def measured(stepper, *args, **options):
        found.append(step(stepper, *args, **options))
        return found[-1]

    with mock.patch.object(Stepper, "train", measured):
        train((2, 2), load, shards, None, 1, {"teacher": load, "ce_weight": 0.0, **flags})
    return found[0].more.get("kl"), found[0].grad_norm


ALL = {"hidden_dropout": 0.1, "lima_dropout": True, "recompute_granularity": "full", "use_distributed_optimizer": True}
RUNS = {
    "TP2xPP2": ((2, 2), {}),
    "PP2, interleaved, bf16": ((1, 2), {"virtual_pipeline_model_parallel_size": 2, "bf16": True}),
    "LoRA": ((2, 2), {"lora_rank": 4, "use_distributed_optimizer": False}),
}


@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.thorough] * (run == "LoRA")) for run in RUNS])
@pytest.mark.works("teacher", "resume", "dropout", "recompute", "distributed optimizer", ["SP", "PP"])
@pytest.mark.works("teacher", "resume", "dropout", "recompute", "VPP", "bf16")
@pytest.mark.works("teacher", "resume", "dropout", "recompute", "LoRA")
def test_ten_steps_are_five_and_five(run, four_ranks, checkpoint, teacher, shards, tmp_path):
    layout, flags = RUNS[run]
    flags = ALL | {"teacher": teacher, "global_batch_size": 4, "micro_batch_size": 1} | flags
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    four_ranks.run(train, layout, checkpoint, shards, str(straight), 10, flags)
    four_ranks.run(train, layout, checkpoint, shards, str(resumed), 5, flags)
    four_ranks.run(train, layout, str(resumed), shards, str(resumed), 10, flags)
    for name in ("train/loss", "train/ce", "train/kl", "train/kl_by_role/assistant"):
        assert read_metrics(straight, name) == read_metrics(resumed, name) and len(read_metrics(straight, name)) == 10
    one, other = (tensors(folder) for folder in (straight, resumed))
    assert one == other and one


def tensors(root) -> dict[str, str]:
    from megatron_ft.checkpoints.folder import find_checkpoint
    from megatron_ft.checkpoints.verify import tensor_hashes

    return {name: value for name, value in tensor_hashes(find_checkpoint(root)).items() if "extra_state" not in name}


def test_the_teacher_is_neither_trained_nor_saved(four_ranks, checkpoint, teacher, shards, tmp_path):
    for before, after in four_ranks.run(teacher_hashes, checkpoint, shards, teacher, str(tmp_path / "run")):
        assert before and before == after
    saved = to_hf(str(tmp_path / "run"), tmp_path / "hf")
    assert saved["model.embed_tokens.weight"].shape[1] == 64 and "model.layers.4.mlp.up_proj.weight" not in saved
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["teacher"] == {"path": str(Path(teacher).resolve() / "release"), "weights": before}
    assert "teacher: " in (tmp_path / "run" / "training.yaml").read_text()


def teacher_hashes(load, shards, teacher, save):
    """The teacher's weights in memory, before the first step and after the last."""
    from unittest import mock

    from megatron_ft.adapters.base import weight_hashes
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.training.setup import teachers
    from megatron_ft.training.step import Stepper

    arch, step, found = describe(find_checkpoint(Path(teacher))).architecture, Stepper.train, []

    def measured(stepper, *args, **options):
        if not found:
            found.append(weight_hashes(teachers(stepper.model), arch))
        result = step(stepper, *args, **options)
        found[1:] = [weight_hashes(teachers(stepper.model), arch)]
        return result

    with mock.patch.object(Stepper, "train", measured):
        train((2, 2), load, shards, save, 3, {"teacher": teacher, "bf16": False})
    return found[0], found[1]


@pytest.mark.works("teacher", "answers while training", ["SP", "PP", "VPP"])
def test_answers_while_training(four_ranks, checkpoint, teacher, shards):
    """The student answers alone; stages still exchange what the pair exchanges."""
    for layout, chunks in (((2, 2), None), ((1, 2), 2)):
        with_teacher, without = (
            four_ranks.run(answers, layout, chunks, checkpoint, shards, one) for one in (teacher, None)
        )
        assert with_teacher == without and without[0]


def answers(layout, chunks, load, shards, teacher):
    from unittest import mock

    from megatron_ft.generation.whole_rows import RowDecoder
    from megatron_ft.training.step import Stepper

    step, found = Stepper.train, []

    def measured(stepper, *args, **options):
        decoder = RowDecoder(stepper.model, stepper.layout, [], 203, SEQ_LENGTH, 128)
        found.extend(decoder.generate([np.arange(1, 9), np.arange(20, 25)], 6))
        return step(stepper, *args, **options)

    with mock.patch.object(Stepper, "train", measured):
        flags = {"teacher": teacher, "virtual_pipeline_model_parallel_size": chunks}
        train(layout, load, shards, None, 1, flags)
    return found


def refused(load, shards, flags, layout=(1, 1)):
    from megatron_ft.errors import UserError

    try:
        train(layout, load, shards, None, 1, flags)
    except UserError as error:
        return str(error)
    return None


def test_teachers_that_do_not_fit(one_rank, four_ranks, checkpoint, teacher, shards, tmp_path):
    other = to_checkpoint(make_llama(tmp_path / "hf", vocab_size=211), tmp_path / "other", "torch_dist", 1, 1)
    three = to_checkpoint(make_llama(tmp_path / "hf3", num_hidden_layers=3), tmp_path / "three", "torch_dist", 1, 1)
    short = to_checkpoint(
        make_llama(tmp_path / "short", max_position_embeddings=32), tmp_path / "of32", "torch_dist", 1, 1
    )
    classic = to_checkpoint(tmp_path / "hf3", tmp_path / "classic", "torch", 1, 1)
    cases = [
        (one_rank, (1, 1), other, "a vocabulary of 211, the model one of 203"),
        (four_ranks, (1, 2), three, "does not divide the model's num_layers 3"),
        (four_ranks, (2, 1), classic, "classic format for TP1 x PP1, this run is TP2 x PP1"),
        (one_rank, (1, 1), short, "--seq_length 64 is beyond the model's 32 positions"),
        (one_rank, (1, 1), str(tmp_path / "nowhere"), "no such folder"),
    ]
    for pool, layout, wrong, message in cases:
        error = pool.run(refused, checkpoint, shards, {"teacher": wrong}, layout)[0]
        assert error.startswith("--teacher: ") and message in error and "\n" not in error
