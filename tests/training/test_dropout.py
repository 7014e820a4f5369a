"""LIMA dropout: the rate of each layer, counted over the whole model, whatever the split. The masks: tests/parallel."""

import numpy as np
import pytest

from tests.parallel.jobs import make_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama") / "hf")


@pytest.mark.parametrize("layout", [(4, 1), (1, 4), (2, 2), (1, 1)], ids=["TP4", "PP4", "TP2xPP2", "DP4"])
@pytest.mark.parametrize("parallel_block", [False, True], ids=["", "parallel"])
def test_rates_rise_over_the_whole_model(layout, parallel_block, four_ranks, llama):
    """0 at the first of four layers, 0.3 at the last; the embedding has none. As in the recipes: p * (n - 1) / (N - 1)."""
    seen = {}
    for rates, embedding in four_ranks.run(rates_of, str(llama), layout, parallel_block):
        seen |= rates
        assert embedding in (None, 0.0)
    assert seen == pytest.approx({1: 0.0, 2: 0.1, 3: 0.2, 4: 0.3})


def test_the_rate_is_what_is_dropped(four_ranks, llama):
    """In a layer of rate 0.3, three in ten of the residual's entries are dropped, and the rest scaled up."""
    for share in four_ranks.run(dropped_share, str(llama)):
        assert share == pytest.approx(0.3, abs=0.02)


def rates_of(hf, layout, parallel_block):
    import dataclasses
    import json
    from pathlib import Path

    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models import llama as family
    from megatron_ft.models.build import BuildOptions, build_model

    arch = family.from_hf(json.loads((Path(hf) / "config.json").read_text()))
    arch = dataclasses.replace(arch, parallel_block=parallel_block)
    with process_groups(ParallelSizes(*layout)) as here:
        model = build_model(arch, here, BuildOptions(hidden_dropout=0.3, lima_dropout=True))
        rates = {layer.layer_number: layer.hidden_dropout for layer in model.decoder.layers}
        return rates, model.embedding.embedding_dropout.p if here.is_first_stage else None


def dropped_share(hf):
    """Share of entries of the last layer's MLP output that do not reach the residual."""
    import json
    from pathlib import Path

    import torch

    from megatron_ft.engine.parallel import process_groups
    from megatron_ft.models import llama as family
    from megatron_ft.models.build import BuildOptions, build_model
    from megatron_ft.models.dropout import token_keys
    from megatron_ft.models.rows import one_sample_a_row

    arch = family.from_hf(json.loads((Path(hf) / "config.json").read_text()))
    with process_groups() as here:
        model = build_model(arch, here, BuildOptions(hidden_dropout=0.3, lima_dropout=True)).train()
        last, seen = model.decoder.layers[-1], {}
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.1) if weight.ndim > 1 else None
        last.pre_mlp_layernorm.register_forward_pre_hook(lambda m, args: seen.update(before=args[0].detach().clone()))
        last.register_forward_hook(lambda m, args, out: seen.update(after=out[0].detach().clone()))
        ids = torch.randint(0, 203, (4, 64))
        keys = torch.from_numpy(token_keys(0, np.arange(4), 64)).transpose(1, 2)
        described = one_sample_a_row(64, keys)
        model(ids, torch.arange(64).expand_as(ids), None, packed_seq_params=described)
        return float((seen["after"] == seen["before"]).float().mean())
