"""Stopping early and going on: signals, broken gradients, old checkpoints, --auto_resume."""

import os
import signal
import time

import pytest
import torch

from tests.parallel.jobs import finetune, read_metrics, to_hf
from tests.ranks import RankFailed, Ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_stops_all(number, four_ranks, checkpoint, shards, tmp_path):
    """Rank 2 is told to stop in step 3; all save, leave with 75, and go on later as if nothing had happened."""
    four_ranks.run(steps, checkpoint, shards, str(tmp_path / "straight"), 6)
    codes = four_ranks.run(steps, checkpoint, shards, str(tmp_path / "run"), 6, number)
    assert codes == [75] * 4
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    assert four_ranks.run(steps, checkpoint, shards, str(tmp_path / "run"), 6) == [0] * 4
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")


def test_broken_gradients_are_skipped_and_then_given_up(checkpoint, shards, tmp_path):
    """One rank's NaN: no rank updates; after three in a row the run ends with one line, and what was being saved counts."""
    ranks = Ranks(4)
    try:
        ranks.run(break_gradients, checkpoint, shards, str(tmp_path / "once"), {2})
        skipped = read_metrics(tmp_path / "once", "train/skipped")
        assert skipped == [0, 1, 0, 0, 0]
        with pytest.raises(RankFailed, match="3 steps in a row had gradients that are not finite, up to iteration 5"):
            ranks.run(slow_writers, checkpoint, shards, str(tmp_path / "often"), {3, 4, 5})
    finally:
        ranks.close()
    assert (tmp_path / "often" / "latest_checkpointed_iteration.txt").read_text() == "4\n"


def test_a_skipped_step_changes_no_weight(one_rank, checkpoint, shards, tmp_path):
    one_rank.run(mostly_broken, checkpoint, shards, str(tmp_path / "run"), {1, 2}, 2)
    before, after = to_hf(checkpoint, tmp_path / "a"), to_hf(str(tmp_path / "run"), tmp_path / "b")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_newest_are_kept(one_rank, checkpoint, shards, tmp_path):
    one_rank.run(keep_two, checkpoint, shards, str(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_0000004", "iter_0000005"]


def test_another_runs_folder_is_not_written_into(one_rank, checkpoint, shards, tmp_path):
    """Starting anew with a --save that is in use is refused; resuming there, and auto_resume, are not."""
    run = str(tmp_path / "run")
    one_rank.run(keep_two, checkpoint, shards, run)
    ranks = Ranks(1)
    with pytest.raises(RankFailed, match="holds the checkpoints of an earlier run: continue that run"):
        ranks.run(keep_two, checkpoint, shards, run)


def steps(load, shards, save, until, stop_with=None):
    """Six steps on TP2 x DP2; with stop_with, rank 2 gets that signal while it computes step 3. Returns the exit code."""
    from megatron_ft.training import step

    original, calls = step.update, []

    def update(optimizer):
        calls.append(1)
        if stop_with and len(calls) == 3 and os.environ["RANK"] == "2":
            os.kill(os.getpid(), stop_with)
        return original(optimizer)

    step.update = update
    try:
        return finetune((2, 1), load=load, data_path=[shards], save=save, train_iters=until, auto_resume=True)
    finally:
        step.update = original


def break_gradients(load, shards, save, at, until=5, **more):
    """Rank 0's gradients become NaN in the given steps."""
    from megatron_ft.training import step

    original, calls = step.update, []

    def update(optimizer):
        calls.append(1)
        if len(calls) in at and os.environ["RANK"] == "0":
            for part in optimizer.chained_optimizers:
                for group in part.optimizer.param_groups:
                    for parameter in group["params"][:1]:
                        (parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad).fill_(float("nan"))
        return original(optimizer)

    step.update = update
    layout = (2, 1) if os.environ["WORLD_SIZE"] == "4" else (1, 1)
    try:
        finetune(
            layout,
            load=load,
            data_path=[shards],
            save=save,
            train_iters=until,
            lr_warmup_iters=0,
            max_skipped_iters=3,
            **more,
        )
    finally:
        step.update = original


def mostly_broken(load, shards, save, at, until):
    """What was reached is saved, and the run ends with an error."""
    from megatron_ft.training.stopping import MostlySkipped

    with pytest.raises(
        MostlySkipped, match=rf"{len(at)} of {until} steps were skipped .* start again with a lower --lr"
    ):
        break_gradients(load, shards, save, at, until)


def slow_writers(load, shards, save, at):
    """The save after step 4 is still being written in the background when the run is given up."""
    from megatron_ft.checkpoints import writer

    write = writer.write
    writer.write = lambda part: (time.sleep(2), write(part))[1]
    break_gradients(load, shards, save, at, until=9, save_interval=2, async_save=True)


def keep_two(load, shards, save):
    finetune((1, 1), load=load, data_path=[shards], save=save, train_iters=5, save_interval=1, keep_last=2)
