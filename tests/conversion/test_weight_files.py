"""Weights in other files and under other names than transformers writes: they are read where it is clear what they are, else the message
says what they are and what to do."""

import gzip
import json
import pickle
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.errors import UserError
from tests.conversion.builders import make_family, make_llama, same_tensors


@pytest.fixture
def model(tmp_path):
    return make_llama(tmp_path / "hf")


def read_back(tmp_path):
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), verify_checkpoint=False))
    export(MegatronToHf(str(tmp_path / "made"), str(tmp_path / "back")))
    return AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")


def refused(tmp_path, message):
    with pytest.raises(UserError, match=message) as caught:
        convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), verify_checkpoint=False))
    assert "\n" not in str(caught.value) and "NoneType" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def only(tmp_path, name, content, **how):
    """Write the weights as this file alone."""
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(content, tmp_path / "hf" / name, **how)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model.", "model.", "language_model.", "model.module."],
)
def test_a_prefix_before_every_name(tmp_path, model, prefix):
    """DistributedDataParallel, torch.compile, PEFT, Lightning."""
    only(tmp_path, "pytorch_model.bin", {prefix + key: tensor for key, tensor in model.state_dict().items()})
    assert same_tensors(model, read_back(tmp_path))


@pytest.mark.parametrize("family", ["qwen2, tied, multi-head, yarn", "falcon 7b"])
def test_a_base_model_of_a_tied_model(tmp_path, family):
    """Saved by transformers itself: AutoModel's names have no prefix."""
    original = make_family(tmp_path / "hf", family)
    AutoModel.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors")
    assert not any(name.startswith(("model.", "transformer.")) for name in names)
    (tmp_path / "base" / "model.safetensors").replace(tmp_path / "hf" / "model.safetensors")
    assert same_tensors(original, read_back(tmp_path))


def test_a_base_model_of_an_untied_model_has_no_output_layer(tmp_path, model):
    AutoModel.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").replace(tmp_path / "hf" / "model.safetensors")
    refused(tmp_path, "lacks lm_head.weight, .*a model without an output layer")


@pytest.mark.parametrize("said, text", [(None, "does not say"), (False, "says tie_word_embeddings false")])
def test_tied_embeddings_that_the_config_does_not_mention(tmp_path, said, text):
    make_llama(tmp_path / "hf", tie_word_embeddings=True)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | {"tie_word_embeddings": said}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    refused(tmp_path, f"lacks lm_head.weight, and config.json {text}.*set it to true")


@pytest.mark.parametrize(
    "holders", [["state_dict"], ["model"], ["module"], ["model_state_dict"], ["model", "state_dict"]]
)
def test_a_state_dict_in_a_dict(tmp_path, model, holders):
    content = model.state_dict()
    for holder in holders:
        content = {holder: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    only(tmp_path, "pytorch_model.bin", content)
    assert same_tensors(model, read_back(tmp_path))


def test_what_is_no_state_dict(tmp_path, model):
    only(tmp_path, "pytorch_model.bin", {"epoch": 3, "weights": [torch.ones(2)]})
    refused(tmp_path, "not a plain dict of tensors: save the model's state_dict alone")
    torch.save(model, tmp_path / "hf" / "pytorch_model.bin")
    refused(tmp_path, r"it names transformers\..*save the state_dict alone with torch.save")


def test_the_format_of_before_1_6(tmp_path, model):
    """The command in the message does what it says."""
    only(tmp_path, "pytorch_model.bin", model.state_dict(), _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"format of torch before 1\.6: convert it once with python -c") as caught:
        convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), verify_checkpoint=False))
    code = re.search(r'python -c "(.*)"', str(caught.value))[1]
    subprocess.run([sys.executable, "-c", code], check=True)
    assert same_tensors(model, read_back(tmp_path))


@pytest.mark.parametrize(
    "start, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>", "web page"),
        (b"\n<html lang='en'>", "web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "page of XML"),
        (b"Entry not found", r"text \(Entry not found\)"),
        (b'{"error":"Repository not found"}', r"text \(.*Repository not found.*fetch the file again"),
        (b"GGUF\3\0\0\0", "GGUF file"),
    ],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_what_came_in_place_of_a_file(tmp_path, model, name, start, message):
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / name).write_bytes(start)
    refused(tmp_path, f"{name} is a {message}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_file_without_bytes_or_compressed(tmp_path, model, name):
    (tmp_path / "hf" / "model.safetensors").unlink()
    for content, message in (
        (b"", "is cut short, to no bytes"),
        (gzip.compress(b"x" * 900), "is compressed with gzip: unpack it"),
    ):
        (tmp_path / "hf" / name).write_bytes(content)
        refused(tmp_path, f"{name} {message}")


def test_files_with_the_name_of_another_format(tmp_path, model):
    safe, torchs = (tmp_path / "hf" / name for name in ("model.safetensors", "pytorch_model.bin"))
    safe.rename(torchs)
    refused(tmp_path, "pytorch_model.bin is a file of safetensors: give it a name that ends in .safetensors")
    torchs.unlink()
    torch.save(model.state_dict(), safe)
    refused(tmp_path, "model.safetensors is a torch file, not of safetensors: give it the name pytorch_model.bin")
    safe.unlink()
    torchs.write_bytes(pickle.dumps({"weights": [1.0]}))
    refused(tmp_path, "pytorch_model.bin is a pickle, but not of torch.save: load it where")
    with zipfile.ZipFile(torchs, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path, "pytorch_model.bin is a zip archive, but not one of torch.save")
    torch.save(model.state_dict(), torchs)
    assert same_tensors(model, read_back(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensor: tensor.to_sparse(), "holds sparse tensors: save them with .to_dense"),
        (lambda tensor: tensor.to("meta"), "holds tensors without numbers"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "holds numbers of 8 bits or fewer: give the unquantised model"),
        (lambda tensor: tensor.numpy(), "holds arrays of numpy: save them with torch.from_numpy"),
    ],
)
def test_tensors_of_other_kinds(tmp_path, model, change, message):
    only(tmp_path, "pytorch_model.bin", {name: change(tensor) for name, tensor in model.state_dict().items()})
    refused(tmp_path, f"pytorch_model.bin {message}")


@pytest.mark.parametrize("change", [("self_attn", "attn"), ("model.layers.1.", "module.model.layers.1.")])
def test_some_names_are_others(tmp_path, model, change):
    only(tmp_path, "pytorch_model.bin", {name.replace(*change): value for name, value in model.state_dict().items()})
    refused(tmp_path, rf"lacks \d+ tensors, first model\..*; \d+ of its 39 tensors have other names \(.*{change[1]}")


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda tensors: {"ema": tensors, "params": tensors}, "it has such dicts as 'ema', 'params'"),
        (lambda tensors: tensors | {"step": 3}, "'step' in it is none"),
        (lambda tensors: {}, "it is empty"),
        (lambda tensors: None, "it is empty"),
    ],
)
def test_what_a_file_holds_beside_tensors(tmp_path, model, content, message):
    only(tmp_path, "pytorch_model.bin", content(dict(model.state_dict())))
    refused(tmp_path, rf"not a plain dict of tensors \({message}\): save")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_without_their_index(tmp_path, ending):
    original = make_llama(tmp_path / "hf", max_shard_size="40KB")
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    if ending == "bin":
        for path in shards:
            torch.save(
                load_file(path), path.with_name(path.name.replace("model", "pytorch_model", 1)).with_suffix(".bin")
            )
            path.unlink()
    assert len(shards) > 2 and same_tensors(original, read_back(tmp_path))
    sorted((tmp_path / "hf").glob(f"*-*.{ending}"))[1].unlink()
    refused_again = tmp_path / "made"
    with pytest.raises(
        UserError, match=rf"no index of its shards, and \d of \d shards; \w*model-00002-of-\d+.{ending} is missing"
    ):
        convert(HfToMegatron(str(tmp_path / "hf"), str(refused_again), overwrite=True, verify_checkpoint=False))


@pytest.mark.parametrize(
    "name, message",
    [
        ("consolidated.00.pth", "Meta's or Mistral's own format: convert it with transformers"),
        ("adapter_model.safetensors", "a PEFT adapter without its base model: merge it"),
        ("x-q4.gguf", "a GGUF file"),
        ("tf_model.h5", "TensorFlow weights"),
        ("weights.pt", "rename it to pytorch_model.bin"),
        ("epoch=3.ckpt", "rename it to pytorch_model.bin"),
        ("weights.safetensors", "rename it to model.safetensors"),
        ("pytorch_model.bin.1.part", "an unfinished download"),
        ("model.safetensors.incomplete", "an unfinished download"),
        ("zero_to_fp32.py", "a checkpoint of DeepSpeed"),
        ("pytorch_model_fsdp_0", "a checkpoint of FSDP: .*merge-weights"),
        ("latest_checkpointed_iteration.txt", "a Megatron checkpoint: use reshard or megatron-to-hf"),
        ("checkpoint-500", "Trainer: give that folder"),
        ("model.onnx", "ONNX"),
        ("model.nemo", "NeMo"),
    ],
)
def test_other_weights(tmp_path, model, name, message):
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / name)
    refused(tmp_path, f"holds neither .* but {name}, .*{message}")


def test_an_adapter_that_was_not_merged(tmp_path, model):
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    query = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    tensors["model.layers.0.self_attn.q_proj.base_layer.weight"] = query
    tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 32)
    save_file(tensors, path)
    refused(tmp_path, "lacks 1 tensor, first .*q_proj.weight; it holds .*lora_A.* merge it")
