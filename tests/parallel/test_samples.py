"""Answers to prompts while training: those of transformers, in every layout, and a run that is the same to the bit without them."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ft.errors import UserError
from tests.conversion.builders import make_llama, make_sentencepiece
from tests.demo.test_report import Balanced
from tests.parallel.jobs import finetune, read_metrics

TEXTS = ["a plum", "a fig is red and a plum is blue", "an apple", "a", "two figs and a plum"]
NEW = 6
ALIKE = {
    "TP2xPP2": ((2, 2), {"use_distributed_optimizer": True}),
    "TP2xDP2": ((2, 1), {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2xVPP": ((2, 2), {"virtual_pipeline_model_parallel_size": 2}),
    "PP2xDP2": ((1, 2), {"sequence_parallel": False, "packing": False, "variable_seq_lengths": True}),
    "LoRA": ((2, 2), {"lora_rank": 4, "lora_dropout": 0.1}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a tokenizer (hf, base), random shards for it, and a file of prompts."""
    from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.data.roles import ASSISTANT
    from megatron_ft.data.shards import ShardWriter

    place = tmp_path_factory.mktemp("samples")
    model = make_llama(place / "hf")
    with torch.no_grad():  # answers that are not one word again and again
        for weight in model.parameters():
            weight.mul_(3.0) if weight.ndim > 1 else None
    model.save_pretrained(place / "hf")
    make_sentencepiece(place / "hf")
    convert(HfToMegatron(str(place / "hf"), str(place / "base"), chat_format="chatml"))
    export(place / "base", place / "export")
    vocab, rng = describe(find_checkpoint(place / "base")).architecture.vocab_size, np.random.default_rng(3)
    with ShardWriter(place / "chats-train", vocab) as writer:
        for _ in range(60):
            ids = rng.integers(0, vocab, int(rng.integers(4, 70)))
            writer.add(ids, np.full(len(ids), ASSISTANT, np.uint8))
    entries = [{"prompt": text, "answer": "no such answer"} for text in TEXTS[:2]] + [{"prompt": t} for t in TEXTS[2:]]
    (place / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return place


def train(layout, place, save, flags):
    values = {
        "load": f"{place}/base", "data_path": [f"{place}/chats-train"], "save": str(save), "train_iters": 2, "lr": 1e-2,
        "lr_warmup_iters": 0, "hidden_dropout": 0.1, "attention_dropout": 0.1, "report": False,
    }  # fmt: skip
    return finetune(layout, **values | flags)


def asking(place, **flags):
    return {"sample_prompts": f"{place}/prompts.jsonl", "sample_max_new_tokens": NEW, **flags}


def answers(folder) -> dict[int, list[str]]:
    """The answers by iteration, in the order of the prompts."""
    found: dict[int, list[str]] = {}
    for line in (Path(folder) / "samples.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["iteration"], []).append(entry["answer"])
    return found


def state(root) -> dict[str, str]:
    """Hashes of all tensors of the last checkpoint: weights, optimizer, random streams."""
    from megatron_ft.checkpoints.folder import find_checkpoint
    from megatron_ft.checkpoints.verify import tensor_hashes

    return tensor_hashes(find_checkpoint(Path(root)))


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.works("answers while training", "dropout", "SP", ["PP", "VPP", "LoRA", "distributed optimizer", "DP"])
@pytest.mark.works("answers while training", "PP", "DP", "rows of variable length")
def test_a_run_is_the_same_with_samples(name, four_ranks, place, tmp_path):
    layout, flags = ALIKE[name]
    four_ranks.run(train, layout, str(place), tmp_path / "without", flags)
    four_ranks.run(train, layout, str(place), tmp_path / "with", flags | asking(place, sample_interval=1))
    for metric in ("train/loss", "train/grad_norm"):
        assert read_metrics(tmp_path / "with", metric) == read_metrics(tmp_path / "without", metric)
    assert state(tmp_path / "with") == state(tmp_path / "without")
    found = answers(tmp_path / "with")
    assert list(found) == [0, 1, 2] and found[0] != found[2]
    if name != "LoRA":
        assert found[0] == by_transformers(place / "export", place)
        assert found[2] == by_transformers(export(tmp_path / "with", tmp_path / "export"), place)


def test_answers_reach_report_and_tensorboard(one_rank, place, tmp_path):
    """Without an interval: before the first step, at the evaluations, at the end."""
    flags = asking(
        place, eval_interval=1, tensorboard_dir=str(tmp_path / "board"), report=True, sequence_parallel=False
    )
    one_rank.run(train, (1, 1), str(place), tmp_path / "run", flags)
    assert list(answers(tmp_path / "run")) == [0, 1, 2]
    page = (tmp_path / "run" / "report.html").read_text()
    Balanced().feed(page)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    assert re.search(r"same as the reference\s+0 of 2\s+0 of 2\s+0 of 2", text) and "no such answer" in text
    assert set(one_rank.run(texts_of_board, tmp_path / "board")[0]) == {f"samples/{n}" for n in range(1, 6)}


def texts_of_board(folder):
    """Names of the texts in TensorBoard's files, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [name.removesuffix("/text_summary") for name in events.Tags()["tensors"]]


def test_what_cannot_be_answered_is_refused(one_rank, place, tmp_path):
    def said(text, **flags):
        (tmp_path / "p.jsonl").write_text(text)
        flags = {"sample_prompts": str(tmp_path / "p.jsonl"), "sequence_parallel": False, **flags}
        return one_rank.run(refused, str(place), tmp_path / "run", flags)[0]

    assert "line 2: not valid JSON" in said('{"prompt": "a"}\n{"prompt": "a"\n')
    assert "contains no prompts" in said("")
    assert '"answer" must be a text' in said('{"prompt": "a", "answer": 3}\n')
    assert '{"role": text, "content": text}' in said('{"messages": ["a"]}\n')
    assert re.search(
        r"prompt 2: has \d+ tokens; a row of this run has room for 1 to 63",
        said(f'{{"prompt": "a"}}\n{{"prompt": "{"a plum " * 40}"}}\n'),
    )
    assert "--sample_interval 3 has no effect: --sample_chats is 0" in said(
        "", sample_prompts=None, sample_interval=3, sample_chats=0
    )
    assert "--sample_chats -1" in said('{"prompt": "a"}\n', sample_chats=-1)
    assert "--sample_max_new_tokens 0: must be at least 1" in said('{"prompt": "a"}\n', sample_max_new_tokens=0)
    assert not (tmp_path / "run").exists()


def refused(place, save, flags):
    """The user's error of a run, as one line."""
    try:
        train((1, 1), place, save, flags)
    except UserError as error:
        return str(error)
    return None


def export(root, folder) -> Path:
    from checkpoints_conversion.megatron_to_hf import MegatronToHf, convert

    convert(MegatronToHf(str(root), str(folder)))
    return folder


def by_transformers(hf, place) -> list[str]:
    """The greedy answers of transformers, to the ids of chatml."""
    from transformers import LlamaForCausalLM

    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.data.chat_format import get_format
    from megatron_ft.data.tokenizer import load_tokenizer

    folder = find_checkpoint(place / "base")
    tokenizer = load_tokenizer(folder / "tokenizer", list(describe(folder).tokenizer["added_tokens"]))
    chat = get_format("chatml", tokenizer)
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model.generation_config.eos_token_id = [tokenizer.eos_id, tokenizer.token_id(chat.stop_token)]
    found = []
    for text in TEXTS:
        ids, _ = chat.encode(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
        row = torch.from_numpy(ids.astype(np.int64))[None]
        given = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        found.append(tokenizer.decode(given[0, row.shape[1] :].tolist(), skip_special=True).strip())
    return found
