"""Memory of answering: the cache is what the engine allocates, the weights are those of the model that is built."""

import pytest

from megatron_ft.planner.answering import LOGITS, Reader, smallest_layout
from megatron_ft.planner.known import architecture
from megatron_ft.planner.memory import RESERVE

LLAMA = architecture("llama2-13b")


def test_the_cache_of_published_models_at_8k():
    """6.7 GB of a 13B and 1.0 GB of Falcon-40B, in bf16."""
    assert Reader(LLAMA, 2, 8192).cache(1, LLAMA.num_layers) == 6_710_886_400
    falcon = architecture("falcon-40b")
    assert Reader(falcon, 2, 8192).cache(1, falcon.num_layers) == 2 * 8192 * 60 * 8 * 64 * 2
    assert Reader(LLAMA, 2, 8192).cache(2, 20) * 4 == Reader(LLAMA, 2, 8192).cache(1, 40)


def test_weights_are_most_of_a_short_text_s_memory():
    """13,015,864,320 parameters of Llama-2-13B and the padding of 32,000 rows, which is none."""
    assert Reader(LLAMA, 2, 1).memory(1, 1) - RESERVE - LOGITS == pytest.approx(2 * 13_015_864_320, rel=1e-4)


def test_nf4_takes_less_than_a_third():
    plain, packed = (Reader(LLAMA, 2, 1, nf4).memory(1, 1) - RESERVE - LOGITS for nf4 in (False, True))
    assert 0.28 < packed / plain < 0.32


def test_fewest_gpus_and_of_several_layouts_the_largest_tp():
    reader = Reader(LLAMA, 2, 1000)
    one, half = reader.memory(1, 1), reader.memory(2, 1)
    assert smallest_layout([reader], range(1, 9), 8, one) == (1, 1)
    assert smallest_layout([reader], range(1, 9), 8, one - 1) == (2, 1)
    assert smallest_layout([reader], range(1, 9), 1, max(half, reader.memory(1, 2))) == (1, 2)
    assert smallest_layout([reader, reader], range(1, 9), 8, one) == (1, 1)  # one after the other
    assert smallest_layout([reader, reader], range(1, 9), 8, 2 * half, together=True) == (2, 1)
    assert smallest_layout([reader], [1, 2], 8, int(RESERVE)) is None


def test_a_size_that_does_not_divide_the_model_is_passed_over():
    reader = Reader(LLAMA, 2, 1000)
    assert smallest_layout([reader], [3], 8, reader.memory(1, 1)) is None  # 40 heads, 40 layers
