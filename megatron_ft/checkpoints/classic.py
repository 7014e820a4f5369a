"""The training state in classic mp_rank folders: one file of weights per model-parallel rank, for the layout it was saved in.

    mp_rank_TT[_PPP]/model_optim_rng.pt     weights, schedule, position, random streams of all data-parallel ranks; and the optimizer
                                            where it is not distributed
    mp_rank_TT[_PPP]/distrib_optim.pt       the distributed optimizer's tensors, collected from all data-parallel ranks

Names as in Megatron-LM. Only tensors and plain containers: read with torch's weights_only reader.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ft.checkpoints.folder import no_training_state, rank_file
from megatron_ft.checkpoints.load import chunks_of
from megatron_ft.checkpoints.saver import Plan
from megatron_ft.checkpoints.verify import read_tensors
from megatron_ft.checkpoints.writer import Part, save_tensors
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError

OPTIMIZER_FILE = "distrib_optim.pt"


def plan_save(state: dict[str, Any], put: dict, model: Any, optimizer: Any, folder: Path, layout: Layout) -> Plan:
    """Return what this rank writes. All ranks call it. state: schedule, progress, sizes and this rank's random streams ("rng")."""
    (chunk,) = _one_chunk(model)
    streams: list = [None] * layout.dp_size
    dist.all_gather_object(streams, state["rng"], group=parallel_state.get_data_parallel_group())
    distributed = [part.get_parameter_state_dp_zero() for part in _distributed(optimizer)]
    if layout.dp_rank == 0:
        whole = state | {"model": own(chunk.state_dict()), "optimizer": own(optimizer.state_dict()), "rng": streams}
        path = _path(Path(), layout)
        put = put | {str(path): partial(save_tensors, whole)}
        if distributed:
            put[str(path.with_name(OPTIMIZER_FILE))] = partial(save_tensors, distributed)
    return Plan(Part(folder, put), lambda _: {})


def read(folder: Path, layout: Layout) -> dict[str, Any]:
    """Return the state that plan_save was given, with "model" and "optimizer". Raise CheckpointError for another layout's."""
    path = _path(folder, layout)
    state = read_tensors(path)
    if "progress" not in state or "sizes" not in state:
        raise no_training_state(folder)
    if state["sizes"] != layout.sizes:
        raise CheckpointError(
            f"{folder} is in the classic format, saved with TP, PP, DP = {state['sizes']}; this run has {layout.sizes}: resume with "
            f"the same sizes, or take the weights into any others: megatron-ft reshard, then --finetune (--ckpt_format torch_dist resumes "
            f"in all)"
        )
    return state | {"rng": state["rng"][layout.dp_rank]}


def load_optimizer(folder: Path, state: dict[str, Any], optimizer: Any, layout: Layout) -> None:
    """Put back what `read` found, and the distributed tensors beside it. All ranks call it."""
    distributed = _distributed(optimizer)
    path = _path(folder, layout).with_name(OPTIMIZER_FILE)
    if (distributed and not path.is_file()) or (not distributed and path.is_file()):
        raise CheckpointError(
            f"{folder} was saved {'without' if distributed else 'with'} --use_distributed_optimizer, and in the classic format both "
            f"must agree: resume as it was saved"
        )
    optimizer.load_state_dict(state["optimizer"])
    tensors = read_tensors(path, list) if distributed and layout.dp_rank == 0 else [None] * len(distributed)
    with torch.no_grad():  # in fp32 the engine copies into views of the parameters themselves
        for part, own in zip(distributed, tensors, strict=True):
            part.load_parameter_state_from_dp_zero(own)


def _one_chunk(model: Any) -> list:
    chunks = chunks_of(model)
    if len(chunks) > 1:
        raise CheckpointError(
            "--ckpt_format torch knows one part of the model a stage, this run's stages have "
            f"{len(chunks)}: save with --ckpt_format torch_dist"
        )
    return chunks


def _distributed(optimizer: Any) -> list:
    return [part for part in optimizer.chained_optimizers if hasattr(part, "get_parameter_state_dp_zero")]


def _path(folder: Path, layout: Layout) -> Path:
    return rank_file(folder, layout.tp_rank, layout.pp_rank, layout.tp_size, layout.pp_size)


def own(value: Any) -> Any:
    """Return the same with each tensor in host memory and with its own storage. A view would be saved with its whole storage."""
    if isinstance(value, torch.Tensor):
        here = value.detach().cpu()
        return here.clone() if here.untyped_storage().nbytes() != here.nbytes else here
    if isinstance(value, dict):
        return {key: own(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(own(entry) for entry in value)
    return value
