"""Which layers a stage holds: every layer once, in order, under every way of saying it; what cannot be is refused with a remedy."""

import re

import pytest

from megatron_ft.config.sections import Parallelism
from megatron_ft.errors import ConfigError
from megatron_ft.models.pipeline import plain_split, split_layers


def split(num_layers, stages, **flags):
    return split_layers(num_layers, Parallelism(pipeline_model_parallel_size=stages, **flags))


SPLITS = [
    ({}, 8, 4, [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]),
    ({"num_layers_per_virtual_pipeline_stage": 2}, 8, 2, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
    ({"virtual_pipeline_model_parallel_size": 2}, 8, 2, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
    ({"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 1}, 4, 3, [[[0]], [[1, 2]], [[3]]]),
    ({"decoder_last_pipeline_num_layers": 1}, 7, 3, [[[0, 1, 2]], [[3, 4, 5]], [[6]]]),
    (
        {"virtual_pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 2}, 8, 2,
        [[[0], [4]], [[1, 2, 3], [5, 6, 7]]],
    ),
    ({"pipeline_model_parallel_layout": "Et*3 | (tt,|)*2 tL"}, 8, 2, [[[0, 1, 2], [5, 6]], [[3, 4], [7]]]),
    ({"pipeline_model_parallel_layout": "E|t*4|L"}, 4, 3, [[[]], [[0, 1, 2, 3]], [[]]]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "layers", "stages", "expected"), SPLITS)
def test_every_layer_once(flags, layers, stages, expected):
    found = split(layers, stages, **flags)
    assert [[list(chunk) for chunk in stage] for stage in found.chunks] == expected
    in_order = [layer for k in range(found.virtual_size) for stage in found.chunks for layer in stage[k]]
    assert in_order == list(range(layers))
    parts = found.for_engine()
    assert parts[0][0] == "embedding" and parts[-1][-1] == "loss" and len(parts) == stages * found.virtual_size
    assert [part.count("decoder") for part in parts] == [
        len(stage[k]) for k in range(found.virtual_size) for stage in found.chunks
    ]


def test_the_plain_split_is_told_from_others():
    assert plain_split(8, 4).is_plain and split(8, 1).for_engine() is None
    assert not split(8, 2, virtual_pipeline_model_parallel_size=2).is_plain
    assert not split(8, 2, decoder_first_pipeline_num_layers=3).is_plain
    assert str(split(8, 2, decoder_first_pipeline_num_layers=1)) == "1 | 2-8"


REFUSED = [
    ({}, 8, 3, "does not divide the model's num_layers 8; sizes that do: 1, 2, 4, 8"),
    ({}, 2, 4, "is more than the model's num_layers 2; sizes that do: 1, 2"),
    ({"num_layers_per_virtual_pipeline_stage": 3}, 8, 2, "layers a chunk that do: 1, 2, 4"),
    ({"virtual_pipeline_model_parallel_size": 3}, 8, 2, "x 3 chunks does not divide"),
    (
        {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 4}, 8, 2,
        "leave 1 of the model's 8 layers to 0 stages",
    ),
    (
        {"decoder_first_pipeline_num_layers": 3, "virtual_pipeline_model_parallel_size": 2}, 8, 2,
        "cannot be cut into 2 chunks",
    ),
    ({"pipeline_model_parallel_layout": "Et*3|t*4L"}, 8, 2, "7 layers, the model has 8"),
    ({"pipeline_model_parallel_layout": "E|t*8|L"}, 8, 2, "3 chunks, not a multiple"),
    ({"pipeline_model_parallel_layout": "t*8|m"}, 8, 2, "write E, then t for every layer, then L"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "layers", "stages", "message"), REFUSED)
def test_what_cannot_be_is_refused(flags, layers, stages, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        split(layers, stages, **flags)
