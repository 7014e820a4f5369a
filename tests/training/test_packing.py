"""Packing and the loader: every token once, in rows that are full, the same for any number of ranks and after any stop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ft.data import packing
from megatron_ft.data.loader import PADDING, ChatDataset, step_rows
from megatron_ft.errors import DataError


class Memory:
    """Shards in memory."""

    prefix = "memory"

    def __init__(self, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths = np.asarray(lengths, np.int32)
        self.ids = [rng.integers(1, 100, length) for length in lengths]
        self.role = [rng.integers(0, 4, length).astype(np.uint8) for length in lengths]

    def __len__(self):
        return len(self.lengths)

    def tokens(self, i):
        return self.ids[i]

    def roles(self, i):
        return self.role[i]


def dataset(lengths, seq_length=16, packed=True, weights=(0, 0, 1, 0), shuffle=True):
    return ChatDataset([Memory(lengths)], seq_length, np.array(weights), 1, packed=packed, shuffle=shuffle)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 8))
def test_first_fit_places_every_sample_once_and_overfills_no_row(lengths, seq_length, window):
    sizes = packing.positions(np.array(lengths), seq_length)
    rows = packing.first_fit(np.arange(len(sizes)), sizes, seq_length, window)
    assert sorted(rows.order.tolist()) == np.flatnonzero(sizes).tolist()
    for row in range(len(rows)):
        assert 0 < sizes[rows.samples(row)].sum() <= seq_length


def test_first_fit_by_hand():
    """Rows of 10: 6 opens one, 5 another, 4 fits the first, 5 the second, 1 needs a third."""
    rows = packing.first_fit(np.arange(5), np.array([6, 5, 4, 5, 1]), 10)
    assert [rows.samples(i).tolist() for i in range(len(rows))] == [[0, 2], [1, 3], [4]]
    assert packing.fill(rows, np.array([6, 5, 4, 5, 1]), 10) == pytest.approx(21 / 30)


def test_a_microbatch_by_hand():
    """Two samples in a row of 8: tokens and labels shifted by one within each sample, weights by the label's role."""
    shard = Memory([4, 3])
    shard.ids, shard.role = (
        [np.array([5, 6, 7, 8]), np.array([9, 10, 11])],
        [np.array([1, 1, 2, 2]), np.array([1, 2, 3])],
    )
    batch = ChatDataset([shard], 8, np.array([0, 0.5, 1, 0]), 1, shuffle=False).microbatch([0])
    assert batch.tokens.tolist() == [[5, 6, 7, 9, 10, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 8, 10, 11, 0, 0, 0]]
    assert batch.weights.tolist() == [[0.5, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.roles.tolist() == [[1, 2, 2, 2, 3, PADDING, PADDING, PADDING]]
    assert batch.segments.tolist() == [3, 2, 3]
    assert (batch.real_tokens, batch.supervised_tokens) == (5, 4)


def test_padding_is_known_from_lengths_not_from_a_token():
    """Token 0 is a real token here: it keeps its weight, and only positions beyond the sample are padding."""
    shard = Memory([5])
    shard.ids, shard.role = [np.array([0, 0, 0, 0, 0])], [np.array([2, 2, 2, 2, 2])]
    batch = ChatDataset([shard], 6, np.array([0, 0, 1, 0]), 1, packed=False).microbatch([0])
    assert batch.weights.tolist() == [[1, 1, 1, 1, 0, 0]] and batch.segments is None


def test_long_samples_are_cut_and_counted():
    data = dataset([40, 17, 18, 3], seq_length=16)
    assert data.truncated == 2  # 17 tokens are 16 positions: they fit
    batch = data.microbatch(range(len(data.epoch_rows(0))))
    assert batch.real_tokens == 16 + 16 + 16 + 2


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_holds_every_token_once(packed):
    lengths = np.random.default_rng(0).integers(0, 17, 50)
    data = dataset(lengths, packed=packed)
    rows = len(data.epoch_rows(0))
    seen = [data.microbatch([row]).tokens for row in range(rows)]
    assert sum(data.microbatch([row]).real_tokens for row in range(rows)) == np.clip(lengths - 1, 0, None).sum()
    epochs = [sorted(np.concatenate([data.samples_of(e * rows + r) for r in range(rows)])) for e in range(1)]
    assert epochs[0] == np.flatnonzero(lengths > 1).tolist() and len(seen) == rows


def test_epochs_are_shuffled_anew_and_reproducibly():
    lengths = [5] * 40
    data, again = dataset(lengths, packed=False), dataset(lengths, packed=False)
    first, second = ([data.samples_of(e * 40 + i)[0] for i in range(40)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert [again.samples_of(40 + i)[0] for i in range(40)] == second


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 2)])
def test_ranks_partition_the_global_batch(dp, micro):
    shares = [step_rows(24, 8, micro, rank, dp) for rank in range(dp)]
    assert sorted(row for share in shares for rows in share for row in rows) == list(range(24, 32))
    assert all(len(rows) == micro for share in shares for rows in share)


def test_samples_too_short_to_train_on_are_refused_together():
    with pytest.raises(DataError, match="nothing to train on"):
        dataset([1, 0, 1])


def test_several_shards_are_one_set():
    data = ChatDataset([Memory([5, 6], 1), Memory([7], 2)], 16, np.ones(4), 1, packed=False, shuffle=False)
    sizes = [data.microbatch([row]).real_tokens for row in range(3)]
    assert sizes == [4, 5, 6] and data.num_samples == 3
