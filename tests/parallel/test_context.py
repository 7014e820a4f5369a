"""Context parallelism with a teacher, resident or stored. Its attention needs Transformer Engine on GPUs; in its place is one that gathers
keys and values, so that everything else runs here: how rows, labels and stored rows are cut, the pair of models, the sums over processes.
"""

import math
from unittest import mock

import numpy as np
import pytest
import torch

from tests.parallel.jobs import SEQ_LENGTH, finetune, make_llama, read_metrics, to_checkpoint
from tests.parallel.test_invariance import LLAMA, TOLERANCE
from tests.parallel.test_stored_teacher import score
from tests.ranks import Ranks

WIDER = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 8}


class Gathered(torch.autograd.Function):
    """The parts of all ranks, one after the other."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


def gathering_attention():
    """A class in the place of Transformer Engine's attention: [s / CP, b, n, d] of the stretches that the engine gives a rank."""
    from megatron.core import parallel_state
    from megatron.core.transformer.module import MegatronModule

    class Gathering(MegatronModule):
        def __init__(self, config, *_args, **_options):
            super().__init__(config)
            self.scale = config.softmax_scale or 1 / math.sqrt(config.kv_channels)

        def forward(self, query, key, value, *_args, **_options):
            group = parallel_state.get_context_parallel_group()
            size, rank = group.size(), group.rank()
            length = query.shape[0] * size
            stretches = torch.arange(length).chunk(2 * size)
            places = [torch.cat([stretches[n], stretches[-1 - n]]) for n in range(size)]
            order = torch.cat(places).argsort()
            whole = [Gathered.apply(x, group)[order] for x in (key, value)]
            repeats = query.shape[2] // key.shape[2]
            k, v = (x.repeat_interleave(repeats, 2).permute(1, 2, 0, 3) for x in whole)
            mask = places[rank][:, None] >= torch.arange(length)
            found = torch.nn.functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3), k, v, attn_mask=mask, scale=self.scale
            )
            return found.permute(2, 0, 1, 3).flatten(2)

    return Gathering


def with_attention(function, *args):
    """Run it where Transformer Engine's attention is taken to be there."""
    from megatron.core.extensions import transformer_engine

    from megatron_ft.models import kernels

    with (
        mock.patch.object(transformer_engine, "TEDotProductAttention", gathering_attention(), create=True),
        mock.patch.object(kernels, "check_context_parallel", lambda *_: None),
    ):
        return function(*args)


def measure(case, teacher, objective):
    from megatron_ft.training import invariance

    return with_attention(invariance.measure, invariance.Problem(LLAMA, objective=objective, teacher=teacher), case)


def cases():
    from megatron_ft.config.sections import Parallelism
    from megatron_ft.training.invariance import Case

    return {
        "CP2": Case("CP2", 2, Parallelism(context_parallel_size=2), packing=False),
        "CP4": Case("CP4", 4, Parallelism(context_parallel_size=4), packing=False),
        "CP2 x DP2": Case("CP2 x DP2", 4, Parallelism(context_parallel_size=2), packing=False),
        "CP2 x TP2 + sequence parallel": Case(
            "CP2 x TP2", 4, Parallelism(2, context_parallel_size=2, sequence_parallel=True), packing=False
        ),
        "CP2 x PP2": Case("CP2 x PP2", 4, Parallelism(1, 2, context_parallel_size=2), packing=False),
    }  # fmt: skip


@pytest.fixture(scope="module")
def pools(one_rank, four_ranks):
    two = Ranks(2)
    yield {1: one_rank, 2: two, 4: four_ranks}
    two.close()


@pytest.fixture(scope="module", params=["cross entropy", "a teacher"])
def problem(request, one_rank):
    """(teacher, objective, what one process measures)."""
    import dataclasses

    from megatron_ft.models.distilled_loss import Mix
    from megatron_ft.training.invariance import Case
    from megatron_ft.training.objectives.cross_entropy import CrossEntropy
    from megatron_ft.training.objectives.distillation import Distillation

    distilled = request.param == "a teacher"
    teacher = (
        dataclasses.replace(LLAMA, hidden_size=96, num_attention_heads=12, ffn_hidden_size=192) if distilled else None
    )
    objective = Distillation(Mix(0.5, 0.7, 2.0)) if distilled else CrossEntropy()
    return teacher, objective, one_rank.run(measure, Case("one", 1, packing=False), teacher, objective)[0]


@pytest.mark.parametrize("name", cases())
def test_loss_and_gradients_are_those_of_one_process(name, problem, pools):
    from megatron_ft.training.invariance import compare

    teacher, objective, reference = problem
    case = cases()[name]
    found = compare(reference, pools[case.processes].run(measure, case, teacher, objective)[0])
    assert found.largest < TOLERANCE, found


@pytest.fixture(scope="module")
def stored(one_rank, shards, tmp_path_factory):
    """(a teacher's checkpoint, prefix of what score wrote of it)."""
    folder = tmp_path_factory.mktemp("teacher")
    root = to_checkpoint(make_llama(folder / "hf", **WIDER), folder / "checkpoint", "torch_dist", 1, 1)
    assert one_rank.run(score, (1, 1), root, shards, str(folder / "k16"), {"top_k": 16}) == [None]
    return root, str(folder / "k16")


def train(size, load, shards, save, flags):
    def run():
        values = {
            "packing": False,
            "train_iters": 2,
            "lr_warmup_iters": 1,
            "report": False,
            "sequence_parallel": False,
            "context_parallel_size": size,
        }
        finetune((1, 1), load=load, data_path=[shards], save=save, **values | flags)

    with_attention(run)


@pytest.mark.parametrize("kind", ["resident", "stored"])
def test_runs_with_a_teacher(kind, stored, pools, checkpoint, shards, tmp_path):
    """finetune --context_parallel_size 2 and 4, with --teacher and --teacher_logits: losses and norms of each step as on one process."""
    flags = {"teacher": stored[0]} if kind == "resident" else {"teacher_logits": [stored[1]]}
    names = (
        "train/loss",
        "train/ce",
        "train/kl",
        "train/kl_by_role/assistant",
        "train/kl_by_position/0-127",
        "train/grad_norm",
    )
    found = {}
    for processes in (1, 2, 4):
        save = tmp_path / str(processes)
        pools[processes].run(train, processes, checkpoint, shards, str(save), flags)
        found[processes] = {name: read_metrics(save, name) for name in names}
    assert SEQ_LENGTH % 8 == 0 and all(len(values) == 2 for values in found[1].values())
    for processes in (2, 4):
        for name in names:
            np.testing.assert_allclose(found[processes][name], found[1][name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["resident", "stored"])
def test_without_its_attention_one_line_refuses(kind, stored, checkpoint, shards, monkeypatch):
    from megatron_ft.errors import ConfigError

    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = {"teacher": stored[0]} if kind == "resident" else {"teacher_logits": [stored[1]]}
    with pytest.raises(ConfigError, match="only Transformer Engine's attention shares a row among processes") as error:
        finetune(
            (1, 1),
            load=checkpoint,
            data_path=[shards],
            packing=False,
            context_parallel_size=2,
            sequence_parallel=False,
            **flags,
        )
    assert "\n" not in str(error.value)
