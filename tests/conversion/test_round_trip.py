"""Hugging Face -> every layout, both formats -> Hugging Face: the same bits, and the same logits in transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.checkpoints.folder import is_complete, read_config
from tests.conversion.builders import SHAPES, logits, make_llama, same_tensors

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 4)]


def there_and_back(
    folder: Path, tp: int = 1, pp: int = 1, ckpt_format: str = "torch", **options
) -> AutoModelForCausalLM:
    made = convert(
        HfToMegatron(
            input_dir=str(folder / "hf"),
            output_dir=str(folder / "megatron"),
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            ckpt_format=ckpt_format,
        )
    )
    assert made.files == (tp * pp if ckpt_format == "torch" else 1)
    assert is_complete(folder / "megatron" / "release")
    back = export(MegatronToHf(input_dir=str(folder / "megatron"), output_dir=str(folder / "back"), **options))
    assert (back.parameters, back.tensors) == (made.parameters, made.tensors)
    return AutoModelForCausalLM.from_pretrained(folder / "back", dtype="auto")


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
@pytest.mark.parametrize("tp, pp", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.works("Hugging Face export", ["TP", "PP", "tied embeddings"])
@pytest.mark.works("Hugging Face export", "classic checkpoints", ["TP", "PP"])
def test_same_bits_and_logits(tmp_path, shape, tp, pp, ckpt_format):
    if shape == "multi-query" and tp > 1:
        pytest.skip("one key-value group cannot be cut")
    original = make_llama(tmp_path / "hf", **SHAPES[shape])
    back = there_and_back(tmp_path, tp, pp, ckpt_format)
    assert same_tensors(original, back)
    assert torch.equal(logits(original, 203), logits(back, 203))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
@pytest.mark.works("Hugging Face export", ["bf16", "fp16"])
def test_half_precision_is_kept(tmp_path, dtype, ckpt_format):
    original = make_llama(tmp_path / "hf", dtype=dtype)
    assert same_tensors(original, there_and_back(tmp_path, 2, 2, ckpt_format))
    assert (
        read_config(tmp_path / "megatron" / "release").dtype == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    )


def test_many_files_on_both_sides(tmp_path):
    original = make_llama(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    back = there_and_back(tmp_path, 2, 1, max_shard_size="30KB")
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    assert same_tensors(original, back)


def test_torch_dist_over_several_files(tmp_path):
    from checkpoints_conversion.stream import write_units
    from checkpoints_conversion.torch_dist import TorchDistSource, finish_torch_dist, plan_torch_dist
    from megatron_ft.models.hf_source import HfSource
    from megatron_ft.models.weights import placed_rules

    make_llama(tmp_path / "hf")
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), ckpt_format="torch_dist"))
    config = read_config(tmp_path / "megatron" / "release")
    source = HfSource(tmp_path / "hf")
    placed = list(placed_rules(source.arch, source.rules))
    units, metadata = plan_torch_dist(tmp_path, placed, source.arch, source.dtype_of, max_file_bytes=20_000)
    assert len(write_units(units, source.full)) > 3
    finish_torch_dist(tmp_path, metadata)
    read = TorchDistSource(tmp_path, config, source.rules)
    assert all(torch.equal(read.full(one), source.full(one)) for one in placed)


def test_types_can_be_chosen(tmp_path):
    original = make_llama(tmp_path / "hf")
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), params_dtype="bf16", ckpt_format="torch"))
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back"), params_dtype="fp32"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert back.dtype == torch.float32
    assert same_tensors(original.to(torch.bfloat16).float(), back)


def test_old_exports_with_extra_copies_are_read(tmp_path):
    """Tied embeddings stored twice, and rotary buffers: both say nothing new."""
    from safetensors.torch import load_file, save_file

    original = make_llama(tmp_path / "hf", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert same_tensors(original, there_and_back(tmp_path))


@pytest.mark.parametrize("method", ["linear", "ntk-yarn", "ntk-by-parts"])
@pytest.mark.works("Hugging Face export", "RoPE scaling")
def test_a_stretched_context_is_recorded_and_exported(tmp_path, method):
    make_llama(tmp_path / "hf", hidden_size=64)
    options = {"rope_scaling_type": method, "rope_scaling_factor": 4.0}
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), **options))
    assert read_config(tmp_path / "megatron" / "release").architecture.rope_scaling["rope_type"] == method
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.max_position_embeddings == 512
    assert not torch.equal(logits(back, 203), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), 203))
