"""What a user can get wrong: each is refused in one line that says what and where, and leaves nothing behind."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.hf_to_megatron import HfToMegatron
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from megatron_ft.config.cli import run_script
from megatron_ft.errors import UserError
from tests.conversion.builders import make_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder / "hf", max_shard_size="40KB")
    make_llama(folder / "single")
    for name in ("torch", "torch_dist"):
        hf_to_megatron.convert(
            HfToMegatron(str(folder / "hf"), str(folder / name), 2, 2, ckpt_format=name)  # TP 2, PP 2
        )
    return folder


@pytest.fixture
def place(tmp_path, llama):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(place, source, message, verify_checkpoint=False, **options):
    """Converting place/source, in the direction that it asks for, raises `message` and makes nothing.

    Without digests, as files of others are: what is tested is the readers' own judgement.
    """
    target, options = place / "target", {**options, "verify_checkpoint": verify_checkpoint}
    with pytest.raises(UserError, match=message) as caught:
        if source in ("hf", "single"):
            hf_to_megatron.convert(HfToMegatron(str(place / source), str(target), **options))
        else:
            megatron_to_hf.convert(MegatronToHf(str(place / source), str(target), **options))
    assert not target.exists()
    assert not list(place.glob(".target*"))
    assert "\n" not in str(caught.value)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "tp, pp, message",
    [
        (3, 1, "tensor_model_parallel_size 3 does not divide the model's num_attention_heads 8; .* 1, 2, 4, 8"),
        (8, 1, "tensor_model_parallel_size 8 does not divide the model's num_query_groups 4"),
        (1, 3, "pipeline_model_parallel_size 3 does not divide the model's num_layers 4"),
        (0, 1, "must be at least 1"),
    ],
)
def test_layout_does_not_divide(place, tp, pp, message):
    refused(place, "hf", message, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "'mamba'.*supported: llama"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'.*supported: silu, gelu, relu"),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "code of its own"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn' lacks factor"),
        ({"rope_theta": 5.0}, "disagree"),
        ({"intermediate_size": 64}, "gate_proj.weight is .48, 32., config.json says .64, 32."),
        ({"num_hidden_layers": 5}, "lacks 9 tensors, first model.layers.4"),
        ({"num_hidden_layers": 2}, "holds model.layers.2.*18 such"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
)
def test_config_that_is_unsupported_or_does_not_fit(place, changes, message):
    edit_config(place / "hf", **changes)
    refused(place, "hf", message)


def test_config_missing_or_no_json(place):
    (place / "hf" / "config.json").write_text('{\n"model_type": ')
    refused(place, "hf", "config.json, line 2")
    (place / "hf" / "config.json").unlink()
    refused(place, "hf", "config.json is missing")


def test_safetensors_missing(place):
    shard = sorted((place / "hf").glob("*.safetensors"))[1]
    shard.unlink()
    refused(place, "hf", f"{shard.name} is missing")


@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.999])
def test_safetensors_truncated(place, keep):
    cut(place / "single" / "model.safetensors", keep)
    refused(place, "single", "model.safetensors is cut short")


def test_git_lfs_pointer(place):
    (place / "single" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    refused(place, "single", "Git LFS pointer")


def test_tensor_unexpected_or_missing(place):
    path = place / "single" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.extra.weight": torch.ones(1)}, path)
    refused(place, "single", "holds model.extra.weight")
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    refused(place, "single", "lacks 1 tensor, first model.norm.weight")


def test_integers_are_not_weights(place):
    path = place / "single" / "model.safetensors"
    save_file({key: tensor.to(torch.int8) for key, tensor in load_file(path).items()}, path)
    refused(place, "single", "int8: give the unquantised model")


def test_index_that_leads_outside(place):
    index = place / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../single/model.safetensors")
    index.write_text(json.dumps(content))
    refused(place, "hf", "not a plain file name")


def test_pickled_weights_that_are_none(place):
    (place / "single" / "model.safetensors").rename(place / "single" / "pytorch_model.bin")
    refused(place, "single", "pytorch_model.bin is a file of safetensors: give it a name")
    (place / "single" / "pytorch_model.bin").unlink()
    refused(place, "single", "holds neither model.safetensors nor")


def test_a_payload_in_pickled_weights_does_not_run(place):
    (place / "single" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(place / "ran")}, place / "single" / "pytorch_model.bin")
    refused(place, "single", r"pytorch_model.bin is damaged, or holds objects .*names (io|_io|builtins).open")
    assert not (place / "ran").exists()


def test_numbers_too_large_for_fp16(place):
    path = place / "single" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, path)
    refused(place, "single", "model.norm.weight holds numbers too large", params_dtype="fp16")


def test_rank_file_missing(place):
    path = place / "torch" / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    path.unlink()
    refused(place, "torch", "mp_rank_01_001/model_optim_rng.pt is missing")


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_rank_file_truncated(place, keep):
    cut(place / "torch" / "release" / "mp_rank_00_001" / "model_optim_rng.pt", keep)
    refused(place, "torch", "mp_rank_00_001/model_optim_rng.pt is (cut short|damaged)")


def change_rank_file(place, change):
    path = place / "torch" / "release" / "mp_rank_00_000" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=True)
    change(state["model"])
    torch.save(state, path)


def test_rank_file_with_other_tensors(place):
    change_rank_file(place, lambda model: model.update({"decoder.layers.0.mlp.linear_fc1.bias": torch.ones(3)}))
    refused(place, "torch", "holds decoder.layers.0.mlp.linear_fc1.bias")
    change_rank_file(place, lambda model: [model.pop(key) for key in list(model) if "bias" in key or "fc2" in key])
    refused(place, "torch", "lacks 2 tensors, first decoder.layers.0.mlp.linear_fc2.weight")


def test_rank_file_of_another_shape(place):
    change_rank_file(place, lambda model: model.update({"decoder.layers.0.mlp.linear_fc1.weight": torch.ones(3, 4)}))
    refused(place, "torch", r"linear_fc1.weight is \[3, 4\], config.json has \[48, 32\]")


class Payload:
    """Unpickling this would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("source, name", [("torch", "mp_rank_00_000/model_optim_rng.pt"), ("torch_dist", ".metadata")])
def test_a_planted_pickle_does_not_run(place, source, name):
    path = place / source / "release" / name
    if source == "torch":
        torch.save({"model": {}, "args": Payload(place / "ran")}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(place / "ran")))
    refused(place, source, "damaged")
    assert not (place / "ran").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99, None])
def test_torch_dist_missing_or_truncated(place, name, keep):
    path = place / "torch_dist" / "release" / name
    path.unlink() if keep is None else cut(path, keep)
    refused(place, "torch_dist", f"{name} is (missing|damaged|cut short)")


def test_iteration_that_is_not_there(place):
    refused(place, "torch", "iter_0000007 does not exist; .* holds: release", iteration="7")
    refused(place, "torch", "--iteration last", iteration="last")
    tracker = place / "torch" / "latest_checkpointed_iteration.txt"
    tracker.write_text("metadata?")
    refused(place, "torch", "not 'release' or a number")
    tracker.unlink()
    refused(place, "torch", "latest_checkpointed_iteration.txt is missing; .* holds: release")
    refused(place, "nowhere", "no such folder")


def test_one_folder_of_a_checkpoint_is_enough(place):
    megatron_to_hf.convert(MegatronToHf(str(place / "torch" / "release"), str(place / "target")))
    assert (place / "target" / "model.safetensors").is_file()


@pytest.mark.parametrize("size", ["", "5", "0GB", "five", "5XB"])
def test_max_shard_size(place, size):
    if size != "5":
        refused(place, "torch", "give a size such as 5GB", max_shard_size=size)


def test_existing_folders_are_kept(place):
    target, source = place / "torch", str(place / "hf")
    with pytest.raises(UserError, match="exists and is not empty"):
        hf_to_megatron.convert(HfToMegatron(source, str(target), ckpt_format="torch"))
    hf_to_megatron.convert(HfToMegatron(source, str(target), overwrite=True, ckpt_format="torch"))
    assert (target / "release" / "mp_rank_00" / "model_optim_rng.pt").is_file()
    (target / "iter_0000500").mkdir()
    with pytest.raises(UserError, match=r"holds iter_0000500, .* does not replace it"):
        hf_to_megatron.convert(HfToMegatron(source, str(target), overwrite=True, ckpt_format="torch"))
    (place / "notes").mkdir()
    (place / "notes" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"has no config.json"):
        megatron_to_hf.convert(MegatronToHf(str(place / "torch_dist"), str(place / "notes"), overwrite=True))
    with pytest.raises(UserError, match="inside each other"):
        megatron_to_hf.convert(MegatronToHf(str(place / "torch_dist"), str(place / "torch_dist" / "hf")))


def test_commands(place, capsys):
    """As from the shell: the line they print, exit code 2 and one line for a mistake."""
    made, back = str(place / "made"), str(place / "back")
    assert run_script(hf_to_megatron.COMMAND, hf_to_megatron.run, [str(place / "hf"), made]) == 0
    assert capsys.readouterr().out.startswith("44.0 k parameters, 39 tensors, 1 shard, 0:0")
    assert run_script(megatron_to_hf.COMMAND, megatron_to_hf.run, ["--input-dir", made, "--output-dir", back]) == 0
    assert "39 tensors" in capsys.readouterr().out
    assert run_script(megatron_to_hf.COMMAND, megatron_to_hf.run, [made, back]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
