"""Rope scaling: published numbers, transformers' own where it has the method, and what an export says."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ft.errors import UserError
from megatron_ft.models import llama
from megatron_ft.models.rope import (
    EXTENDING,
    attention_factor,
    correction_range,
    extend,
    inverse_frequencies,
    scaled_base,
)

SIZES = {"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}  # head_dim 128
UNSCALED = llama.from_hf(LlamaConfig(**SIZES, max_position_embeddings=4096).to_dict())


def frequencies(arch, length=None):
    return inverse_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling, arch.max_position_embeddings, length)


def of_transformers(config: dict, length=None):
    """(frequencies, m) as transformers computes them for an exported config."""
    config = LlamaConfig(**config)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** steps, 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)


@pytest.mark.parametrize("method", EXTENDING)
@pytest.mark.parametrize("length", [100, 5000])
def test_an_export_turns_as_we_do(method, length):
    arch = extend(UNSCALED, method, 4.0)
    theirs, m = of_transformers(llama.to_hf(arch), length)
    torch.testing.assert_close(frequencies(arch, length), theirs, rtol=1e-6, atol=0)
    assert attention_factor(arch.rope_scaling, arch.max_position_embeddings) == pytest.approx(m)


@pytest.mark.parametrize("method", EXTENDING)
def test_an_export_reads_back_with_the_same_frequencies(method):
    arch = extend(UNSCALED, method, 4.0)
    again = llama.from_hf(llama.to_hf(arch))
    torch.testing.assert_close(frequencies(again, 5000), frequencies(arch, 5000), rtol=1e-6, atol=0)
    assert again.max_position_embeddings == arch.max_position_embeddings
    factors = (attention_factor(x.rope_scaling, x.max_position_embeddings) for x in (again, arch))
    assert next(factors) == pytest.approx(next(factors))
    assert llama.from_hf(llama.to_hf(again)) == again


@pytest.mark.parametrize("method", EXTENDING)
def test_scaling_by_one_is_no_scaling(method):
    assert extend(UNSCALED, method, 1.0) is UNSCALED
    linear = replace(UNSCALED, rope_scaling={"rope_type": "linear", "factor": 1.0})
    assert torch.equal(frequencies(linear), frequencies(UNSCALED))


def test_alfreds_bases_and_m():
    """Head size 64, base 1e4, scale 4: NTK-Margin 52664.434, plain NTK 41829.366; NTK-YaRN scales by 1.138629."""
    assert scaled_base(64, 1e4, {"rope_type": "ntk-margin", "factor": 4.0}) == pytest.approx(52664.434, abs=1e-3)
    assert scaled_base(64, 1e4, {"rope_type": "ntk", "factor": 4.0}) == pytest.approx(41829.366, abs=1e-3)
    alfred = {"rope_type": "ntk-yarn", "factor": 4.0}
    assert scaled_base(64, 1e4, alfred) == scaled_base(64, 1e4, {**alfred, "rope_type": "ntk-margin"})
    assert attention_factor(alfred, 8192) == pytest.approx(1.138629, abs=1e-6)


def test_airophins_ranges():
    """Head size 128, context 4096: ramps over 43-48 and 25-41; up to 25 untouched, from 48 divided by the scale."""
    assert correction_range(1.25, 0.75, 128, 1e4, 4096) == (43, 48)
    assert correction_range(16, 2, 128, 1e4, 4096) == (25, 41)
    plain, parts = frequencies(UNSCALED), frequencies(extend(UNSCALED, "ntk-by-parts", 4.0))
    assert torch.equal(parts[:26], plain[:26])
    torch.testing.assert_close(parts[48:], plain[48:] / 4)
    assert (parts[26:48] < plain[26:48]).all() and (parts[26:48] > plain[26:48] / 4).all()


@pytest.mark.parametrize("head_dim, original, ends", [(128, 4096, (20, 46)), (64, 2048, (8, 21))])
def test_yarns_range(head_dim, original, ends):
    assert correction_range(32, 1, head_dim, 1e4, original) == ends


@pytest.mark.parametrize(
    "entry",
    [
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        {"rope_type": "yarn", "factor": 8.0, "truncate": False},
        {"rope_type": "longrope", "short_factor": [1.5] * 64, "long_factor": [3.0] * 64, "factor": 8.0,
         "original_max_position_embeddings": 512},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda entry: ", ".join(map(str, entry)),
)  # fmt: skip
@pytest.mark.parametrize("length", [100, 9000])
def test_settings_of_a_config(entry, length):
    config = LlamaConfig(**SIZES, max_position_embeddings=4096, rope_parameters={**entry, "rope_theta": 1e4}).to_dict()
    arch = llama.from_hf(config)
    theirs, m = of_transformers(config, length)
    torch.testing.assert_close(frequencies(arch, length), theirs, rtol=1e-6, atol=0)
    assert attention_factor(arch.rope_scaling, arch.max_position_embeddings) == pytest.approx(m)


def test_positions_are_raised_with_the_context():
    assert extend(UNSCALED, "linear", 4.0).max_position_embeddings == 16384
    assert extend(UNSCALED, "dynamic", 4.0).max_position_embeddings == 4096
    assert math.isclose(llama.to_hf(extend(UNSCALED, "ntk", 2.0))["rope_theta"], 1e4 * 2 ** (128 / 126))


@pytest.mark.parametrize(
    "method, factor, message",
    [
        ("linear", 0.5, "at least 1"),
        ("llama3", 2.0, "cannot be chosen by a factor"),
        ("alibi", 2.0, "cannot be chosen"),
    ],
)
def test_what_cannot_be_scaled(method, factor, message):
    with pytest.raises(UserError, match=message):
        extend(UNSCALED, method, factor)
    with pytest.raises(UserError, match="scaled already"):
        extend(extend(UNSCALED, "linear", 2.0), "linear", 2.0)


def test_a_method_that_an_export_cannot_say_is_refused():
    with pytest.raises(UserError, match=r"'xpos' has no counterpart .* answer differently"):
        llama.to_hf(replace(UNSCALED, rope_scaling={"rope_type": "xpos", "factor": 2.0}))
