"""A run of --epochs is the run of as many --train_iters, and a resumed one has the same number of steps."""

import yaml

from megatron_ft.commands import finetune
from megatron_ft.config.cli import parse
from megatron_ft.config.sections import Batch
from tests.parallel.jobs import finetune as train
from tests.parallel.jobs import read_metrics


def test_a_run_of_two_epochs_stopped_and_resumed(four_ranks, tmp_path, checkpoint, shards):
    whole, parts, by_steps = (tmp_path / name for name in ("whole", "parts", "steps"))
    four_ranks.run(trained, checkpoint, shards, str(whole), {"epochs": 2})
    losses = read_metrics(whole)
    assert len(losses) > 2
    four_ranks.run(trained, checkpoint, shards, str(parts), {"epochs": 2, "exit_interval": 2})
    assert len(read_metrics(parts)) == 2
    four_ranks.run(trained, checkpoint, shards, str(parts), {"epochs": 2})
    four_ranks.run(trained, checkpoint, shards, str(by_steps), {"train_iters": len(losses)})
    assert read_metrics(parts) == losses == read_metrics(by_steps)
    recorded = yaml.safe_load((whole / "training.yaml").read_text())["batch"]
    assert (recorded["epochs"], recorded["train_iters"]) == (None, len(losses))
    assert f"{len(losses)} steps of 24 rows, 2." in (whole / "finetune.log").read_text()
    again = parse(finetune.COMMAND, ["--config", str(whole / "training.yaml"), "--epochs", "3"])[0]
    assert again.batch == Batch(micro_batch_size=2, global_batch_size=24, epochs=3)


def trained(load: str, prefix: str, save: str, flags: dict) -> int:
    every = {"train_iters": 0, "lr_warmup_iters": 1, "global_batch_size": 24, "auto_resume": True, "report": False}
    return train((2, 1), load=load, data_path=[prefix], save=save, **every | flags)
