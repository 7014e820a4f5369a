"""Answers to chats of the data before and after training, which every run has: the same run to the bit, in every layout, and no risk."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conversion.builders import make_llama, make_sentencepiece
from tests.parallel.jobs import finetune, read_metrics
from tests.parallel.test_samples import answers, state

ASKED = ["a plum", "a fig is red", "two figs", "an apple", "a"]
ANSWER = "a plum is blue"
ALIKE = {
    "TP2xPP2": ((2, 2), {"use_distributed_optimizer": True}),
    "TP2xVPP": ((2, 2), {"virtual_pipeline_model_parallel_size": 2}),
    "PP2xDP2": ((1, 2), {"sequence_parallel": False, "lora_rank": 4}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a tokenizer, one without (bare), and chats in chatml to train on and to validate on."""
    from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.data.chat_format import get_format
    from megatron_ft.data.shards import ShardWriter
    from megatron_ft.data.tokenizer import load_tokenizer

    place = tmp_path_factory.mktemp("chats")
    make_llama(place / "hf")
    make_sentencepiece(place / "hf")
    convert(HfToMegatron(str(place / "hf"), str(place / "base"), chat_format="chatml"))
    folder = find_checkpoint(place / "base")
    tokenizer = load_tokenizer(folder / "tokenizer", list(describe(folder).tokenizer["added_tokens"]))
    chat = get_format("chatml", tokenizer)
    for split, count in (("train", 40), ("val", 5)):
        with ShardWriter(place / f"talk-{split}", tokenizer.vocab_size, tokenizer.info()) as writer:
            for number in range(count):
                messages = [
                    {"role": "user", "content": ASKED[number % len(ASKED)]},
                    {"role": "assistant", "content": ANSWER},
                ]
                writer.add(*chat.encode(tokenizer, messages))
    return place


def train(layout, place, save, **flags):
    values = {
        "load": f"{place}/base", "data_path": [f"{place}/talk-train"], "save": save and str(save), "train_iters": 2, "lr": 1e-2,
        "lr_warmup_iters": 0, "hidden_dropout": 0.1, "report": False,
    }  # fmt: skip
    return finetune(layout, **values | flags)


@pytest.mark.parametrize("name", ALIKE)
def test_a_run_is_the_same_with_answers(name, four_ranks, one_rank, place, tmp_path):
    layout, flags = ALIKE[name]
    for folder, chats in (("with", 4), ("without", 0)):
        four_ranks.run(train_with, layout, place, tmp_path / folder, flags | {"sample_chats": chats})
    for metric in ("train/loss", "train/grad_norm"):
        assert read_metrics(tmp_path / "with", metric) == read_metrics(tmp_path / "without", metric)
    assert state(tmp_path / "with") == state(tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    found = answers(tmp_path / "with")
    assert list(found) == [0, 2] and len(found[0]) == 4
    if "lora_rank" not in flags:  # the first answers are those of one process
        one_rank.run(train_with, (1, 1), place, tmp_path / "one", {"sequence_parallel": False})
        assert found[0] == answers(tmp_path / "one")[0]


def train_with(layout, place, save, flags):
    return train(layout, place, save, **flags)


def test_questions_are_of_the_validation_data_and_shown_as_text(one_rank, place, tmp_path):
    one_rank.run(train_with, (1, 1), place, tmp_path / "run", {"report": True, "sequence_parallel": False})
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    asked = [line["messages"] for line in lines if line["iteration"] == 0]
    assert all(len(one) == 1 and one[0]["role"] == "user" and one[0]["content"] in ASKED for one in asked)
    assert len({one[0]["content"] for one in asked}) == 4, "five chats of validation, four of them asked"
    assert {line["reference"] for line in lines} == {ANSWER} and "right" not in lines[0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Answers" in page and "step 0" in page and "step 2" in page and ANSWER in page


def test_a_resumed_run_asks_the_same_and_keeps_the_first_answers(one_rank, place, tmp_path):
    flags = {"sequence_parallel": False}
    one_rank.run(train_with, (1, 1), place, tmp_path / "run", flags)
    one_rank.run(
        train_with,
        (1, 1),
        place,
        tmp_path / "run",
        flags | {"load": str(tmp_path / "run"), "train_iters": 4, "sample_interval": 1},
    )
    found = answers(tmp_path / "run")
    assert list(found) == [0, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len({json.dumps(line["messages"]) for line in lines}) == 4


def test_what_has_no_answers_says_so_once(one_rank, place, tmp_path):
    """Random ids without an answer; nothing to show answers in."""
    from megatron_ft.data.roles import PROMPTER
    from megatron_ft.data.shards import ShardWriter

    with ShardWriter(tmp_path / "text-train", 203) as writer:
        for _ in range(20):
            writer.add(np.arange(3, 30), np.full(27, PROMPTER, np.uint8))
    flags = {"data_path": [f"{tmp_path}/text-train"], "sequence_parallel": False, "scalar_loss_mask": 1.0}
    one_rank.run(train_with, (1, 1), place, tmp_path / "run", flags)
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    log = (tmp_path / "run" / "finetune.log").read_text()
    assert log.count("no answers before and after training: the shards have no chat") == 1
    assert one_rank.run(answered_without_a_place, str(place))[0] == 0


def answered_without_a_place(place):
    """How often a run without a folder asks its model."""
    from megatron_ft.generation.whole_rows import RowDecoder

    asked, generate = [], RowDecoder.generate
    RowDecoder.generate = lambda *given: asked.append(1)
    try:
        train((1, 1), place, None, sequence_parallel=False)
    finally:
        RowDecoder.generate = generate
    return len(asked)


def test_a_failure_on_one_rank_ends_the_answers_and_not_the_run(four_ranks, place, tmp_path):
    said = four_ranks.run(failing, str(place), str(tmp_path / "run"))
    assert [code for code, _ in said] == [0] * 4
    assert sorted(
        text.count("MemoryError: no room; nothing more is logged there, the run continues") for _, text in said
    ) == [0, 0, 0, 1]
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    assert len(read_metrics(Path(tmp_path / "run"))) == 2


def failing(place, save):
    """Train four replicas, of which the second cannot answer; return the exit code and what was logged."""
    import logging

    import torch.distributed as dist

    from megatron_ft.generation.whole_rows import RowDecoder

    lines, generate = [], RowDecoder.generate
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron_ft").addHandler(handler)

    def fails(*given):
        raise MemoryError("no room")

    if dist.get_rank() == 1:
        RowDecoder.generate = fails
    try:
        return train((1, 1), place, save, sequence_parallel=False), "\n".join(lines)
    finally:
        RowDecoder.generate = generate
        logging.getLogger("megatron_ft").removeHandler(handler)
