"""Which prompts share a batch: the fewest steps, against every other way of cutting."""

import itertools
import random

from megatron_ft.generation.batches import batches


def steps(cut: list[list[int]], lengths: list[int], new: int) -> int:
    return sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) + new for batch in cut)


def test_no_other_cut_has_fewer_steps():
    rng = random.Random(0)
    for _ in range(50):
        lengths, new = [rng.randint(1, 60) for _ in range(7)], rng.randint(1, 20)
        found = batches(lengths, 32, new)
        assert sorted(i for batch in found for i in batch) == list(range(7))
        order = sorted(range(7), key=lambda i: lengths[i])
        others = (
            [order[a:b] for a, b in itertools.pairwise([0, *places, 7])]
            for n in range(7)
            for places in itertools.combinations(range(1, 7), n)
        )
        assert steps(found, lengths, new) == min(steps(cut, lengths, new) for cut in others)


def test_batch_size():
    assert [len(batch) for batch in batches([5] * 7, 3, 10)] == [3, 3, 1]
