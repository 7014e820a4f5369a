"""Makes our commands of a job that was read from another tool's file."""

from __future__ import annotations

import shlex
from typing import Any

from megatron_ft.config.checks import check_settings
from megatron_ft.config.cli import parse
from megatron_ft.errors import ConfigError
from megatron_ft.importing.job import Dataset, Job, flag_text, is_local, slug, written
from megatron_ft.importing.megatron import COMMAND
from megatron_ft.importing.schedule import reports

WANDB = ("wandb_name", "wandb_project", "wandb_entity", "wandb_id")
PER_NODE = 8


def commands(job: Job, gpus: int | None) -> list[str]:
    """Return the command lines, in order; none for a job that nothing here does. gpus: as the user says.

    Settings that need the number of GPUs are completed in the job.
    """
    if job.unfit:
        return []
    _count_gpus(job, gpus)
    reports(job)
    if not job.finetune.get("wandb_logger") and job.tool != "Megatron":
        for name in WANDB:
            job.finetune.pop(name, None)
    if job.tool == "Megatron":
        return _of_megatron(job)
    _layout(job)
    _batch(job)
    _new_tokens(job)
    _validation(job)
    model = _folder(job.model or "MODEL", "models", local=bool(job.model) and is_local(job.model))
    base = f"checkpoints/{slug(job.model or 'MODEL')}"
    lines = []
    if job.model and not is_local(job.model):
        lines.append(shlex.join(["hf", "download", job.model, "--local-dir", model]))
    for one in job.datasets:
        if not one.local:
            lines.append(
                shlex.join(
                    [
                        "hf",
                        "download",
                        "--repo-type",
                        "dataset",
                        one.name,
                        "--local-dir",
                        _folder(one.name, "data", False),
                    ]
                )
            )
    lines.append(_line("hf-to-megatron", {"input_dir": model, "output_dir": base, **job.convert}))
    if not job.datasets:
        job.before.append(
            "the file names no training data: put your chats in place of CHATS; is it a file for training?"
        )
    prefixes = []
    for one in job.datasets or [Dataset("CHATS", True)]:
        prefix = f"shards/{slug(one.name).removesuffix('.json').removesuffix('.jsonl')}"
        prefixes.append(f"{prefix}-train")
        source = _folder(one.name, "data", one.local)
        lines.append(
            _line(
                "pretokenize",
                {"input": [source], "tokenizer": model, "output_prefix": prefix, **job.pretokenize, **one.pretokenize},
            )
        )
    save = str(job.finetune.pop("save", "runs/tuned"))
    _length(job)
    settings = {"load": base, "save": save, "data_path": prefixes, **job.finetune}
    lines.append(_finetune(job, settings))
    return [*lines, _export(job, save)]


def _of_megatron(job: Job) -> list[str]:
    """Return the commands for a script of Megatron: its data can be read as it is, its model comes from a checkpoint."""
    own = job.finetune
    load, save = own.pop("load", None), str(own.pop("save", "runs/tuned"))
    base = "checkpoints/MODEL" if load in (None, save) else str(load)
    if base == "checkpoints/MODEL":
        job.before.append(
            "the script trains from scratch, or goes on in its own folder; here a run begins with a model: put its Hugging Face folder "
            "in place "
            "of MODEL. --auto_resume goes on in --save"
        )
        own["auto_resume"] = True
    else:
        job.before.append(
            f"--load {base} must be a checkpoint of hf-to-megatron, as above; one of Megatron-LLM is converted with megatron-ft reshard"
        )
    own.setdefault("data_path", ["DATA"])
    lines = [_line("hf-to-megatron", {"input_dir": "MODEL", "output_dir": base})]
    lines.append(_finetune(job, {"load": base, "save": save, **own}))
    return [*lines, _export(job, save)]


def _finetune(job: Job, settings: dict[str, Any]) -> str:
    """Return the command of the training. What finetune would refuse about it is said beforehand."""
    first = {"nproc_per_node": job.gpus}
    if job.nodes > 1:
        first["nnodes"] = job.nodes
    rest = {
        name: value
        for name, value in settings.items()
        if name not in ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")
    }
    line = _line("finetune", {**first, **rest})
    try:
        (read,) = parse(COMMAND, shlex.split(line)[2:])
        check_settings(read, (job.gpus or 1) * job.nodes)
    except ConfigError as error:
        job.before.append(f"as it stands, finetune refuses the command: {error}")
    return line


def _export(job: Job, save: str) -> str:
    target = f"{save.rstrip('/')}-hf"
    if job.adapters:
        return _line("megatron-to-hf", {"input_dir": save, "output_dir": target, "adapter_only": True})
    return _line("megatron-to-hf", {"input_dir": save, "output_dir": target})


def _line(command: str, settings: dict[str, Any]) -> str:
    """Return a command line. A switch that is False is written --no_x."""
    words = ["megatron-ft", command]
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag_text(name, value))
        else:
            words += [f"--{name}", *(written(one) for one in (value if isinstance(value, list) else [value]))]
    return shlex.join(words)


def _folder(name: str, parent: str, local: bool) -> str:
    return name if local else f"{parent}/{slug(name)}"


def _count_gpus(job: Job, gpus: int | None) -> None:
    job.gpus = gpus or job.gpus
    if job.gpus is None:
        job.gpus = 1
        job.before.append(
            "the file does not say how many GPUs it runs on: 1 is written; import with --gpus N for others"
        )


def _layout(job: Job) -> None:
    """Choose tensor parallelism where the weights are divided over all GPUs there."""
    world = (job.gpus or 1) * job.nodes
    if job.sharded and world > 1 and "tensor_model_parallel_size" not in job.finetune:
        others = [int(job.finetune.get(f"{name}_model_parallel_size", 1)) for name in ("pipeline",)]
        free = (job.gpus or 1) // max(1, others[0] * int(job.finetune.get("context_parallel_size", 1)))
        size = max(one for one in (1, 2, 4, PER_NODE) if free % one == 0 or one == 1)
        job.finetune["tensor_model_parallel_size"] = size
        job.before.append(
            f"{job.sharded} divides the weights over {world} GPUs there, --tensor_model_parallel_size {size} every matrix over {size}: see "
            f"whether it fits, and better layouts, with megatron-ft plan MODEL --gpus {world}"
        )


def _batch(job: Job) -> None:
    """Set the global batch: micro batch x accumulation x the GPUs that are data parallel there."""
    world = (job.gpus or 1) * job.nodes
    split = 1
    if not job.sharded:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            split *= int(job.finetune.get(name, 1))
    if world % split:
        job.before.append(
            f"{world} GPUs are not a multiple of {split}, the parallel sizes of the file: import with --gpus N"
        )
    job.finetune["global_batch_size"] = job.micro_batch * job.accumulation * max(1, world // split)
    if int(job.finetune.get("context_parallel_size", 1)) > 1:
        job.finetune["packing"] = False
        job.finetune.pop("variable_seq_lengths", None)


def _validation(job: Job) -> None:
    """Hold chats out only where the other tool does."""
    if job.pretokenize.setdefault("val_split", 0):
        job.before.append(
            "an evaluation reads at most --eval_iters 10 batches of the validation shards; raise it to read them all"
        )


def _new_tokens(job: Job) -> None:
    """Train rows of added tokens only where some are added."""
    if (
        "chat_format" not in job.convert
        and "vocab_extra_ids_list" not in job.convert
        and job.finetune.pop("train_new_tokens", None)
    ):
        job.before.append(
            "no tokens are added here, so embedding and output layer stay as they are, and --train_new_tokens is left out"
        )


def _length(job: Job) -> None:
    """Set the length of the run in steps or in epochs."""
    if job.steps:
        return
    job.finetune["epochs"] = job.epochs or 1.0
