"""Context parallelism, as far as it goes without GPUs: who has which positions, and what is refused and why. Not tried end to end."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ft.config.checks import check_training
from megatron_ft.config.sections import Batch, Checkpointing, Data, Logging, Numerics, Optimizer, Parallelism
from megatron_ft.errors import ConfigError
from megatron_ft.models.kernels import Machine, check_context_parallel


def test_ranks_share_a_row_evenly(one_rank):
    assert one_rank.run(shares)[0]


def shares():
    """Every position once, as the engine cuts its rotary table, and each rank sees equally many pairs."""
    from megatron_ft.training.step import Stepper

    parts = []
    for rank in range(4):
        me = SimpleNamespace(layout=SimpleNamespace(cp_size=4, cp_rank=rank))
        parts.append(Stepper._own_positions(me, torch.arange(32)[None], -1)[0])
    assert sorted(torch.cat(parts).tolist()) == list(range(32))
    assert parts[1].tolist() == [4, 5, 6, 7, 24, 25, 26, 27]
    assert len({int(part.sum()) for part in parts}) == 1
    return True


ROWS = {"packing": False, "seq_length": 64}
REFUSED = [
    ({"packing": True, "seq_length": 64}, {}, "cuts rows of one sample and one length: add --no_packing"),
    ({"packing": False, "seq_length": 62}, {}, "to be a multiple of 4: use --seq_length 60"),
    (ROWS, {"tensor_model_parallel_size": 4}, "x context_parallel_size 2 = 8: start a multiple of 8"),
]


@pytest.mark.parametrize(("data", "parallel", "message"), REFUSED)
def test_what_does_not_fit_is_refused(data, parallel, message):
    sections = (
        Checkpointing(load="x"), Data(data_path=["x"], **data), Batch(train_iters=1),
        Parallelism(context_parallel_size=2, **parallel), Optimizer(), Numerics(), Logging(),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        check_training(*sections, world_size=4)


def test_it_needs_transformer_engine_on_a_gpu():
    two = Parallelism(context_parallel_size=2)
    with pytest.raises(ConfigError, match="on GPUs, and this machine has no GPU: use --sequence_parallel"):
        check_context_parallel(two, Machine())
    with pytest.raises(ConfigError, match="Transformer Engine is not installed"):
        check_context_parallel(two, Machine(has_gpu=True))
    check_context_parallel(two, Machine(has_gpu=True, transformer_engine=True))
    check_context_parallel(Parallelism(), Machine())
