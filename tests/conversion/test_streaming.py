"""Large models in small memory: plans exact to the byte, going on after a kill, full disks, headers that lie."""

import json
import os
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion import hf_to_megatron, stream
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.plan import plan_units
from megatron_ft.config.cli import run_script
from megatron_ft.errors import CheckpointError, UserError
from megatron_ft.models.safetensors_file import SafetensorsFile
from megatron_ft.models.torch_file import TorchFile
from tests.conversion.builders import make_llama, make_sentencepiece, same_tensors

LLAMA2_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_70b_by_plan_alone(tmp_path, capsys):
    """TP8 x PP4 of Llama-2-70B from its config.json: 32 folders, every shape and byte, against the index."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_70B))
    units = plan_units(tmp_path, tmp_path / "out", 8, 4, "torch", None)
    assert len({path.parent.name for unit in units for path in unit.files}) == 32
    parameters = 68_976_648_192
    norms = 161 * 8192  # whole on each of 8 ranks
    numbers = sum(size * len(unit.files) for unit in units for _, _, size in unit.tensors)
    assert numbers == 2 * (parameters + 7 * norms + 768 * 8192 * 2)  # 32000 rows are padded to 32768, twice
    assert all(0 < sum(unit.files.values()) - 8 * sum(n for _, _, n in unit.tensors) < 8 * 60_000 for unit in units)
    shapes = {key: shape for key, shape, _ in units[1].tensors}
    assert shapes["decoder.layers.19.self_attention.linear_qkv.weight"] == (1280, 8192)
    assert shapes["decoder.layers.0.mlp.linear_fc1.weight"] == (7168, 8192)
    names = plan_units(tmp_path, tmp_path / "out", 1, 1, "torch_dist", None)
    assert sum(size for unit in names for _, _, size in unit.tensors) == 2 * parameters
    arguments = [
        str(tmp_path),
        str(tmp_path / "out"),
        "--tensor_model_parallel_size",
        "8",
        "--ckpt_format",
        "torch",
        "--plan",
    ]
    assert run_script(hf_to_megatron.COMMAND, hf_to_megatron.run, arguments) == 0
    assert "mp_rank_07/model_optim_rng.pt" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tp, pp, ckpt_format", [(1, 1, "torch"), (4, 2, "torch"), (1, 1, "torch_dist")])
def test_plans_are_what_is_written(tmp_path, tp, pp, ckpt_format):
    make_llama(tmp_path / "hf", max_shard_size="40KB", tie_word_embeddings=True)
    units = plan_units(tmp_path / "hf", tmp_path / "made", tp, pp, ckpt_format, None)
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), tp, pp, ckpt_format=ckpt_format))
    planned = {path: size for unit in units for path, size in unit.files.items()}
    assert {path: path.stat().st_size for path in planned} == planned
    assert set((tmp_path / "made" / "release").rglob("*model_optim_rng.pt")) <= set(planned)


def test_a_plan_counts_the_tokens_that_come_with_a_tokenizer_type(tmp_path):
    make_llama(tmp_path / "hf")
    make_sentencepiece(tmp_path / "hf")
    options = HfToMegatron(
        str(tmp_path / "hf"), str(tmp_path / "made"), ckpt_format="torch_dist", chat_format="chatml",
        tokenizer_type="SentencePieceTokenizer",
    )  # fmt: skip
    assert "embedding.word_embeddings.weight  [210, 32]" in hf_to_megatron.planned(options)


def test_a_plan_against_an_index_of_another_model(tmp_path):
    make_llama(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for change, message in (
        ({"metadata": {"total_size": 5}}, "total_size 5, the model"),
        ({"weight_map": {**index["weight_map"], "x": "y"}}, "x .1 such. is in only one"),
    ):
        path.write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match=message):
            plan_units(tmp_path, tmp_path / "out", 1, 1, "torch", None)


def test_files_are_those_of_torch_and_safetensors(tmp_path):
    make_llama(tmp_path / "hf", dtype=torch.bfloat16)
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), 2, 1, ckpt_format="torch"))
    path = tmp_path / "made" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    assert zipfile.ZipFile(path).testzip() is None  # every CRC
    for mapped in (False, True):
        model = torch.load(path, weights_only=True, mmap=mapped)["model"]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in model.values() if mapped)
    export(MegatronToHf(str(tmp_path / "made"), str(tmp_path / "back")))
    assert (
        load_file(tmp_path / "back" / "model.safetensors").keys()
        == load_file(tmp_path / "hf" / "model.safetensors").keys()
    )


def test_pytorch_model_bin(tmp_path):
    model = make_llama(tmp_path / "hf")
    state = model.state_dict()
    names = sorted(state)
    parts = {"pytorch_model-1.bin": names[:20], "pytorch_model-2.bin": names[20:]}
    for name, keys in parts.items():
        some = type(state)({key: state[key] for key in keys})
        some._metadata = state._metadata  # as every model's state_dict has it
        torch.save(some, tmp_path / "hf" / name)
    (tmp_path / "hf" / "model.safetensors").unlink()
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), 2, 2, ckpt_format="torch"))
    export(MegatronToHf(str(tmp_path / "made"), str(tmp_path / "back")))
    assert same_tensors(model, type(model).from_pretrained(tmp_path / "back"))


KILLED = """
import os, signal, sys
from checkpoints_conversion import stream
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
write, left = stream._write, [2]
def some(*args):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(*args)
stream._write = some
convert(HfToMegatron(sys.argv[1], sys.argv[2], 2, 4, ckpt_format="torch"))
"""


def test_killed_and_taken_up_again(tmp_path, monkeypatch):
    """Two of four stages were done when it was killed: the same command writes the other two, another one starts anew."""
    make_llama(tmp_path / "hf")
    source, target = str(tmp_path / "hf"), str(tmp_path / "made")
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", KILLED, source, target], cwd=root, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    done = sorted((tmp_path / ".made.partial").rglob("*.pt"))
    assert len(done) == 4
    written, write = [], stream._write
    monkeypatch.setattr(stream, "_write", lambda unit, *args: (written.append(unit), write(unit, *args)))
    convert(HfToMegatron(source, target, 2, 4, ckpt_format="torch"))
    assert len(written) == 2 and not (tmp_path / ".made.partial").exists()
    convert(HfToMegatron(source, str(tmp_path / "straight"), 2, 4, ckpt_format="torch"))
    for path in (tmp_path / "straight").rglob("*.pt"):
        other = tmp_path / "made" / path.relative_to(tmp_path / "straight")
        assert path.read_bytes() == other.read_bytes()


def test_work_of_another_conversion_is_not_taken_up(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt), stream.resumable_folder(target, {"tp": 1}, False) as work:
        (work / "file").touch()
        raise KeyboardInterrupt
    with stream.resumable_folder(target, {"tp": 2}, False) as work:
        assert not (work / "file").exists()
        with (
            pytest.raises(UserError, match="another conversion is writing"),
            stream.resumable_folder(target, {}, False),
        ):
            pass
    assert target.is_dir() and not list(target.iterdir())


def test_no_room(tmp_path, monkeypatch):
    make_llama(tmp_path / "hf")
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: os.statvfs_result and type("U", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"[\d.]+ kB are needed, 1.0 kB are free: free disk space"):
        convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), ckpt_format="torch"))
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoints_conversion.torch_zip.os.pwrite", full)
    with pytest.raises(UserError, match="the disk is full"):
        convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), ckpt_format="torch"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def read_all(path):
    """Every tensor of a file, by our readers."""
    if path.suffix == ".pt":
        for ref in TorchFile(path).value["model"].values():
            ref.read()
        return
    file = SafetensorsFile(path, "fetch it again")
    for name in file.tensors:
        file.read(name)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_fuzzed_headers(tmp_path, kind):
    """Whatever a header says, a reader reads or says why not, in no more memory than the file has."""
    rng, path = random.Random(5), tmp_path / f"x.{kind}"
    make_llama(tmp_path / "hf", hidden_size=8, head_dim=2, intermediate_size=8, vocab_size=11)
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), ckpt_format="torch"))
    source = tmp_path / (
        "hf/model.safetensors" if kind == "safetensors" else "made/release/mp_rank_00/model_optim_rng.pt"
    )
    whole = source.read_bytes()
    start = len(whole) - 6000 if kind == "pt" else 0  # a zip file's header is its end
    refused = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            data[start + rng.randrange(min(6000, len(whole) - start))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            read_all(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_a_flipped_bit_in_a_rank_file_is_noticed(tmp_path):
    make_llama(tmp_path / "hf")
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), ckpt_format="torch"))
    path = tmp_path / "made" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    data = bytearray(path.read_bytes())
    model = torch.load(path, weights_only=True)["model"]
    data[data.index(model["decoder.layers.2.mlp.linear_fc1.weight"].numpy().tobytes()) + 100] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"the numbers of archive/data/\d+ are not those that were written"):
        export(MegatronToHf(str(tmp_path / "made"), str(tmp_path / "back"), verify_checkpoint=False))
    assert not (tmp_path / "back").exists()


def test_a_source_is_the_same_in_every_process(tmp_path):
    """Else a conversion of several files that was killed would begin anew: the order of a set differs from process to process."""
    from checkpoints_conversion.stream import identity

    files = [tmp_path / f"model-{number}.safetensors" for number in range(5)]
    for path in files:
        path.touch()
    assert identity(files) == identity([*reversed(files), files[2]]) and len(identity(files)) == 5
