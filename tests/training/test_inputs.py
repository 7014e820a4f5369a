"""Microbatches built ahead: the same, in the same order, and an error where it belongs."""

import pytest


def test_every_step_gets_its_rows_whatever_was_built_ahead(one_rank):
    assert one_rank.run(streams)[0]


def streams():
    """Compare what a stream gives with what the loader makes, through steps, an evaluation between them, and a jump."""
    import numpy as np

    from megatron_ft.data.loader import step_rows

    stream, dataset, other = _stream(), _dataset(0), _dataset(1)
    plan = [(dataset, 0, 4), (dataset, 4, 8), (other, 0, 4), (dataset, 8, 12), (dataset, 100, 104)]
    for source, first, following in plan:
        rows = step_rows(first, 4, 2, 0, 1)
        found = list(stream.step(source, rows, then=step_rows(following, 4, 2, 0, 1)))
        assert len(found) == len(rows) == 2
        for inputs, numbers in zip(found, rows, strict=True):
            batch = source.microbatch(numbers)
            for name in ("tokens", "labels", "weights"):
                assert np.array_equal(getattr(inputs, name).numpy(), getattr(batch, name).reshape(1, -1))
            assert np.array_equal(inputs.groups.numpy(), batch.groups.reshape(3, 1, -1))
            assert inputs.rows.lengths == tuple(batch.segments)
            assert inputs.counts.tolist()[:2] == [batch.real_tokens, batch.supervised_tokens]
            places = np.concatenate([np.arange(length) for length in batch.segments])
            assert np.array_equal(inputs.rows.positions.numpy(), places)
    return True


def test_rows_are_built_by_another_thread_before_they_are_asked_for(one_rank):
    built, main = one_rank.run(ahead)[0]
    assert built[0] == [0, 1, 2], "the first microbatch and two more"
    assert built[1] == [0, 1, 2, 3] and built[2] == [0, 1, 2, 3, 4], "over the end of the step"
    assert main not in built[3]


def ahead():
    """Return which rows had been begun after each of three microbatches, and the threads that built them."""
    import threading

    stream, dataset = _stream(), _dataset(0)
    begun, threads, plain = [], [], dataset.microbatch

    def microbatch(rows, end=None):
        begun.append(rows[0])
        threads.append(threading.get_ident())
        return plain(rows, end)

    dataset.microbatch = microbatch
    seen, steps = [], stream.step(dataset, [[0], [1]], then=[[2], [3], [4]])
    for _ in range(2):
        next(steps)
        stream._pool.submit(int).result()  # what was handed to the thread before is done
        seen.append(sorted(begun))
    next(stream.step(dataset, [[2], [3], [4]]))
    stream._pool.submit(int).result()
    return [*seen, sorted(begun), threads], threading.get_ident()


def test_an_error_of_the_data_is_raised_at_the_step_that_needs_it(one_rank):
    with pytest.raises(AssertionError, match="DataError: shard is gone"):
        one_rank.run(broken)


def broken():
    from megatron_ft.errors import DataError

    stream, dataset = _stream(), _dataset(0)
    plain = dataset.microbatch

    def microbatch(rows, end=None):
        if rows[0] >= 2:
            raise DataError("shard is gone")
        return plain(rows, end)

    dataset.microbatch = microbatch
    assert len(list(stream.step(dataset, [[0], [1]], then=[[2], [3]]))) == 2  # built ahead in vain, and not asked for
    list(stream.step(dataset, [[2], [3]]))


def _stream():
    from types import SimpleNamespace

    from megatron_ft.training.inputs import InputStream

    return InputStream(SimpleNamespace(cp_size=1, sequence_parallel=False), None, None)


def _dataset(seed):
    from megatron_ft.data.loader import ChatDataset, Choices
    from megatron_ft.data.roles import loss_weights
    from megatron_ft.training.invariance import MadeUpChats

    return ChatDataset([MadeUpChats(203, 64, seed)], loss_weights(), Choices(64, seed))
