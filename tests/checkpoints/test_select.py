"""Which checkpoint a run begins from where one of them is of another model, or what the run began from is gone."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest

from megatron_ft.checkpoints.folder import describe
from megatron_ft.checkpoints.select import first_whole
from megatron_ft.config.sections import Checkpointing
from megatron_ft.digests import write_digests
from megatron_ft.errors import CheckpointError


@pytest.fixture
def root(checkpoint: str, tmp_path: Path) -> Path:
    """Three checkpoints of one model, whole and with digests."""
    for number in (1, 2, 3):
        folder = tmp_path / "run" / f"iter_000000{number}"
        shutil.copytree(Path(checkpoint) / "release", folder)
        change(folder, iteration=number)
    return tmp_path / "run"


def change(folder: Path, architecture: dict | None = None, **entries: object) -> None:
    """Change entries of a checkpoint's config.json, with digests that vouch for them."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | entries | {"architecture": config["architecture"] | (architecture or {})}))
    write_digests(folder)


def newest_first(root: Path) -> list[Path]:
    return sorted(root.iterdir(), reverse=True)


def trust(root: str) -> tuple[str, str, list[str]]:
    """(the folder that is chosen, the error, the warnings)."""
    from megatron_ft.checkpoints import select
    from megatron_ft.engine.parallel import process_groups

    lines: list[str] = []
    folders = newest_first(Path(root))
    try:
        with mock.patch.object(select.log, "warning", lines.append), process_groups() as layout:
            folder, _ = select.first_trusted(folders, describe(folders[0]), describe, layout, True)
        return folder.name, "", lines
    except CheckpointError as error:
        return "", str(error), lines


def test_an_older_checkpoint_of_another_model_is_passed_over(one_rank, root):
    """The newest one is damaged, the one before of another model: the third is used, and all of it is said."""
    (root / "iter_0000003" / "common.pt").write_bytes(b"x")
    change(root / "iter_0000002", {"num_attention_heads": 4})
    ((chosen, error, said),) = one_rank.run(trust, str(root))
    assert (chosen, error) == ("iter_0000001", "")
    assert f"{root}/iter_0000002 is a checkpoint of another model than the others beside it; remove it" in said[2]
    assert said[3] == f"falling back to the checkpoint before: {root}/iter_0000001"


def test_where_none_can_be_trusted_the_newest_ones_fault_is_the_message(one_rank, root):
    shutil.rmtree(root / "iter_0000001")
    (root / "iter_0000003" / "common.pt").write_bytes(b"x")
    change(root / "iter_0000002", {"num_attention_heads": 4})
    ((chosen, error, _),) = one_rank.run(trust, str(root))
    assert chosen == "" and f"{root}/iter_0000003/common.pt has 1 bytes" in error


@pytest.mark.parametrize("there", [True, False])
def test_a_run_goes_on_without_the_model_that_it_began_from(there: bool, root: Path, tmp_path: Path) -> None:
    """As long as it is there, what is in --save has to be of that model."""
    if there:
        shutil.copytree(root / "iter_0000001", tmp_path / "model" / "release")
        change(tmp_path / "model" / "release", {"num_attention_heads": 4}, iteration="release")
        (tmp_path / "model" / "latest_checkpointed_iteration.txt").write_text("release\n")
    asked = Checkpointing(load=str(tmp_path / "model"), save=str(root))
    folders = newest_first(root)
    if there:
        with pytest.raises(CheckpointError, match=r"iter_0000003 is a checkpoint of another model than --load"):
            first_whole(folders, describe, asked)
    else:
        index, config = first_whole(folders, describe, asked)
        assert (index, config.iteration) == (0, 3)


def test_a_tokenizer_that_is_named_and_missing(one_rank, root):
    """A run would save checkpoints without it, and nobody could use them."""
    change(root / "iter_0000001", tokenizer={"kind": "sentencepiece"})
    (said,) = one_rank.run(read_the_tokenizer, str(root / "iter_0000001"))
    where = root / "iter_0000001" / "tokenizer"
    assert said == f"{where} is missing: the checkpoint is incomplete; copy or convert it again"
    assert one_rank.run(read_the_tokenizer, str(root / "iter_0000002")) == [{}]


def read_the_tokenizer(folder: str) -> object:
    from megatron_ft.checkpoints.training_state import read_tokenizer

    try:
        return read_tokenizer(Path(folder), describe(Path(folder)))
    except CheckpointError as error:
        return str(error)
