"""What is verified before a checkpoint is loaded, one by one, and in which words it is refused; on several ranks in the same."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ft.checkpoints import classic, verify
from megatron_ft.checkpoints.folder import describe, is_complete, rank_file
from megatron_ft.checkpoints.load import fill, guarded
from megatron_ft.digests import MANIFEST
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError, UserError

ALONE = Layout(1, 1, 1, 0, 0, 0, False, 0)


@pytest.fixture
def folder(checkpoint: str, tmp_path: Path) -> Path:
    shutil.copytree(Path(checkpoint) / "release", tmp_path / "release")
    return tmp_path / "release"


def verify_here(folder: str, digests: bool) -> tuple[str, int, list[str]]:
    """(the error, its exit code, the warnings) of this rank."""
    from megatron_ft.engine.parallel import process_groups

    lines: list[str] = []
    try:
        with mock.patch.object(verify.log, "warning", lines.append), process_groups() as layout:
            verify.verify(Path(folder), describe(Path(folder)), layout, digests)
    except UserError as error:
        return str(error), error.exit_code, lines
    return "", 0, lines


def verify_on_a_failing_disk(folder: str) -> tuple[str, int, list[str]]:
    """The same, where the disk stops answering on rank 2."""

    def broken(where: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(where / "common.pt"))

    fault = mock.patch.object(verify, "read_description", broken)
    with fault if os.environ["RANK"] == "2" else contextlib.nullcontext():
        return verify_here(folder, False)


def test_a_disk_that_fails_on_one_rank(four_ranks: Any, folder: Path) -> None:
    said = four_ranks.run(verify_on_a_failing_disk, str(folder), timeout=60)
    assert said == [said[0]] * 4
    text, code, _ = said[0]
    assert text.startswith(f"{folder}/common.pt: stale file handle; earlier checkpoints are complete") and code == 1


def test_without_digests_the_first_rank_says_so(four_ranks: Any, folder: Path) -> None:
    (folder / MANIFEST).unlink()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"digested": true', '"digested": false'))
    said = four_ranks.run(verify_here, str(folder), True, timeout=60)
    assert [one[:2] for one in said] == [("", 0)] * 4
    assert [len(one[2]) for one in said] == [1, 0, 0, 0]
    assert "has no digests" in said[0][2][0] and "its content is not verified" in said[0][2][0]


def test_a_description_too_large_to_be_one_is_not_read(folder: Path) -> None:
    os.truncate(folder / ".metadata", verify.MAX_METADATA_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"\.metadata has more than 1073741824 bytes: not a checkpoint's"):
        verify.read_description(folder)


def test_a_list_is_no_common_part(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt is not a checkpoint's; use an earlier checkpoint"):
        verify.read_tensors(tmp_path / "common.pt")


@pytest.mark.parametrize(
    ("key", "shape", "dtype", "said"),
    [
        ("model.none", (203, 64), torch.float32, "has no tensor model.none: it is of another model or optimizer"),
        (None, (7, 64), torch.float32, "this run's is [7, 64]: it is of another model"),
        (None, None, torch.bfloat16, "is stored in float32, this run computes in bfloat16"),
        (None, None, torch.float32, None),
    ],
)
def test_a_tensor_that_a_run_asks_for(key: Any, shape: Any, dtype: Any, said: Any, folder: Path) -> None:
    from megatron.core.dist_checkpointing import ShardedTensor

    metadata = verify.read_description(folder).metadata
    name, stored = next((n, e) for n, e in metadata.state_dict_metadata.items() if len(getattr(e, "size", ())) == 2)
    wanted = {"x": ShardedTensor.from_rank_offsets(key or name, torch.zeros(shape or tuple(stored.size), dtype=dtype))}
    if said is None:
        verify.check_tensors(metadata, wanted, folder, cast_weights=False)
        return
    with pytest.raises(CheckpointError) as caught:
        verify.check_tensors(metadata, wanted, folder, cast_weights=False)
    assert said in str(caught.value) and str(folder) in str(caught.value)


def save_classic(folder: Path, state: Any, name: str = "model_optim_rng.pt") -> Path:
    path = folder / "mp_rank_00" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return folder


def test_hashes_of_a_classic_checkpoint(tmp_path: Path) -> None:
    """Every tensor, however deep, by its name; another number, type or shape of one changes its hash and no other."""

    def hashes(weight: torch.Tensor) -> dict[str, str]:
        save_classic(tmp_path, {"model": {"weight": weight, "bias": torch.ones(2)}, "step": 3})
        save_classic(tmp_path, [{"exp_avg": torch.zeros(3)}, (torch.ones(1),)], "distrib_optim.pt")
        return verify.tensor_hashes(tmp_path)

    first = hashes(torch.zeros(4))
    assert set(first) == {
        "mp_rank_00/.model.weight", "mp_rank_00/.model.bias", "mp_rank_00/.0.exp_avg", "mp_rank_00/.1.0",
    }  # fmt: skip
    assert hashes(torch.zeros(4)) == first
    for other in (torch.tensor([0.0, 0, 0, 1]), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), -torch.zeros(4)):
        assert {name for name, value in hashes(other).items() if first[name] != value} == {"mp_rank_00/.model.weight"}


def test_a_classic_checkpoint_without_training_state(tmp_path: Path) -> None:
    save_classic(tmp_path, {"model": {}})
    with pytest.raises(CheckpointError, match="holds weights only, no training state to resume"):
        classic.read(tmp_path, ALONE)


def test_a_classic_checkpoint_of_other_sizes(tmp_path: Path) -> None:
    save_classic(tmp_path, {"progress": {}, "sizes": [1, 1, 4], "rng": [{}] * 4})
    with pytest.raises(CheckpointError, match=r"saved with TP, PP, DP = \[1, 1, 4\]; this run has \[1, 1, 1\]"):
        classic.read(tmp_path, ALONE)


@pytest.mark.parametrize("saved", [False, True])
def test_a_classic_checkpoint_of_another_optimizer(saved: bool, tmp_path: Path) -> None:
    """Saved with the distributed optimizer and read without, or the other way round: refused before anything is loaded."""
    save_classic(tmp_path, {})
    if saved:
        save_classic(tmp_path, [], classic.OPTIMIZER_FILE)
    distributed = SimpleNamespace(get_parameter_state_dp_zero=None)
    optimizer = SimpleNamespace(chained_optimizers=[object() if saved else distributed])  # which loads nothing
    word = "with" if saved else "without"
    with pytest.raises(CheckpointError, match=f"was saved {word} --use_distributed_optimizer"):
        classic.load_optimizer(tmp_path, {"optimizer": {}}, optimizer, ALONE)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"weight": torch.ones(3, 3), "bias": torch.ones(2)}, "does not fit the model .*size mismatch for weight"),
        ({"weight": torch.ones(2, 2)}, "tensors missing: bias; not known: none; convert again"),
        (
            {"weight": torch.ones(2, 2), "bias": torch.ones(2), "more": torch.ones(1)},
            "tensors missing: none; not known: more; convert again",
        ),
    ],
)
def test_weights_that_do_not_fit(weights: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        fill(torch.nn.Linear(2, 2), {f"model.{name}": value for name, value in weights.items()}, tmp_path)


def test_whatever_a_reader_raises_is_said_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no file of torch")
    with pytest.raises(
        CheckpointError, match=r"cannot be read .*it is damaged or cut short; use an earlier checkpoint"
    ):
        guarded(lambda: torch.load(tmp_path / "x", weights_only=True), tmp_path)


def test_a_rank_that_no_layout_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank \(2, 0\) outside layout \(2, 1\)"):
        rank_file(tmp_path, 2, 0, 2, 1)


def test_what_is_no_checkpoint_is_not_complete(folder: Path) -> None:
    assert is_complete(folder)
    (folder / "config.json").write_text("{")
    assert not is_complete(folder) and not is_complete(folder / "tokenizer")
