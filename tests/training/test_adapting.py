"""What preflight says about adapters, without torch; and which model stored adapters are added to."""

import dataclasses

import pytest

from megatron_ft.adapters.spec import Lora, ordered
from megatron_ft.checkpoints.folder import CheckpointConfig, write_config
from megatron_ft.commands.preflight import adapters
from megatron_ft.config.sections import Parallelism
from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.models.pipeline import split_layers
from tests.parallel.test_invariance import FALCON, LLAMA


def described(**changes) -> CheckpointConfig:
    return CheckpointConfig(LLAMA, "torch_dist", 1, 1, 256, "release", "fp32", **changes)


def said(lora=None, flags=None, **changes) -> list[str]:
    """The warnings."""
    lora = lora or Lora(64, 16.0, ordered(["all"], LLAMA))
    split = split_layers(4, flags or Parallelism())
    return [found.text for found in adapters(lora, described(**changes), split) if found.level == "warning"]


def test_preflight_warns():
    assert said() == []
    (scale,) = said(Lora(8, 64.0, ("q_proj",)))
    assert "multiplied by 8 (--lora_alpha 64, --lora_rank 8)" in scale
    assert said(Lora(64, 64.0, ("q_proj",), rs=True)) == []
    (added,) = said(tokenizer={"added_tokens": {"<|im_start|>": 200, "<|im_end|>": 201}})
    assert "2 added tokens (<|im_start|>, <|im_end|>)" in added and "--train_new_tokens" in added
    own = Lora(64, 16.0, ("q_proj",), new_tokens=(200, 201))
    assert said(own, tokenizer={"added_tokens": {"<|im_start|>": 200, "<|im_end|>": 201}}) == []
    (empty,) = said(flags=Parallelism(pipeline_model_parallel_size=3, pipeline_model_parallel_layout="Ett|tt|L"))
    assert "stage 3 of the pipeline has no layers" in empty


def test_targets():
    assert ordered(["fc1", "v_proj"], LLAMA) == ("v_proj", "gate_proj", "up_proj")
    assert ordered(["linear_qkv"], LLAMA) == ("q_proj", "k_proj", "v_proj")
    assert ordered(["all-linear"], FALCON) == ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    with pytest.raises(ConfigError, match=r"--lora_target q_proj: the model has no such part; .* query_key_value"):
        ordered(["q_proj"], FALCON)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": "8"}, "must be at least 1"),
        ({"rank": True}, "must be at least 1"),
        ({"alpha": None}, "adapter"),
        ({"targets": ["nothing"]}, "has no such part"),
        ({"targets": 3}, "adapter"),
        ({"dropout": 2.0}, "must be at least 0"),
        ({"rs": None}, None),
        ({"new_tokens": [203]}, "token 203 has trained rows, but the model has tokens 0 to 202: its tokenizer lacks"),
        ({"new_tokens": ["3"]}, "token '3'"),
    ],
)
def test_what_a_file_says_is_checked(change, words):
    entry = Lora(8, 16.0, ordered(["qkv"], LLAMA)).to_dict()
    assert Lora.from_dict(entry | {"base": {}}, LLAMA).to_dict() == entry
    if words:
        with pytest.raises(CheckpointError, match=words):
            Lora.from_dict(entry | change, LLAMA)
    for name in entry:
        with pytest.raises(CheckpointError, match="incomplete"):
            Lora.from_dict({key: value for key, value in entry.items() if key != name}, LLAMA)


def test_config_json_without_adapters_is_as_before(tmp_path):
    from megatron_ft.checkpoints.folder import read_config

    write_config(tmp_path, described())
    assert '"adapter"' not in (tmp_path / "config.json").read_text()
    own = dataclasses.replace(described(), adapter=Lora(8, 16.0, ("q_proj",)).to_dict())
    write_config(tmp_path, own)
    assert read_config(tmp_path) == own
