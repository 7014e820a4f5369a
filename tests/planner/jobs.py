"""What a rank is asked to do for the planner's tests: count parameters and what the backward pass keeps, in models of the engine."""

import contextlib
from dataclasses import replace
from unittest import mock

import torch

from megatron_ft import device
from megatron_ft.adapters.lora import attach
from megatron_ft.adapters.spec import TRAINED
from megatron_ft.engine.parallel import Layout, process_groups
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.build import BuildOptions, build_model
from megatron_ft.models.dropout import token_keys
from megatron_ft.models.rows import one_sample_a_row


def parameters_of_every_rank(arch: Architecture, tp: int, pp: int) -> list[int]:
    """Numbers in the parameters of each rank of TP x PP, stage by stage, built on the meta device: no memory, no other processes."""
    with process_groups(), _on_meta():
        return [_count(arch, tp, pp, t, p) for p in range(pp) for t in range(tp)]


@contextlib.contextmanager
def _on_meta():
    """What is built has shapes and no numbers."""
    from megatron.core.tensor_parallel import layers

    meta = torch.device("meta")
    here = mock.patch.object(device, "current_device", lambda: meta)
    engine = mock.patch.object(layers.torch.cuda, "current_device", lambda: meta)
    with here, engine, meta:
        yield


def _count(arch: Architecture, tp: int, pp: int, tp_rank: int, pp_rank: int) -> int:
    """The engine asks its state who it is: it is told another rank's answers."""
    from megatron.core import parallel_state as state

    here = Layout(tp, pp, 1, tp_rank, pp_rank, 0, False, pp_rank * tp + tp_rank)
    answers = {
        "get_tensor_model_parallel_world_size": tp, "get_tensor_model_parallel_rank": tp_rank,
        "get_pipeline_model_parallel_world_size": pp, "get_pipeline_model_parallel_rank": pp_rank,
    }  # fmt: skip
    globals_ = {
        "_MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE": tp, "_MPU_TENSOR_MODEL_PARALLEL_RANK": tp_rank,
        "_MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE": pp, "_MPU_PIPELINE_MODEL_PARALLEL_RANK": pp_rank,
    }  # fmt: skip
    groups = {"_TENSOR_MODEL_PARALLEL_GROUP": (tp, tp_rank), "_PIPELINE_MODEL_PARALLEL_GROUP": (pp, pp_rank)}
    before = {name: getattr(state, name) for name in (*globals_, *groups)}
    try:
        for name, value in globals_.items():
            setattr(state, name, value)
        for name, (size, rank) in groups.items():
            setattr(state, name, _Group(before[name], size, rank))
        assert all(getattr(state, name)() == value for name, value in answers.items())
        model = build_model(arch, here, BuildOptions(dtype=torch.bfloat16))
        return sum(weight.numel() for weight in model.parameters())
    finally:
        for name, value in before.items():
            setattr(state, name, value)


class _Group:
    """A process group of another size, as far as building a model asks."""

    def __init__(self, real, size: int, rank: int):
        self._real, self._size, self._rank = real, size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def __getattr__(self, name):
        return getattr(self._real, name)


def kept_by_a_layer(arch: Architecture, tokens: int, recompute: str | None, lora=None, modules=()) -> int:
    """Bytes that one more layer keeps for the backward pass of a row: what a model of three keeps beyond one of two."""
    with process_groups():
        few, more = (_kept(replace(arch, num_layers=n), tokens, recompute, lora, modules) for n in (2, 3))
    return more - few


def _kept(arch: Architecture, tokens: int, recompute: str | None, lora, modules) -> int:
    layout = Layout(1, 1, 1, 0, 0, 0, False, 0)
    full = {"recompute_method": "uniform", "recompute_num_layers": 1} if recompute == "full" else {}
    options = BuildOptions(dtype=torch.bfloat16, recompute_granularity=recompute, recompute_modules=modules, **full)
    model = build_model(arch, layout, options).train()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    if lora:
        attach([model], arch, lora)
        TRAINED.freeze_others(model)
    ids = torch.arange(tokens)[None] % arch.vocab_size
    keys = torch.from_numpy(token_keys(1, [0], tokens).swapaxes(1, 2)) if lora and lora.dropout else None
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, ids, None, labels=ids, packed_seq_params=one_sample_a_row(tokens, keys))
    size = sum(storage.nbytes() for storage in storages.values())
    loss.sum().backward()
    return size
