"""Model cards: read by the Hub's own library; licence and languages of the base; nothing that is not recorded."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer

from checkpoints_conversion.base_card import carried_entries, front_matter
from checkpoints_conversion.card_data import front_matter as head_of
from checkpoints_conversion.card_data import is_repository
from checkpoints_conversion.card_training import settings_of, training_rows
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.reshard import Reshard
from checkpoints_conversion.reshard import convert as reshard
from megatron_ft.checkpoints.folder import TRAINED_ON, find_checkpoint, read_config, write_config
from megatron_ft.errors import ConfigError
from tests.conversion.builders import make_llama, make_sentencepiece

BASE_CARD = """\
---
license: other
license_name: plum-1.0
license_link: https://example.org/plum
language:
- en
- no
tags: [secret]
extra: {a: [1]}
---
# Base
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "hf"
    make_llama(folder)
    make_sentencepiece(folder)
    (folder / "README.md").write_text(BASE_CARD)
    return folder


def made(base, place, system=None, chat_format="chatml"):
    """Convert and export; return the card."""
    convert(HfToMegatron(str(base), str(place / "megatron"), chat_format=chat_format, ckpt_format="torch"))
    export(MegatronToHf(str(place / "megatron"), str(place / "back"), system=system))
    return ModelCard.load(place / "back" / "README.md")


def test_licence_and_languages_are_those_of_the_base(base, tmp_path):
    card = made(base, tmp_path)
    entries = card.data.to_dict()
    assert entries.pop("language") == ["en", "no"] and not isinstance(entries.pop("license_link"), list)
    assert entries == {
        "license": "other", "license_name": "plum-1.0", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["megatron-core", "conversational"],
    }  # fmt: skip
    reshard(Reshard(str(tmp_path / "megatron"), str(tmp_path / "dist"), ckpt_format="torch_dist"))
    assert (
        read_config(find_checkpoint(tmp_path / "dist")).card == read_config(find_checkpoint(tmp_path / "megatron")).card
    )
    convert(HfToMegatron(str(tmp_path / "back"), str(tmp_path / "again"), ckpt_format="torch"))
    assert read_config(find_checkpoint(tmp_path / "again")).card["license_name"] == "plum-1.0"


def test_a_base_without_a_card_gives_none(base, tmp_path):
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("README.md"))
    assert not {"license", "language"} & set(made(tmp_path / "bare", tmp_path).data.to_dict())
    assert "card" not in json.loads((find_checkpoint(tmp_path / "megatron") / "config.json").read_text())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# No entries",
        "---\nlicense: mit",
        "---\n- a\n---",
        "---\n{\n---",
        "---\nlicense: {a: 1}\nlanguage: [[1]]\n---",
        "\udcff",
    ],
)
def test_cards_that_say_nothing(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text.encode(errors="surrogateescape"))
    assert carried_entries(tmp_path) is None


def test_values_are_texts(tmp_path):
    """YAML's own rules would make False of the Norwegian language, and a date of a version."""
    (tmp_path / "README.md").write_text("\ufeff---\r\nlicense: mit\r\nlanguage: no\r\n---\r\n", encoding="utf-8")
    assert carried_entries(tmp_path) == {"license": "mit", "language": "no"}
    assert yaml.safe_load(yaml.safe_dump({"language": "no"})) == {"language": "no"}
    assert front_matter("---\nlicense_name: 2024-01-01\n---\n") == {"license_name": "2024-01-01"}


def test_entries_that_grow_when_they_are_read(tmp_path):
    lines = [
        "a: &a [x, x, x, x, x, x, x, x, x]",
        *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")),
    ]
    (tmp_path / "README.md").write_text("---\n" + "\n".join(lines) + "\nlanguage: *i\n---\n")
    assert carried_entries(tmp_path) is None


def test_the_prompt_is_the_template_s(base, tmp_path):
    card = made(base, tmp_path, system="Be `brief` | ``` polite.")
    messages = [
        {"role": "system", "content": "Be `brief` | ``` polite."}, {"role": "user", "content": "What colour is a plum?"},
    ]  # fmt: skip
    text = AutoTokenizer.from_pretrained(tmp_path / "back").apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert f"\n````text\n{text}\n````\n" in card.text
    assert "The recommended system message:\n\n````text\nBe `brief` | ``` polite.\n````" in card.text
    program = card.text.split("```python\n")[1].split("\n```")[0]
    assert json.dumps(messages, ensure_ascii=False) in program


@pytest.mark.parametrize(
    ("chat_format", "words"), [("vicuna", "A chat between a curious user"), ("llama2", "[INST] What colour")]
)
def test_a_system_message_of_the_template_itself(base, tmp_path, chat_format, words):
    card = made(base, tmp_path, chat_format=chat_format)
    assert words in card.text.split("## Prompt format")[1]
    assert ("Without a system message the template takes this one" in card.text) == (chat_format == "vicuna")


def test_a_system_message_that_has_no_place_is_refused_before_anything_is_written(base, tmp_path):
    convert(HfToMegatron(str(base), str(tmp_path / "megatron"), ckpt_format="torch"))
    with pytest.raises(ConfigError, match="--system: the model has no chat format"):
        export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back"), system="Be brief."))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron"]


def test_a_trained_checkpoint(base, tmp_path):
    """Its card has the settings, the last losses before it, the names of Hub datasets, and what it is to its base."""
    made(base, tmp_path)
    folder = find_checkpoint(tmp_path / "megatron").rename(tmp_path / "megatron" / "iter_0000020")
    config = read_config(folder)
    arch = replace(config.architecture, hf={**config.architecture.hf, "_name_or_path": "owner/base"})
    (folder / "digests.json").unlink()
    write_config(folder, replace(config, architecture=arch, iteration=20, digested=False))
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("20\n")
    settings = {"optimizer": {"lr": 1e-5, "min_lr": 0.0}, "numerics": {"bf16": True}, "data": {"seed": 0},
                "distillation": {"teacher": "runs/secret", "kd_weight": 0.5}, "adapters": {"lora_alpha": 16.0}}  # fmt: skip
    (folder / "training.yaml").write_text(yaml.safe_dump(settings))
    sources = [{"name": "s", "sources": ["owner/data", "messages", "../x"], "samples": 1, "tokens": 2, "digest": "d"}]
    (folder / TRAINED_ON).write_text(json.dumps(sources))
    lines = [
        {"iteration": 10, "train/loss": 2.0, "eval/loss": 1.5}, {"iteration": 20, "train/loss": 1.25},
        {"iteration": 20, "checkpoint": f"/elsewhere/{folder.name}"}, {"iteration": 30, "train/loss": 9.0},
    ]  # fmt: skip
    (tmp_path / "megatron" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "trained")))
    card = ModelCard.load(tmp_path / "trained" / "README.md")
    assert (card.data.base_model, card.data["base_model_relation"]) == ("owner/base", "finetune")
    assert card.data.datasets == ["owner/data"] and "distillation" in card.data.tags
    section = card.text.split("## Training")[1].split("##")[0]
    rows = dict(
        line.strip("| ").split(" | ") for line in section.splitlines() if line.count(" | ") == 1 and line[2] != "|"
    )
    assert rows == {
        "learning rate": "1e-05", "seed": "0", "weight of the distillation": "0.5", "precision": "bf16",
        "loss of training": "1.25 at step 20", "loss of validation": "1.5 at step 10",
    }  # fmt: skip
    assert "secret" not in card.content


def test_metrics_of_another_run_are_not_taken(tmp_path):
    folder = tmp_path / "iter_0000020"
    folder.mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 20, "train/loss": 1.0}\n')
    assert training_rows(folder, settings_of(folder)) == {}
    (folder / "training.yaml").write_text("[")
    assert settings_of(folder) == {}


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-13b-hf", "a/b", "a.b/c_d"])
def test_names_of_the_hub(name):
    validate_repo_id(name)
    assert is_repository(name)


@pytest.mark.parametrize("name", ["", "base", "/tmp/base", "../base", "./base", "a/b/c", "a b/c", "models/", "~/base"])
def test_folders_are_no_names_of_the_hub(name):
    assert not is_repository(name)


@pytest.mark.parametrize(
    ("iteration", "kind", "lora", "relation"),
    [
        ("release", None, False, None),
        ("release", "gptq", False, "quantized"),
        (5, "gptq", False, "finetune"),
        (5, None, True, "adapter"),
    ],
)
def test_what_a_model_is_to_its_base(base, tmp_path, iteration, kind, lora, relation):
    convert(HfToMegatron(str(base), str(tmp_path / "megatron"), ckpt_format="torch"))
    config = replace(read_config(find_checkpoint(tmp_path / "megatron")), iteration=iteration)
    found = front_matter(head_of(config, tmp_path, "transformers", "owner/base", {}, kind, lora))
    assert found.get("base_model_relation") == relation and (kind in found["tags"]) == bool(kind)
