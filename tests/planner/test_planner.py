"""Plans against the engine: parameters of every rank, what a layer keeps, what a checkpoint weighs; and the command."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ft.adapters.spec import Lora, ordered
from megatron_ft.errors import CheckpointError, UserError
from megatron_ft.models.pipeline import plain_split
from megatron_ft.planner import figures, known, memory, search
from megatron_ft.planner.memory import Job
from tests.planner import jobs


def job(arch, tp=1, pp=1, dp=1, **more) -> Job:
    sizes = {"seq_length": 4096, "micro_batch": 2, "global_batch": 64} | more
    return Job(plain_split(arch.num_layers, pp), tp, dp, **sizes)


@pytest.mark.parametrize("name, tp, pp", [("llama2-70b", 8, 4), ("falcon-40b", 8, 2)])
def test_parameters_of_every_rank(name, tp, pp, one_rank):
    """Against the engine's own model of each rank, built without memory."""
    arch = known.architecture(name)
    built = one_rank.run(jobs.parameters_of_every_rank, arch, tp, pp)[0]
    planned = [stage.parameters for stage in memory.stages(arch, job(arch, tp, pp)) for _ in range(tp)]
    assert len(built) == tp * pp and planned == built


def small(family):
    """Return the family's architecture at a size that one rank computes at once. With LayerNorm: RMSNorm in torch's CPU version keeps
    intermediates that its fused GPU version does not.
    """
    sizes = {
        "num_layers": 2,
        "hidden_size": 256,
        "head_dim": 32,
        "num_attention_heads": 8,
        "ffn_hidden_size": 704,
        "vocab_size": 512,
    }
    groups = 1 if family == "falcon-7b" else 2
    return replace(known.architecture(family), **sizes, num_query_groups=groups, norm="layernorm")


@pytest.mark.parametrize("family", ["llama2-70b", "falcon-40b", "falcon-7b", "qwen2.5-7b"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_a_layer_keeps(family, recompute, one_rank):
    """Against what autograd keeps in one more layer of a small model, within 5%."""
    arch = small(family)
    kept = one_rank.run(jobs.kept_by_a_layer, arch, 512, None if recompute == "none" else recompute)[0]
    planned = memory.layer_activations(arch, job(arch, seq_length=512, micro_batch=1, recompute=recompute))
    assert planned == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("family", ["llama2-70b", "falcon-40b", "falcon-7b", "qwen3-8b"])
@pytest.mark.parametrize(
    "modules", [("mlp",), ("layernorm",), ("mlp", "layernorm"), ("core_attn", "mlp")], ids="+".join
)
def test_what_a_layer_keeps_that_recomputes_parts(family, modules, one_rank):
    arch = small(family)
    kept = one_rank.run(jobs.kept_by_a_layer, arch, 512, "selective", None, modules)[0]
    planned = job(arch, seq_length=512, micro_batch=1, recompute="selective", recompute_modules=modules)
    assert memory.layer_activations(arch, planned) == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_layer_with_adapters_keeps_that_recomputes_its_mlp(dropout, one_rank):
    arch = small("llama2-70b")
    own, modules = lora(arch, dropout=dropout), ("mlp", "layernorm")
    kept = one_rank.run(jobs.kept_by_a_layer, arch, 512, "selective", own, modules)[0]
    planned = job(arch, seq_length=512, micro_batch=1, recompute="selective", recompute_modules=modules, lora=own)
    assert memory.layer_activations(arch, planned) == pytest.approx(kept, rel=0.05)


def lora(arch, rank=16, targets=("all",), **more):
    return Lora(rank, 16.0, ordered(targets, arch), **more)


@pytest.mark.parametrize(
    ("family", "targets", "dropout", "recompute"),
    [
        ("llama2-70b", ("all",), 0.0, "none"),
        ("llama2-70b", ("all",), 0.1, "none"),
        ("llama2-70b", ("all",), 0.1, "full"),
        ("llama2-70b", ("q_proj", "v_proj"), 0.0, "none"),
        ("falcon-7b", ("all",), 0.1, "none"),
        ("falcon-7b", ("fc2",), 0.0, "none"),
    ],
)
def test_what_a_layer_with_adapters_keeps(family, targets, dropout, recompute, one_rank):
    arch = small(family)
    own = lora(arch, targets=targets, dropout=dropout)
    kept = one_rank.run(jobs.kept_by_a_layer, arch, 512, None if recompute == "none" else recompute, own)[0]
    planned = memory.layer_activations(arch, job(arch, seq_length=512, micro_batch=1, recompute=recompute, lora=own))
    assert planned == pytest.approx(kept, rel=0.05)


def test_adapters_have_all_the_state():
    """The 13B of Airophin at rank 64: 250,347,520 adapter parameters, as PEFT counts them for all seven modules."""
    arch = known.architecture("llama2-13b")
    own = lora(arch, 64)
    assert own.parameters(arch) == 250_347_520
    frozen, trained = (memory.stages(arch, job(arch, lora=one))[0] for one in (own, None))
    assert (frozen.trained, trained.trained) == (250_347_520, trained.parameters)
    assert frozen.weights == 2 * (trained.parameters + 250_347_520)
    assert frozen.gradients == 4 * 250_347_520 and frozen.optimizer == 12 * 250_347_520
    cut = memory.stages(arch, job(arch, 2, 2, lora=own))
    assert 250_347_520 / 4 < cut[0].trained < 250_347_520 / 2  # the whole parts are on both tensor-parallel ranks
    saved = figures.checkpoint(arch, job(arch, 2, 2, lora=own))
    assert saved.bytes == 14 * 250_347_520
    assert memory.host_memory(arch, job(arch, lora=own), 8) == 14 * 250_347_520
    ratio = figures.flops(arch, job(arch, lora=own)) / figures.flops(arch, job(arch))
    assert 0.66 < ratio < 0.75


@pytest.mark.parametrize(("name", "tables"), [("llama2-7b", 2), ("falcon-7b", 1)])
def test_rows_of_new_tokens_are_trained_too(name, tables):
    """Whole on every tensor-parallel rank of the first and the last stage."""
    arch = known.architecture(name)
    tokens = tuple(range(arch.vocab_size - 3, arch.vocab_size))
    own, more = lora(arch), lora(arch, new_tokens=tokens)
    rows = 3 * arch.hidden_size
    assert more.parameters(arch) - own.parameters(arch) == tables * rows
    for pp, added in ((1, [tables * rows]), (2, [rows, rows]), (4, [rows, 0, 0, rows])):
        few, many = (memory.stages(arch, job(arch, 1, pp, lora=one)) for one in (own, more))
        assert [b.trained - a.trained for a, b in zip(few, many, strict=True)] == added
        assert [b.gradients - a.gradients for a, b in zip(few, many, strict=True)] == [4 * size for size in added]
        assert [b.optimizer - a.optimizer for a, b in zip(few, many, strict=True)] == [12 * size for size in added]


LORA_PLANS = {
    "a 13B on one GPU": ("llama2-13b", "--gpus", 1, "--gpu", "a6000-48gb"),
    "a 70B in NF4 on four": (
        "llama2-70b", "--gpus", 4, "--gpu", "a6000-48gb", "--base_precision", "nf4", "--tensor_model_parallel_size", 4,
    ),
    "a 70B on eight": ("llama2-70b", "--gpus", 8, "--gpu", "a100-80gb", "--tensor_model_parallel_size", 8),
}  # fmt: skip


@pytest.mark.parametrize("words", LORA_PLANS.values(), ids=LORA_PLANS)
def test_the_plans_of_the_documentation(words):
    """Each fits, has a proposal, and its numbers are those of docs/adapters.md."""
    done = plan(*words, "--lora_rank", 64, "--recompute_granularity", "full", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    need, limit = max(stage["total"] for stage in found["stages"]), found["gpu"]["memory_bytes"]
    assert need <= limit and all(one["memory"] <= limit for one in found["proposals"])
    first = found["proposals"][0]
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{' '.join(map(str, words))}` |")]
    assert f"{need / 1e9:.1f} of {limit / 1e9:.1f} GB" in row and f"{first['memory'] / 1e9:.1f} GB |" in row


def test_new_tokens_on_the_command_line():
    words = ("llama2-13b", "--gpus", 1, "--lora_rank", 64, "--train_new_tokens")
    assert f"{250_347_520 + 2 * 2 * 5120:,} parameters are trained" in plan(*words, 2).stdout
    done = plan(*words, 50_000)
    assert (
        done.returncode == 2 and "--train_new_tokens 50000: must be from 0 to the model's 32000 tokens" in done.stderr
    )


def test_a_teacher_is_weights_and_logits():
    """Of another depth: its own layers of each stage in bf16, no gradients, no optimizer; proposals divide both models."""
    arch, teacher = known.architecture("llama2-7b"), known.architecture("llama2-70b")
    alone = job(arch, 2, 4)
    plain, beside = (memory.stages(arch, one) for one in (alone, replace(alone, teacher=teacher)))
    weights = [one.weights - other.weights for one, other in zip(beside, plain, strict=True)]
    assert weights == [2 * stage.parameters for stage in memory.stages(teacher, job(teacher, 2, 4))]
    assert all(
        (one.gradients, one.optimizer) == (other.gradients, other.optimizer) for one, other in zip(beside, plain)
    )
    assert all(one.total > other.total for one, other in zip(beside, plain))
    found = list(search.candidates(arch, replace(alone, teacher=known.architecture("llama2-13b")), 8))
    assert found and all(40 % (one.pp * one.split.virtual_size) == 0 for one in found)


def test_optimizer_and_microbatches_in_flight():
    arch = known.architecture("llama2-70b")
    plain = memory.stages(arch, job(arch, 8, 4))
    shared = memory.stages(arch, job(arch, 8, 2, 2, distributed_optimizer=True))
    assert plain[0].optimizer == 12 * plain[0].parameters and plain[0].gradients == 4 * plain[0].parameters
    assert shared[0].optimizer == 6 * shared[0].parameters
    assert memory.stages(arch, job(arch, 8, 4, bf16=False))[0].optimizer == 8 * plain[0].parameters
    one = memory.layer_activations(arch, job(arch, 8, 4))
    assert [round(stage.activations / one / 20) for stage in plain] == [4, 3, 2, 1]


def test_context_parallel_size_counts():
    """It divides a row's activations and, with the distributed optimizer, the state. Proposals do not use it."""
    arch = known.architecture("llama2-70b")
    plain, context = job(arch, 8, 4, 2), job(arch, 8, 4, 2, cp=2, distributed_optimizer=True)
    assert (plain.gpus, context.gpus) == (64, 128)
    assert 2 * memory.layer_activations(arch, context) == memory.layer_activations(arch, plain)
    assert memory.optimizer_bytes(4000, context) == 12 * 1000
    found = search.proposals(arch, context, known.gpu("a100-80gb"), 85.2e9, 8)
    assert found and all(one.job.cp == 1 and one.job.gpus == 128 for one in found)


def test_host_memory_at_a_save():
    """By owner a node of one data-parallel group holds the state once and a parameter a rank; plain, the first rank alone holds it."""
    arch = known.architecture("llama3-8b")
    count = memory.parameters(arch, 1, 32, True, True)
    one = 4 * 128256 * 4096  # the embedding, fp32
    shared = job(arch, dp=8, distributed_optimizer=True)
    assert memory.host_memory(arch, shared, 8) == 14 * count + 8 * one
    assert 14 * count / 2 <= memory.host_memory(arch, shared, 4) - 4 * one <= 14 * (count / 2 + 128256 * 4096)
    assert memory.host_memory(arch, job(arch, dp=8), 8) == 14 * count
    assert memory.host_memory(arch, job(arch, dp=8, bf16=False), 4) == 12 * count
    stages = job(arch, 2, 2, 2, distributed_optimizer=True)  # a node of 4: all of a stage's ranks
    last = memory.parameter_sizes(arch, 2, 16, False, True)
    assert memory.host_memory(arch, stages, 4) == 2 * (14 * sum(last) + 2 * 4 * max(last))


def test_bubble():
    """Four stages, eight microbatches: 3 of 11 slots; chunks divide the waiting."""
    arch = known.architecture("llama2-70b")
    assert figures.bubble(job(arch, 8, 4, global_batch=16)) == pytest.approx(3 / 11)
    assert figures.bubble(job(arch, 8, 1)) == 0


def test_proposals_fit_and_divide():
    arch, gpu = known.architecture("llama2-70b"), known.gpu("a100-80gb")
    found = search.proposals(arch, job(arch, 8, 4), gpu, 85.2e9, 8)
    assert found and [one.seconds for one in found] == sorted(one.seconds for one in found)
    for one in found:
        assert one.job.tp * one.job.pp * one.job.dp == 32 and one.job.tp <= 8 and one.memory <= 85.2e9
        assert one.job.global_batch == 64 and one.job.microbatches * one.job.micro_batch * one.job.dp == 64
    assert not search.proposals(arch, job(arch, 8, 4), gpu, 10e9, 8)


def plan(*words) -> subprocess.CompletedProcess:
    code = "import sys; from megatron_ft.__main__ import main; code = main(sys.argv[1:]); sys.exit(70 if 'torch' in sys.modules else code)"
    return subprocess.run(
        [sys.executable, "-c", code, "plan", *map(str, words)], capture_output=True, text=True, timeout=60
    )


def test_the_command_without_torch(tmp_path):
    done = plan(
        "llama2-70b", "--gpus", 32, "--tensor_model_parallel_size", 8, "--pipeline_model_parallel_size", 4, "--sequence_parallel",
        "--micro_batch_size", 2, "--train_iters", 12000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "68,976,648,192 parameters on 32 x a100-80gb" in done.stdout and "2,172,977,152" in done.stdout
    assert re.search(r"host memory  [\d,.]+ GB per node at a save", done.stdout)
    assert "fits" in done.stdout and "262,144 tokens per step, in 32 microbatches of 2" in done.stdout
    done = plan("llama2-13b", "--gpu", "h100-80gb", "--gpus", 8, "--lora_rank", 64, "--recompute_granularity", "full")
    assert "LoRA of rank 64: 250,347,520 parameters are trained" in done.stdout and "[green]" not in done.stdout
    assert done.stdout.count("fits") == 1, done.stdout
    done = plan("falcon-40b", "--json")
    assert json.loads(done.stdout)["stages"][0]["parameters"] == json.loads(done.stdout)["parameters"]
    assert "does not fit" in plan("falcon-40b").stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["lama2-70b"], "did you mean llama2-70b"),
        (["llama2-7b", "--gpu", "a100"], "--gpu a100 may be one of a100-40gb/80gb: give more"),
        (["llama2-7b", "--tensor_model_parallel_size", "3"], "does not divide the model's num_attention_heads 32"),
        (["llama2-7b", "--gpus", "6", "--tensor_model_parallel_size", "4"], "--gpus 6 is not a multiple of .* = 4"),
        (["llama2-7b", "--lora_rank", "0"], "--lora_rank 0: must be at least 1"),
        (["llama2-7b", "--teacher", "falcon-40b"], "--teacher falcon-40b has a vocabulary of 65024, the model one of 32000"),
        (["llama2-7b", "--lora_target", "qkv"], "add --lora_rank, or drop --lora_target"),
        (["llama2-7b", "--lora_rank", "8", "--lora_target", "dense"], "has no such part"),
        (["llama2-7b", "--gpus", "6", "--micro_batch_size", "3"], "--global_batch_size 64 is not a multiple of .* = 3: "),
    ],
)  # fmt: skip
def test_mistakes(words, message):
    done = plan(*words)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


def test_models_from_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(known.MODELS["llama3-8b"]))
    assert (
        known.architecture(str(tmp_path))
        == known.architecture(str(tmp_path / "config.json"))
        == known.architecture("llama3-8b")
    )
    with pytest.raises(UserError):
        known.architecture(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"hidden_size": "many"}, "hidden_size .many.: must be a whole number"),
        ({"rope_scaling": [[]]}, r"rope_scaling \[\[\]\]: must be an object"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000: must be"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense(tmp_path, entries, message):
    (tmp_path / "config.json").write_text(json.dumps(known.MODELS["llama3-8b"] | entries))
    with pytest.raises(CheckpointError, match=message):
        known.architecture(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architecture": 3}')
    with pytest.raises(CheckpointError, match="format_version"):
        known.architecture(str(tmp_path / "config.json"))
