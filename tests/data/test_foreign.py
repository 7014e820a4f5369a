"""Shards that the original tools wrote open as ours do; see tests/pretokenizer/original/README.md for where the files come from."""

import json
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.commands.inspect import Inspect
from megatron_ft.commands.inspect import run as inspect
from megatron_ft.config.sections import Data
from megatron_ft.data.foreign import ForeignShards, is_foreign, open_any
from megatron_ft.data.loader import ChatDataset, Choices
from megatron_ft.data.mmididx import HEADER
from megatron_ft.data.plain import PlainShards, is_plain
from megatron_ft.data.shards import open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.errors import DataError
from megatron_ft.models.architecture import Architecture
from megatron_ft.training.datasets import make_datasets
from tests.data.test_shards import write
from tests.pretokenizer.original import unpack

EXTRA = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<|im_start|>", "<|im_end|>")


@pytest.fixture
def original(tmp_path):
    return unpack(tmp_path) / "shards"


@pytest.fixture
def tokenizer(original):
    return load_tokenizer(original.parent / "inputs" / "tokenizer.model", EXTRA)


def encoded(original, text):
    """The ids of a text with control tokens, by the reference library and special_tokens.json."""
    special = json.loads((original / "special_tokens.json").read_text())
    model = sentencepiece.SentencePieceProcessor(model_file=str(original.parent / "inputs" / "tokenizer.model"))
    parts = re.split(r"(<\|im_start\|>|<\|im_end\|>)", text)
    return [index for part in parts for index in ([special[part]] if part in special else model.encode(part))]


def turns(shards, tokenizer, index):
    """[(role, text)] of a sample, by runs of equal roles."""
    ids, roles = shards.tokens(index), shards.roles(index)
    ends = [*(np.flatnonzero(np.diff(roles)) + 1), len(ids)]
    return [(int(roles[a]), tokenizer.decode(ids[a:b].tolist())) for a, b in zip([0, *ends], ends)]


def test_open_assistants_pretokenizer(original, tokenizer, caplog):
    shards = open_any(original / "oasst_all-train", tokenizer.vocab_size, tokenizer.info())
    assert "without a manifest" in caplog.text
    texts = [json.loads(line)["text"] for line in (original / "oasst_all-train.jsonl").read_text().splitlines()]
    assert len(shards) == len(texts) > 90
    for index, text in enumerate(texts):
        assert shards.tokens(index).tolist() == encoded(original, text)
        parts = text.split("<|im_start|>")[1:]
        expected = [1 if part.startswith("user") else 2 for part in parts]
        assert [role for role, _ in turns(shards, tokenizer, index)] == expected
    counts = shards.manifest.counts
    assert counts["samples"] == len(texts) and sum(counts["tokens_by_role"].values()) == counts["tokens"]


def test_megatron_llms_instruction_data(original, tokenizer):
    shards = open_any(original / "i", tokenizer.vocab_size, tokenizer.info())
    records = [json.loads(line) for line in (original / "x.jsonl").read_text().splitlines()]
    for index, record in enumerate(records):
        assert [role for role, _ in turns(shards, tokenizer, index)] == [0, 1, 2]
        for (_, text), key in zip(turns(shards, tokenizer, index), ("instruction", "input", "output"), strict=True):
            assert record[key] in text


def test_megatron_llms_plain_text(original, tokenizer):
    prefix = str(original / "t_text_document")
    assert is_plain(prefix)
    shards, model = (
        PlainShards(prefix, 337),
        sentencepiece.SentencePieceProcessor(model_file=str(original.parent / "inputs" / "tokenizer.model")),
    )
    for index, text in enumerate(["the lazy dog", "a quick fox jumps"]):
        assert shards.tokens(index).tolist() == [*model.encode(text), 332]  # <EOD>


def checkpoint(tokenizer, vocab_size=337):
    arch = Architecture("llama", 2, 16, 32, 4, 4, 4, vocab_size, 128, 1e-5)
    info = tokenizer.info() if tokenizer else {}
    return CheckpointConfig(arch, "torch_dist", 1, 1, 384, "release", "fp32", tokenizer=info)


def test_they_are_trained_on(original, tokenizer, caplog):
    """With the checkpoint's tokenizer; the validation set beside them is found. Loss on the assistant's tokens alone."""
    data = Data(data_path=[str(original / "oasst_all-train")], seq_length=512)
    train, valid = make_datasets(data, checkpoint(tokenizer))
    shards = train.shards[0]
    batch = train.microbatch([0])
    assert set(batch.roles[batch.weights > 0].tolist()) == {2}
    assert valid is not None and len(valid.shards[0]) > 0
    assert sum(len(shards.tokens(i)) for i in range(len(shards))) == shards.manifest.counts["tokens"]
    assert caplog.text.count("without a manifest") == 2


def test_another_tokenizer_is_refused_where_it_can_be_told(original, tokenizer):
    data = Data(data_path=[str(original / "oasst_all-train")], seq_length=512)
    other = load_tokenizer(original.parent / "inputs" / "tokenizer.model", ("<|im_start|>", "<|im_end|>"))
    with pytest.raises(
        DataError, match=r"special_tokens.json: id 330 is '<CLS>' there and '<\|im_start\|>' in the model"
    ):
        make_datasets(data, checkpoint(other))
    make_datasets(data, checkpoint(None))
    with pytest.raises(DataError, match=r"sample 0 holds ids .* the model's vocabulary has 300"):
        ForeignShards(original / "oasst_all-train", 300).tokens(0)


def test_inspect_shows_them(original, capsys):
    tokenizer = str(original.parent / "inputs" / "tokenizer.model")
    assert inspect(Inspect(str(original / "i"), tokenizer=tokenizer)) == 0
    shown = capsys.readouterr().out
    assert "2 samples" in shown and "<|im_start|>" in shown and "«" in shown and "not recorded" in shown


MAKER = """
import sys, numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
prefix, text_type, role_type, ends = sys.argv[1:]
for kind, of, samples in (("text", text_type, ([5, 6, 7], [8], [9, 10])), ("role", role_type, ([0, 1, 2], [2], [3, 2]))):
    builder = IndexedDatasetBuilder(f"{prefix}-{kind}.bin", dtype=getattr(numpy, of))
    for number, sample in enumerate(samples):
        builder.add_item(torch.tensor(sample))
        if ends == "each" or (ends == "last" and number == 2):
            builder.end_document()
    builder.finalize(f"{prefix}-{kind}.idx")
"""


@pytest.mark.parametrize(
    "types",
    [("int32", "uint16", "each"), ("int32", "int32", "never"), ("uint16", "uint8", "last"), ("int64", "int8", "each")],
)
def test_megatron_cores_builder(tmp_path, types):
    pytest.importorskip("megatron.core")
    subprocess.run([sys.executable, "-c", MAKER, str(tmp_path / "x"), *types], check=True, capture_output=True)
    shards = open_any(tmp_path / "x", 11)
    assert [shards.tokens(i).tolist() for i in range(3)] == [[5, 6, 7], [8], [9, 10]]
    assert [shards.roles(i).tolist() for i in range(3)] == [[0, 1, 2], [2], [3, 2]]
    assert shards.role_bytes(0).dtype == np.uint8
    batch = ChatDataset([shards], np.array([0, 0, 1, 0], np.float32), Choices(8, shuffle=False)).microbatch([0])
    assert batch.weights[0, :3].tolist() == [0, 1, 1]


def change(path, place, form, value):
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, place, value)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("ending", "place", "form", "value", "message"),
    [
        ("-text.idx", 0, "8s", b"TNTIDX\0\0", "dataset_impl mmap"),
        ("-text.idx", HEADER.size, "<i", 54, "offset 1 is 110, expected 108"),
        ("-text.idx", HEADER.size, "<i", -1, "sequence 0 has length -1"),
        ("-text.idx", 66 - 8, "<q", 3, "document index"),
        ("-text.bin", 0, "<H", 400, None),
        ("-role.bin", 100, "<H", 7, "unknown role 7"),
    ],
)
def test_what_is_damaged(original, ending, place, form, value, message):
    change(original / f"i{ending}", place, form, value)
    with pytest.raises(DataError, match=message or "holds ids"):
        open_any(original / "i", 337).tokens(0)


def test_shards_that_do_not_belong_together(original):
    shutil.copy(original / "oasst_all-val-role.idx", original / "i-role.idx")
    shutil.copy(original / "oasst_all-val-role.bin", original / "i-role.bin")
    with pytest.raises(DataError, match="do not belong together"):
        open_any(original / "i")
    (original / "i-text.bin").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_any(original / "i")


def test_our_own_without_a_manifest_are_unfinished(tmp_path):
    prefix = write(tmp_path / "x")
    assert not is_foreign(prefix) and open_any(prefix).manifest == open_shards(prefix).manifest
    (tmp_path / "x-manifest.json").unlink()
    assert not is_foreign(prefix)
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        open_any(prefix)


def test_documents_of_several_sentences(tmp_path):
    """megatron-core ends a document after several sequences: such a document is one sample."""
    pytest.importorskip("megatron.core")
    maker = MAKER.replace('ends == "last" and number == 2', 'ends == "last" and number > 0')
    subprocess.run([sys.executable, "-c", maker, str(tmp_path / "x"), "int32", "int32", "last"], check=True)
    shards = PlainShards(str(tmp_path / "x-text"), 11)
    assert [shards.tokens(i).tolist() for i in range(len(shards))] == [[5, 6, 7, 8], [9, 10]]
