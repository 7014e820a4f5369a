"""Layers that differ: windows by layer, a second rotary base, partial rotary embedding; against transformers, in several layouts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ft.errors import CheckpointError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import family_for, family_of
from megatron_ft.models.weights import placed_rules
from tests.models import jobs
from tests.ranks import Ranks

SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 203, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = 5
LOCAL = 500.0
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
IDS = np.random.default_rng(3).integers(0, 203, (2, 24))


def qwen2_with_windows():
    """Windows in the first, third and fourth layer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, layer_types=TYPES, attn_implementation="eager"
    )
    return Qwen2ForCausalLM(config), family_for(config.to_dict()).from_hf(config.to_dict())


def two_bases():
    """The same, and layers with the window turn by frequencies of another base, as transformers' Gemma 3 has it."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    model, arch = qwen2_with_windows()
    config = type(model.config)(
        **{**model.config.to_dict(), "rope_parameters": {"rope_type": "default", "rope_theta": LOCAL}}
    )
    local = Qwen2RotaryEmbedding(config)

    def another(_module, args, options):
        positions = torch.arange(args[0].shape[1])[None]
        return args, {**options, "position_embeddings": local(args[0], positions)}

    for layer, kind in zip(model.model.layers, TYPES, strict=True):
        if kind == "sliding_attention":
            layer.register_forward_pre_hook(another, with_kwargs=True)
    return model, dataclasses.replace(arch, window_rope_theta=LOCAL)


def partial_rotary():
    """StableLM: LayerNorm, a gated MLP, a quarter of each head turned."""
    from transformers import StableLmConfig, StableLmForCausalLM

    share = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = StableLmConfig(**SIZES, rope_parameters=share, partial_rotary_factor=0.5, attn_implementation="eager")
    arch = Architecture(
        family="llama", num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=4, head_dim=8,
        vocab_size=203, max_position_embeddings=64, norm_epsilon=config.layer_norm_eps, norm="layernorm", rotary_share=0.5,
    )  # fmt: skip
    return StableLmForCausalLM(config), arch


KINDS = {"windows by layer": qwen2_with_windows, "two bases": two_bases, "partial rotary": partial_rotary}


@pytest.fixture(scope="module")
def pools(one_rank, four_ranks):
    two = Ranks(2)
    yield {1: one_rank, 2: two, 4: four_ranks}
    two.close()


@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (1, 4), (2, 2)], ids=["one", "TP4", "PP4", "TP2 x PP2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.works("sliding window", "generate", ["TP", "PP"])
def test_logits_are_transformers_own(kind, layout, pools):
    model, arch, weights = made(kind)
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(IDS)).logits.numpy()
    found = pools[layout[0] * layout[1]].run(logits, arch, weights, layout)
    ours = next(x for x in found if x is not None)
    assert np.abs(ours - theirs).max() < 2e-5
    if layout == (1, 1) and kind != "windows by layer":  # what is tested matters to these logits
        plain = dataclasses.replace(arch, window_rope_theta=None, rotary_share=1.0)
        (other,) = pools[1].run(logits, plain, weights, layout)
        assert np.abs(other - theirs).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.works("sliding window", "packing", ["SP", "VPP"])
def test_every_layout_trains_the_same(kind, pools):
    from megatron_ft.training.invariance import Case, compare

    arch = made(kind)[1]
    reference = pools[1].run(measure, arch, Case("one", 1))[0]
    from megatron_ft.commands.verify_invariance import cases_for

    for case in cases_for(arch):
        if case.name in ("PP2, interleaved", "TP2 x PP2 + sequence parallel") and case.packing:
            found = compare(reference, pools[case.processes].run(measure, arch, case)[0])
            assert found.largest < 2e-5, (case.name, found)


def made(kind):
    torch.manual_seed(5)
    model, arch = KINDS[kind]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.2 if weight.ndim > 1 else 0.05) + float(weight.ndim == 1))
    return model, arch, {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def measure(arch, case):
    from megatron_ft.training import invariance

    return invariance.measure(invariance.Problem(arch), case)


def logits(arch, weights, layout):
    """[b, s, vocabulary] on the last stage, gathered over tensor-parallel ranks; None elsewhere."""
    from megatron_ft.checkpoints.fill import fill_from
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models.build import build_model

    def full(placed):
        tensors = [torch.from_numpy(weights[key]) for key in placed.hf_keys]
        return placed.rule.to_megatron(arch, tensors)

    ids = torch.from_numpy(IDS)
    with process_groups(ParallelSizes(*layout)) as here, torch.no_grad():
        model = build_model(arch, here).eval()
        fill_from(model, arch, family_of(arch).rules(arch), full, here)
        return jobs.logits(model, ids, arch.vocab_size, here)


def test_parts_of_a_layer_and_their_way_to_disk(tmp_path: Path):
    arch = dataclasses.replace(made("two bases")[1], hf={})
    windows = [arch.layer(n).attention.window for n in range(4)]
    assert windows == [WINDOW, None, WINDOW, WINDOW]
    assert [arch.layer(n).attention.rope.theta for n in range(4)] == [LOCAL, arch.rope_theta, LOCAL, LOCAL]
    assert arch.layer(0) == arch.layer(2) != arch.layer(1)
    again = Architecture.from_dict(json.loads(json.dumps(arch.to_dict())))
    assert again == arch and again.with_layers(2).window_layers == (0,)
    assert all(placed.rule.full_shape(arch) for placed in placed_rules(arch, family_of(arch).rules(arch)))
    config = family_of(arch).to_hf(dataclasses.replace(arch, window_rope_theta=None))
    assert config["layer_types"] == TYPES
    assert family_for(config).from_hf(config) == dataclasses.replace(arch, window_rope_theta=None)


def test_what_only_few_models_have_is_not_written_for_the_others():
    plain = made("windows by layer")[1]
    simple = dataclasses.replace(plain, window_layers=None, sliding_window=None)
    assert not {"window_layers", "window_rope_theta", "rotary_share"} & simple.to_dict().keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"window_layers": (4,)}, {"window_layers": (-1,)}, {"window_layers": "0"}, {"window_layers": (0.0,)}, {"window_rope_theta": 0},
        {"window_rope_theta": 5.0, "sliding_window": None, "window_layers": None}, {"rotary_share": 0}, {"rotary_share": 1.5},
        {"rotary_share": 0.1}, {"rotary_share": "all"}, {"window_layers": (0,), "sliding_window": None},
    ],
)  # fmt: skip
def test_values_that_no_model_has_are_refused(changes):
    arch = made("windows by layer")[1]
    with pytest.raises(CheckpointError):
        dataclasses.replace(arch, **changes)
