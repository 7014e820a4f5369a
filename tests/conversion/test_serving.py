"""Servers for exports: none is named that does not load them as they are."""

import json
import shlex

import pytest

from checkpoints_conversion.serve import COMMAND, run
from checkpoints_conversion.serving import serving
from megatron_ft.config.cli import run_script
from megatron_ft.errors import UserError

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
         "intermediate_size": 14336, "hidden_act": "silu", "dtype": "bfloat16"}  # fmt: skip
QWEN = {**LLAMA, "model_type": "qwen2"}
FALCON = {"model_type": "falcon", "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "activation": "gelu",
          "new_decoder_architecture": True, "dtype": "bfloat16"}  # fmt: skip
FALCON_7B = {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "dtype": "bfloat16"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
W4A16 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"group_size": 128}}}}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture
def made(tmp_path):
    """Make an export of a config and a number of bytes of weights; return how to serve it."""

    def make(config=None, size=0, name="m", **files):
        folder = tmp_path / "export"
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(size)
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
        return serving(folder, name)

    return make


def servers(found) -> list[str]:
    return [way.server for way in found.ways]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, ["vLLM", "SGLang", "TGI", "transformers"]),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 4096}, ["vLLM", "SGLang", "TGI", "transformers"]),
        ({**LLAMA, "model_type": "qwen3"}, ["vLLM", "SGLang", "transformers"]),
        (FALCON, ["vLLM", "transformers"]),
        ({**LLAMA, "hidden_act": "relu"}, ["transformers"]),
        ({**FALCON, "activation": "relu"}, ["transformers"]),
        ({**FALCON, "ffn_hidden_size": 1024}, ["transformers"]),
        ({**QWEN, "use_sliding_window": True, "max_window_layers": 12}, ["transformers"]),
        ({**QWEN, "use_sliding_window": False, "max_window_layers": 12}, ["vLLM", "SGLang", "TGI", "transformers"]),
        ({**LLAMA, "model_type": "gpt2"}, ["transformers"]),
        ({**LLAMA, "quantization_config": BNB}, ["transformers"]),
        ({**LLAMA, "quantization_config": GPTQ}, ["vLLM", "transformers"]),
        ({**LLAMA, "quantization_config": W4A16}, ["vLLM", "transformers"]),
        ({**LLAMA, "hidden_size": 96, "quantization_config": W4A16}, ["transformers"]),
        ({**FALCON, "quantization_config": GPTQ}, ["vLLM"]),
        ({**FALCON, "quantization_config": BNB}, []),
    ],
)
def test_servers_of_models(made, config, expected):
    found = made(config)
    assert servers(found) == expected
    assert all(way.command in found.markdown() and way.command in found.text() for way in found.ways)


@pytest.mark.parametrize(
    ("rope", "known"),
    [
        ({"rope_type": "default", "rope_theta": 5e4}, True),
        ({"rope_type": "linear", "factor": 4.0}, True),
        ({"rope_type": "llama3", "factor": 8.0}, True),
        ({"rope_type": "yarn", "factor": 4.0}, True),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.138629436}, True),
        ({"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.138629}, False),  # NTK-YaRN
        ({"rope_type": "longrope", "factor": 4.0, "attention_factor": 1.0}, False),  # NTK-by-parts
    ],
)
def test_rotary_embeddings_that_vllm_computes_in_another_way(made, rope, known):
    found = made({**LLAMA, "rope_scaling": rope})
    assert ("vLLM" in servers(found)) == known and (
        "computes" in found.text() or known or "compute in another" in found.text()
    )


def test_falcon_has_no_scaling_there(made):
    assert servers(made({**FALCON, "rope_parameters": {"rope_type": "linear", "factor": 4.0}})) == ["transformers"]


@pytest.mark.parametrize(
    ("config", "size", "command", "words"),
    [
        (LLAMA, 16 * 10**9, "vllm serve m", "1, 2, 4 or 8 GPUs"),
        (LLAMA, 140 * 10**9, "vllm serve m --tensor-parallel-size 4", "140 GB"),
        ({**LLAMA, "num_attention_heads": 40, "num_key_value_heads": 40, "hidden_size": 5120, "intermediate_size": 13824},
         26 * 10**9, "vllm serve m", "1, 2, 4 or 8 GPUs"),
        (FALCON, 84 * 10**9, "vllm serve m --tensor-parallel-size 2", "128 heads"),
        (FALCON_7B, 14 * 10**9, "vllm serve m", "of 71 heads, cannot be divided"),
        ({**LLAMA, "quantization_config": {**GPTQ, "group_size": 128}}, 5,
         "vllm serve m --quantization gptq --dtype float16", "1, 2, 4 or 8 GPUs"),
        ({**LLAMA, "quantization_config": W4A16}, 5, "vllm serve m", "1, 2, 4 or 8 GPUs"),
        ({**LLAMA, "intermediate_size": 11008, "quantization_config": W4A16}, 5, "vllm serve m", "1 or 2 GPUs"),  # 11008 = 86 x 128
    ],
)  # fmt: skip
def test_numbers_of_gpus(made, config, size, command, words):
    found = made(config, size)
    assert found.ways[0].command == command and words in found.text()


def test_names_are_quoted_for_the_shell(made):
    found = made(LLAMA, name="it's a model", chat_template__jinja="x")
    assert shlex.split(found.ways[0].command) == ["vllm", "serve", "it's a model"]
    request = found.markdown().split("curl ")[1].split("```")[0]
    assert json.loads(shlex.split(request)[-1])["model"] == "it's a model"
    assert "/v1/chat/completions" in request


def test_a_model_without_a_template_is_asked_for_completions(made):
    assert "/v1/completions" in made(LLAMA).markdown()


def test_gguf_is_for_llama_cpp_alone(made):
    found = made(**{"model-q8_0-00002-of-00002__gguf": "x", "model-q8_0-00001-of-00002__gguf": "x"})
    assert servers(found) == ["llama.cpp"] and found.ways[0].port == 8080
    assert found.ways[0].command == "llama-server -m m/model-q8_0-00001-of-00002.gguf --jinja"
    assert "loads the others by itself" in found.text()


@pytest.mark.parametrize(("rank", "flag"), [(4, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_adapters_beside_their_base(made, rank, flag):
    found = made(
        name="exports/mine", adapter_config__json={"r": rank, "base_model_name_or_path": "owner/base", "bias": "none"}
    )
    assert servers(found) == ["vLLM", "SGLang"] and found.model == "mine"
    assert (
        found.ways[0].command
        == f"vllm serve owner/base --enable-lora --max-lora-rank {flag} --lora-modules mine=exports/mine"
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"r": 513}, "rank 513 is above"),
        ({"trainable_token_indices": [3]}, "trained rows of tokens"),
        ({"modules_to_save": ["lm_head"]}, "trained rows of tokens"),
        ({"use_dora": True}, "more than plain LoRA"),
        ({"base_model_name_or_path": ""}, "name of the base is not recorded"),
    ],
)
def test_adapters_that_have_to_be_merged(made, more, words):
    found = made(adapter_config__json={"r": 8, "base_model_name_or_path": "owner/base", **more})
    assert not found.ways and words in found.text() and "merge-adapter" in found.text()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"}, {**LLAMA, "num_attention_heads": 0}, {**LLAMA, "hidden_size": "x"},
        {**LLAMA, "rope_scaling": [1]}, {**LLAMA, "num_key_value_heads": [1]}, {**LLAMA, "quantization_config": "gptq"},
        {**LLAMA, "quantization_config": {"quant_method": "gptq", "group_size": 0}}, {**FALCON, "ffn_hidden_size": [], "hidden_size": None},
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_one_line(made, config):
    with pytest.raises(UserError, match="makes no sense"):
        made(config)


@pytest.mark.parametrize("config", [[], {"r": "x"}, {"r": None, "base_model_name_or_path": "a/b"}])
def test_an_adapter_s_config_that_makes_no_sense_is_one_line(made, config):
    with pytest.raises(UserError, match="makes no sense"):
        made(adapter_config__json=config)


def test_the_command_prints_what_the_card_says(tmp_path, made, capsys):
    commands = [way.command for way in made(LLAMA, name=str(tmp_path / "export")).ways]
    assert run_script(COMMAND, run, [str(tmp_path / "export") + "/"]) == 0
    printed = capsys.readouterr().out
    assert len(commands) == 4 and all(f"  $ {command}\n" in printed for command in commands)
    assert run_script(COMMAND, run, [str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder; give an export" in capsys.readouterr().err


def test_what_is_no_export(tmp_path, made):
    with pytest.raises(UserError, match="is no export"):
        made()
    with pytest.raises(UserError, match="is no export"):
        made_config = tmp_path / "checkpoint"
        made_config.mkdir()
        (made_config / "config.json").write_text("{}")
        serving(made_config, "m")
