"""Layers with experts: logits against transformers in several layouts, parts of a layer, the way to disk, refusals."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.models import llama
from megatron_ft.models import rules as r
from megatron_ft.models.architecture import Architecture, check_layout
from megatron_ft.models.parts import ExpertsPart, MlpPart
from megatron_ft.models.weights import placed_rules
from tests.models import jobs
from tests.ranks import Ranks

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 203,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "rope_theta": 10000.0, "attn_implementation": "eager",
}  # fmt: skip
ARCH = Architecture(
    family="llama", num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4, head_dim=8,
    vocab_size=203, max_position_embeddings=64, norm_epsilon=1e-6, num_experts=8, experts_per_token=2, expert_ffn_hidden_size=96,
)  # fmt: skip
IDS = np.random.default_rng(3).integers(0, 203, (4, 24))
LAYER = "model.layers.{n}."


def mixtral():
    """Experts in every layer, two for each token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **SIZES, intermediate_size=96, num_local_experts=8, num_experts_per_tok=2, sliding_window=None, rms_norm_eps=1e-6
    )  # fmt: skip
    return MixtralForCausalLM(config), ARCH


def qwen3_moe():
    """A dense first layer, narrower experts in the others, three for each token; norms of heads."""
    return _qwen3_moe(True, [0])


def not_renormalised():
    """Weights of experts that do not sum to 1; the third layer is dense."""
    return _qwen3_moe(False, [2])


def _qwen3_moe(renormalised, dense):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SIZES, intermediate_size=96, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48,
        norm_topk_prob=renormalised, decoder_sparse_step=1, mlp_only_layers=dense,
    )  # fmt: skip
    arch = dataclasses.replace(
        ARCH, head_dim=16, qk_norm=True, experts_per_token=3, expert_ffn_hidden_size=48, experts_renormalised=renormalised,
        dense_layers=tuple(dense),
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config), arch


KINDS = {"Mixtral": mixtral, "Qwen3 MoE": qwen3_moe, "not renormalised": not_renormalised}
MLP = {"Mixtral": (LAYER + "block_sparse_moe.", "w1", "w3", "w2")}
OTHERS = (LAYER + "mlp.", "gate_proj", "up_proj", "down_proj")
"""Where a layer's experts lie in Hugging Face's files, and the names of an expert's matrices."""


def rules_of(kind, arch):
    before, *matrices = MLP.get(kind, OTHERS)
    experts = r.gated_experts(arch, *(before + "experts.{e}." + name + ".weight" for name in matrices))
    return [*llama.rules(arch), r.router(before + "gate.weight"), *experts]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind -> (architecture, tensors as transformers saves them, its logits)."""
    return {kind: _made(kind, tmp_path_factory.mktemp("hf")) for kind in KINDS}


def _made(kind, folder):
    from safetensors.numpy import load_file

    torch.manual_seed(5)
    model, arch = KINDS[kind]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.05 if weight.ndim == 1 else 0.5 if "gate.weight" in name else 0.1
            weight.copy_(torch.randn_like(weight) * scale + float(weight.ndim == 1))
        theirs = model.eval()(torch.from_numpy(IDS)).logits.numpy()
    model.save_pretrained(folder)
    return arch, load_file(folder / "model.safetensors"), theirs


@pytest.fixture(scope="module")
def pools(one_rank, four_ranks):
    two = Ranks(2)
    yield {1: one_rank, 2: two, 4: four_ranks}
    two.close()


LAYOUTS = {
    "one": {}, "EP2": {"expert": 2}, "TP2": {"tensor": 2}, "TP2 + SP": {"tensor": 2, "sequence_parallel": True},
    "PP2": {"pipeline": 2}, "EP4": {"expert": 4}, "TP2 x EP2 + SP": {"tensor": 2, "expert": 2, "sequence_parallel": True},
    "PP2 x EP2": {"pipeline": 2, "expert": 2},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.works("experts", ["SP", "PP"])
def test_logits_are_transformers_own(layout, made, pools):
    sizes = LAYOUTS[layout]
    processes = math.prod(size for name, size in sizes.items() if name != "sequence_parallel")
    found = pools[processes].run(logits, [(kind, arch, weights) for kind, (arch, weights, _) in made.items()], sizes)
    for rows, ours in found:
        for (_, _, theirs), one in zip(made.values(), ours, strict=True):
            assert one is None or np.abs(one - theirs[rows]).max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Mixtral", {"experts_per_token": 3}), ("Qwen3 MoE", {"experts_per_token": 2}), ("Qwen3 MoE", {"experts_renormalised": False}),
        ("not renormalised", {"experts_renormalised": True}), ("Mixtral", {"activation": "geglu"}),
    ],
)  # fmt: skip
def test_what_is_compared_matters(kind, change, made, pools):
    arch, weights, theirs = made[kind]
    ((_, (ours,)),) = pools[1].run(logits, [(kind, dataclasses.replace(arch, **change), weights)], {})
    assert np.abs(ours - theirs).max() > 1e-2


def logits(models, sizes):
    """Return (rows of this data-parallel rank, [rows, s, vocabulary] of each model or None where the stage is not the last)."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups

    with process_groups(ParallelSizes(**sizes)) as here, torch.no_grad():
        rows = list(range(here.dp_rank, len(IDS), here.dp_size))
        return rows, [_logits(*model, here, torch.from_numpy(IDS[rows])) for model in models]


def _logits(kind, arch, weights, here, ids):
    from megatron_ft.checkpoints.fill import fill_from
    from megatron_ft.models.build import build_model

    def full(placed):
        return placed.rule.to_megatron(arch, [torch.from_numpy(weights[key]) for key in placed.hf_keys])

    model = build_model(arch, here).eval()
    fill_from(model, arch, rules_of(kind, arch), full, here)
    return jobs.logits(model, ids, arch.vocab_size, here)


DENSE = dataclasses.replace(ARCH, num_experts=0, experts_per_token=0, expert_ffn_hidden_size=0)
MIXED = dataclasses.replace(ARCH, expert_ffn_hidden_size=48, experts_renormalised=False, dense_layers=(0, 2))


def test_layers_are_dense_or_have_experts():
    dense, experts = MlpPart(96, "swiglu"), MlpPart(48, "swiglu", ExpertsPart(8, 2, renormalised=False))
    assert [MIXED.layer(n).mlp for n in range(4)] == [dense, experts, dense, experts]
    assert MIXED.layer(0) == MIXED.layer(2) == DENSE.layer(0) != MIXED.layer(1)
    assert MIXED.with_layers(2).dense_layers == (0,)
    assert not any(MIXED.with_layers(1).has_experts(n) for n in range(1))


def test_the_way_to_disk():
    assert Architecture.from_dict(json.loads(json.dumps(MIXED.to_dict()))) == MIXED
    new = {"num_experts", "experts_per_token", "expert_ffn_hidden_size", "experts_renormalised", "dense_layers"}
    assert new <= MIXED.to_dict().keys() and not new & DENSE.to_dict().keys()
    assert Architecture.from_dict(DENSE.to_dict()) == DENSE


def test_each_layer_has_the_tensors_of_its_kind():
    names = [placed.key for placed in placed_rules(MIXED, rules_of("Qwen3 MoE", MIXED)) if ".mlp." in placed.key]
    dense, experts = ["linear_fc1", "linear_fc2"], ["router", "experts.linear_fc1", "experts.linear_fc2"]
    wanted = [(n, name) for n in range(4) for name in (experts if n % 2 else dense)]
    assert names == [f"decoder.layers.{n}.mlp.{name}.weight" for n, name in wanted]
    assert not any(placed.rule.has_experts for placed in placed_rules(DENSE, rules_of("Qwen3 MoE", DENSE)))


def test_experts_are_stacked_and_split_again():
    for placed in placed_rules(MIXED, rules_of("Mixtral", MIXED)):
        tensors = [torch.randn(shape) for shape in placed.rule.hf_shapes(MIXED)]
        full = placed.rule.to_megatron(MIXED, tensors)
        assert tuple(full.shape) == placed.rule.full_shape(MIXED) and len(tensors) == len(placed.hf_keys)
        assert all(map(torch.equal, placed.rule.to_hf(MIXED, full), tensors))
        if placed.key == "decoder.layers.1.mlp.experts.linear_fc1.weight":
            assert placed.hf_keys[3] == "model.layers.1.block_sparse_moe.experts.1.w3.weight"
            assert torch.equal(full[1], torch.cat(tensors[2:4]))
            assert placed.dist_key == "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
            names = [name for name, _ in placed.parameters(full)]
            assert names == [f"decoder.layers.1.mlp.experts.local_experts.{n}.linear_fc1.weight" for n in range(8)]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": -1}, {"num_experts": 10**6}, {"num_experts": 8.0}, {"num_experts": 0}, {"experts_per_token": 0},
        {"experts_per_token": 9}, {"experts_per_token": 1}, {"expert_ffn_hidden_size": 0}, {"expert_ffn_hidden_size": "48"},
        {"experts_renormalised": 1}, {"dense_layers": (4,)}, {"dense_layers": None}, {"dense_layers": (True,)},
    ],
)  # fmt: skip
def test_values_that_no_model_has_are_refused(changes):
    with pytest.raises(CheckpointError) as error:
        dataclasses.replace(ARCH, **changes)
    assert "\n" not in str(error.value) and next(iter(changes)) in str(error.value)


def test_a_layout_that_does_not_divide_experts_is_refused():
    check_layout(MIXED, 2, 1, 4)
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size 3 .*num_experts 8; sizes that do: 1, 2, 4, 8"):
        check_layout(MIXED, 1, 1, 3)
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size 2: the model has no experts"):
        check_layout(DENSE, 1, 1, 2)
    with pytest.raises(ConfigError, match=r"tensor_model_parallel_size 4 .*expert_ffn_hidden_size 50"):
        check_layout(dataclasses.replace(MIXED, expert_ffn_hidden_size=50), 4)


@pytest.mark.refuses(
    "experts", ["What is trained", "Runs", "Results"], says="which cannot be trained, saved or converted yet"
)
def test_training_and_conversion_are_refused(one_rank, tmp_path):
    from checkpoints_conversion.megatron_source import open_source
    from checkpoints_conversion.megatron_target import plan
    from megatron_ft.checkpoints.folder import CheckpointConfig

    (message,) = one_rank.run(refused_training)
    assert "num_experts 8" in message and "\n" not in message
    for kind in ("torch", "torch_dist"):
        config = CheckpointConfig(MIXED, kind, 1, 1, 256, "release", "fp32")
        for convert in (lambda c: open_source(tmp_path, c), lambda c: plan(tmp_path, c, [], lambda _: torch.float32)):
            with pytest.raises(ConfigError) as error:
                convert(config)
            assert str(error.value) == message


def refused_training():
    from megatron_ft.config.sections import Data, Numerics, Parallelism
    from megatron_ft.engine.parallel import Layout
    from megatron_ft.training.setup import make_model

    try:
        make_model(MIXED, Layout(1, 1, 1, 0, 0, 0, False, 0), Data(), Parallelism(), Numerics())
    except ConfigError as error:
        return str(error)


def test_ranks_exchange_unequal_numbers_of_tokens(pools):
    """As tensor-parallel ranks of experts do; gradients come back to the tokens that they are of."""
    for lengths in ([2, 5], [0, 3], [0, 0]):
        whole = torch.arange(float(sum(lengths) * 3)).reshape(-1, 3)
        for rank, found in enumerate(pools[2].run(exchanged, whole.numpy(), lengths)):
            gathered, gradient, scattered, gradient_of_all = map(torch.from_numpy, found)
            part = whole.split(lengths)[rank]
            assert torch.equal(gathered, whole) and torch.equal(gradient, 2 * part)  # from both ranks
            assert torch.equal(scattered, 2 * part) and torch.equal(gradient_of_all, whole)


def exchanged(whole, lengths):
    """Return what is gathered, the gradient of a part, the sum of both ranks' own, and the gradient of all."""
    from megatron.core.tensor_parallel import mappings

    group, whole = torch.distributed.group.WORLD, torch.from_numpy(whole)
    part = whole.split(lengths)[group.rank()].clone().requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(part, group=group, output_split_sizes=lengths)
    gathered.backward(whole)
    both = whole.clone().requires_grad_()
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(both, group=group, input_split_sizes=lengths)
    scattered.backward(part.detach())
    return [x.detach().numpy() for x in (gathered, part.grad, scattered, both.grad)]
