"""Tensors of experts: cut over expert-parallel ranks by expert, within an expert as other matrices; the engine's groups beside them."""

import pytest
import torch

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import Rule

ARCH = Architecture(
    family="llama", num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, num_query_groups=2, head_dim=4,
    vocab_size=10, max_position_embeddings=16, norm_epsilon=1e-5,
)  # fmt: skip
EXPERTS = 4


def rule(cut, *shape):
    return Rule(
        "decoder.layers.{n}.mlp.experts", (), lambda a: [], lambda a: (EXPERTS, *shape), cut=cut, has_experts=True
    )


RULES = {
    "gate and up": (rule("gated_column_parallel", 24, 8), lambda e, tp, rank: torch.cat([h.chunk(tp)[rank] for h in e.chunk(2)])),
    "down": (rule("row_parallel", 8, 12), lambda e, tp, rank: e.chunk(tp, dim=1)[rank]),
    "one matrix up": (rule("column_parallel", 12, 8), lambda e, tp, rank: e.chunk(tp)[rank]),
    "replicated": (rule("replicated", 12, 8), lambda e, tp, rank: e),
}  # fmt: skip


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_parts_are_those_of_each_expert(kind, tp, ep):
    one, of_expert = RULES[kind]
    full = torch.randn(one.full_shape(ARCH))
    each = EXPERTS // ep
    for ep_rank in range(ep):
        for tp_rank in range(tp):
            part = one.part(full, tp, tp_rank, ep, ep_rank)
            wanted = [of_expert(expert, tp, tp_rank) for expert in full[ep_rank * each : (ep_rank + 1) * each]]
            assert torch.equal(part, torch.stack(wanted))
            assert tuple(part.shape) == one.part_shape(ARCH, tp, 0, ep)
    assert torch.equal(one.join(ARCH, one.split(ARCH, full, tp)), full)


def test_the_layout_knows_the_engines_expert_groups(four_ranks):
    found = four_ranks.run(expert_groups, 2, 2)
    assert [layout[:4] for layout in found] == [(2, 0, 2, 0), (2, 0, 2, 1), (2, 1, 2, 0), (2, 1, 2, 1)]
    assert {layout[4] for layout in found} == {"TP2 x PP1 x EP2 x DP2"}
    assert [layout[:2] for layout in four_ranks.run(expert_groups, 1, 4)] == [(4, 0), (4, 1), (4, 2), (4, 3)]


def expert_groups(tensor, expert):
    from megatron.core import parallel_state

    from megatron_ft.engine.parallel import ParallelSizes, process_groups

    with process_groups(ParallelSizes(tensor, expert=expert)) as layout:
        assert parallel_state.get_expert_model_parallel_group().size() == layout.ep_size
        return layout.ep_size, layout.ep_rank, layout.tp_size, layout.tp_rank, str(layout)
