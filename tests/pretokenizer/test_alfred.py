"""The packaged mix of Alfred-40B-1023, as it is, over small files that stand for its datasets."""

import json

import pytest

from megatron_ft.data.roles import CONTEXT, MARKED, ROLE_BITS
from megatron_ft.data.shards import open_shards
from tests.pretokenizer.fixtures import answer, ask, lines, tar_gz, tree
from tests.pretokenizer.test_pretokenize import place, pretokenize  # noqa: F401 - a fixture

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix jugs of black liquid".split()


def words(number, count):
    return " ".join(WORDS[(number * 7 + i * (1 + number % 5)) % len(WORDS)] for i in range(count))


def chats(start, count, length, context=0):
    for i in range(start, start + count):
        question = {"role": "user", "content": f"{i} {words(i, length)}"}
        if context:
            question["context"] = words(i, context)
        yield {"messages": [question, {"role": "assistant", "content": words(i + 1, length)}]}


@pytest.fixture
def datasets(place):  # noqa: F811
    """Every dataset of the section, where the section looks for it: beside, as a folder, in the cache by its published name."""
    trees = [
        tree(i, ask(f"{i} {words(i, 9)}", answer(words(i + 1, 30), rank=0), answer(words(i + 2, 30), rank=1)))
        for i in range(60)
    ]
    (place / "2023-07-23_oasst_ready.tar.gz").write_bytes(tar_gz([("ready.jsonl", lines(trees))]))
    dolphin = [
        {"instruction": "be kind", "input": f"{i} {words(i, 9)}", "output": words(i + 3, 30)} for i in range(120)
    ]
    dolphin += [{"instruction": "", "input": "x", "output": "As an AI language model I can't."}] * 3
    (place / ".cache/ehartford/dolphin").mkdir(parents=True)
    (place / ".cache/ehartford/dolphin/train.jsonl").write_bytes(lines(dolphin))
    (place / "short_chats").mkdir()
    (place / "short_chats/a.jsonl").write_bytes(lines(chats(1000, 60, 25)))
    (place / "long_context").mkdir()
    (place / "long_context/a.jsonl").write_bytes(lines(chats(2000, 60, 12, context=150)))
    (place / "long_context/b.jsonl").write_bytes(lines(chats(2000, 1, 12, context=150)))  # a duplicate
    (place / "refinedweb").mkdir()
    (place / "refinedweb/part.jsonl").write_bytes(lines([{"text": f"{i} {words(i, 60)}"} for i in range(40)]))
    return place


def test_fifty_forty_five_five(datasets):
    flags = ("--configs", "alfred", "--vocab_file", "tokenizer.model")
    assert pretokenize(*flags, "--workers", 1) == 0
    stats = json.loads((datasets / "output/alfred/alfred-train_stats.json").read_text())
    asked = {("oasst_export", 0.2), ("dolphin", 0.2), ("messages", 0.1), ("messages", 0.45), ("text", 0.05)}
    assert {(row["name"], row["requested"]) for row in stats["mix"]} == asked
    tokens = [row["accepted_tokens"] for row in stats["mixed"]]
    whole = stats["mixed_total"]["accepted_tokens"]
    chat, context, text = sum(tokens[:3]) / whole, tokens[3] / whole, tokens[4] / whole
    assert (chat, context, text) == pytest.approx((0.5, 0.45, 0.05), abs=0.01)
    assert max(row["epochs"] for row in stats["mix"]) <= 4.01
    left_out = {reason: n for row in stats["datasets"] for reason, n in row["left_out_by_reader"].items()}
    assert left_out["refusal phrase"] == 3 and left_out["exact duplicate"] == 1

    shards = open_shards("output/alfred/alfred-train", verify=True)
    assert shards.manifest.chat_format == {"name": "alfred", "stop_token": "<end_message>"}
    assert shards.manifest.counts["tokens"] == whole
    assert list(shards.manifest.tokenizer["added_tokens"]) == [
        "<start_system>",
        "<start_user>",
        "<start_assistant>",
        "<end_message>",
    ]
    begin, end = shards.manifest.sources[4]["documents"]
    for sample in range(begin, end):
        role_bytes = shards.role_bytes(sample)
        assert (role_bytes & ROLE_BITS == CONTEXT).all() and (
            role_bytes & MARKED > 0
        ).all()  # RefinedWeb: language modelling on all of it
    begin, end = shards.manifest.sources[3]["documents"]
    marked = sum(bool((shards.role_bytes(sample) & MARKED).any()) for sample in range(begin, end)) / (end - begin)
    assert 0.05 < marked < 0.4  # of the long prompts a fifth
    text = (datasets / "output/alfred/alfred-train_stats.txt").read_text()
    assert text.startswith("before mixing:") and "in the shards:" in text and text.count("| oasst_export") == 3
    page = (datasets / "output/alfred/alfred-train_stats.html").read_text()
    assert page.count("<td>oasst_export</td>") == 2 and "In the shards" in page
    before = {path.name: path.read_bytes() for path in (datasets / "output/alfred").iterdir()}
    assert pretokenize(*flags, "--workers", 2, "--overwrite") == 0
    assert {path.name: path.read_bytes() for path in (datasets / "output/alfred").iterdir()} == before
