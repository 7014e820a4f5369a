"""The tables of names: every argument of transformers and TRL has a fate, no name has two, each of our flags exists."""

import dataclasses
from pathlib import Path

import pytest

from megatron_ft.config.fields import options_of
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.importing import axolotl, llama_factory, trainer, trl

TABLES = {"trainer": trainer.TABLE, "trl": trl.OWN, "llama_factory": llama_factory.OWN, "axolotl": axolotl.OWN}


@pytest.mark.parametrize("name", TABLES)
def test_no_name_is_twice_in_a_table(name):
    table = TABLES[name]
    grouped = [one for _, names in (*table.ignored, *table.impossible) for one in names.split()]
    every = [*table.direct, *table.computed, *grouped]
    assert not {one for one in every if every.count(one) > 1}
    assert set(table.direct.values()) <= set(options_of((TrainingSettings,)))
    assert set(table.off) <= set(every)


LISTS = {"axolotl": axolotl, "llama_factory": llama_factory}
"""Names in data/NAME.txt: axolotl's schema at commit 067b021c, LLaMA-Factory's arguments at ff6d4d12."""


@pytest.mark.parametrize("tool", LISTS)
def test_every_key_of_a_tool_has_a_fate(tool):
    names = (Path(__file__).parent / "data" / f"{tool}.txt").read_text().split()
    assert len(names) > 250
    assert not [name for name in names if not any(table.knows(name) for table in LISTS[tool].TABLES)]


def lost(config, *tables) -> list[str]:
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if not any(table.knows(name) for table in tables)]


def test_every_training_argument_of_transformers_has_a_fate():
    transformers = pytest.importorskip("transformers")
    assert not lost(transformers.TrainingArguments, trainer.TABLE)


def test_every_argument_of_trl_has_a_fate():
    trl_package = pytest.importorskip("trl")
    configs = (trl_package.SFTConfig, trl_package.ModelConfig, trl_package.ScriptArguments)
    assert not [name for config in configs for name in lost(config, *trl.TABLES)]
