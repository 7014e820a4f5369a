"""Exports in bitsandbytes' formats: their weights, and what transformers with bitsandbytes makes of them."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.errors import ConfigError
from megatron_ft.quantization.nf4 import LEVELS
from tests.conversion.builders import make_family, make_llama
from tests.conversion.test_gptq_export import LENGTH, perplexity, stated_perplexity, write_shards

SIZES = {"hidden_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bitsandbytes")
    make_llama(folder / "llama", **SIZES, intermediate_size=128)
    make_family(folder / "falcon", "falcon 40b", **SIZES)
    for name in ("llama", "falcon"):
        convert(HfToMegatron(str(folder / name), str(folder / f"{name}-megatron"), tensor_model_parallel_size=1))
    return folder


def exported(models, family, target, kind, **options):
    return export(MegatronToHf(str(models / f"{family}-megatron"), str(target), quantize=kind, **options))


def dequantised(folder):
    """The weights of an export by the rules of its format, with code of this test only."""
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    found = {}
    for name, value in tensors.items():
        if name + ".absmax" in tensors:
            shape = json.loads(bytes(tensors[name + ".quant_state.bitsandbytes__nf4"].tolist()))["shape"]
            codes = torch.stack([value.reshape(-1) >> 4, value.reshape(-1) & 15], 1).reshape(-1, 64).long()
            assert tensors[name + ".quant_map"].tolist() == pytest.approx(list(LEVELS))
            found[name] = (torch.tensor(LEVELS)[codes] * tensors[name + ".absmax"][:, None]).reshape(shape)
        elif name.removesuffix("weight") + "SCB" in tensors:
            found[name] = value.float() * tensors[name.removesuffix("weight") + "SCB"][:, None] / 127
        elif name.endswith((".weight", ".bias")):
            found[name] = value
    return found


@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize("kind, error", [("nf4", 0.15), ("int8", 0.02)])
@pytest.mark.works("NF4, int8 export", "Falcon")
def test_weights_and_card(models, tmp_path, family, kind, error):
    exported(models, family, tmp_path / "out", kind, max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    weights, state = dequantised(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(models / family).state_dict()
    linears = [name for name in weights if not torch.equal(weights[name], state[name])]
    assert len(linears) == (14 if family == "llama" else 8)
    assert all(0 < (weights[name] - state[name]).norm() < error * state[name].norm() for name in linears)
    assert set(state) - set(weights) <= {"lm_head.weight"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"mean over {len(linears)} linears" in card and ("FalconLinear = torch.nn.Linear" in card) == (
        family == "falcon"
    )


@pytest.mark.parametrize("family, kind", [("llama", "nf4"), ("llama", "int8"), ("falcon", "nf4")])
def test_perplexity_in_the_card(models, tmp_path, family, kind):
    """Of the original and of the dequantised weights, in transformers."""
    write_shards(tmp_path / "shards")
    rows = {"calibration_rows": 20, "calibration_length": LENGTH}
    done = exported(models, family, tmp_path / "out", kind, calibration=str(tmp_path / "shards"), **rows)
    stated = stated_perplexity(tmp_path / "out")
    assert f"perplexity {stated[0]:g} before, {stated[1]:g} after" in str(done)
    model = AutoModelForCausalLM.from_pretrained(models / family).eval()
    assert perplexity(model, tmp_path / "shards") == pytest.approx(stated[0], rel=1e-4)
    model.load_state_dict(dequantised(tmp_path / "out"), strict=family == "llama")
    assert perplexity(model, tmp_path / "shards") == pytest.approx(stated[1], rel=1e-4)
    assert stated[0] != stated[1]


def test_perplexity_is_not_measured_without_texts(models, tmp_path):
    assert "perplexity" not in exported(models, "llama", tmp_path / "out", "nf4").note
    assert "| perplexity | not measured: give --calibration |" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="--calibration_rows is about the texts of --calibration"):
        exported(models, "llama", tmp_path / "other", "nf4", calibration_rows=4)


@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_reads_it(models, tmp_path, family, kind, monkeypatch):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    from transformers.models.falcon import modeling_falcon

    monkeypatch.setattr(modeling_falcon, "FalconLinear", torch.nn.Linear)  # as the card says
    exported(models, family, tmp_path / "out", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    assert [name for name, one in theirs.named_modules() if type(one) is torch.nn.Linear] == ["lm_head"]
    theirs.train()  # else bitsandbytes computes in bf16, or in 8 bits
    ours = AutoModelForCausalLM.from_pretrained(models / family)
    ours.load_state_dict(dequantised(tmp_path / "out"), strict=family == "llama")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits.float(), ours(ids).logits, rtol=0, atol=1e-4)


def test_blocks_that_do_not_fit(tmp_path):
    make_llama(tmp_path / "hf")
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), tensor_model_parallel_size=1))
    with pytest.raises(ConfigError, match="no multiple of NF4's block of 64"):
        export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "out"), quantize="nf4"))
    assert not (tmp_path / "out").exists()
