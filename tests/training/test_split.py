"""`--split` divides plain shards as Megatron-LLM does, and `--data_type` is compared with the shards."""

import numpy as np
import pytest
import torch

from megatron_ft.config.checks import shares_of_split
from megatron_ft.config.sections import Data
from megatron_ft.data.plain import part_of
from megatron_ft.errors import ConfigError, DataError
from megatron_ft.training.datasets import make_datasets
from tests.training.test_datasets import CHECKPOINT, write

ENDS = [
    ("969,30,1", 1000, [969, 999, 1000]),
    ("969, 30, 1", 10, [10, 10, 10]),
    ("949,50,1", 1234567, [1171604, 1233332, 1234567]),
    ("1,1,1", 10, [4, 7, 10]),
    ("98/2", 51, [50, 51, 51]),
    ("50,50", 3, [1, 3, 3]),
    ("100", 5, [5, 5, 5]),
]
"""Text, number of documents, and what Megatron-LLM's get_train_valid_test_split_ returned for them, without its first 0."""


@pytest.mark.parametrize(("text", "documents", "ends"), ENDS)
def test_parts_are_megatron_llms(text, documents, ends):
    shares = shares_of_split(Data(["a"], split=text))
    assert [part_of(documents, shares, number) for number in range(3)] == list(zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize("text", ["", "ten", "0,1,0", "1,2,3,4", "1,-1,0", "inf,1"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match="write shares to train on, to validate on and to leave out, as in 969,30,1"):
        shares_of_split(Data(["a"], split=text))


def test_one_way_to_name_the_validation_set():
    with pytest.raises(ConfigError, match="both define the validation set: keep one"):
        shares_of_split(Data(["a"], split="9,1,0", valid_data_path=["b"]))


@pytest.fixture
def plain(tmp_path):
    """Prefix of ten documents; the first token of each is its number."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path / "text_document")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for number in range(10):
        builder.add_item(torch.tensor([number, 50, 51]))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    return prefix


def first_tokens(dataset):
    (shards,) = dataset.shards
    return [int(shards.tokens(index)[0]) for index in range(len(shards))]


def test_plain_shards_are_divided(plain):
    train, valid = make_datasets(Data([plain], seq_length=16, split="7,2,1"), CHECKPOINT)
    assert (first_tokens(train), first_tokens(valid)) == (list(range(7)), [7, 8])
    train, valid = make_datasets(Data([plain], seq_length=16, split="100,0,0"), CHECKPOINT)
    assert (len(train.shards[0]), valid) == (10, None)
    train, valid = make_datasets(Data([plain], seq_length=16), CHECKPOINT)
    assert (len(train.shards[0]), valid) == (10, None)


def test_shards_with_roles_keep_their_division(tmp_path):
    alone, prefix = write(tmp_path / "alone-train", [9, 5]), write(tmp_path / "x-train", [9, 5])
    write(tmp_path / "x-val", [9])
    train, valid = make_datasets(Data([prefix], seq_length=16, split="969,30,1"), CHECKPOINT)
    assert (train.num_samples, valid.num_samples) == (2, 1)
    assert make_datasets(Data([prefix], seq_length=16, split="100,0,0"), CHECKPOINT)[1] is None
    with pytest.raises(
        DataError, match="shards with roles are divided when they are made: pretokenize with --val_split"
    ):
        make_datasets(Data([alone], seq_length=16, split="969,30,1"), CHECKPOINT)


def test_data_type_is_compared_with_the_shards(plain, tmp_path):
    chats = write(tmp_path / "chats-train", [9, 5])
    make_datasets(Data([plain], seq_length=16, data_type="gpt"), CHECKPOINT)
    make_datasets(Data([chats], seq_length=16, data_type="instruction"), CHECKPOINT)
    with pytest.raises(
        DataError, match=r"--data_type instruction: the shards of .*text_document are plain text, without roles"
    ):
        make_datasets(Data([plain], seq_length=16, data_type="instruction"), CHECKPOINT)
    with pytest.raises(DataError, match=r"--data_type gpt: the shards of .*chats-train have roles"):
        make_datasets(Data([chats], seq_length=16, data_type="gpt"), CHECKPOINT)
