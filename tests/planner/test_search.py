"""Proposals: finetune takes every one of them; recomputation, uneven stages and a teacher count; remedies are enough, and the smallest."""

import json
import shlex
from dataclasses import replace

import pytest

from megatron_ft.adapters.spec import Lora, ordered
from megatron_ft.commands import finetune
from megatron_ft.config import checks
from megatron_ft.config.cli import parse
from megatron_ft.config.sections import Parallelism
from megatron_ft.models.pipeline import plain_split, split_layers
from megatron_ft.planner import figures, known, memory, search, splits
from megatron_ft.planner.memory import Job
from megatron_ft.planner.remedies import remedies

H100 = known.gpu("h100")


def job(name, gpus, *, arch=None, **more) -> Job:
    arch = arch or known.architecture(name)
    sizes = {"seq_length": 4096, "micro_batch": 1, "global_batch": 64} | more
    return Job(plain_split(arch.num_layers, 1), 1, gpus, **sizes)


def lora(name, **more):
    arch = known.architecture(name)
    return Lora(16, 16.0, ordered(("all",), arch), **more)


FOURTEEN = replace(known.architecture("llama3.2-1b"), num_layers=14)
JOBS = {
    "405B on 2,048": ("llama3-405b", 2048, {"global_batch": 2048}),
    "405B on 2,048 with a small batch": ("llama3-405b", 2048, {}),
    "405B with long rows": ("llama3.1-405b", 2048, {"seq_length": 131072}),
    "70B on 64": ("llama3-70b", 64, {}),
    "70B on 24": ("llama3-70b", 24, {"global_batch": 96}),
    "70B with adapters on 8": ("llama3-70b", 8, {"lora": lora("llama3-70b", dropout=0.1)}),
    "70B in 4 bits on 1": ("llama3-70b", 1, {"lora": lora("llama3-70b"), "nf4": True}),
    "8B under a teacher": ("llama3.1-8b", 16, {"teacher": known.architecture("llama3.1-70b")}),
    "8B with long rows": ("llama3.1-8b", 8, {"seq_length": 131072, "global_batch": 8}),
    "falcon 7B": ("falcon-7b", 6, {"seq_length": 2048}),
}


def settings_of(flags: str):
    words = ["--load", "x", "--data_path", "y", "--train_iters", "10", *shlex.split(flags)]
    return parse(finetune.COMMAND, words)[0]


@pytest.mark.parametrize("name", JOBS)
def test_finetune_takes_every_proposal(name):
    """By its own parser and its own rules; the layout that it reads is the one whose memory was counted."""
    model, gpus, more = JOBS[name]
    arch = known.architecture(model)
    found = search.proposals(arch, job(model, gpus, **more), H100, 85.5e9, 8)
    assert found
    for one in found:
        settings = settings_of(search.flags(one.job))
        parallel, dp = settings.parallel, one.job.dp
        checks.check_settings(settings, gpus)
        checks.recompute_groups_fit(settings.numerics, [len(c) for stage in one.job.split.chunks for c in stage])
        checks.rows_fit_positions(settings.data, arch.max_position_embeddings)
        checks.microbatches_fit_chunks(parallel, settings.batch, settings.data, dp, one.job.split.virtual_size)
        assert split_layers(arch.num_layers, parallel) == one.job.split
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        assert sizes == (one.job.tp, one.job.pp, one.job.cp) and checks.data_parallel_size(parallel, gpus) == dp
        assert one.memory == max(stage.total for stage in memory.stages(arch, one.job)) <= 85.5e9
        assert settings.numerics.recompute_modules in ([], list(one.job.recompute_modules))


def test_405b_has_uneven_stages():
    """Llama 3.1 405B was trained with 126 layers on 16 stages: one layer fewer on the first and the last."""
    arch = known.architecture("llama3-405b")
    found = search.proposals(arch, job("llama3-405b", 2048, global_batch=2048), H100, 85.5e9, 8)
    (sixteen,) = [one for one in found if (one.job.tp, one.job.pp) == (8, 16)]
    assert "--decoder_first_pipeline_num_layers 7 --decoder_last_pipeline_num_layers 7" in search.flags(sixteen.job)
    assert [len(sixteen.job.split.layers_of(stage)) for stage in range(16)] == [7, *[8] * 14, 7]


@pytest.mark.parametrize("layers", [1, 5, 13, 14, 80, 126])
@pytest.mark.parametrize(("stages", "chunks"), [(1, 1), (2, 1), (4, 1), (4, 2), (8, 1), (16, 1), (3, 4)])
def test_splits_are_nearly_even_and_their_flags_mean_them(layers, stages, chunks):
    found = splits.nearly_even(layers, stages, chunks)
    if layers < stages * chunks:
        assert found is None
        return
    sizes = [len(chunk) for stage in found.chunks for chunk in stage]
    assert sum(sizes) == layers and max(sizes) - min(sizes) <= 1
    assert len(found.chunks[-1][-1]) == min(sizes) and found.virtual_size == chunks
    words = dict(zip(*[iter(shlex.split(" ".join(splits.flags_of(found))))] * 2, strict=True))
    given = {name.removeprefix("--"): value for name, value in words.items()}
    given |= {name: int(value) for name, value in given.items() if value.isdigit()}
    assert split_layers(layers, Parallelism(**given)) == found


def test_recomputation_costs_time_and_saves_memory():
    """Nothing, some layers, all; blocks of all layers are as all layers; groups keep less and need more at once."""
    arch = known.architecture("llama2-70b")
    none = replace(job("llama2-70b", 1), split=plain_split(80, 4))
    blocks = [replace(none, recompute="full", recompute_method="block", recompute_layers=n) for n in (5, 10, 20)]
    full = search.whole_layers(none)
    line = [none, blocks[0], blocks[1], blocks[2]]
    kept = [memory.stages(arch, one)[0].activations for one in line]
    times = [figures.flops(arch, one) for one in line]
    assert kept == sorted(kept, reverse=True) and times == sorted(times) and len(set(times)) == 4
    assert kept[3] == memory.stages(arch, full)[0].activations and times[3] == figures.flops(arch, full)
    assert kept[0] - kept[1] == pytest.approx((kept[0] - kept[3]) / 4, rel=1e-6)
    # Narayanan et al. 2021: with all layers recomputed 4/3 of the operations, but the logits only once.
    logits = 6 * arch.vocab_size * arch.hidden_size * 64 * 4096
    assert times[3] - logits == pytest.approx((times[0] - logits) * 4 / 3, rel=1e-9)
    pairs = replace(full, recompute_layers=2)
    grouped, single = memory.stages(arch, pairs)[0], memory.stages(arch, full)[0]
    assert grouped.activations < single.activations and grouped.working > single.working
    modules = search.recomputing_modules(none)
    assert times[0] < figures.flops(arch, modules) < times[3]
    assert kept[3] < memory.stages(arch, modules)[0].activations < kept[0]


def test_the_operations_are_those_of_the_published_formula():
    """Narayanan et al. 2021, section 5.1: 96 B s l h^2 (1 + s / 6h + V / 16 l h) with recomputed layers, for GPT's MLP of 4 h and attention
    over whole rows; here the mask halves attention's products, and the logits are computed once.
    """
    h, layers, s, v = 4096, 32, 2048, 51200
    arch = replace(
        known.architecture("falcon-40b"), num_layers=layers, hidden_size=h, ffn_hidden_size=4 * h, num_attention_heads=32,
        num_query_groups=32, head_dim=128, vocab_size=v,
    )  # fmt: skip
    one = search.whole_layers(job("", 1, arch=arch, seq_length=s, global_batch=8))
    published = 96 * 8 * s * layers * h**2 * (1 + s / (6 * h) / 2 + v / (16 * layers * h))
    assert figures.flops(arch, one) == pytest.approx(published, rel=2e-4)  # norms


def test_a_teacher_takes_time():
    """A third of the time that its own training would take, and what its layers and the wider residual communicate."""
    arch, teacher = known.architecture("llama3.1-8b"), known.architecture("llama3.1-70b")
    alone = replace(job("llama3.1-8b", 4), split=plain_split(32, 4), tp=8, sequence_parallel=True)
    beside = replace(alone, teacher=teacher)
    theirs = replace(alone, split=plain_split(80, 4))
    more = figures.flops(arch, beside) - figures.flops(arch, alone)
    assert more == pytest.approx(figures.flops(teacher, theirs) / 3, rel=1e-9)
    one, both = (figures.step_time(arch, each, H100, 8) for each in (alone, beside))
    assert both.compute > 2 * one.compute and both.communication > one.communication


def test_the_slowest_stage_is_waited_for():
    arch = known.architecture("llama3-405b")
    even, uneven = (replace(job("llama3-405b", 1), split=splits.nearly_even(126, pp)) for pp in (7, 8))
    for one, most in ((even, 18), (uneven, 16)):
        time = figures.step_time(arch, one, H100, 8)
        bubble = figures.bubble(one)
        slowest = time.compute / (1 - bubble) * most * one.pp / 126
        assert time.compute + time.waiting == pytest.approx(slowest, rel=0.04)  # the logits


def test_interleaved_stages_wait_for_the_largest_chunk():
    arch = known.architecture("llama2-70b")
    even, ragged = (replace(job("llama2-70b", 1), split=splits.nearly_even(80, 4, chunks)) for chunks in (5, 8))
    assert {len(chunk) for stage in ragged.split.chunks for chunk in stage} == {2, 3}
    waits = [figures.step_time(arch, one, H100, 8).waiting for one in (even, ragged)]
    assert waits[1] > waits[0]


def test_context_parallelism_is_for_long_rows():
    arch = known.architecture("llama3.1-8b")
    short, long = (
        search.proposals(arch, job("llama3.1-8b", 8, seq_length=length, global_batch=8), H100, 85.5e9, 8)
        for length in (8192, 131072)
    )
    assert all(one.job.cp == 1 for one in short) and any(one.job.cp > 1 for one in long)
    for one in long:
        assert one.job.cp == 1 or "--no_packing" in search.flags(one.job)


HELPLESS = {
    "70B on 8": ("llama3-70b", 8, 85.5, {}),
    "8B on a small GPU": ("llama3-8b", 1, 25.3, {}),
    "8B with adapters on a small GPU": ("llama3-8b", 1, 25.3, {"lora": lora("llama3-8b")}),
    "405B on 8": ("llama3-405b", 8, 85.5, {}),
}


@pytest.mark.parametrize("name", HELPLESS)
def test_remedies_are_enough_and_the_smallest(name):
    model, gpus, size, more = HELPLESS[name]
    arch, one = known.architecture(model), job(model, gpus, **more)
    assert not search.proposals(arch, one, H100, size * 1e9, 8)
    found = {entry.flags.split()[0]: entry for entry in remedies(arch, one, size * 1e9, 8)}
    assert found
    for flag, entry in found.items():
        words = dict(zip(*[iter(entry.flags.split())] * 2, strict=True))
        assert entry.memory <= (known.gpu(words["--gpu"]).memory if flag == "--gpu" else size) * 1e9
        if flag == "--gpus":
            count = int(words[flag])
            assert search.proposals(arch, job(model, count, **more), H100, size * 1e9, 8)
            below = count - 1 if count <= 8 else count - 8
            assert below == gpus or not search.proposals(arch, job(model, below, **more), H100, size * 1e9, 8)
        if flag == "--seq_length":
            length = int(words[flag])
            assert search.proposals(arch, replace(one, seq_length=length), H100, size * 1e9, 8)
            assert not search.proposals(arch, replace(one, seq_length=length + 256), H100, size * 1e9, 8)
        if flag == "--lora_rank":
            changed = replace(one, lora=lora(model), nf4="--base_precision" in words)
            assert search.proposals(arch, changed, H100, size * 1e9, 8)


def screen(capsys, *words: str) -> str:
    from megatron_ft.__main__ import main

    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


SCREENS = {
    "405B on 2,048": "llama3-405b --gpus 2048 --gpu h100",
    "405B on 2,048, uneven": "llama3-405b --gpus 2048 --gpu h100 --tensor_model_parallel_size 8 --pipeline_model_parallel_size 16 "
    "--decoder_first_pipeline_num_layers 7 --decoder_last_pipeline_num_layers 7 --sequence_parallel --use_distributed_optimizer",
    "405B on 8": "llama3-405b --gpus 8",
    "70B on 8": "llama3-70b --gpus 8 --gpu h100",
    "70B on 64": "llama3-70b --gpus 64 --gpu h100",
    "7B on 8, without a wait": "qwen2.5-7b --gpus 8 --gpu h100",
    "8B": "llama3-8b",
    "8B on a small GPU": "llama3-8b --gpu rtx4090 --gpus 1",
    "8B with adapters": "llama3-8b --gpu rtx4090 --lora_rank 16 --base_precision nf4",
    "a laptop": "smollm2-135m --gpu cpu --fp32 --seq_length 512",
    "a teacher": "llama3.1-8b --teacher llama3.1-70b --gpus 16 --gpu h100",
    "long rows": "llama3.1-8b --gpus 8 --gpu h100 --seq_length 131072 --global_batch_size 8",
}


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_of_80_columns_says_one_thing(name, capsys, monkeypatch):
    """Nothing fits and does not at once; where nothing does, a change that does is named; its own flags are the only long line."""
    monkeypatch.setenv("COLUMNS", "80")
    text = screen(capsys, *SCREENS[name].split())
    lines = [line.rstrip() for line in text.splitlines()]
    assert all(len(line) <= 80 for line in lines if not line.startswith("flags of")), text
    assert "…" not in text and "-0.0" not in text
    fits, none = any(line.startswith("fits: ") for line in lines), "No layout of" in text
    assert not (fits and none) and fits + any(line.startswith("does not fit: ") for line in lines) == 1
    assert none == ("The smallest change that" in " ".join(lines))
    assert none or text.count("flags of") == 1


def test_the_same_screen_as_json(capsys):
    found = json.loads(screen(capsys, "llama3-70b", "--gpus", "8", "--gpu", "h100", "--json"))
    assert found["chosen"] and not found["proposals"]
    assert found["remedies"][0]["flags"] == "--gpus 16"
    found = json.loads(screen(capsys, "llama3-70b", "--gpus", "16", "--gpu", "h100", "--json"))
    assert found["proposals"] and found["proposals"][0]["flags"] == found["flags"] and not found["remedies"]
    assert max(stage["total"] for stage in found["stages"]) <= found["gpu"]["memory_bytes"]


def test_what_recomputation_makes_fit_is_named(capsys):
    """The given layout does not fit, and does with the flags that are named."""
    words = ["llama2-70b", "--gpus", "32", "--tensor_model_parallel_size", "8", "--pipeline_model_parallel_size", "4"]
    found = json.loads(screen(capsys, *words, "--micro_batch_size", "4", "--json"))
    assert found["fits_with"]["memory"] <= found["gpu"]["memory_bytes"]
    again = json.loads(
        screen(capsys, *words, "--micro_batch_size", "4", *found["fits_with"]["flags"].split(), "--json")
    )
    assert (
        again["fits_with"] is None and max(stage["total"] for stage in again["stages"]) == found["fits_with"]["memory"]
    )


def test_given_settings_are_kept(capsys):
    words = ("llama3-8b", "--gpus", "8", "--gpu", "h100", "--micro_batch_size", "2", "--recompute_granularity", "full")
    found = json.loads(screen(capsys, *words, "--json"))
    assert found["micro_batch_size"] == 2 and found["recompute"] == "full" and found["chosen"]
