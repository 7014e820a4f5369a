"""torch_dist on two gloo ranks: what we convert megatron-core loads, and what it saves we export."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.checkpoints.folder import MODEL_PREFIX, iteration_folder, read_config, write_config, write_tracker
from megatron_ft.models.hf_source import HfSource
from megatron_ft.models.weights import pad_rows, placed_rules
from tests.conversion.builders import make_llama, same_tensors
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def load_and_save(folder, root, tp, pp):
    """Load folder into a fresh model, save that as iteration 3, both with the engine. Returns this rank's weights."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_ft.engine.parallel import ParallelSizes, process_groups, seed_everything
    from megatron_ft.models.build import build_model

    metadata = {"non_homogeneous_layers": True}
    with process_groups(ParallelSizes(tp, pp)) as layout:
        seed_everything(1, layout)
        model = build_model(read_config(folder).architecture, layout)
        wanted = model.sharded_state_dict(prefix=MODEL_PREFIX, metadata=metadata)
        loaded = dist_checkpointing.load(wanted, str(folder))
        weights = {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in loaded.items() if torch.is_tensor(tensor)}
        model.load_state_dict(weights, strict=False)
        state = model.sharded_state_dict(prefix=MODEL_PREFIX, metadata=metadata)
        moment = torch.full((1, 3), float(layout.rank))
        state["optimizer"] = ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.model.decoder.final_layernorm.weight", moment, (0, layout.rank, 2), replica_id=0
        )
        dist_checkpointing.save(state, str(iteration_folder(root, 3)))
        return weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)])
def test_megatron_core_loads_and_saves(tmp_path, two_ranks, tp, pp, tied):
    original = make_llama(tmp_path / "hf", tie_word_embeddings=tied, vocab_size=100)
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), ckpt_format="torch_dist"))
    folder, root = tmp_path / "made" / "release", tmp_path / "trained"
    iteration_folder(root, 3).mkdir(parents=True)
    per_rank = two_ranks.run(load_and_save, folder, root, tp, pp)

    source = HfSource(tmp_path / "hf")
    for rank, weights in enumerate(per_rank):
        tp_rank, pp_rank = (rank, 0) if tp > 1 else (0, rank)
        placed = list(placed_rules(source.arch, source.rules, pp, pp_rank))
        assert set(weights) == {one.local_key for one in placed}
        for one in placed:
            full = source.full(one)
            if one.rule.cut == "vocab_parallel":  # with TP 2 the second rank holds nothing but padding: 100 rows of 256
                full = pad_rows(full, 128 * tp)
            assert torch.equal(weights[one.local_key], one.rule.part(full, tp, tp_rank)), one.key

    config = dataclasses.replace(read_config(folder), iteration=3, padded_vocab_size=128 * tp)
    write_config(iteration_folder(root, 3), config)
    write_tracker(root, 3)
    export(MegatronToHf(str(root), str(tmp_path / "back"), verify_checkpoint=False))  # the engine writes none
    assert same_tensors(original, AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto"))
