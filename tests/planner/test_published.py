"""Known models: their sizes are those that were published and those that transformers builds; how their names may be spelt."""

import pytest

from megatron_ft.errors import ConfigError
from megatron_ft.planner import figures, known

PUBLISHED = {
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688, "codellama-13b": 13_016_028_160, "codellama-34b": 33_743_970_304,
    "codellama-70b": 68_976_910_336, "tinyllama-1.1b": 1_100_048_384, "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800, "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800, "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496, "mistral-7b": 7_241_732_096, "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552, "qwen2-0.5b": 494_032_768, "qwen2-1.5b": 1_543_714_304, "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952, "falcon-180b": 179_522_565_120,
    "falcon3-1b": 1_669_408_768, "falcon3-3b": 3_227_655_168, "falcon3-7b": 7_455_550_464, "falcon3-10b": 10_305_653_760,
}  # fmt: skip
"""Numbers in the safetensors files of the models' pages, tied tables once."""


def test_every_known_model_has_its_published_size():
    assert PUBLISHED.keys() == known.MODELS.keys()
    for name, count in PUBLISHED.items():
        assert figures.whole_model(known.architecture(name)) == count, name


@pytest.mark.parametrize("name", known.MODELS)
def test_transformers_counts_the_same(name):
    """A model of one layer and one of two, built without memory, and as many more of the second layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def count(layers: int) -> int:
        entries = {**known.MODELS[name], "num_hidden_layers": layers}
        config = AutoConfig.for_model(entries.pop("model_type"), **entries)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()

    one, two = count(1), count(2)
    layers = known.MODELS[name]["num_hidden_layers"]
    assert one + (layers - 1) * (two - one) == figures.whole_model(known.architecture(name))


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("LLAMA3-405B", "llama3-405b"),
        ("llama3-4", "llama3-405b"),
        ("meta-llama/Llama-3.1-405B-Instruct", "llama3.1-405b"),
        ("Meta-Llama-3-8B", "llama3-8b"),
        ("Llama-2-7b-chat-hf", "llama2-7b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("mistral_7b", "mistral-7b"),
        ("tiiuae/falcon-180B", "falcon-180b"),
        ("tiny", "tinyllama-1.1b"),
    ],
)
def test_spellings_and_beginnings(spelt, name):
    assert known.architecture(spelt) == known.architecture(name)


@pytest.mark.parametrize(
    ("spelt", "message"),
    [
        ("llama3.1", r"model llama3.1 may be one of llama3.1-8b/70b/405b: give more of the name"),
        ("lama3-8b", "did you mean llama3-8b"),
        ("gpt5", "no known model of this name; known: llama2-7b/13b/70b, codellama"),
        ("runs/models/llama3-8b", "no such file or folder"),
        ("llama3-8b.json", "no such file or folder"),
    ],
)
def test_names_that_are_none(spelt, message):
    with pytest.raises(ConfigError, match=message):
        known.architecture(spelt)


def test_a_folder_comes_before_another_spelling(tmp_path, monkeypatch):
    """A path that is mistyped beside other files is no name either."""
    import json

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "Llama-3-8B").mkdir(parents=True)
    (tmp_path / "runs" / "Llama-3-8B" / "config.json").write_text(json.dumps(known.MODELS["smollm2-135m"]))
    assert known.architecture("runs/Llama-3-8B").num_layers == 30
    with pytest.raises(ConfigError, match="no such file or folder"):
        known.architecture("runs/Llama-2-7B")


def test_gpus_by_their_beginning():
    assert known.gpu_name("H100") == "h100-80gb" and known.gpu_name("rtx4090") == "rtx4090-24gb"
    assert known.gpu("cpu").memory > 0
    with pytest.raises(ConfigError, match="--gpu a100 may be one of a100-40gb/80gb"):
        known.gpu("a100")
