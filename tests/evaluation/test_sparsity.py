"""evaluate sparsity: the zeros, near zeros and loss of transformers, the same in every layout; several models in one page."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ft.commands import evaluate_sparsity as command
from megatron_ft.commands.evaluate_sparsity import SparsityOptions
from megatron_ft.config.cli import run_script
from megatron_ft.data.shards import ShardWriter, open_shards
from megatron_ft.evaluation.sparsity import pieces
from megatron_ft.report.by_length import by_length
from megatron_ft.report.sparsity_page import rows
from tests.conversion.builders import make_model, make_sentencepiece

LENGTH, NEAR = 16, 0.01
SIZES = (1, 2, 16, 17, 40, 33)
FALCON = {
    "hidden_size": 64, "num_attention_heads": 8, "new_decoder_architecture": True, "num_kv_heads": 4, "ffn_hidden_size": 96,
}  # fmt: skip
MODELS = {
    "gelu": ("falcon", FALCON),
    "relu": ("falcon", FALCON | {"activation": "relu"}),
    "reglu": ("llama", {"hidden_act": "relu", "num_hidden_layers": 2}),
}


def inputs_of_down(model, ids):
    """The inputs of the down projection of each layer of a model of transformers, [s, f]."""
    found = []
    downs = [m for name, m in model.named_modules() if name.endswith(("dense_4h_to_h", "down_proj"))]
    hooks = [down.register_forward_pre_hook(lambda _, args: found.append(args[0][0])) for down in downs]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models with a tokenizer, and shards."""
    place = tmp_path_factory.mktemp("sparsity")
    make_sentencepiece(place / "tokenizer")
    for name, (model_type, changes) in MODELS.items():
        make_model(place / name, model_type, **changes)
        shutil.copy(place / "tokenizer/tokenizer.model", place / name)
    rng = np.random.default_rng(5)
    with ShardWriter(place / "chats", 203) as writer:
        for size in SIZES:
            writer.add(rng.integers(3, 203, size), np.full(size, 2, np.uint8))
    return place


def measured(place, output, names, layout=(1, 1), **options):
    """Run the command as a rank does. The first rank writes sparsity.json, and may be the last to end."""
    from megatron_ft.commands.generate import GenerationLayout
    from megatron_ft.config.sections import Processes

    given = {"length": LENGTH, "batch_size": 3, "data": [str(place / "chats")], **options}
    loads = [str(place / name) for name in names]
    assert command.run(SparsityOptions(loads, output=str(output), **given), GenerationLayout(*layout), Processes()) == 0


def theirs(place, name):
    """(loss, [zeros of each layer], [near zeros of each layer], tokens)."""
    model, shards = AutoModelForCausalLM.from_pretrained(place / name).eval(), open_shards(str(place / "chats"))
    nats, tokens, zeros, near, width = 0.0, 0, 0, 0, 0
    for number in range(len(shards)):
        ids = torch.from_numpy(shards.tokens(number).astype(np.int64))
        for start in range(0, len(ids) - 1, LENGTH):
            piece = ids[start : start + LENGTH + 1]
            with torch.no_grad():
                logits = model(piece[None, :-1]).logits[0].double()
            nats += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
            inputs = inputs_of_down(model, piece[:-1])
            zeros = zeros + np.array([(x == 0).sum().item() for x in inputs])
            near = near + np.array([(x.abs() <= NEAR * x.abs().amax(-1, keepdim=True)).sum().item() for x in inputs])
            tokens, width = tokens + len(piece) - 1, inputs[0].shape[-1]
    return nats / tokens, zeros / (tokens * width), near / (tokens * width), tokens


def same(ours, expected):
    loss, zeros, near, tokens = expected
    assert ours["tokens"] == tokens == sum(size - 1 for size in SIZES)
    assert ours["loss"] == pytest.approx(loss, rel=1e-5)
    assert [one["zeros"] for one in ours["layers"]] == pytest.approx(zeros, abs=2e-4)
    assert [one["near_zero"] for one in ours["layers"]] == pytest.approx(near, abs=2e-4)
    assert ours["zeros"] == pytest.approx(zeros.mean(), abs=2e-4) and ours["near_zero"] == pytest.approx(
        near.mean(), abs=2e-4
    )


def test_zeros_of_transformers(place, one_rank, four_ranks, tmp_path):
    """Several models at once; with the others' layers, where they have fewer."""
    one_rank.run(measured, place, tmp_path / "one", list(MODELS))
    found = json.loads((tmp_path / "one" / "sparsity.json").read_text())["models"]
    expected = {name: theirs(place, name) for name in MODELS}
    for ours in found:
        same(ours, expected[ours["name"]])
    gelu, relu, reglu = found
    assert gelu["zeros"] < 0.001 < gelu["near_zero"] < relu["zeros"] <= relu["near_zero"]
    assert 0.3 < relu["zeros"] < 0.7 and 0.3 < reglu["zeros"] < 0.7
    assert [one["activation"] for one in found] == ["gelu", "relu", "reglu"]
    page = (tmp_path / "one" / "sparsity.html").read_text()
    assert [row[:2] for row in rows(found)] == [("gelu", "gelu"), ("relu", "relu"), ("reglu", "reglu")]
    assert all(cell in page for row in rows(found) for cell in row)
    assert all(f"{name}: near zero" in page for name in MODELS) and page.count("<svg") == 2
    assert (tmp_path / "one" / "sparsity.svg").read_text().startswith("<svg")
    for layout in ((2, 2), (1, 2), (1, 1)):
        four_ranks.run(measured, place, tmp_path / "four", ["relu"], layout)
        same(json.loads((tmp_path / "four" / "sparsity.json").read_text())["models"][0], expected["relu"])


def test_pieces_compute_every_token_but_the_last_once():
    sizes = [1, 5, 9, 3]
    windows = pieces(sizes, 4)
    computed = [(one.document, at) for one in windows for at in range(one.start, one.end - 1)]
    assert computed == [(number, at) for number, size in enumerate(sizes) for at in range(size - 1)]
    assert (
        pieces(sizes, 4, 6) == windows[:2] and pieces(sizes, 4, 4) == windows[:1] and pieces(sizes, 4, 10**9) == windows
    )


def test_a_figure_of_many_layers():
    svg = by_length("zeros", range(60), {"relu": [n / 60 for n in range(60)]}, "layer", "percent")
    assert svg.count("<g><title>") == 20 and svg.count("L") == 59


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--data x", "--load is needed"),
        ("--load x", "--data is needed"),
        ("--load x --data x --length 0", "--length 0: must be at least 1"),
        ("--load x --data x --max_tokens 0", "--max_tokens 0: must be at least 1"),
        ("--load nowhere --data x", "nowhere"),
        ("--load x x --data x", "two models have the name x"),
    ],
)
def test_refusals(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(command.COMMAND, command.run, flags.split()) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and not list(tmp_path.iterdir())
