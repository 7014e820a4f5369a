"""megatron-ft resume-check passes on a checkpoint of ours, in its layout and in another, and notices a resume that forgets something."""

import contextlib
import io

import pytest

from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import UserError
from tests.parallel.jobs import SEQ_LENGTH, finetune


@pytest.fixture(scope="module")
def run(four_ranks, checkpoint, shards, tmp_path_factory):
    """A run of two steps on TP2 x PP2, of twelve."""
    folder = tmp_path_factory.mktemp("run") / "run"
    four_ranks.run(two_steps, checkpoint, shards, str(folder))
    return folder


def test_the_same_layout_is_the_same_to_the_bit(run, four_ranks, shards):
    said = four_ranks.run(check, str(run), shards, {})[0]
    assert said["error"] is None
    assert said["out"].count("same ") == 2 and "DIFFER" not in said["out"]
    assert (
        "of which 0 differ" in said["out"]
        and "the resumed run and the uninterrupted run are bit-identical" in said["out"]
    )


def test_a_run_that_was_to_end_where_it_is(run, four_ranks, shards):
    """Its --train_iters are done: the schedule of all three runs then ends where the check does."""
    said = four_ranks.run(check, str(run), shards, {"train_iters": 2})[0]
    assert said["error"] is None and "bit-identical" in said["out"]


def test_another_layout_is_close(run, four_ranks, shards):
    there = {"resume_tensor_model_parallel_size": 4, "resume_pipeline_model_parallel_size": 1}
    said = four_ranks.run(check, str(run), shards, there)[0]
    assert said["error"] is None
    assert "stopped in TP2 x PP2, resumed in TP4 x PP1" in said["out"]


@pytest.mark.parametrize("forget", ["random streams", "position"])
def test_what_is_forgotten_is_noticed(forget, run, four_ranks, shards):
    said = four_ranks.run(check, str(run), shards, {}, forget)
    assert all(one["error"] for one in said), said
    assert ("not bit-identical" if forget == "random streams" else "used other samples") in said[0]["error"]


def two_steps(load, shards, save):
    finetune((2, 2), load=load, data_path=[shards], save=save, train_iters=2, lr_decay_iters=12, **DROPOUTS)


DROPOUTS = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def check(load, shards, settings, forget=None):
    """resume-check over two steps, as a rank; {"error", "out"}. settings: the check's own, and train_iters. forget: what resuming
    leaves out.
    """
    from megatron_ft.checkpoints import training_state
    from megatron_ft.commands import resume_check
    from megatron_ft.training import loop

    settings = dict(settings)
    values = {
        "load": load, "data_path": [shards], "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
        "seq_length": SEQ_LENGTH, "global_batch_size": 8, "train_iters": settings.pop("train_iters", 12), "lr": 1e-3,
        "hidden_dropout": 0.1, "attention_dropout": 0.0 if settings else 0.1,
    }  # fmt: skip
    restore, timed = training_state._restore_rng, loop._timed_step
    if forget == "random streams":
        training_state._restore_rng = lambda states: None
    if forget == "position":
        loop._timed_step = lambda run, progress: timed(run, _shifted(progress))
    out = io.StringIO()
    resume_check.say = lambda text: out.write(text + "\n")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            resume_check._on_this_rank(
                (resume_check.ResumeCheck(check_steps=2, **settings), TrainingSettings.of(**values))
            )
        error = None
    except UserError as caught:
        error = str(caught)
    finally:
        training_state._restore_rng, loop._timed_step = restore, timed
    return {"error": error, "out": out.getvalue()}


def _shifted(progress):
    """A run that after a new start begins a batch further on: the steps after the third of the run that was stopped."""
    import dataclasses
    import inspect

    save = next(f.frame.f_locals["save"] for f in inspect.stack() if f.function == "_finetune")
    late = save.name == "resumed" and progress.iteration >= 3
    return dataclasses.replace(progress, consumed_samples=progress.consumed_samples + 8 * late)
