"""Packing and the loader: every token once, in rows that are full, the same for any number of ranks and after any stop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ft.data import packing
from megatron_ft.data.loader import PADDING, ChatDataset, step_rows
from megatron_ft.data.manifest import Manifest
from megatron_ft.errors import DataError


class Memory:
    """Shards in memory."""

    prefix = "memory"
    manifest = Manifest()

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


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 8), st.integers(0, 9))
def test_every_sample_once_and_no_row_overfull(lengths, seq_length, window, seed):
    sizes = packing.positions(np.array(lengths), seq_length)
    rng = np.random.default_rng(seed)
    packed = packing.best_fit(rng.permutation(len(sizes)), sizes, seq_length, window)
    for rows in (packed, packing.shuffled(packed, rng)):
        assert sorted(rows.order.tolist()) == np.flatnonzero(sizes).tolist()
        assert all(0 < sizes[rows.samples(row)].sum() <= seq_length for row in range(len(rows)))
    kept = {tuple(packed.samples(row)) for row in range(len(packed))}
    assert kept == {tuple(rows.samples(row)) for row in range(len(rows))}


def test_best_fit_by_hand():
    """Rows of 10, largest first: 6; 5 and 5; 4 fits the 6's row; 1 is left for a third."""
    rows = packing.best_fit(np.arange(5), np.array([6, 5, 4, 5, 1]), 10)
    assert [rows.samples(i).tolist() for i in range(len(rows))] == [[0, 2], [1, 3], [4]]
    assert packing.fill(rows, np.array([6, 5, 4, 5, 1]), 10) == pytest.approx(21 / 30)


def test_least_room_is_taken_and_samples_keep_their_order():
    """A window of one sample is online best fit: 3 prefers the row with 3 left to the one with 6."""
    rows = packing.best_fit(np.array([0, 1, 2]), np.array([4, 7, 3]), 10, window=1)
    assert [rows.samples(i).tolist() for i in range(len(rows))] == [[0], [1, 2]]


def test_many_samples_fill_rows():
    """Lengths as in chats (log-normal), rows of 4096: over 99% of the positions are tokens."""
    sizes = np.clip(np.random.default_rng(0).lognormal(5.8, 0.8, 20000).astype(np.int64), 1, 4096)
    assert packing.fill(packing.best_fit(np.arange(20000), sizes, 4096), sizes, 4096) > 0.99


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
    assert batch.groups[:, 0].tolist() == [[1, 2, 2, 2, 3, -1, -1, -1], [0] * 5 + [-1] * 3, [0] * 5 + [-1] * 3]


def test_groups_name_source_and_position():
    """Two sources in one shard; a sample's positions change stretch at 128."""
    shard = Memory([200, 10])
    shard.manifest = Manifest(sources=[{"name": "a", "documents": [0, 1]}, {"name": "b", "documents": [1, 2]}])
    data = ChatDataset([shard], 256, np.ones(4), 1, shuffle=False)
    groups = data.microbatch([0]).groups[:, 0]
    assert data.group_names["source"] == ("a", "b") and data.group_names["position"][1] == "128-511"
    assert groups[1, :208].tolist() == [0] * 199 + [1] * 9
    assert groups[2, :208].tolist() == [0] * 128 + [1] * 71 + [0] * 9


def test_padding_is_known_from_lengths_not_from_a_token():
    """Token 0 is a real token here: it keeps its weight, and only positions beyond the sample are padding."""
    shard = Memory([5])
    shard.ids, shard.role = [np.array([0, 0, 0, 0, 0])], [np.array([2, 2, 2, 2, 2])]
    batch = ChatDataset([shard], 6, np.array([0, 0, 1, 0]), 1, packed=False).microbatch([0])
    assert batch.weights.tolist() == [[1, 1, 1, 1, 0, 0]] and batch.segments is None


def test_long_samples_are_cut_and_counted():
    data = dataset([40, 17, 18, 3], seq_length=16, shuffle=False)
    assert data.truncated == 2  # 17 tokens are 16 positions: they fit
    batch = data.microbatch(range(len(data.epoch_rows(0))))
    assert batch.real_tokens == 16 + 16 + 16 + 2


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_once_an_epoch(packed, shuffle):
    """Over three epochs every sample comes three times, but for those of the one row that is held back for the fourth."""
    lengths = np.random.default_rng(0).integers(0, 17, 50)
    data = dataset(lengths, packed=packed, shuffle=shuffle)
    rows = sum(len(data.epoch_rows(epoch)) for epoch in range(3))
    seen = np.bincount(np.concatenate([data.samples_of(row) for row in range(rows)]), minlength=50)
    held = len(data._plans[2][1])
    assert set(seen[lengths <= 1]) == {0}
    assert set(seen[lengths > 1]) <= {2, 3} and (seen[lengths > 1] == 2).sum() == held
    assert held == 0 or (packed and shuffle)


def test_a_held_back_row_is_not_lost():
    """Samples of 6 in rows of 16, three an epoch: 2 + 1 held, then 2 + 2 held, then 2 + 2 + 1 held."""
    data = dataset([7, 7, 7])
    assert [len(data.epoch_rows(epoch)) for epoch in range(3)] == [1, 1, 2]


def test_jumping_ahead_gives_the_same_rows():
    """A resumed run asks for a late row first."""
    lengths = np.random.default_rng(1).integers(2, 17, 30)
    walked, jumped = dataset(lengths), dataset(lengths)
    rows = [walked.samples_of(row).tolist() for row in range(120)]
    assert jumped.samples_of(119).tolist() == rows[119]
    assert [jumped.samples_of(row).tolist() for row in range(120)] == rows


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
