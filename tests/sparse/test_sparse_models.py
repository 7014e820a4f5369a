"""Whole models with ReLU: transformers' numbers, to the bit the same with and without zeros, predictors, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.data.roles import ASSISTANT
from megatron_ft.data.shards import ShardWriter
from megatron_ft.errors import UserError
from tests.conversion.builders import make_family, make_sentencepiece
from tests.ranks import Ranks

FAMILIES = {
    "falcon": ("falcon 40b, relu, untied, yarn", {}),
    "llama": ("llama, relu, tied", {"hidden_size": 64, "intermediate_size": 96}),
    "gelu": ("falcon 40b", {}),
    "silu": ("llama", {"hidden_size": 64, "intermediate_size": 96}),
    "wide": ("falcon 40b, relu, untied, yarn", {"hidden_size": 128}),
}
PROMPT = [5, 9, 17, 40, 3, 77]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """falcon, llama (gated), gelu: exports; falcon-dist: a checkpoint in bf16; text.txt."""
    place = tmp_path_factory.mktemp("sparse")
    for name, (family, changes) in FAMILIES.items():
        model = make_family(place / name, family, **changes)
        with torch.no_grad():  # answers that are not one word again and again
            for weight in model.parameters():
                weight.mul_(3.0) if weight.ndim > 1 else None
        model.save_pretrained(place / name)
        make_sentencepiece(place / name)
    AutoModelForCausalLM.from_pretrained(place / "falcon").bfloat16().save_pretrained(place / "falcon-bf16")
    make_sentencepiece(place / "falcon-bf16")
    convert(HfToMegatron(str(place / "falcon-bf16"), str(place / "falcon-dist"), ckpt_format="torch_dist"))
    (place / "text.txt").write_text("ab plum xyz zxa plum ab ab xyz plum " * 60)
    return place


@pytest.fixture(scope="module")
def rank():
    ranks = Ranks(1)
    yield ranks
    ranks.close()


def decode(folder, precision, mode, predictors=None):
    """(ids of the answer to PROMPT, logits of the token after each of its tokens, share of zeros)."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.generation.sparse_loading import described, open_sparse, predictors_of

    stored = predictors_of(predictors, mode, described(folder).arch)
    with process_groups(ParallelSizes(1, 1)) as layout:
        chat, sparse = open_sparse(folder, layout, precision, mode, stored)
        return *answer(chat.decoder.model, chat.decoder), sparse.zeros


def answer(model, decoder):
    from megatron.core.inference.contexts.static_context import StaticInferenceContext

    (ids,) = decoder.generate([np.array(PROMPT)], 12)
    cache, logits = StaticInferenceContext(1, len(PROMPT) + 12), []
    with torch.no_grad():
        for at, token in enumerate([*PROMPT, *ids][:-1]):
            out = model(
                torch.tensor([[token]]), torch.tensor([[at]]), None, inference_context=cache, runtime_gather_output=True
            )
            cache.sequence_len_offset += 1
            cache.enable_decode_mode()
            logits.append(out[0, 0, : model.true_vocab_size])
    return ids, torch.stack(logits)


@pytest.mark.parametrize("name", ["falcon", "llama"])
def test_numbers_are_those_of_transformers(place, rank, name):
    ((ids, logits, zeros),) = rank.run(decode, place / name, None, "exact")
    model = AutoModelForCausalLM.from_pretrained(place / name)
    row = torch.tensor([[*PROMPT, *ids]])[:, :-1]
    with torch.no_grad():
        theirs = model(row).logits[0]
    assert torch.allclose(logits, theirs, rtol=1e-4, atol=1e-4)
    assert 0.2 < zeros < 0.8


@pytest.mark.parametrize("name", ["falcon", "llama", "falcon-dist"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.works("sparse decoding", "ReLU", "Falcon")
def test_exact_has_the_bits_of_dense(place, rank, name, precision):
    ((ids, logits, zeros),) = rank.run(decode, place / name, precision, "exact")
    ((dense_ids, dense, _),) = rank.run(decode, place / name, precision, "dense")
    assert ids == dense_ids and torch.equal(logits, dense) and zeros > 0.2


def test_weights_are_held_as_they_are_stored(place, rank):
    """A checkpoint in bf16: nothing is rounded a second time."""
    for precision in ("bf16", "fp32"):
        ((_, stored, _),) = rank.run(decode, place / "falcon-dist", None, "exact")
        ((_, again, _),) = rank.run(decode, place / "falcon-dist", precision, "exact")
        assert torch.equal(stored, again)


def trained(folder, text, output, size=16, recall=0.98, steps=300):
    from megatron_ft.commands.train_predictors import TrainPredictors, run

    return run(
        TrainPredictors(str(folder), [str(text)], str(output), size, recall, tokens=1500, seq_length=64, steps=steps)
    )


@pytest.mark.parametrize("name", ["falcon", "llama"])
def test_predictors(place, rank, tmp_path, name):
    rank.run(trained, place / name, place / "text.txt", tmp_path / "low")
    said = json.loads((tmp_path / "low" / "predictors.json").read_text())
    assert len(said["layers"]) == 4 and all(one["recall"] > 0.8 for one in said["layers"])
    assert all(one["rows"] < 1 for one in said["layers"])
    ((_, low, _),) = rank.run(decode, place / name, None, "predicted", tmp_path / "low")
    ((_, exact, _),) = rank.run(decode, place / name, None, "exact")
    assert not torch.equal(low, exact)


def test_a_predictor_of_full_rank_finds_nearly_all(place, rank, tmp_path):
    rank.run(trained, place / "falcon", place / "text.txt", tmp_path / "full", 64, 0.999, 0)
    said = json.loads((tmp_path / "full" / "predictors.json").read_text())
    for one in said["layers"]:
        assert one["recall"] > 0.99 and one["weight"] > 0.999 and one["rows"] < one["active"] + 0.05
    assert said["perplexity"]["predicted"] == pytest.approx(said["perplexity"]["all_rows"], rel=0.01)


def refusal(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except UserError as error:
        return str(error)
    return None


class TestRefused:
    def test_model_without_relu(self, place, rank):
        (said,) = rank.run(refusal, decode, place / "gelu", None, "exact")
        assert (
            "sparse decoding needs activations that are zero (relu, reglu, relu2, relu2glu), the model has gelu" in said
        )

    def test_predictors_of_another_model(self, place, rank, tmp_path):
        rank.run(trained, place / "falcon", place / "text.txt", tmp_path / "made", 16, 0.98, 0)
        other = tmp_path / "other"
        shutil.copytree(place / "falcon", other)
        model = AutoModelForCausalLM.from_pretrained(other)
        with torch.no_grad():
            model.transformer.h[1].mlp.dense_h_to_4h.weight[3, 4] += 1e-3
        model.save_pretrained(other)
        (said,) = rank.run(refusal, decode, other, None, "predicted", tmp_path / "made")
        assert "the predictors were trained for another model than" in said
        (said,) = rank.run(refusal, decode, place / "wide", None, "predicted", tmp_path / "made")
        assert "holds no predictor that fits layer 0" in said
        (tmp_path / "made" / "predictors.safetensors").write_bytes(b"no tensors")
        (said,) = rank.run(refusal, decode, place / "falcon", None, "predicted", tmp_path / "made")
        assert "predictors.safetensors" in said

    @pytest.mark.refuses(
        "sparse decoding", ["TP", "PP", "DP"], says="--sparse decodes in one process, with its threads"
    )
    @pytest.mark.refuses(
        "sparse decoding", "LoRA", says="--sparse takes no --adapter: write the model with megatron-ft merge-adapter"
    )
    def test_flags_that_do_not_go_together(self, place):
        from megatron_ft.commands.in_layout import Asked, GenerationLayout
        from megatron_ft.commands.sparse_options import SparseOptions, check_sparse_options
        from megatron_ft.config.sections import Processes

        falcon, alone = str(place / "falcon"), Processes()
        for options, adapter, bf16, processes, message in (
            (SparseOptions("predicted"), None, None, alone, "--sparse predicted needs --predictors DIR"),
            (SparseOptions("exact", predictors="x"), None, None, alone, "--predictors needs --sparse predicted"),
            (SparseOptions(sparse_weights="int8"), None, None, alone, "--sparse_weights needs --sparse"),
            (SparseOptions("exact"), "adapters", None, alone, "merge-adapter"),
            (SparseOptions("exact"), None, True, alone, "--sparse_weights"),
            (SparseOptions("exact"), None, None, Processes(nproc_per_node=2), "in one process, .* this would be 2"),
            (
                SparseOptions("predicted", predictors=falcon),
                None,
                None,
                alone,
                "holds no predictors .*train-predictors",
            ),
        ):
            with pytest.raises(UserError, match=message):
                check_sparse_options(options, [Asked(falcon, adapter)], bf16, GenerationLayout(), processes)
        with pytest.raises(UserError, match=r"in one process, .* this would be 4"):
            check_sparse_options(SparseOptions("exact"), [Asked(falcon)], None, GenerationLayout(2, 2), alone)

    def test_a_classic_checkpoint_of_several_processes(self, place, tmp_path):
        """By every command that decodes sparsely, in one line; with reshard it is read."""
        from megatron_ft.commands.measure import Measure
        from megatron_ft.commands.measure import run as measure
        from megatron_ft.commands.train_predictors import TrainPredictors
        from megatron_ft.commands.train_predictors import run as train

        classic = str(tmp_path / "classic")
        convert(HfToMegatron(str(place / "falcon"), classic, 2, 2, ckpt_format="torch"))
        for run, options in (
            (generated, (classic, str(tmp_path / "answers"), "exact")),
            (train, (TrainPredictors(classic, [str(place / "text.txt")], str(tmp_path / "p"), 16),)),
            (measure, (Measure(classic, sparse=True),)),
        ):
            with pytest.raises(
                UserError, match=r"classic format for TP2 x PP2, and sparse decoding .* megatron-ft reshard"
            ) as found:
                run(*options)
            assert "\n" not in str(found.value) and not (tmp_path / "p").exists()


def generated(load, output, mode):
    """`megatron-ft generate --sparse`; returns what it wrote."""
    from megatron_ft.commands.generate import Generation, SamplingOptions, run
    from megatron_ft.commands.in_layout import GenerationLayout
    from megatron_ft.commands.sparse_options import SparseOptions
    from megatron_ft.config.sections import Processes

    asked = Generation(load=load, prompt=["ab plum", "xyz"], output=output)
    options = SamplingOptions(max_new_tokens=8)
    run(asked, options, GenerationLayout(), Processes(), SparseOptions(mode) if mode else None)
    return Path(output).read_text()


def trained_in_four(load, shards, save):
    """A step of a run in TP2 x PP2, and what it saves."""
    from tests.parallel.jobs import finetune

    finetune(
        (2, 2), load=load, data_path=[shards], save=save, train_iters=1, lr_warmup_iters=0, report=False, seq_length=32
    )


def test_a_checkpoint_that_four_processes_wrote(place, rank, four_ranks, tmp_path):
    run, back, rng = tmp_path / "run", tmp_path / "back", np.random.default_rng(1)
    with ShardWriter(tmp_path / "chats-train", 203) as writer:
        for _ in range(20):
            writer.add(rng.integers(0, 203, 20), np.full(20, ASSISTANT, np.uint8))
    four_ranks.run(trained_in_four, str(place / "falcon-dist"), str(tmp_path / "chats-train"), str(run))
    (iteration,) = run.glob("iter_*")
    assert len(list(iteration.glob("__*.distcp"))) > 1  # of several processes
    export(MegatronToHf(str(run), str(back)))
    check_against_transformers(rank, run, back)


@pytest.mark.parametrize("name", ["gelu", "silu"])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_a_swapped_model(name, activation, place, rank, tmp_path):
    """Of GELU, or of another function of the gate: exact is dense, with transformers' numbers."""
    made, back = str(tmp_path / "made"), str(tmp_path / "back")
    convert(HfToMegatron(str(place / name), made, activation=activation, ckpt_format="torch_dist"))
    export(MegatronToHf(made, back))
    check_against_transformers(rank, made, back)
    answers = [rank.run(generated, made, str(tmp_path / f"{mode}.jsonl"), mode)[0] for mode in ("dense", "exact", None)]
    assert answers[0] == answers[1] == answers[2] and answers[0].count("\n") == 2


def check_against_transformers(rank, checkpoint, exported):
    """Exact decoding of a checkpoint has the bits of dense decoding, and the numbers that transformers has of its export."""
    ((ids, logits, zeros),) = rank.run(decode, Path(checkpoint), "fp32", "exact")
    ((dense_ids, dense, _),) = rank.run(decode, Path(checkpoint), "fp32", "dense")
    assert ids == dense_ids and torch.equal(logits, dense) and 0.2 < zeros < 0.8
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([[*PROMPT, *ids]])[:, :-1]).logits[0]
    assert torch.allclose(logits, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def measured(folder, output, predictors):
    from megatron_ft.commands.measure import Measure, run

    return run(
        Measure(
            str(folder), max_new_tokens=6, sparse=True, predictors=predictors and str(predictors), output=str(output)
        )
    )


def test_measure(place, rank, tmp_path, monkeypatch):
    rank.run(trained, place / "falcon", place / "text.txt", tmp_path / "made", 16, 0.9, 0)
    rank.run(measured, place / "falcon", tmp_path / "out", tmp_path / "made")
    said = json.loads((tmp_path / "out" / "measure.json").read_text())
    dense, exact, predicted = said["modes"]
    assert [one["mode"] for one in said["modes"]] == ["dense", "exact", "predicted"] and said["exact_is_dense"]
    assert dense["zeros"] == exact["zeros"] and dense["computed"] == exact["computed"] == 1 > predicted["computed"]
    # Down rows of zeros are not read: fp32, 64 columns, 4 layers of 96 rows.
    assert dense["bytes_per_token"] - exact["bytes_per_token"] == pytest.approx(exact["zeros"] * 4 * 96 * 64 * 4)


def test_measure_refuses(place):
    from megatron_ft.commands.measure import Measure, run

    for options, message in (
        (Measure(str(place / "falcon"), sparse=True, bits=["4"]), "--sparse takes no --bits"),
        (Measure(str(place / "falcon"), predictors="x"), "--predictors needs --sparse"),
        (Measure(str(place / "gelu"), sparse=True), "the model has gelu"),
    ):
        with pytest.raises(UserError, match=message):
            run(options)
