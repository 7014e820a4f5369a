"""megatron-ft reshard: convert a checkpoint, also Megatron-LLM's, to another layout or format."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints_conversion.options import (
    CheckpointFormat,
    CheckpointSource,
    Folders,
    Written,
    check_folders,
    note_sizes,
)
from megatron_ft.checkpoints.folder import TRACKER
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.model_parallel import ModelParallel
from megatron_ft.config.sections import CkptFormat
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from checkpoints_conversion.megatron_source import Opened
    from checkpoints_conversion.report import Report
    from megatron_ft.checkpoints.folder import CheckpointConfig


@dataclass(frozen=True)
class Reshard(CheckpointSource, Written, CheckpointFormat, ModelParallel, Folders):
    """Source and result"""

    input_dir: str = field(metadata={"required": True})
    """Checkpoint to convert, of megatron-ft or Megatron-LLM: its root, or one release or iter_ folder."""
    output_dir: str = field(metadata={"required": True, "writes": "folder"})
    """Folder of the new checkpoint."""
    ckpt_format: CkptFormat = "torch_dist"
    """Checkpoint format; torch_dist: loads into any layout, keeps the training state of a torch_dist source; torch: one mp_rank file per
    rank, only for this layout."""


COMMAND = Command(
    name="reshard",
    summary="convert a checkpoint to another tensor and pipeline parallel layout or format, without GPUs",
    sections=(Reshard,),
    examples=(
        "megatron-ft reshard checkpoints/llama2-70b-tp8-pp4 checkpoints/llama2-70b-tp4-pp8 "
        "--tensor_model_parallel_size 4 --pipeline_model_parallel_size 8 --ckpt_format torch",
        "megatron-ft reshard megatron-llm/llama2-7b checkpoints/llama2-7b --tokenizer llama2/tokenizer.model",
    ),
    positional=("input_dir", "output_dir"),
)


def run(options: Reshard) -> None:
    print(convert(options))


def convert(options: Reshard) -> Report:
    """Convert and return a report. output_dir appears only when everything is written. Raise UserError."""
    started, source_root, target = time.monotonic(), Path(options.input_dir), Path(options.output_dir)
    check_folders(options, options.overwrite, {TRACKER, "release"}, TRACKER)
    # Imported here, so that --help and the checks above do not wait for torch.
    from checkpoints_conversion.megatron_source import open_megatron
    from checkpoints_conversion.megatron_target import write_checkpoint
    from checkpoints_conversion.quantise import stored_dtype
    from checkpoints_conversion.report import Report, count
    from checkpoints_conversion.stream import identity
    from megatron_ft.checkpoints.folder import check_quantised, rules_in
    from megatron_ft.models.architecture import check_layout, padded_vocab_size
    from megatron_ft.models.dtypes import cast, torch_dtype

    opened = open_megatron(source_root, options)
    tp_size, arch = options.tensor_model_parallel_size, opened.config.architecture
    check_layout(arch, tp_size, options.pipeline_model_parallel_size)
    check_quantised(opened.config, tp_size)
    if opened.config.quantization and options.params_dtype not in (None, opened.config.dtype):
        raise ConfigError(
            f"--params_dtype {options.params_dtype}: {opened.folder} holds NF4 of a model in {opened.config.dtype}, which stays: "
            "drop the flag"
        )
    note_sizes(options, tp_size, options.pipeline_model_parallel_size)
    config = replace(
        opened.config,
        ckpt_format=options.ckpt_format,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        padded_vocab_size=padded_vocab_size(arch.vocab_size, tp_size, options.make_vocab_size_divisible_by),
        dtype=options.params_dtype or opened.config.dtype,
    )
    key = {"options": asdict(options), "source": identity(opened.files())}
    both = opened.config.ckpt_format == options.ckpt_format == "torch_dist"
    if both and options.params_dtype in (None, opened.config.dtype):
        files = _copy(opened, config, target, key, options.overwrite)
    else:
        kind = torch_dtype(options.params_dtype) if options.params_dtype else None
        full = opened.stored or (lambda one: cast(opened.full(one), options.params_dtype, one.key))
        files = write_checkpoint(
            target, config, rules_in(config), full, stored_dtype(lambda one: kind or opened.dtype(one)),
            opened.tokenizer, key, options.overwrite, opened.folder,
        )  # fmt: skip
    parameters, tensors = count(arch, opened.rules)
    return Report(target, parameters, tensors, files, time.monotonic() - started)


def _copy(opened: Opened, config: CheckpointConfig, target: Path, key: dict, overwrite: bool) -> int:
    """Copy a torch_dist checkpoint, optimizer and random states included, because it loads into any layout."""
    import shutil

    from checkpoints_conversion.certificate import NAME
    from checkpoints_conversion.stream import resumable_folder, seal
    from megatron_ft.checkpoints.folder import CONFIG, iteration_folder, write_config, write_tracker
    from megatron_ft.digests import MANIFEST, has_digests, read_digests

    with resumable_folder(target, key, overwrite) as root:
        folder = iteration_folder(root, config.iteration)
        shutil.copytree(opened.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(NAME, MANIFEST))
        # The padding remains that of the files: a loading rank adds or drops rows itself.
        write_config(folder, replace(config, padded_vocab_size=opened.config.padded_vocab_size, digested=True))
        # The source's digests, if it has them, so that an incorrect copy is detected.
        known = read_digests(opened.folder) if has_digests(opened.folder) else {}
        seal(folder, {folder / name: entry for name, entry in known.items() if name != CONFIG})
        write_tracker(root, config.iteration)
    return len(list(opened.folder.glob("*.distcp")))


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
