"""GGUF exports: read back with the gguf package, and run by llama.cpp where a package of it is installed."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.errors import ConfigError
from tests.conversion import llama_cpp
from tests.conversion.builders import FAMILIES, LLAMA3, LONGROPE, YARN, make_llama, make_model, make_sentencepiece
from tests.conversion.test_gptq_export import LENGTH, perplexity, stated_perplexity, write_shards
from tests.data.helpers import fast_file, sentencepiece_file

VOCABULARY = 402
TEXTS = ["the quick brown fox", "  lazy  dogs, 12 3.5\n\n?", "na\u00efve 二😀", "<s>over", "jumps over</s>"]


def made(folder, family="llama", tokenizer=sentencepiece_file, chat_format=None, **options):
    make_model(folder / "hf", family, **{"vocab_size": VOCABULARY, **options})
    if tokenizer:
        tokenizer(folder / "hf")
    convert(
        HfToMegatron(
            str(folder / "hf"), str(folder / "megatron"), tensor_model_parallel_size=1, chat_format=chat_format
        )
    )
    return AutoModelForCausalLM.from_pretrained(folder / "hf").eval()


def gguf(folder, kind="f16", **options):
    """Export, and return the file in the gguf package's reader."""
    reader = pytest.importorskip("gguf")
    export(MegatronToHf(str(folder / "megatron"), str(folder / kind), quantize=f"gguf-{kind}", **options))
    return reader.GGUFReader(sorted((folder / kind).glob("*.gguf"))[0])


def stored(read):
    from gguf import dequantize

    found = {one.name: dequantize(one.data, one.tensor_type) for one in read.tensors}
    return {name: torch.from_numpy(values.astype(np.float32)) for name, values in found.items()}


def halves(weight, heads):
    """Rows of the original Llama's order, where neighbours are rotated together, put half a head apart, with code of this test only."""
    size = weight.shape[0] // heads
    rows = [head * size + 2 * place + part for head in range(heads) for part in (0, 1) for place in range(size // 2)]
    return weight[rows]


def rounded(weight):
    """The weights of Q8_0 by its definition in ggml: blocks of 32, a scale in fp16, halves away from zero; F16 where blocks do not fit."""
    if weight.shape[-1] % 32:
        return weight.half().float()
    blocks = weight.numpy().reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    scaled = blocks * inverse
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    return torch.from_numpy(codes * scale.astype(np.float16).astype(np.float32)).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_tensors_of_a_llama(tmp_path, kind):
    state = made(tmp_path).state_dict()
    found = stored(gguf(tmp_path, kind))
    round_ = rounded if kind == "q8_0" else lambda weight: weight.half().float()
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for number in range(4):
        for theirs, ours in names.items():
            place = "self_attn" if "attn" in ours else "mlp"
            value = found.pop(f"blk.{number}.{ours}.weight")
            if theirs in ("q_proj", "k_proj"):
                value = halves(value, 8 if theirs == "q_proj" else 4)
            assert torch.equal(value, round_(state[f"model.layers.{number}.{place}.{theirs}.weight"])), theirs
        norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        for ours, theirs in norms.items():
            assert torch.equal(
                found.pop(f"blk.{number}.{ours}.weight"), state[f"model.layers.{number}.{theirs}.weight"]
            )
    assert torch.equal(found.pop("token_embd.weight"), round_(state["model.embed_tokens.weight"]))
    assert torch.equal(found.pop("output.weight"), round_(state["lm_head.weight"]))
    assert torch.equal(found.pop("output_norm.weight"), state["model.norm.weight"])
    assert not found


def test_metadata_tokenizer_template_and_card(tmp_path):
    made(tmp_path, chat_format="chatml", rope_parameters=YARN)
    read = gguf(tmp_path, "q8_0")
    found = {name: one.contents() for name, one in read.fields.items()}
    sizes = {"block_count": 4, "embedding_length": 32, "feed_forward_length": 48, "attention.head_count": 8}
    sizes |= {
        "attention.head_count_kv": 4,
        "context_length": 128,
        "rope.dimension_count": 4,
        "rope.scaling.factor": 4.0,
    }
    sizes |= {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32, "rope.freq_base": 10000.0}
    assert {name: found[f"llama.{name}"] for name in sizes} == sizes
    assert found["general.architecture"] == "llama" and found["general.file_type"] == 7
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    stop = tokens.index("<|im_end|>")
    assert found["tokenizer.ggml.eos_token_id"] == stop and kinds[stop] == 3
    assert tokens[5] == words.convert_ids_to_tokens(5) and found["tokenizer.ggml.model"] == "llama"
    assert "<|im_start|>" in found["tokenizer.chat_template"]
    card = (tmp_path / "q8_0" / "README.md").read_text()
    assert "library_name: gguf" in card and "in Q8_0" in card and "llama-cli -m model-q8_0.gguf" in card
    assert "0.0" in card.split("error")[1].split("|")[1]
    assert json.loads((tmp_path / "q8_0" / "digests.json").read_text())


def test_a_large_file_is_split_and_replaced(tmp_path):
    made(tmp_path)
    read = gguf(tmp_path, max_shard_size="40KB")
    assert read.fields["split.count"].contents() == len(list((tmp_path / "f16").glob("*.gguf"))) > 1
    assert len(stored(gguf(tmp_path, overwrite=True))) == 39
    assert [path.name for path in (tmp_path / "f16").glob("*.gguf")] == ["model-f16.gguf"]


@pytest.mark.parametrize("family, kind", [("llama", "q8_0"), ("falcon 40b", "f16"), ("falcon 40b", "q8_0")])
def test_perplexity_in_the_card(tmp_path, family, kind):
    """Of the original, and of the file as transformers reads it."""
    sizes = FAMILIES[family][1] if family in FAMILIES else {}
    original = made(tmp_path, family.split()[0], **{**sizes, "hidden_size": 64, "num_hidden_layers": 2})
    write_shards(tmp_path / "shards", VOCABULARY)
    rows = {"calibration_rows": 20, "calibration_length": LENGTH}
    file = gguf(tmp_path, kind, calibration=str(tmp_path / "shards"), **rows)
    before, after = stated_perplexity(tmp_path / kind)
    assert perplexity(original, tmp_path / "shards") == pytest.approx(before, rel=1e-4)
    if family == "llama":
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / kind, gguf_file=f"model-{kind}.gguf", dtype=torch.float32
        )
        assert perplexity(theirs.eval(), tmp_path / "shards") == pytest.approx(after, rel=1e-4)
    assert file.tensors and (before != after or kind == "f16")


MODELS = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "longrope, one table": ("llama", {"rope_parameters": {**LONGROPE, "short_factor": [1.0, 4.0]}}),
    "yarn, its own factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    **{
        name: FAMILIES[name]
        for name in ("qwen3", "falcon 7b", "falcon 40b", "falcon 11b", "mistral, no window, theta 1e6")
    },
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.works("GGUF", ["Falcon", "Qwen3", "RoPE scaling", "tied embeddings"])
def test_llama_cpp_computes_the_same(tmp_path, name):
    pytest.importorskip("xllamacpp")
    family, options = MODELS[name]
    # Without pieces for single bytes: llama.cpp's server gives no probabilities of a token that is half a character.
    model = made(tmp_path, family, make_sentencepiece, vocab_size=203, **options)
    gguf(tmp_path)
    model.load_state_dict(
        {key: value.half().float() if value.dim() > 1 else value for key, value in model.state_dict().items()}
    )
    ids = torch.randint(0, 203, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    requests, expected = [], []
    for _ in range(5):
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
        requests.append({"ids": list(ids), "vocab_size": 203})
        ids.append(int(expected[-1].argmax()))
    answers = llama_cpp.ask(tmp_path / "f16" / "model-f16.gguf", requests)
    for answer, ours in zip(answers, expected, strict=True):
        theirs = llama_cpp.log_probabilities(answer, 203)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0.01)  # llama.cpp rounds inputs to fp16
        assert theirs.argmax() == ours.argmax()


@pytest.mark.parametrize("tokenizer", [sentencepiece_file, fast_file])
def test_llama_cpp_gives_the_same_tokens(tmp_path, tokenizer):
    pytest.importorskip("xllamacpp")
    made(tmp_path, tokenizer=tokenizer, vocab_size=VOCABULARY if tokenizer is sentencepiece_file else 339)
    gguf(tmp_path)
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "plain")))
    words = AutoTokenizer.from_pretrained(tmp_path / "plain")
    found = llama_cpp.ask(tmp_path / "f16" / "model-f16.gguf", [{"text": text} for text in TEXTS])
    assert found == [words(text)["input_ids"] for text in TEXTS]


REFUSED = {
    "llama, relu, tied": "activation reglu",
    "llama, dynamic rope": "rotary embedding of type dynamic",
    "llama, longrope": "rotary embedding of type longrope",
    "mistral": "sliding window",
    "falcon 40b, relu, untied, yarn": "activation relu",
}


@pytest.mark.parametrize("name, said", REFUSED.items())
@pytest.mark.refuses("GGUF", "sliding window", says="has layers with a sliding window")
@pytest.mark.refuses("GGUF", "ReLU", says="which is not written as GGUF: choose another --quantize, or drop it")
def test_models_that_llama_cpp_would_compute_otherwise(tmp_path, name, said):
    family, options = FAMILIES[name]
    made(tmp_path, family, tokenizer=None, **options)
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    with pytest.raises(ConfigError, match=said):
        export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "out"), quantize="gguf-f16"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_lacks(tmp_path):
    pytest.importorskip("gguf")
    made(tmp_path, tokenizer=lambda folder: sentencepiece_file(folder, model_type="unigram", size=330), vocab_size=332)
    with pytest.raises(ConfigError, match="another kind than BPE"):
        gguf(tmp_path)
    assert not (tmp_path / "f16").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"bits": 8}, "--quantize gguf-f16 has no use for --bits: choose --quantize gptq or w4a16"),
        ({}, r"pip install 'megatron_ft\[gguf\]'"),
    ],
)
def test_refusals_before_the_model_is_read(tmp_path, monkeypatch, options, said):
    make_llama(tmp_path / "hf")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "checkpoints_conversion.gguf_export.find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(ConfigError, match=said):
        export(MegatronToHf(str(tmp_path / "hf"), str(tmp_path / "out"), quantize="gguf-f16", **options))
