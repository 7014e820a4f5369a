"""What training opens: shards that are whole, and nothing else; told before anything waits."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.config.sections import Data
from megatron_ft.data.shards import ShardWriter
from megatron_ft.errors import DataError
from megatron_ft.models.architecture import Architecture
from megatron_ft.training.datasets import make_datasets

ARCHITECTURE = Architecture(
    family="llama", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1, head_dim=8,
    vocab_size=100, max_position_embeddings=64, norm_epsilon=1e-5,
)  # fmt: skip
CHECKPOINT = CheckpointConfig(ARCHITECTURE, "torch_dist", 1, 1, 128, "release", "fp32")


def write(prefix: Path, lengths, roles=2) -> str:
    with ShardWriter(prefix, 100) as writer:
        for length in lengths:
            writer.add(np.arange(length) % 100, np.full(length, roles))
    return str(prefix)


def flip(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 4
    Path(path).write_bytes(content)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["text", "role"])
def test_a_flipped_bit_is_refused_by_the_files_name_unless_asked_not_to_look(tmp_path, split, kind, monkeypatch):
    prefix = write(tmp_path / "x-train", [9, 5])
    write(tmp_path / "x-val", [9, 5])
    train, valid = make_datasets(Data([prefix], seq_length=16), CHECKPOINT)
    assert (train.num_samples, valid.num_samples) == (2, 2)
    flip(f"{tmp_path}/x-{split}-{kind}.bin")
    with pytest.raises(DataError, match=rf"x-{split}-{kind}\.bin: its bytes are not those that were written; copy it"):
        make_datasets(Data([prefix], seq_length=16), CHECKPOINT)
    make_datasets(Data([prefix], seq_length=16, verify_data=False), CHECKPOINT)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the machine's first process looks, for all of them
    make_datasets(Data([prefix], seq_length=16), CHECKPOINT)


def test_a_validation_set_of_which_nothing_fits(tmp_path, caplog):
    """Found beside the training set, it is left out aloud; asked for, it is refused with the way out."""
    prefix = write(tmp_path / "x-train", [9, 5])
    valid = write(tmp_path / "x-val", [60, 50])
    data = Data([prefix], seq_length=16, over_long="drop")
    train, none = make_datasets(data, CHECKPOINT)
    assert train.num_samples == 2 and none is None
    assert "x-val: no sample fits --seq_length 16 with --over_long drop, so there is no evaluation" in caplog.text
    data.valid_data_path = [valid]
    with pytest.raises(
        DataError, match=r"--valid_data_path .*x-val: no sample fits .*leave the flag out to train without"
    ):
        make_datasets(data, CHECKPOINT)
    data.over_long = "cut"
    assert make_datasets(data, CHECKPOINT)[1].num_samples == 2
    data.over_long, data.data_path = "drop", [valid]
    with pytest.raises(DataError, match=r"x-val: no sample of two tokens or more that fits, nothing to train on"):
        make_datasets(data, CHECKPOINT)
