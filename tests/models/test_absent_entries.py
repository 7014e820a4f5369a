"""A config.json without an entry means what transformers' own config class makes of it; a config that is contradictory is refused."""

import json

import pytest
from transformers import AutoConfig

from megatron_ft.errors import CheckpointError
from megatron_ft.models.families import FAMILIES, family_for, parse_hf_config
from tests.conversion.builders import BASE

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768, "falcon": 2048}


def full(model_type, **entries):
    return json.loads(AutoConfig.for_model(model_type, **entries).to_json_string(use_diff=False))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_absent_is_transformers_default(model_type):
    """Entry by entry, of each family's default config."""
    config = full(model_type)
    family = family_for(config)
    for key in sorted(set(config) - {"model_type", *SIZES}):
        without = {name: value for name, value in config.items() if name != key}
        ours, theirs = family.from_hf(without).to_dict(), family.from_hf(full(**without)).to_dict()
        assert {**ours, "hf": {}} == {**theirs, "hf": {}}, key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_positions(model_type):
    config = full(model_type)
    del config["max_position_embeddings"]
    assert family_for(config).from_hf(config).max_position_embeddings == POSITIONS[model_type]
    assert AutoConfig.for_model(model_type).max_position_embeddings == POSITIONS[model_type]


def test_a_size_that_is_absent_is_refused():
    for model_type in FAMILIES:
        for key in set(SIZES) & set(full(model_type)):
            config = {name: value for name, value in full(model_type).items() if name != key}
            with pytest.raises(CheckpointError, match=f"'{key}' is missing"):
                family_for(config).from_hf(config)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("value", [None, "x", [], {}, 1.5, True, -1])
def test_an_entry_of_another_type_is_named(model_type, value):
    """As config.json has it: null, not a word of Python's."""
    for key in (*SIZES, "max_position_embeddings", "rope_parameters", "rms_norm_eps", "num_key_value_heads"):
        config = full(model_type) | {key: value}
        try:
            parse_hf_config(config)
        except CheckpointError as error:
            assert "NoneType" not in str(error) and "\n" not in str(error)
            if key == "rms_norm_eps":
                assert f"config.json: rms_norm_eps {json.dumps(value)}: must be a number above 0" in str(error)
            if key in SIZES:
                assert f"{key} {json.dumps(value)}: must be a whole number" in str(error)
        else:
            assert key not in SIZES


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6}


@pytest.mark.parametrize("rope", [YARN, {"rope_type": "default", "rope_theta": 1e6}])
def test_a_rope_theta_that_was_left_over(rope):
    """Transformers takes the one in rope_parameters. An equal one beside it says nothing else."""
    config = full("llama", **BASE, rope_parameters=rope)
    family = family_for(config)
    for theta in (1e6, 1000000, None):
        assert family.from_hf(config | {"rope_theta": theta}) == family.from_hf(config)
    with pytest.raises(CheckpointError, match="disagree"):
        family.from_hf(config | {"rope_theta": 1e4})
    with pytest.raises(CheckpointError, match="disagree"):
        family.from_hf(config | {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("where", [{"partial_rotary_factor": 0.5}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}])
def test_a_part_of_the_head_is_refused(where):
    config = {key: value for key, value in full("llama", **BASE).items() if not key.startswith("rope")}
    with pytest.raises(CheckpointError, match="partial_rotary_factor"):
        family_for(config).from_hf(config | where)
