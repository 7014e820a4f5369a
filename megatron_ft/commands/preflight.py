"""megatron-ft preflight: check a finetune command line against its shards and checkpoint, without starting it.

Takes the flags of finetune. Every finding names the flag that fixes it. Needs neither a GPU nor torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Batch, Checkpointing, Data, Numerics, Parallelism
from megatron_ft.config.settings import COMMON, TrainingSettings
from megatron_ft.errors import UserError
from megatron_ft.wording import counted, size

if TYPE_CHECKING:
    from megatron_ft.adapters.spec import Lora
    from megatron_ft.checkpoints.folder import CheckpointConfig
    from megatron_ft.models.pipeline import PipelineSplit
    from megatron_ft.training.teacher import Teacher


@dataclass
class Preflight:
    """Size of the run"""

    world_size: int = field(default=1)
    """number of processes of the run, over all nodes"""


COMMAND = Command(
    name="preflight",
    summary="check shards and checkpoint against a finetune command line, without starting it",
    sections=(Preflight, TrainingSettings),
    examples=(
        "megatron-ft preflight --world_size 32 --load runs/model --data_path data/mine-train --train_iters 500 "
        "--tensor_model_parallel_size 8 --pipeline_model_parallel_size 4 --seq_length 4096",
    ),
    megatron_flags=True,
    common=("world_size: number of processes of the run", *COMMON),
)


class Finding(NamedTuple):
    """One result. level: error, warning or ok. text: the problem and the flag that fixes it."""

    level: str
    text: str


def run(options: Preflight, settings: TrainingSettings) -> int:
    """Print every finding. Return 0 if none is an error, else 2."""
    findings = list(_findings(options, settings))
    for level in ("error", "warning", "ok"):
        for finding in findings:
            if finding.level == level:
                print(f"{level + ':':9}{finding.text}")
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    print(f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}; nothing was started")
    return 2 if counts["error"] else 0


def _findings(options: Preflight, settings: TrainingSettings) -> Iterator[Finding]:
    from megatron_ft.config.checks import check_settings, places_to_write
    from megatron_ft.config.schedule import doubtful_rate
    from megatron_ft.files import check_writable
    from megatron_ft.generation.prompts import read_references

    try:
        check_settings(settings, options.world_size)
        yield Finding("ok", "the settings fit together")
        consistent = True
    except UserError as error:
        yield Finding("error", str(error))
        consistent = False  # their effect on a model and on rows cannot be computed
    if doubt := doubtful_rate(settings.optimizer):
        yield Finding("warning", doubt)
    for flag, place in places_to_write(settings).items():
        try:
            check_writable(flag, place)
        except UserError as error:
            yield Finding("error", str(error))
    if asked := settings.logging.sample_prompts:
        try:
            read_references(Path(asked))
        except UserError as error:
            yield Finding("error", str(error))
    data = settings.data
    described = yield from _checkpoint(settings, options.world_size if consistent else None)
    for prefix in [*data.data_path, *data.valid_data_path]:
        yield from _shards(prefix, data, described, not (consistent and data.verify_data))
    if consistent and data.data_path and settings.distillation.teacher_logits and described is not None:
        yield from _stored(settings, described)
    if consistent:
        yield from _length(data, settings.batch, options.world_size, settings.parallel)


def _checkpoint(
    settings: TrainingSettings, world_size: int | None
) -> Generator[Finding, None, CheckpointConfig | None]:
    """Yield findings on the checkpoint to start from and on the space for new ones. Return its description, None if it is unusable.

    world_size: None if the settings are inconsistent; then they are not compared with the model.
    """
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.models.pipeline import split_layers
    from megatron_ft.training.adapting import find_adapting
    from megatron_ft.training.fit import find_start, starts_anew
    from megatron_ft.training.teacher import find_teacher

    start, problem = None, None
    if world_size is not None:
        try:
            start = find_start(settings, world_size)
        except UserError as error:
            problem = error
    try:
        folder = start.folder if start else find_checkpoint(Path(settings.checkpointing.load))
        described = start.described if start else describe(folder)
    except UserError as error:
        yield Finding("error", f"{error} (--load)")
        return None
    yield Finding("ok", f"checkpoint {folder}: {described.architecture.family}, {described.dtype}, all files exist")
    if problem:
        yield Finding("error", str(problem))
    if start:
        split = split_layers(described.architecture.num_layers, settings.parallel)
        tp = settings.parallel.tensor_model_parallel_size
        yield Finding("ok", f"TP {tp} x PP {split.stages} fit the model: layers {split}")
        adapting = find_adapting(settings, described, folder, starts_anew(described, settings.checkpointing))
        trained = None
        if adapting:
            trained = adapting.lora.parameters(described.architecture)
            yield from adapters(adapting.lora, described, split)
        if teacher := find_teacher(settings, described):
            yield Finding("ok", f"teacher {teacher.folder}: {_of_teacher(teacher, settings)}")
        yield from disk(folder, described, settings.checkpointing, settings.batch, settings.numerics, trained)
    return described


def _of_teacher(teacher: Teacher, settings: TrainingSettings) -> str:
    """Return the teacher's family and the memory of its weights in the fullest process."""
    from megatron_ft.planner.memory import parameters, saved_by_nf4

    arch, split, tp = teacher.described.architecture, teacher.split, settings.parallel.tensor_model_parallel_size
    width = 2 if settings.numerics.bf16 or settings.numerics.fp16 else 4
    nf4 = teacher.described.quantization is not None

    def weights(stage: int) -> int:
        layers = len(split.layers_of(stage))
        whole = width * parameters(arch, tp, layers, stage == 0, stage == split.stages - 1)
        return whole - saved_by_nf4(arch, tp, layers, width) if nf4 else whole

    most = max(weights(stage) for stage in range(split.stages))
    precision = ", linears in NF4" if nf4 else ""
    return f"{arch.family}, layers {split}, {size(most)} of weights a process{precision}"


def adapters(lora: Lora, described: CheckpointConfig, split: PipelineSplit) -> Iterator[Finding]:
    """Yield findings on the adapters of a run."""
    count, targets = lora.parameters(described.architecture), ", ".join(lora.targets)
    yield Finding("ok", f"adapters of rank {lora.rank} on {targets}: {count:,} parameters are trained")
    if not 1 / 8 <= lora.scale <= (16 if lora.rs else 4):
        yield Finding(
            "warning",
            f"the adapters' output is multiplied by {lora.scale:g} (--lora_alpha {lora.alpha:g}, --lora_rank {lora.rank}); usual are 0.25 "
            f"to 2: check --lora_alpha",
        )
    added = list(described.tokenizer.get("added_tokens", {}))
    if added and not lora.new_tokens:
        yield Finding(
            "warning",
            f"{len(added)} added tokens ({', '.join(added[:3])}): adapters do not train their embeddings; add --train_new_tokens",
        )
    for number, stage in enumerate(split.chunks, 1):
        if not any(len(chunk) for chunk in stage):
            yield Finding(
                "warning", f"stage {number} of the pipeline has no layers, so nothing is trained on its processes"
            )


def disk(
    folder: Path, described: Any, checkpointing: Checkpointing, batch: Batch, numerics: Numerics, trained: int | None = None
) -> Iterator[Finding]:  # fmt: skip
    """Yield a finding on the disk space for the run's checkpoints: weights, with bf16 also fp32 main weights, and two moments.

    trained: number of parameters that they hold; None: those of the model in `folder`.
    """
    import shutil

    if checkpointing.save is None:
        yield Finding("warning", "--save is not set: the trained weights will not be saved")
        return
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    parameters = stored / (4 if described.dtype == "fp32" else 2) if trained is None else trained
    each = parameters * (14 if numerics.bf16 else 12)
    saves = max(1, -(-batch.train_iters // checkpointing.save_interval)) if checkpointing.save_interval else 1
    place = Path(checkpointing.save).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    unknown = checkpointing.save_interval and not batch.train_iters
    many = "checkpoints" if unknown else counted(saves, "checkpoint")
    text = f"{many} of about {size(each)}, {size(free)} free at {place}"
    if each > free:
        yield Finding("error", f"{text}: not one fits; set --save to a folder on another disk")
    elif each * saves > free:
        yield Finding(
            "warning", f"{text}: not all fit; increase --save_interval, or set --save to a folder on another disk"
        )
    else:
        yield Finding("ok", text)


def _shards(prefix: str, data: Data, described: Any, quick: bool) -> Iterator[Finding]:
    from megatron_ft.data.foreign import open_any
    from megatron_ft.data.manifest import check_tokenizer
    from megatron_ft.data.plain import PlainShards, is_plain
    from megatron_ft.data.shards import Shards
    from megatron_ft.data.verify import verify_shards

    try:
        vocabulary = described.architecture.vocab_size if described is not None else 1 << 31
        if is_plain(prefix):
            plain = PlainShards(prefix, vocabulary)
            yield Finding("ok", f"{prefix}: {counted(len(plain), 'document')} without roles, every token is trained on")
            return
        shards = open_any(prefix, vocabulary, described.tokenizer if described is not None else None)
        if not quick:
            verify_shards([shards], "--no_verify_data")
        if described is not None and isinstance(shards, Shards):
            check_tokenizer(shards.manifest, described.tokenizer, vocabulary, where=prefix)
    except UserError as error:
        yield Finding("error", f"{error} (--data_path)")
        return
    made = "made with the model's tokenizer, vocabulary fits"
    if not isinstance(shards, Shards):
        made = "of another tool, without a manifest: the tokenizer cannot be checked"
    yield Finding(
        "ok" if isinstance(shards, Shards) else "warning", f"{prefix}: {counted(len(shards), 'sample')}, {made}"
    )
    if described is not None and described.chat_format and "name" in shards.manifest.chat_format:
        ours = shards.manifest.chat_format["name"]
        if ours != described.chat_format:
            yield Finding(
                "warning",
                f"{prefix}: chat format {ours}, the checkpoint's is {described.chat_format}, which its export will use; "
                "pretokenize with the same --chat_format",
            )
    if not quick:
        yield from supervision(prefix, shards, data)


def _stored(settings: TrainingSettings, described: CheckpointConfig) -> Iterator[Finding]:
    """Yield a finding on a teacher's stored log-probabilities."""
    from megatron_ft.training.datasets import make_datasets

    try:
        train, _ = make_datasets(settings.data, described, settings.distillation)
        for one in train.scored or []:
            yield Finding("ok", f"{one.record()['path']}: top {one.top_k} of a teacher, fits the shards and the run")
    except UserError as error:
        yield Finding("error", f"{error} (--teacher_logits)")


def supervision(prefix: str, shards: Any, data: Data) -> Iterator[Finding]:
    """Yield findings on the supervised tokens and ends of turns that remain after cutting. Read every token."""
    from megatron_ft.data.roles import ASSISTANT, ROLE_BITS, last_turn
    from megatron_ft.data.trained_on import weights_of

    weight_by_byte = shards.loss_weights(weights_of(data), data.marked_loss_weight)
    stop = shards.manifest.tokenizer.get("added_tokens", {}).get(shards.manifest.chat_format.get("stop_token"))
    cut = silent = silent_whole = endless = unlearnt = 0
    for sample in range(len(shards)):
        role_bytes, ids = shards.role_bytes(sample), shards.tokens(sample)
        limit = data.seq_length + 1
        weights = weight_by_byte[role_bytes[1:]]
        if data.last_turn_only:
            weights[: max(0, last_turn(role_bytes) - 1)] = 0
        cut += len(role_bytes) > limit
        if not (weights[: limit - 1] > 0).any():
            silent += 1
            silent_whole += not (weights > 0).any()
        if stop is not None and ((role_bytes & ROLE_BITS) == ASSISTANT).any():
            ends = (ids[1:] == stop) & ((role_bytes[1:] & ROLE_BITS) == ASSISTANT)
            endless += not ends[: limit - 1].any()
            unlearnt += bool((ends & (weights == 0)).any())
    whole = len(shards)
    if cut:
        yield Finding(
            "warning",
            f"{prefix}: {cut:,} of {whole:,} samples are longer than --seq_length {data.seq_length} and are cut",
        )
    if silent_whole:
        yield Finding(
            "warning",
            f"{prefix}: {silent_whole:,} of {whole:,} samples have no token that is trained on; pretokenize with "
            "--min_assistant_tokens 1, or set --scalar_loss_mask",
        )
    if silent > silent_whole:
        yield Finding(
            "error",
            f"{prefix}: {silent - silent_whole:,} of {whole:,} samples lose all tokens that are trained on when they are cut; increase "
            f"--seq_length, or pretokenize with --max_tokens {data.seq_length + 1}",
        )
    if endless:
        yield Finding(
            "warning",
            f"{prefix}: in {endless:,} of {whole:,} samples no answer ends within --seq_length {data.seq_length}; increase it, or "
            f"pretokenize with --max_tokens {data.seq_length + 1}",
        )
    if unlearnt:
        yield Finding(
            "warning",
            f"{prefix}: in {counted(unlearnt, 'sample')} the end of an answer has loss weight 0, because of the weight of its message",
        )
    if not silent and not endless and not unlearnt:
        yield Finding(
            "ok", f"{prefix}: after cutting, every sample has tokens that are trained on, ends of turns included"
        )


def _length(data: Data, batch: Batch, world_size: int, parallel: Parallelism) -> Iterator[Finding]:
    """Yield a finding on the number of epochs."""
    import numpy as np

    from megatron_ft.config.checks import data_parallel_size
    from megatron_ft.data import packing
    from megatron_ft.data.shards import open_shards

    try:
        lengths = np.concatenate([open_shards(prefix).lengths for prefix in data.data_path])
    except (UserError, ValueError):
        return
    sizes = packing.positions(lengths, data.seq_length)
    rows = sizes.sum() / data.seq_length if data.packing else np.count_nonzero(sizes)
    replicas = max(1, data_parallel_size(parallel, world_size))
    a_step = batch.global_batch_size or batch.micro_batch_size * replicas
    each = f"about {counted(round(float(rows)), 'row')}"
    if batch.epochs is not None:
        steps = max(1, math.ceil(batch.epochs * float(rows) / a_step))
        text = (
            f"--epochs {batch.epochs:g} is about {counted(steps, 'step')} of {counted(a_step, 'row')}, an epoch {each}"
        )
        level = "warning" if batch.epochs > 20 else "ok"
        yield Finding(level, text + ("; check --epochs" if batch.epochs > 20 else ""))
        return
    epochs = batch.train_iters * a_step / max(1.0, float(rows))
    text = f"--train_iters {batch.train_iters} x {counted(a_step, 'row')} is {epochs:.2f} epochs of {each}"
    yield Finding(
        "warning" if epochs > 20 else "ok",
        text + ("; check --train_iters and --global_batch_size" if epochs > 20 else ""),
    )


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
