"""Context parallelism, as far as it goes without GPUs: who has which positions, and what is refused and why. Not tried end to end."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ft.config.checks import check_settings
from megatron_ft.config.sections import Parallelism
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import ConfigError
from megatron_ft.models.kernels import Machine, check_context_parallel


def test_ranks_share_a_row_evenly(one_rank):
    """Every position once, as the engine cuts its rotary table, and each rank sees equally many pairs."""
    parts = one_rank.run(shares)[0]
    assert sorted(position for part in parts for position in part) == list(range(32))
    assert parts[1] == [4, 5, 6, 7, 24, 25, 26, 27]
    assert len({sum(part) for part in parts}) == 1


def shares():
    """Return the positions of each of four ranks."""
    from megatron_ft.training.inputs import own_positions

    ranks = [SimpleNamespace(cp_size=4, cp_rank=rank) for rank in range(4)]
    return [own_positions(np.arange(32)[None], rank, -1)[0].tolist() for rank in ranks]


ROWS = {"packing": False, "seq_length": 64}
REFUSED = [
    ({"packing": True, "seq_length": 64}, {}, "cuts rows of one sample and one length: add --no_packing"),
    ({"packing": False, "seq_length": 62}, {}, "to be a multiple of 4: use --seq_length 60"),
    (ROWS, {"tensor_model_parallel_size": 4}, "x context_parallel_size 2 = 8: start a multiple of 8"),
]


@pytest.mark.parametrize(("data", "parallel", "message"), REFUSED)
@pytest.mark.refuses("CP", "packing", says="cuts rows of one sample and one length: add --no_packing")
def test_what_does_not_fit_is_refused(data, parallel, message):
    settings = TrainingSettings.of(
        load="x", data_path=["x"], train_iters=1, context_parallel_size=2, **data, **parallel
    )
    with pytest.raises(ConfigError, match=message):
        check_settings(settings, world_size=4)


def test_it_needs_transformer_engine_on_a_gpu():
    two = Parallelism(context_parallel_size=2)
    with pytest.raises(ConfigError, match="on GPUs, and this machine has no GPU: use --sequence_parallel"):
        check_context_parallel(two, Machine())
    with pytest.raises(ConfigError, match="Transformer Engine is not installed"):
        check_context_parallel(two, Machine(has_gpu=True))
    check_context_parallel(two, Machine(has_gpu=True, transformer_engine=True))
    check_context_parallel(Parallelism(), Machine())
