"""Configs: what transformers writes, in the keys of versions 4 and 5, comes back the same."""

import json

import pytest
from transformers import LlamaConfig

from megatron_ft.errors import UserError
from megatron_ft.models import llama
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import family_for
from tests.conversion.builders import BASE, SHAPES

VERSION_4 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_sees_the_same_model(shape, tmp_path):
    original = LlamaConfig(**{**BASE, **SHAPES[shape]}).to_dict()
    arch = llama.from_hf(original)
    (tmp_path / "config.json").write_text(json.dumps(llama.to_hf(arch, "float32")))
    exported = LlamaConfig.from_pretrained(tmp_path).to_dict()
    exported["rope_parameters"].pop("type", None)  # version 4's older spelling of rope_type
    unlike = {key for key in original if exported.get(key) != original[key]}
    assert unlike <= {"_name_or_path", "transformers_version", "dtype", "architectures"}


@pytest.mark.parametrize("shape", SHAPES)
def test_our_own_export_reads_back(shape):
    arch = llama.from_hf(json.loads(LlamaConfig(**{**BASE, **SHAPES[shape]}).to_json_string()))
    assert llama.from_hf(llama.to_hf(arch, "bfloat16")) == arch
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


def test_version_4_keys_are_read_and_written():
    arch = llama.from_hf(VERSION_4)
    assert (arch.rope_theta, arch.rope_scaling) == (500000.0, VERSION_4["rope_scaling"])
    assert (arch.head_dim, arch.num_query_groups, arch.tied_embeddings) == (128, 8, False)
    exported = llama.to_hf(arch, "bfloat16")
    assert all(exported[key] == value for key, value in VERSION_4.items() if key != "rope_scaling")
    assert exported["rope_parameters"] == {**VERSION_4["rope_scaling"], "rope_theta": 500000.0}


def test_oldest_spelling_of_linear_scaling():
    config = {**VERSION_4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert llama.from_hf(config).rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope type 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "spice": 1}}, "'linear' with spice is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' lacks factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_is_not_supported_is_refused_with_a_reason(changes, message):
    config = {key: value for key, value in {**VERSION_4, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        llama.from_hf(config)


def test_families():
    assert family_for({"model_type": "llama"}) is llama
    assert family_for({"architectures": ["LlamaForCausalLM"]}) is llama
    with pytest.raises(UserError, match=r"'mamba'.*supported: llama, mistral, qwen2, qwen3, falcon"):
        family_for({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})


def test_a_newer_architecture_is_refused():
    data = {**llama.from_hf(VERSION_4).to_dict(), "window": 4096}
    with pytest.raises(UserError, match="window"):
        Architecture.from_dict(data)
    del data["window"], data["hidden_size"]
    with pytest.raises(UserError, match="hidden_size"):
        Architecture.from_dict(data)
