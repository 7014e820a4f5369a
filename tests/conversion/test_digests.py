"""What the converters write says what it was: a file that is no longer that is refused by name, and nothing is made of it."""

import json
import shutil

import pytest

from checkpoints_conversion import reshard
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.reshard import Reshard
from checkpoints_conversion.verify import Verify, verify
from megatron_ft.digests import MANIFEST, check_digests, files_below, read_digests
from megatron_ft.errors import DamagedError
from tests.conversion.builders import make_llama, make_sentencepiece


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model in both formats, and its export in several files."""
    folder = tmp_path_factory.mktemp("made")
    make_llama(folder / "source")
    make_sentencepiece(folder / "source")
    for kind in ("torch", "torch_dist"):
        convert(HfToMegatron(str(folder / "source"), str(folder / kind), 2, 2, ckpt_format=kind, chat_format="chatml"))
    export(MegatronToHf(str(folder / "torch"), str(folder / "hf"), max_shard_size="60KB"))
    return folder


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


FOLDERS = ["hf", "torch/release", "torch_dist/release"]


@pytest.mark.parametrize("name", FOLDERS)
def test_every_file_is_listed(made, name):
    entries = read_digests(made / name)
    assert sorted(entries) == [file for file in files_below(made / name) if file != "README.md"]
    assert "tokenizer/tokenizer.model" in entries or "tokenizer.model" in entries
    check_digests(made / name)


def read(place, folder):
    """Each command that reads such a folder, as (what it is called, what it would make, the call)."""
    source, target = str(place / folder.split("/")[0]), str(place / "target")
    if folder == "hf":
        yield lambda **o: convert(HfToMegatron(source, target, **o))
        yield lambda **o: verify(Verify(source, str(place / "torch"), logits=False, **o))
    else:
        yield lambda **o: export(MegatronToHf(source, target, **o))
        yield lambda **o: reshard.convert(Reshard(source, target, **o))
        yield lambda **o: reshard.convert(Reshard(source, target, ckpt_format="torch_dist", **o))
        yield lambda **o: verify(Verify(str(place / "source"), source, logits=False, **o))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_flipped_bit_in_any_file(place, folder):
    for name in [*read_digests(place / folder), MANIFEST]:
        path = place / folder / name
        whole = path.read_bytes()
        path.write_bytes(
            whole[:-1] + bytes([whole[-1] ^ 1]) if name != MANIFEST else whole.replace(b"xxh3", b"xxh2", 1)
        )
        for command in read(place, folder):
            with pytest.raises(DamagedError) as caught:
                command()
            assert name in str(caught.value) and "--no_verify_checkpoint" in str(caught.value)
        path.write_bytes(whole)
    assert not (place / "target").exists() and not list(place.glob(".target*"))


@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_a_checkpoint_without_its_digests(place, folder):
    (place / folder / MANIFEST).unlink()
    for command in read(place, folder):
        with pytest.raises(DamagedError, match=r"digests.json is missing"):
            command()


def test_missing_cut_or_changed_on_purpose(place):
    path = place / "hf" / "generation_config.json"
    path.unlink()
    commands = list(read(place, "hf"))
    with pytest.raises(DamagedError, match=r"generation_config.json is missing"):
        commands[0]()
    path.write_text("{}")
    with pytest.raises(DamagedError, match=r"generation_config.json has 2 bytes"):
        commands[0]()
    commands[0](verify_checkpoint=False)
    assert (place / "target" / "release" / MANIFEST).is_file()


def test_an_edited_model_card_is_no_damage(place):
    """Whoever publishes a model writes in its README."""
    (place / "hf" / "README.md").write_text("# Mine")
    next(read(place, "hf"))()
    assert (place / "target" / "release" / MANIFEST).is_file()


def test_a_copy_of_torch_dist_keeps_the_digests_of_its_source(place):
    before = read_digests(place / "torch_dist" / "release")
    reshard.convert(Reshard(str(place / "torch_dist"), str(place / "other"), 4, 1, ckpt_format="torch_dist"))
    after = read_digests(place / "other" / "release")
    assert {name for name in before if before[name] != after[name]} == {"config.json"}
    check_digests(place / "other" / "release")


def test_work_taken_up_again_is_digested_too(place, monkeypatch):
    from checkpoints_conversion import stream

    write, left = stream._write, [1]

    def once(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args)

    monkeypatch.setattr(stream, "_write", once)
    again = HfToMegatron(str(place / "hf"), str(place / "target"), 1, 2, ckpt_format="torch")
    with pytest.raises(KeyboardInterrupt):
        convert(again)
    monkeypatch.undo()
    convert(again)
    check_digests(place / "target" / "release")


def test_of_files_of_others_nothing_is_asked(place):
    (place / "hf" / MANIFEST).unlink()
    config = place / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    convert(HfToMegatron(str(place / "hf"), str(place / "target"), ckpt_format="torch"))
