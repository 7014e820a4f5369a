"""What `plan` says of a quantised base, against a model and a checkpoint."""

import dataclasses
import json

import pytest

from checkpoints_conversion.plan import plan_units
from megatron_ft.errors import ConfigError
from megatron_ft.models.pipeline import plain_split
from megatron_ft.models.quantised import Quantization
from megatron_ft.planner import figures, known, memory, search
from megatron_ft.planner.memory import Job
from tests.quantization import jobs
from tests.quantization.test_frozen import FALCON, LLAMA


def job(arch, tp=1, pp=1, **more):
    return Job(plain_split(arch.num_layers, pp), tp, 1, 128, 1, 8, **more)


@pytest.mark.parametrize("arch", [LLAMA, FALCON], ids=["llama", "falcon"])
def test_weights_of_every_rank(four_ranks, arch):
    """The bytes of the engine's own model; nothing is trained."""
    planned = memory.stages(arch, job(arch, 2, 2, nf4=True))
    held = four_ranks.run(jobs.bytes_of_ranks, arch, (2, 2))
    assert held == [stage.weights for stage in planned for _ in range(2)]
    assert all(stage.gradients == stage.optimizer == 0 for stage in planned)
    plain = memory.stages(arch, job(arch, 2, 2))
    assert all(stage.weights > some.weights and stage.gradients > 0 for stage, some in zip(plain, planned, strict=True))


@pytest.mark.parametrize("double", [False, True])
def test_size_on_disk(tmp_path, double):
    """The sizes of the files that hf-to-megatron would write, but for their headers and the padding of tensors."""
    (tmp_path / "config.json").write_text(json.dumps({**known.MODELS["llama2-7b"], "dtype": "bfloat16"}))
    quantization = Quantization(double)
    units = plan_units(tmp_path, tmp_path, 1, 1, "torch_dist", None, quantization=quantization)
    arch = known.architecture("llama2-7b")
    planned = figures.nf4_on_disk(arch, job(arch), double)
    assert planned == pytest.approx(sum(unit.nbytes for unit in units), rel=1e-3)


def test_proposals_have_slices_of_whole_blocks():
    arch = known.architecture("llama2-7b")  # 11008 columns: 172 blocks
    wanted = dataclasses.replace(job(arch, nf4=True), dp=8, global_batch=64)
    assert {one.tp for one in search.candidates(arch, wanted, 8)} == {1, 2, 4}
    assert {one.tp for one in search.candidates(arch, dataclasses.replace(wanted, nf4=False), 8)} == {1, 2, 4, 8}


def test_the_command(capsys):
    from megatron_ft.commands.plan import Plan, run
    from megatron_ft.config.sections import Parallelism

    run(Plan("llama2-13b", gpu="a6000-48gb", recompute_granularity="full", base_precision="nf4"), Parallelism())
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "fits: 15.0 of 51.0 GB" in out and "on disk 7.8 GB, with --double_quant 7.2 GB; adapters are not counted" in out
    )
    run(
        Plan("llama2-13b", gpu="a6000-48gb", recompute_granularity="full", base_precision="nf4", lora_rank=64),
        Parallelism(),
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "250,347,520 parameters are trained" in out and "adapters are not counted" not in out
    assert "fits: " in out and "checkpoint 3" in out
    with pytest.raises(ConfigError, match=r"11008 columns, 1376 on a rank, .* sizes that fit: 1, 2, 4$"):
        run(Plan("llama2-7b", base_precision="nf4"), Parallelism(8))
