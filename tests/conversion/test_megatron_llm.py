"""Checkpoints that Megatron-LLM's own converter and sharding tool wrote (megatron_llm/README.md) give back the model they were made of."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
import transformers

from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.reshard import Reshard
from checkpoints_conversion.reshard import convert as reshard
from checkpoints_conversion.verify import Verify, verify
from megatron_ft.errors import UserError

BASE = {"vocab_size": 128, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
LLAMA = {**BASE, "intermediate_size": 48, "rms_norm_eps": 1e-5}
FALCON = {**BASE, "bias": False, "alibi": False}
CONFIGS = {
    "falcon7": transformers.FalconConfig(**{**FALCON, "hidden_size": 12, "num_attention_heads": 3}),
    "falcon40": transformers.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "mistral7": transformers.MistralConfig(**LLAMA, num_key_value_heads=2, max_position_embeddings=32768),
    "codellama7": transformers.LlamaConfig(
        **LLAMA, max_position_embeddings=16384, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
}


def filled(config):
    """Return the model with the weights that the files were made of."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for number, (name, weights) in enumerate(sorted(model.named_parameters())):
            places = torch.arange(weights.numel())
            values = ((places * 7919 + number * 104729 + 13) % 1009 - 504).float() / 2520
            if "norm" in name or "ln_" in name:
                values = values / 4 + (0 if name.endswith("bias") else 1)
            weights.copy_(values.view_as(weights))
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with tarfile.open(Path(__file__).parent / "megatron_llm" / "checkpoints.tar.xz") as archive:
        archive.extractall(folder)
    return folder


def same_logits(original, folder, size):
    back = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert len(back.get_input_embeddings().weight) == size
    ids = torch.arange(7, 119).unsqueeze(0)
    with torch.no_grad():
        return torch.equal(original(ids).logits[..., :size], back(ids).logits)


@pytest.mark.parametrize("name", ["falcon7", "falcon40", "falcon7-sharded", "falcon40-sharded", "codellama7"])
def test_back_to_transformers(made, tmp_path, name):
    """A release file of Falcon has neither ffn_hidden_size nor padded_vocab_size."""
    export(MegatronToHf(str(made / name), str(tmp_path / "hf"), true_vocab_size=120))
    assert same_logits(filled(CONFIGS[name.removesuffix("-sharded")]), tmp_path / "hf", 120)


def test_what_the_sharding_tool_loses(made, tmp_path, caplog):
    source = str(made / "codellama7-sharded")
    export(MegatronToHf(source, str(tmp_path / "lost"), true_vocab_size=120))
    [warning] = [record.getMessage() for record in caplog.records if "checkpoint_util" in record.getMessage()]
    assert "(rope_theta 10000, layernorm_epsilon 1e-05, rope_scaling_factor 1)" in warning
    assert not same_logits(filled(CONFIGS["codellama7"]), tmp_path / "lost", 120)
    export(MegatronToHf(source, str(tmp_path / "hf"), true_vocab_size=120, rope_theta=1e6))
    assert same_logits(filled(CONFIGS["codellama7"]), tmp_path / "hf", 120)


def test_a_mistral_keeps_its_window(made, tmp_path):
    export(MegatronToHf(str(made / "mistral7-sharded"), str(tmp_path / "hf"), true_vocab_size=120))
    assert same_logits(filled(CONFIGS["mistral7"]), tmp_path / "hf", 120)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 4096)


def test_only_the_tool_is_warned_about(made, tmp_path, caplog):
    stated = {"rope_theta": 1e6, "layernorm_epsilon": 1e-6, "rope_scaling_factor": 2.0}
    export(MegatronToHf(str(made / "codellama7"), str(tmp_path / "a"), true_vocab_size=120))
    export(MegatronToHf(str(made / "codellama7-sharded"), str(tmp_path / "b"), true_vocab_size=120, **stated))
    assert "checkpoint_util" not in caplog.text
    config = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 16384)
    assert config.rope_parameters == {**config.rope_parameters, "rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}


@pytest.mark.parametrize("changes", [{"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling_factor": 2.0}])
def test_through_reshard_and_verify(made, tmp_path, changes):
    source, stated = str(made / "codellama7-sharded"), {"true_vocab_size": 120, **changes}
    export(MegatronToHf(source, str(tmp_path / "hf"), **stated))
    reshard(Reshard(source, str(tmp_path / "new"), 2, 1, ckpt_format="torch", **stated))
    verify(Verify(str(tmp_path / "hf"), str(tmp_path / "new"), logits=False))
    content = verify(Verify(str(tmp_path / "hf"), source, longest=40, **stated)).content
    assert content["logits"]["largest_difference"] < 1e-4


def test_settings_that_are_refused(made, tmp_path):
    source = str(made / "codellama7-sharded")
    for name, value in (("rope_theta", 0.0), ("layernorm_epsilon", float("nan")), ("rope_scaling_factor", 0.5)):
        with pytest.raises(UserError, match=f"--{name} .*must be"):
            export(MegatronToHf(source, str(tmp_path / "hf"), true_vocab_size=120, **{name: value}))
    reshard(Reshard(source, str(tmp_path / "new"), true_vocab_size=120))
    with pytest.raises(UserError, match=r"--rope_theta is only for a Megatron-LLM checkpoint; .*its own value"):
        export(MegatronToHf(str(tmp_path / "new"), str(tmp_path / "hf"), rope_theta=1e6))
