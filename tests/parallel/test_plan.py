"""What plan says of a checkpoint against one that was saved."""

from megatron_ft.models.pipeline import plain_split
from megatron_ft.planner import figures, known
from megatron_ft.planner.memory import Job
from tests.parallel.jobs import finetune


def test_a_checkpoint_weighs_what_was_planned(one_rank, checkpoint, shards, tmp_path):
    one_rank.run(saved, checkpoint, shards, str(tmp_path / "run"))
    folder = tmp_path / "run" / "iter_0000001"
    arch = known.architecture(str(folder))
    planned = figures.checkpoint(arch, Job(plain_split(arch.num_layers, 1), 1, 1, 64, 2, 8, bf16=False))
    sizes = [path.stat().st_size for path in folder.glob("*.distcp")]
    assert planned.bytes < sum(sizes) < planned.bytes * 1.02 + 500_000  # each tensor has a header
    files = sum(path.is_file() for path in folder.iterdir())
    assert abs(files - planned.files) <= 2  # training.yaml, digests


def saved(load, shards, save):
    finetune((1, 1), load=load, data_path=[shards], save=save, train_iters=1, lr_warmup_iters=0)
