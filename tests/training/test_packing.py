"""Packing and the loader: every token once, in rows that are full, the same for any number of ranks and after any stop."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ft.data import packing
from megatron_ft.data.loader import PADDING, ChatDataset, Choices, step_rows
from megatron_ft.data.manifest import Manifest
from megatron_ft.data.roles import byte_weights
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

    def role_bytes(self, i):
        return self.role[i]

    def loss_weights(self, by_role, marked_loss_weight=1.0):
        return byte_weights(by_role, self.manifest.weights, marked_loss_weight)


def dataset(lengths, seq_length=16, **choices):
    return ChatDataset([Memory(lengths)], np.array([0, 0, 1, 0]), Choices(seq_length, 1, **choices))


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
    batch = ChatDataset([shard], np.array([0, 0.5, 1, 0]), Choices(8, shuffle=False)).microbatch([0])
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
    data = ChatDataset([shard], np.ones(4), Choices(256, shuffle=False))
    groups = data.microbatch([0]).groups[:, 0]
    assert data.group_names["source"] == ("a", "b") and data.group_names["position"][1] == "128-511"
    assert groups[1, :208].tolist() == [0] * 199 + [1] * 9
    assert groups[2, :208].tolist() == [0] * 128 + [1] * 71 + [0] * 9


def test_padding_is_known_from_lengths_not_from_a_token():
    """Token 0 is a real token here: it keeps its weight, and only positions beyond the sample are padding."""
    shard = Memory([5])
    shard.ids, shard.role = [np.array([0, 0, 0, 0, 0])], [np.array([2, 2, 2, 2, 2])]
    batch = ChatDataset([shard], np.array([0, 0, 1, 0]), Choices(6, packed=False)).microbatch([0])
    assert batch.weights.tolist() == [[1, 1, 1, 1, 0, 0]] and batch.segments is None


@pytest.mark.parametrize(
    ("over_long", "tokens"), [("cut", 16 + 16 + 16 + 2), ("drop", 16 + 2), ("split", 39 + 16 + 17 + 2)]
)
def test_long_samples_meet_their_fate_and_are_counted(over_long, tokens):
    data = dataset([40, 17, 18, 3], shuffle=False, over_long=over_long)
    assert data.over_long == 2  # 17 tokens are 16 positions: they fit
    assert data.microbatch(range(len(data.epoch_rows(0)))).real_tokens == tokens


def test_a_split_sample_loses_no_label():
    """Pieces of 4 positions read one token more than they take: token 4 is the label that ends one and begins the next."""
    shard = Memory([10])
    shard.ids = [np.arange(10)]
    data = ChatDataset([shard], np.ones(4), Choices(4, packed=False, shuffle=False, over_long="split"))
    batch = data.microbatch([0, 1, 2])
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 0, 0]]
    assert batch.labels.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 0, 0]]


@pytest.mark.parametrize("by", ["samples", "supervised_tokens"])
def test_shares_hold_over_an_epoch(by):
    """A quarter and three quarters of an epoch, by samples or by supervised tokens, from sets of 100 and 60."""
    small, large = Memory([6] * 100), Memory([11] * 60)
    for shard in (small, large):
        shard.role = [np.full(n, 2, np.uint8) for n in shard.lengths]
        shard.manifest = Manifest(counts={"tokens_by_role": {"assistant": int(shard.lengths.sum())}})
    choices = Choices(16, 1, packed=False, shares=(1.0, 3.0), shares_by=by)
    data = ChatDataset([small, large], np.array([0, 0, 1, 0]), choices)
    rows = len(data.epoch_rows(0))
    samples = np.array([data.samples_of(row)[0] for row in range(rows)])
    worth = np.where(samples < 100, 1, 1 if by == "samples" else 11 / 6)
    assert rows == 160 and worth[samples < 100].sum() / worth.sum() == pytest.approx(0.25, abs=0.01)
    seen = np.bincount(samples, minlength=160)
    assert seen[:100].max() == 1 and set(seen[100:]) <= {1, 2}  # the larger share goes through its set more than once


def test_a_share_of_nothing_is_left_out():
    data = ChatDataset([Memory([5] * 4), Memory([5] * 4)], np.ones(4), Choices(16, packed=False, shares=(0.0, 1.0)))
    assert {int(data.samples_of(row)[0]) for row in range(8)} == {4, 5, 6, 7}


def test_marks_and_message_weights():
    """Byte 9: a prompter's token marked for language modelling; byte 18: the assistant in a message of weight 0.25."""
    shard = Memory([4])
    shard.role, shard.manifest = [np.array([1, 9, 2, 18], np.uint8)], Manifest(weights=[1.0, 0.25])
    for marked, expected in ((1.0, [1, 1, 0.25]), (0.0, [0, 1, 0.25])):
        data = ChatDataset([shard], np.array([0, 0, 1, 0]), Choices(3, marked_loss_weight=marked))
        batch = data.microbatch([0])
        assert batch.weights.tolist() == [expected] and batch.roles.tolist() == [[1, 2, 2]]


def test_variable_rows_are_as_long_as_they_must_be():
    data = dataset([6, 18, 40], seq_length=64, packed=False, shuffle=False, variable=True)
    assert [data.microbatch(rows).tokens.shape for rows in ([0], [1], [0, 1], [2])] == [
        (1, 16),
        (1, 32),
        (2, 32),
        (1, 48),
    ]


def test_plain_shards_are_trained_on_whole(tmp_path):
    """As megatron-core writes them: no roles, every token a label, ids checked against the model."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_ft.data.plain import PlainShards, is_plain

    prefix = str(tmp_path / "text_document")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for tokens in ([1, 2, 3, 4, 5], [6, 7, 8]):
        builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    assert is_plain(prefix)
    batch = ChatDataset([PlainShards(prefix, 10)], np.array([0, 0, 1, 0]), Choices(8, shuffle=False)).microbatch([0])
    assert batch.labels[0, :6].tolist() == [2, 3, 4, 5, 7, 8] and batch.supervised_tokens == 6
    with pytest.raises(DataError, match="vocabulary has 8"):
        PlainShards(prefix, 8).tokens(1)


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
    data = ChatDataset([Memory([5, 6], 1), Memory([7], 2)], np.ones(4), Choices(16, packed=False, shuffle=False))
    sizes = [data.microbatch([row]).real_tokens for row in range(3)]
    assert sizes == [4, 5, 6] and data.num_samples == 3
