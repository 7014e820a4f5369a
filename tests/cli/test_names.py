"""Names in flags: other case, other dashes and beginnings stand for the one name that is meant, several are listed."""

import pytest

from megatron_ft.config.hints import alternatives, meant
from megatron_ft.data.chat_format import get_format
from megatron_ft.errors import ConfigError

NAMES = ("a100-40gb", "a100-80gb", "h100-80gb", "rtx4090-24gb", "torch", "torch_dist")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h100-80gb", "h100-80gb"), ("H100-80GB", "h100-80gb"), ("h100_80gb", "h100-80gb"),
        ("H100 80GB", "h100-80gb"), ("h100", "h100-80gb"),
        ("a100", None), ("a100-8", "a100-80gb"), ("4090", None),
        ("torch", "torch"), ("torch-dist", "torch_dist"), ("TORCH_D", "torch_dist"),
        ("tor", None), ("h1", None), ("", None), ("v100", None),
    ],
)  # fmt: skip
def test_what_is_meant(given, name):
    assert meant(given, NAMES) == name


def test_beginnings_may_be_too_little():
    assert meant("h100", NAMES, beginnings=False) is None and meant("H100-80gb", NAMES, beginnings=False) == "h100-80gb"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("a100", "; which of a100-40gb, a100-80gb?"), ("A100", "; which of a100-40gb, a100-80gb?"),
        ("4090", "; did you mean rtx4090-24gb?"),
        ("h100-90gb", "; did you mean h100-80gb?"), ("zzz", ""), ("x", ""),
    ],
)  # fmt: skip
def test_what_may_be_meant(given, hint):
    assert alternatives(given, NAMES) == hint


def test_chat_formats():
    assert get_format("ChatML").name == get_format("chat").name == "chatml" and get_format("Llama-3").name == "llama3"
    with pytest.raises(ConfigError, match=r"unknown chat format 'llama'.*; which of llama2, llama3"):
        get_format("llama")


@pytest.mark.parametrize("given", ["cosine", "Cosine", "COS"])
def test_choices(read, given):
    assert read("--lr_decay_style", given).lr_decay_style == "cosine"
