"""What ranks do in test_owner_saves.py: make a small run that has trained a step, save it, read it back, count."""

import contextlib
import copy
import json
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.checkpoints.restricted import file_slice, read_metadata
from megatron_ft.checkpoints.verify import read_description, tensor_hashes
from megatron_ft.config.sections import Batch, Data, Kernels, Numerics, Optimizer, Parallelism
from megatron_ft.errors import CheckpointError
from megatron_ft.models.architecture import Architecture

ARCH = {
    "family": "llama", "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 88, "num_attention_heads": 4, "num_query_groups": 4,
    "head_dim": 8, "vocab_size": 1024, "max_position_embeddings": 64, "norm_epsilon": 1e-5,
}  # fmt: skip
PROGRESS_AT = 3


class Run(NamedTuple):
    """What a job works on, and how it is saved."""

    layout: object
    contents: object
    config: CheckpointConfig

    @property
    def optimizer(self):
        return self.contents.optimizer.chained_optimizers[0]

    @property
    def group_numbers(self) -> list[int]:
        """The size of each parameter of this rank's model."""
        return [weight.numel() for chunk in self.contents.model for weight in chunk.parameters()]


@contextlib.contextmanager
def made(tp=1, pp=1, chunks=1, bf16=False, fp16=False, tied=False, buckets=False, seed=1):
    """A run after a step of random gradients, which are the same on all data-parallel ranks."""
    from megatron_ft.checkpoints.training_state import Contents
    from megatron_ft.engine.optimizer import make_optimizer, make_schedule
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.training.setup import bare, make_model

    arch = Architecture(**ARCH, tied_embeddings=tied)
    parallel = Parallelism(
        tp, pp, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None, use_distributed_optimizer=True
    )
    numerics, section = Numerics(bf16=bf16, fp16=fp16), Optimizer(lr=1e-3)
    with process_groups(ParallelSizes(tp, pp, chunks=chunks), seed) as layout:
        kernels = Kernels(overlap_grad_reduce=buckets)
        model = make_model(arch, layout, Data(seq_length=32), parallel, numerics, kernels)
        weights = [weight for chunk in model for weight in chunk.parameters()]
        for weight in weights:
            weight.data.copy_(_numbers(weight, layout, seed) * 0.1)
        optimizer = make_optimizer(model, section, numerics, True)
        for weight in weights:
            weight.main_grad.copy_(_numbers(weight, layout, seed + 100))
        optimizer.step()
        schedule = make_schedule(optimizer, section, Batch(train_iters=10))
        dtype = "bf16" if bf16 else "fp16" if fp16 else "fp32"
        config = CheckpointConfig(arch, "torch_dist", tp, pp, arch.vocab_size, PROGRESS_AT, dtype)
        yield Run(layout, Contents(config, bare(model), optimizer, schedule, layout, {}), config)


def _numbers(weight: torch.nn.Parameter, layout, seed: int) -> torch.Tensor:
    """Random numbers for a weight; norms have the same on all tensor-parallel ranks."""
    tp_rank = layout.tp_rank if weight.ndim > 1 else 0
    generator = torch.Generator().manual_seed(1000 * seed + 10 * layout.pp_rank + tp_rank)
    return torch.randn(weight.shape, generator=generator)


def plan(run: Run, folder: Path, engines_way: bool = False):
    """What each rank would write, with the product's own function; with the engine's whole gather where asked."""
    from megatron_ft.checkpoints import training_state
    from megatron_ft.checkpoints.owned_state import Whole

    if run.layout.is_main:
        folder.mkdir(exist_ok=True)
    dist.barrier()
    with mock.patch.object(training_state, "optimizer_state", Whole) if engines_way else contextlib.nullcontext():
        return training_state.plan_save(
            run.contents, "torch_dist", folder, training_state.Progress(PROGRESS_AT, 24, "x")
        )


def write(run: Run, planned, writer=None) -> None:
    """Write and finish a plan, as the Saver does without its folders."""
    from megatron_ft.checkpoints.writer import Here

    writer = writer or Here(planned.part)
    writer.wait()
    assert writer.problem is None, writer.problem
    everyone = [None] * run.layout.world_size
    dist.all_gather_object(everyone, writer.written.places)
    if run.layout.is_main:
        planned.finish(everyone)
    dist.barrier()


def restore(run: Run, folder: Path, engines_way: bool = False) -> None:
    from megatron_ft.checkpoints import training_state
    from megatron_ft.checkpoints.owned_state import Whole

    with mock.patch.object(training_state, "optimizer_state", Whole) if engines_way else contextlib.nullcontext():
        own = run.contents
        progress = training_state.resume(folder, run.config, own.model, own.optimizer, own.schedule, run.layout, 1)
    assert progress == training_state.Progress(PROGRESS_AT, 24, "x")


def state_of(run: Run) -> list[torch.Tensor]:
    """Copies of all numbers of this rank: its weights, and its pieces of the optimizer's state."""
    inner = run.optimizer.optimizer
    main = [weight for group in inner.param_groups for weight in group["params"]]
    moments = [inner.state[weight][key] for weight in main for key in ("exp_avg", "exp_avg_sq")]
    weights = [weight for chunk in run.contents.model for weight in chunk.parameters()]
    return [tensor.detach().clone() for tensor in (*weights, *main, *moments)]


def spoil(run: Run) -> None:
    """Change every number in place."""
    inner = run.optimizer.optimizer
    with torch.no_grad():
        for chunk in run.contents.model:
            for weight in chunk.parameters():
                weight.add_(1)
        for group in inner.param_groups:
            for weight in group["params"]:
                weight.add_(1)
                for moment in inner.state[weight].values():
                    moment.add_(1)


def same(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return len(these) == len(those) and all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


class OnDisk(NamedTuple):
    """A checkpoint without regard to which file holds what."""

    tensors: dict[str, str]
    described: dict
    common: str


def on_disk(folder: Path) -> OnDisk:
    described = {}
    for key, entry in read_metadata(folder / ".metadata").state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):  # the engine's empty objects beside each layer
            described[key] = ()
            continue
        parts = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
        described[key] = tuple(entry.size), entry.properties.dtype, parts
    return OnDisk(
        tensor_hashes(folder), described, json.dumps(read_description(folder).common, default=str, sort_keys=True)
    )


def assembled(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor but random streams, put together from its parts."""
    metadata, found = read_metadata(folder / ".metadata"), {}
    for index, place in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        if index.fqn.startswith("rng.") or not isinstance(entry, TensorStorageMetadata):
            continue
        whole = found.setdefault(index.fqn, torch.full(entry.size, float("nan"), dtype=entry.properties.dtype))
        part = torch.load(file_slice(folder / place.relative_path, place.offset, place.length), weights_only=True)
        whole[tuple(slice(o, o + n) for o, n in zip(index.offset, part.shape, strict=True))] = part
    return found


def save_both_ways(root: str, settings: dict) -> dict:
    """Save the same run by owner and as the engine does; bytes that this rank's plans hold, of weights and optimizer."""
    with made(**settings) as run:
        ours = plan(run, Path(root) / "ours")
        engines = plan(run, Path(root) / "engine", engines_way=True)
        write(run, ours)
        write(run, engines)
        each = 12 + (2 if settings.get("bf16") or settings.get("fp16") else 4)
        numbers = run.group_numbers
        return {
            "held": held(ours), "held_by_engine": held(engines), "share": each * sum(numbers) / run.layout.dp_size,
            "largest": each * max(numbers),
        }  # fmt: skip


def held(planned) -> int:
    """Bytes of the storages behind the tensors that a rank is to write, random streams left aside."""
    tensors = [
        tensor
        for _, _, (_, entries) in planned.part.buckets
        for item, tensor in entries
        if not item.index.fqn.startswith("rng.")
    ]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def read_each_other(root: str, settings: dict) -> dict:
    with made(**settings) as run:
        before = state_of(run)
        write(run, plan(run, Path(root) / "ours"))
        write(run, plan(run, Path(root) / "engine", engines_way=True))
        answers = {}
        for name, folder, engines_way in (
            ("engine reads ours", "ours", True),
            ("we read the engine's", "engine", False),
        ):
            spoil(run)
            restore(run, Path(root) / folder, engines_way)
            answers[name] = same(state_of(run), before)
        return answers


def count_what_is_read(root: str, settings: dict) -> dict:
    """Numbers of the optimizer's state that this rank's reader reads when it resumes."""
    from torch.distributed.checkpoint import FileSystemReader

    read, plain = [], FileSystemReader.read_data

    def counting(self, plan, planner):
        read.extend(item.lengths.numel() for item in plan.items if item.dest_index.fqn.startswith("optimizer.state."))
        return plain(self, plan, planner)

    with made(**settings) as run:
        write(run, plan(run, Path(root) / "ours"))
        with mock.patch.object(FileSystemReader, "read_data", counting):
            restore(run, Path(root) / "ours")
        return {"read": sum(read), "whole": 3 * sum(run.group_numbers), "largest": 3 * max(run.group_numbers)}


def save_again(root: str, source: str | None, target: str, settings: dict) -> None:
    """Save a new run, or one that goes on from `source` with other numbers of its own until then."""
    with made(**settings, seed=1 if source is None else 2) as run:
        if source:
            restore(run, Path(root) / source)
        write(run, plan(run, Path(root) / target))


def save_while_training_goes_on(root: str, settings: dict) -> dict:
    from megatron_ft.checkpoints.writer import Forked

    with made(**settings) as run:
        write(run, plan(run, Path(root) / "before"))
        planned = plan(run, Path(root) / "background")
        tensors = [
            tensor
            for _, _, (_, entries) in planned.part.buckets
            for item, tensor in entries
            if "optimizer.state" in item.index.fqn
        ]
        inner = run.optimizer.optimizer
        live = {weight.untyped_storage().data_ptr() for group in inner.param_groups for weight in group["params"]}
        live |= {moment.untyped_storage().data_ptr() for state in inner.state.values() for moment in state.values()}
        writer = Forked(planned.part)
        spoil(run)
        write(run, planned, writer)
        return {
            "on the host": bool(tensors) and all(tensor.device.type == "cpu" for tensor in tensors),
            "shared with the optimizer": any(tensor.untyped_storage().data_ptr() in live for tensor in tensors),
        }


def save_with_a_gap(root: str) -> str | None:
    """What the main rank, which plans, says of a tensor of four parts of which rank 2 is not to write its own."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_ft.checkpoints.training_state import plan_sharded
    from megatron_ft.engine.parallel import process_groups

    with process_groups() as here:
        part = ShardedTensor.from_rank_offsets("x", torch.zeros(4), (0, here.rank, 4), replica_id=int(here.rank == 2))
        try:
            plan_sharded({"x": part}, {}, Path(root), here.is_main, has_one_writer_each=True)
        except ValueError as error:
            return str(error)


def resume_without_a_tensor(root: str, settings: dict) -> dict:
    from megatron_ft.checkpoints import training_state

    with made(**settings) as run:
        write(run, plan(run, Path(root) / "ours"))
        whole = training_state.read_description

        def without_one(folder):
            found = copy.deepcopy(whole(folder))  # which keeps what it has read
            names = found.metadata.state_dict_metadata
            del names[next(key for key in names if key.startswith("optimizer.state.exp_avg."))]
            return found

        with mock.patch.object(training_state, "read_description", without_one):
            try:
                restore(run, Path(root) / "ours")
            except CheckpointError as error:
                return {"error": str(error)}
        return {"error": None}
