"""Quantised exports as a source of weights: kinds that are not read, and models that are not what their config.json says."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conversion import verify
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.checkpoints.folder import check_folder, find_checkpoint
from megatron_ft.data.shards import ShardWriter
from megatron_ft.errors import UserError
from megatron_ft.models.hf_source import HfSource
from tests.conversion.builders import make_family, make_llama
from tests.errors.conftest import engine_desk

KINDS = {"gptq": "GPTQ", "w4a16": "compressed-tensors", "int8": "bitsandbytes' int8"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """KIND or family-KIND -> an export."""
    place = tmp_path_factory.mktemp("sources")
    make_llama(place / "llama", hidden_size=64, num_hidden_layers=2, intermediate_size=128)
    make_family(place / "falcon", "falcon 40b", hidden_size=64, num_hidden_layers=2)
    with ShardWriter(place / "shards", 203) as writer:
        for _ in range(4):
            writer.add(np.arange(32) % 203, np.full(32, 2))
    for family in ("llama", "falcon"):
        convert(HfToMegatron(str(place / family), str(place / f"{family}-megatron")))
        export(MegatronToHf(str(place / f"{family}-megatron"), str(place / f"{family}-nf4"), quantize="nf4"))
    for kind in KINDS:
        given = {} if kind == "int8" else {"calibration": str(place / "shards"), "calibration_length": 32}
        export(MegatronToHf(str(place / "llama-megatron"), str(place / kind), quantize=kind, **given))
    return place


def changed(folder, target, tensors=None, **entries):
    """A copy with other entries in config.json (None: without) and other tensors."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("digests.json"))
    config = {**json.loads((target / "config.json").read_text()), **entries}
    kept = {name: value for name, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    if tensors:
        save_file(tensors, target / "model.safetensors")
    return target


def refused(said, call, *args):
    with pytest.raises(UserError, match=said) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_are_not_read(exports, tmp_path, kind):
    said = f"{kind}/config.json says {re.escape(KINDS[kind])}.*give the unquantised model .*export without --quantize"
    refused(said, HfSource, exports / kind)
    refused(said, convert, HfToMegatron(str(exports / kind), str(tmp_path / "out")))
    refused(said, verify.verify, verify.Verify(str(exports / kind), str(exports / "llama-megatron")))
    assert not (tmp_path / "out").exists()


def test_generate_refuses_them_in_one_line(exports):
    done = engine_desk()("generate", "--load", str(exports / "gptq"), "--prompt", "x")
    assert done.code == 2 and "Traceback" not in done.err
    assert "config.json says GPTQ" in done.err.strip().splitlines()[-1]


def test_gguf_is_not_read(tmp_path):
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-q8_0.gguf").write_bytes(b"GGUF")
    said = "is GGUF, which only llama.cpp reads: give the checkpoint"
    for call in (HfSource, check_folder, find_checkpoint):
        refused(said, call, folder)
    refused(said, check_folder, folder / "model-q8_0.gguf")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    check_folder(folder)


def test_a_falcon_that_stayed_dense(exports, tmp_path):
    """As transformers saves it with bitsandbytes or GPTQ: the entry in config.json, and plain weights."""
    for kind in ("falcon-nf4", "gptq", "w4a16", "int8"):
        entry = json.loads((exports / kind / "config.json").read_text())["quantization_config"]
        dense = changed(exports / "falcon", tmp_path / kind, quantization_config=entry)
        refused("all weights of .* are dense, but config.json says", HfSource, dense)


def test_one_linear_that_stayed_dense(exports, tmp_path):
    tensors = load_file(exports / "llama-nf4" / "model.safetensors")
    plain = load_file(exports / "llama" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    mixed = {key: value for key, value in tensors.items() if not key.startswith(name)} | {name: plain[name]}
    folder = changed(exports / "llama-nf4", tmp_path / "mixed", mixed)
    refused(f"{name} is dense, but config.json says bitsandbytes' NF4", HfSource, folder)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    kept = changed(folder, tmp_path / "kept", quantization_config={**entry, "llm_int8_skip_modules": ["up_proj"]})
    refused("down_proj", HfSource, changed(kept, tmp_path / "more", without(mixed, plain, "down_proj")))
    assert torch.equal(HfSource(kept).tensor(name), plain[name])


def without(tensors, plain, linear):
    """The tensors with all linears of a name dense."""
    kept = {key: value for key, value in tensors.items() if f".{linear}." not in key}
    return kept | {key: value for key, value in plain.items() if f".{linear}." in key}


@pytest.mark.parametrize("kind", ["llama-nf4", "falcon-nf4", *KINDS])
def test_quantised_weights_under_a_plain_config(exports, tmp_path, kind):
    folder = changed(exports / kind, tmp_path / "plain", quantization_config=None)
    refused("is a quantised weight .* but config.json has no quantization_config", HfSource, folder)


def test_another_kind_than_config_says(exports, tmp_path):
    entry = json.loads((exports / "llama-nf4" / "config.json").read_text())["quantization_config"]
    folder = changed(exports / "gptq", tmp_path / "other", quantization_config=entry)
    refused("is GPTQ or AWQ, config.json says bitsandbytes' NF4", HfSource, folder)
