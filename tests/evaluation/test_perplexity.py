"""Perplexity by length: that of transformers, the same tokens at every length, the same number in every layout."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ft.commands.compared_models import adapters_of, names_of
from megatron_ft.commands.evaluate_perplexity import PerplexityOptions, check
from megatron_ft.data.roles import ASSISTANT, PROMPTER
from megatron_ft.data.shards import ShardWriter
from megatron_ft.errors import ConfigError, DataError
from megatron_ft.evaluation.perplexity import batches, windows
from megatron_ft.report.perplexity_page import beyond, chart, named_rows
from tests.conversion.builders import FAMILIES, make_family, make_sentencepiece

LENGTHS, STRIDE = [16, 40, 96], 8
TEXT = "a plum, an apple and the plum again. " * 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, shards of two sources with roles, and a text."""
    place = tmp_path_factory.mktemp("perplexity")
    make_sentencepiece(place / "tokenizer")
    (place / "text.txt").write_text(TEXT)
    rng = np.random.default_rng(5)
    with ShardWriter(place / "chats", 203) as writer:
        for name, sizes in (("short", (1, 9, 30)), ("long", (120,))):
            writer.source(name, f"{name}.jsonl", "0" * 16)
            for size in sizes:
                roles = np.where(rng.random(size) < 0.5, ASSISTANT, PROMPTER)
                writer.add(rng.integers(3, 203, size), roles.astype(np.uint8))
    return place


@pytest.fixture(scope="module")
def models(place):
    """models(name) -> folder of a random model of a family, with the tokenizer."""

    def models(name):
        folder = place / name.replace(" ", "_")
        if not folder.exists():
            make_family(folder, name)
            shutil.copy(place / "tokenizer/tokenizer.model", folder)
        return folder

    return models


def measured(load, data, output, layout=(1, 1), **options):
    """perplexity.json of the command, as a rank runs it."""
    from megatron_ft.commands.evaluate_perplexity import run
    from megatron_ft.commands.generate import GenerationLayout
    from megatron_ft.config.sections import Processes

    given = PerplexityOptions(
        [str(load)], data=[str(data)], lengths=LENGTHS, stride=STRIDE, output=str(output), batch_size=3, **options
    )
    assert run(given, GenerationLayout(*layout), Processes()) == 0
    return json.loads((output / "perplexity.json").read_text())["models"][0]["lengths"]


def theirs(folder, documents, length):
    """(nats, tokens) of transformers, one window after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats, tokens = 0.0, 0
    for ids in documents:
        ids = torch.from_numpy(ids.astype(np.int64))
        for first in range(1, len(ids), STRIDE):
            end = min(first + STRIDE, len(ids))
            window = ids[max(0, end - length) : end]
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0].double()
            losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            nats, tokens = nats + losses[first - end :].sum().item(), tokens + end - first
    return nats, tokens


def shard_documents(place):
    from megatron_ft.data.shards import open_shards

    shards = open_shards(place / "chats")
    return [shards.tokens(i) for i in range(len(shards))]


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers_at_each_length(name, models, place, one_rank, tmp_path):
    (ours,) = one_rank.run(measured, models(name), place / "chats", tmp_path)
    for entry, length in zip(ours, LENGTHS, strict=True):
        nats, tokens = theirs(models(name), shard_documents(place), length)
        assert (entry["length"], entry["stride"], entry["tokens"]) == (length, STRIDE, tokens)
        assert entry["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_a_text_file_is_one_document(models, place, one_rank, tmp_path):
    from megatron_ft.data.tokenizer import load_tokenizer

    ids = load_tokenizer(place / "tokenizer/tokenizer.model").encode(TEXT)
    (ours,) = one_rank.run(measured, models("llama"), place / "text.txt", tmp_path)
    nats, tokens = theirs(models("llama"), [ids], LENGTHS[-1])
    assert ours[-1]["tokens"] == tokens == len(ids) - 1 and list(ours[-1]["sources"]) == ["text.txt"]
    assert ours[-1]["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4) and not ours[-1]["roles"]


def test_the_same_number_in_every_layout(models, place, one_rank, four_ranks, tmp_path):
    for name in ("llama", "falcon 40b"):
        (alone,) = one_rank.run(measured, models(name), place / "chats", tmp_path / "1")
        for layout in ((2, 2), (1, 2), (1, 1)):
            for ours in four_ranks.run(measured, models(name), place / "chats", tmp_path / "4", layout):
                for one, other in zip(alone, ours, strict=True):
                    assert one["tokens"] == other["tokens"] and one["roles"].keys() == other["roles"].keys()
                    assert one["nats"] == pytest.approx(other["nats"], rel=1e-6)


def test_roles_and_sources_add_up(models, place, one_rank, tmp_path):
    (ours,) = one_rank.run(measured, models("llama"), place / "chats", tmp_path)
    for entry in ours:
        assert set(entry["roles"]) == {"assistant", "prompter"} and set(entry["sources"]) == {"short", "long"}
        for kind in ("roles", "sources"):
            assert sum(part["tokens"] for part in entry[kind].values()) == entry["tokens"]
            assert sum(part["nats"] for part in entry[kind].values()) == pytest.approx(entry["nats"])
    assert ours[0]["sources"]["long"]["tokens"] == 119 and ours[0]["sources"]["short"]["tokens"] == 37
    assert {path.name for path in tmp_path.iterdir()} == {"perplexity.json", "perplexity.html", "perplexity.svg"}


def scored(folder, rows, piece):
    """Scores, the largest number of logits that were held at once, and whether the output layer is in its place afterwards."""
    from pathlib import Path

    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.evaluation import scoring
    from megatron_ft.generation.loading import open_chat_model

    sizes = []
    with process_groups(ParallelSizes(2, 2)) as layout, pytest.MonkeyPatch.context() as patch:
        model = open_chat_model(Path(folder), layout).decoder.model
        layer = getattr(model, "output_layer", None)
        if layer:
            layer.register_forward_hook(lambda _, args, output: sizes.append(output[0].nelement()))
        patch.setattr(scoring, "PIECE", piece)
        found = scoring.Scorer(model, layout).score(rows)
        return found.log_probs, found.greedy, max(sizes, default=0), getattr(model, "output_layer", None) is layer


def test_logits_are_computed_in_pieces_with_the_same_scores(models, four_ranks):
    rows = torch.randint(3, 203, (3, 50), generator=torch.Generator().manual_seed(0))
    for name in ("llama", "falcon 40b"):
        whole = four_ranks.run(scored, models(name), rows, 1 << 28)
        parts = four_ranks.run(scored, models(name), rows, 4096)
        for one, other in zip(whole, parts, strict=True):
            assert torch.allclose(one[0], other[0], atol=1e-5) and torch.equal(one[1], other[1])
            assert one[3] and other[3]
        assert max(one[2] for one in whole) > 3 * 49 * 100 and 0 < max(one[2] for one in parts) <= 1024


def test_windows_beyond_the_positions_have_a_star(models, place, one_rank, tmp_path):
    one_rank.run(measured, shortened(models("llama"), tmp_path / "short", 64), place / "chats", tmp_path / "out")
    result = json.loads((tmp_path / "out/perplexity.json").read_text())["models"]
    assert result[0]["positions"] == 64
    for kind in (None, "roles", "sources"):
        for _, cells in named_rows(result, kind):
            assert [cell.endswith("*") for cell in cells] == [False, False, True]
    line = "* windows longer than the model's positions: 64 (short)."
    assert beyond(result) == line and line in (tmp_path / "out/perplexity.html").read_text().replace("&#x27;", "'")
    assert beyond([{**result[0], "positions": 96}]) is None


def shortened(folder, to, positions):
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    return to


def test_bf16_is_near(models, place, one_rank, tmp_path):
    (plain,) = one_rank.run(measured, models("llama"), place / "chats", tmp_path / "32")
    (rough,) = one_rank.run(rough_run, models("llama"), place / "chats", tmp_path / "16")
    assert rough[-1]["nats"] == pytest.approx(plain[-1]["nats"], rel=0.05) and rough[-1]["nats"] != plain[-1]["nats"]


def rough_run(load, data, output):
    return measured(load, data, output, bf16=True)


@pytest.mark.parametrize("length", [3, 4, 9, 100])
def test_every_token_but_the_first_is_scored_once(length):
    sizes = [0, 1, 2, 7, 23]
    found = windows(sizes, length, 2)
    scored = [(one.document, place) for one in found for place in range(one.scored, one.end)]
    assert sorted(scored) == [(n, place) for n, size in enumerate(sizes) for place in range(1, size)]
    assert all(one.start < one.scored and one.length <= length for one in found)
    for pads in (True, False):
        taken = list(batches(found, 3, pads))
        assert (
            sorted((one for batch in taken for one in batch), key=repr) == sorted(found, key=repr)
            and max(map(len, taken)) <= 3
        )
        assert pads or all(len({one.length for one in batch}) == 1 for batch in taken)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"load": []}, "--load is needed"),
        ({"data": []}, "--data is needed"),
        ({"lengths": [1, 2]}, "--lengths must be at least 2"),
        ({"lengths": [64, 32]}, "rising order"),
        ({"stride": 16}, "--stride 16 must be at least 1 and below the smallest length, 16"),
        ({"batch_size": 0}, "--batch_size"),
        ({"names": ["a"], "load": ["x", "y"]}, "--names has 1 name for 2 models"),
        ({"load": ["x/a", "y/a"]}, "two models have the name a"),
        ({"load": ["x", "y"], "adapter": ["z"]}, "--adapter has 1 entry for 2 models"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check(PerplexityOptions(**{"load": ["x"], "data": ["d"], "lengths": [16, 32], **options}))


def test_names_and_adapters_of_models():
    options = PerplexityOptions(["a/base", "b/tuned"], adapter=["none", "peft"], data=["d"])
    assert names_of(options) == ["base", "tuned"] and adapters_of(options) == [None, "peft"] and check(options) == 256


def test_data_that_cannot_be_scored(place):
    from megatron_ft.data.tokenizer import load_tokenizer
    from megatron_ft.evaluation.documents import read_documents

    tokenizer = load_tokenizer(place / "tokenizer/tokenizer.model")
    (place / "empty.txt").write_text("")
    for name, vocab_size, message in (
        ("missing", 203, "neither a text file nor the prefix"),
        ("empty.txt", 203, "no document has two tokens"),
        ("chats", 100, "vocabulary of 203"),
    ):
        with pytest.raises(DataError, match=message):
            read_documents([str(place / name)], tokenizer, vocab_size)


@pytest.mark.parametrize("values", [[7.62, 5.38, 4.82], [57.1, 6.2, 5e6], [3.0, 3.0, 3.0], [None, 2.0, 1.0]])
def test_every_point_of_a_chart_is_inside(values):
    import re

    svg = chart([512, 1024, 2048], {"a": values})
    heights = [float(y) for y in re.findall(r"<title>.*?</title><path d=\"M[\d.]+ (-?[\d.]+)m", svg)]
    assert len(heights) == len([value for value in values if value is not None])
    assert (
        all(15 < y < 273 for y in heights) and "perplexity (logarithmic)" in svg and "largest context (tokens)" in svg
    )


def test_lengths_are_separated_by_commas_or_spaces():
    from megatron_ft.commands.evaluate_perplexity import COMMAND
    from megatron_ft.config.cli import parse

    for words in ("16,40,96", "16 40 96", "16,40 96"):
        options, *_ = parse(COMMAND, ["--lengths", *words.split(), "--data", "a,b.txt", "--load", "x"])
        assert (options.lengths, options.data) == ([16, 40, 96], ["a,b.txt"])
