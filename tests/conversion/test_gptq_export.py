"""Exports with GPTQ: read back by a plain reader and by the format's own, the loss that the card states, and refusals."""

import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.regrouped import regroup
from megatron_ft.data.shards import ShardWriter
from megatron_ft.errors import ConfigError, UserError
from megatron_ft.models.hf_source import HfSource
from tests.conversion.builders import make_family, make_llama

LENGTH = 64


def write_shards(prefix, vocab_size=203, samples=40):
    """Samples of 50 tokens, so that rows of 64 go across samples."""
    random = np.random.default_rng(0)
    with ShardWriter(prefix, vocab_size) as writer:
        for _ in range(samples):
            writer.add(random.integers(0, 203, 50), np.full(50, 2))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Llama and a Falcon, each as a checkpoint beside its Hugging Face folder, and shards."""
    folder = tmp_path_factory.mktemp("gptq")
    make_llama(folder / "llama")
    make_family(folder / "falcon", "falcon 40b")
    for name in ("llama", "falcon"):
        convert(HfToMegatron(str(folder / name), str(folder / f"{name}-megatron"), tensor_model_parallel_size=2))
    write_shards(folder / "shards")
    return folder


def quantised(models, family, target, **options):
    given = {"group_size": 16, "calibration_rows": 20, "calibration_length": LENGTH, **options}
    calibration = given.pop("calibration", str(models / "shards"))
    return export(MegatronToHf(str(models / f"{family}-megatron"), str(target), calibration=calibration, **given))


def nibbles(packed):
    """The codes of int32 words along the last axis, read byte by byte."""
    as_bytes = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    return torch.from_numpy(np.stack([as_bytes & 15, as_bytes >> 4], -1).reshape(*as_bytes.shape[:-1], -1)).int()


def dequantised(tensors):
    """The weights of an export by the rules of its format, with code of this test only."""
    found = {}
    for name, values in tensors.items():
        stem = name.rsplit(".", 1)[0]
        if name.endswith(".qweight"):
            codes = nibbles(values.t().contiguous())
            zeros = (nibbles(tensors[stem + ".qzeros"]) + 1).t()
            group = tensors[stem + ".g_idx"].long()
            found[stem + ".weight"] = tensors[stem + ".scales"].t().float()[:, group] * (codes - zeros[:, group])
        elif name.endswith(".weight_packed"):
            scales = tensors[stem + ".weight_scale"]
            codes = nibbles(values) - 8
            found[stem + ".weight"] = scales.float().repeat_interleave(codes.shape[1] // scales.shape[1], 1) * codes
        elif name.rsplit(".", 1)[1] in ("weight", "bias"):
            found[name] = values
    return found


def read(folder):
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def in_order(groups):
    """Whether groups are neighbours."""
    return bool((groups.diff() >= 0).all())


def perplexity(model, shards):
    """Of the last 5 of the 25 rows that the options above give."""
    from megatron_ft.data.shards import open_shards

    opened = open_shards(shards)
    ids = np.concatenate([opened.tokens(index) for index in range(len(opened))]).astype(np.int64)
    rows = torch.from_numpy(ids[: 25 * LENGTH].reshape(-1, LENGTH))[-5:]
    with torch.no_grad():
        return torch.exp(torch.stack([model(row[None], labels=row[None]).loss for row in rows]).mean()).item()


def stated_perplexity(folder):
    """Before and after, as the model card says."""
    card = (folder / "README.md").read_text()
    return tuple(map(float, re.search(r"\| perplexity \| ([\d.]+) before, ([\d.]+) after", card).groups()))


CASES = [("llama", "gptq", False), ("llama", "gptq", True), ("llama", "w4a16", True), ("falcon", "gptq", True)]


@pytest.mark.parametrize("family, method, desc_act", CASES)
@pytest.mark.works("GPTQ, W4A16", "Falcon")
def test_weights_loss_and_card(models, tmp_path, family, method, desc_act):
    quantised(models, family, tmp_path / "out", quantize=method, desc_act=desc_act)
    original = AutoModelForCausalLM.from_pretrained(models / family).eval()
    card = (tmp_path / "out" / "README.md").read_text()
    before, after = stated_perplexity(tmp_path / "out")
    assert perplexity(original, models / "shards") == pytest.approx(before, rel=1e-4)
    tensors = read(tmp_path / "out")
    assert all(in_order(values) != desc_act for name, values in tensors.items() if name.endswith(".g_idx"))
    weights = dequantised(tensors)
    state = original.state_dict()
    linears = [name for name in weights if not torch.equal(weights[name], state[name])]
    assert len(linears) == (28 if family == "llama" else 16)
    assert all((weights[name] - state[name]).norm() < 0.15 * state[name].norm() for name in linears)
    original.load_state_dict(weights, strict=family == "llama")
    assert perplexity(original, models / "shards") == pytest.approx(after, rel=1e-4)
    assert ("FalconLinear = torch.nn.Linear" in card) == (family == "falcon")
    gptq, rounded = map(float, re.search(r"([\d.]+) of the outputs' norm.*nearest: ([\d.]+)", card).groups())
    assert 0 < gptq < rounded


def test_max_shard_size(models, tmp_path):
    """The same tensors in one file, in several, and each in its own; with an index, as transformers reads them."""
    small = {"quantize": "gptq", "calibration_rows": 4}
    assert quantised(models, "llama", tmp_path / "whole", **small).files == 1
    done = quantised(models, "llama", tmp_path / "parts", max_shard_size="20KB", **small)
    assert done.files == count_files(tmp_path / "parts", tmp_path / "whole", 20_000) > 2
    shutil.copytree(tmp_path / "whole", tmp_path / "each")
    count = regroup(tmp_path / "each", ["model.safetensors"], 1)
    assert count == count_files(tmp_path / "each", tmp_path / "whole", 1) == len(read(tmp_path / "whole"))


def count_files(folder, whole, largest):
    """Check the tensors, names and sizes of files, and their index. Return the number of files."""
    assert [path.name for path in whole.glob("*.safetensors*")] == ["model.safetensors"]
    expected, files = read(whole), sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    tensors = {file: load_file(folder / file) for file in files}
    assert all(sum(one.nbytes for one in held.values()) <= largest or len(held) == 1 for held in tensors.values())
    found = {name: value for held in tensors.values() for name, value in held.items()}
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, held in tensors.items() for name in held}
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in expected.values())
    return len(files)


def test_formats_own_reader_of_w4a16(models, tmp_path):
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed")
    quantised(models, "llama", tmp_path / "out", quantize="w4a16", max_shard_size="20KB")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(models / "llama")
    ours.load_state_dict(dequantised(read(tmp_path / "out")))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_formats_own_reader_of_gptq(models, tmp_path, family, monkeypatch):
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed")
    from transformers.models.falcon import modeling_falcon

    monkeypatch.setattr(modeling_falcon, "FalconLinear", torch.nn.Linear)  # as the card says
    wide = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}  # its kernels need multiples of 32
    if family == "llama":
        make_llama(tmp_path / family, **wide, num_key_value_heads=2, intermediate_size=192)
    else:
        make_family(tmp_path / family, "falcon 40b", **wide, num_kv_heads=2)
    convert(HfToMegatron(str(tmp_path / family), str(tmp_path / f"{family}-megatron")))
    options = {"group_size": 32, "desc_act": True, "calibration": str(models / "shards")}
    quantised(tmp_path, family, tmp_path / "out", quantize="gptq", **options)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
    assert [name for name, one in theirs.named_modules() if type(one) is torch.nn.Linear] == [
        "lm_head"
    ]  # none stayed dense
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    ours.load_state_dict(dequantised(read(tmp_path / "out")), strict=family == "llama")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=0.01)


def test_the_export_is_refused_as_a_source_of_weights(models, tmp_path):
    quantised(models, "llama", tmp_path / "out", quantize="gptq")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["bits"] == 4 and entry["group_size"] == 16
    with pytest.raises(UserError, match="gptq"):
        HfSource(tmp_path / "out")


REFUSED = [
    ({"quantize": "gptq", "calibration": None}, "needs texts"),
    ({"quantize": None, "bits": 8, "calibration": None}, "--bits is for a quantised export"),
    ({"quantize": "w4a16", "bits": 8}, "has 4 bits"),
    ({"quantize": "gptq", "bits": 3}, "choose 2, 4, 8"),
    ({"quantize": "gptq", "group_size": 24}, "no multiple"),
    ({"quantize": "gptq", "group_size": 0}, "at least 1"),
    ({"quantize": "gptq", "calibration_length": 500}, "128 positions"),
    ({"quantize": "gptq", "adapter_only": True}, "--adapter_only"),
    ({"quantize": "gptq", "calibration": "short"}, "fewer than two rows"),
    ({"quantize": "gptq", "calibration_rows": 1}, "at least 2"),
    ({"quantize": "gptq", "max_shard_size": "many"}, "--max_shard_size many"),
]


@pytest.mark.parametrize("options, said", REFUSED)
def test_refusals(models, tmp_path, options, said):
    write_shards(tmp_path / "short", samples=2)
    if options.get("calibration") == "short":
        options = {**options, "calibration": str(tmp_path / "short")}
    with pytest.raises(ConfigError, match=said):
        quantised(models, "llama", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
