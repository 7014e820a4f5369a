"""The layout that generate and the evaluations choose, on the pretended GPUs of a machine: the fewest whose memory suffices."""

from __future__ import annotations

import json
import os

import pytest

from megatron_ft.commands.layout_choice import Asked, GenerationLayout, sizes_for
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError
from megatron_ft.planner.known import MODELS

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def chosen(folder: str, asked: dict, world: int | None) -> tuple[int, int] | str:
    """Return the layout on eight GPUs of 80 GiB, in the launcher, or in one of `world` ranks."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHED:
            patch.delenv(name, raising=False)
        if world:
            patch.setenv("RANK", "1")
            patch.setenv("WORLD_SIZE", str(world))
        try:
            return sizes_for([Asked(folder, **asked)], GenerationLayout(), Processes())
        except ConfigError as error:
            return str(error)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> folder with the config.json of a published model, whose weights nobody reads here."""
    place = tmp_path_factory.mktemp("published")
    for name in ("llama2-7b", "llama2-70b", "falcon-180b"):
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps({**MODELS[name], "dtype": "bfloat16"}))
    return place


SMALL = {"rows": 4, "length": 1000, "bf16": True}


@pytest.mark.parametrize(
    ("name", "asked", "world", "expected"),
    [
        ("llama2-7b", SMALL, None, (1, 1)),
        ("llama2-7b", {"rows": 1, "bf16": None}, None, (1, 1)),
        ("llama2-7b", {"rows": 64, "length": 4096, "bf16": True}, None, (4, 1)),  # 137 GB of keys and values
        ("llama2-70b", SMALL, None, (2, 1)),  # 138 GB of weights
        ("llama2-70b", {**SMALL, "bf16": False}, None, (4, 1)),
        ("llama2-70b", SMALL, 8, (2, 1)),  # four models, which divide the prompts
        ("llama2-70b", SMALL, 2, (2, 1)),
        ("falcon-180b", SMALL, None, (1, 5)),  # 360 GB; 5 divides its layers, not its heads
    ],
)
def test_the_fewest_gpus_whose_memory_suffices(gpus, models, name, asked, world, expected):
    assert gpus.run(1, chosen, str(models / name), asked, world) == [expected]


def test_a_model_that_does_not_fit_says_what_helps(gpus, models):
    (said,) = gpus.run(1, chosen, str(models / "llama2-70b"), SMALL, 1)
    assert "fit into no layout of 1 GPU with 86 GB: give --bf16" in said


def answers(checkpoint: str, output: str) -> tuple[int, int]:
    """Answer with GPUs into which half of the small model fits; return the layout of the model that answered."""
    from megatron_ft import device
    from megatron_ft.commands import generate
    from megatron_ft.generation.decoding import Decoder
    from megatron_ft.planner.answering import Reader
    from megatron_ft.planner.known import architecture

    found, real = [], Decoder.generate

    def noted(self, *args, **options):
        found.append((self.layout.tp_size, self.layout.pp_size, self.layout.dp_size))
        return real(self, *args, **options)

    reader = Reader(architecture(checkpoint), 4, 2 * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "memories", lambda: [reader.memory(2, 1)] * int(os.environ["WORLD_SIZE"]))
        patch.setattr(Decoder, "generate", noted)
        given = generate.Generation(load=checkpoint, prompt=["a" * 40, "b" * 40], output=output)
        options = generate.SamplingOptions(max_new_tokens=10)
        assert generate.run(given, options, GenerationLayout(), Processes()) == 0
    return found[0]


def test_a_model_answers_in_the_layout_that_was_chosen(gpus, tmp_path):
    from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
    from tests.conversion.builders import make_llama, make_sentencepiece

    make_llama(tmp_path / "hf")
    make_sentencepiece(tmp_path / "hf")
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "checkpoint")))
    found = gpus.run(4, answers, str(tmp_path / "checkpoint"), str(tmp_path / "answers.jsonl"))
    assert found == [(2, 1, 2)] * 4
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
