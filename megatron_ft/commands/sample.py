"""megatron-ft sample: a sampling report, prompts x settings, of a model, and a page that shows several models side by side."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.commands.in_layout import LAYOUT_FLAGS, Asked, GenerationLayout, in_layout
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout
    from megatron_ft.generation.sampling_report import Setting


@dataclass
class Sample:
    """Model, prompts and settings"""

    load: str = field(default="", metadata={"required": True})
    """folder of a checkpoint or of an exported Hugging Face model"""
    adapter: str | None = None
    """adapters of the model in --load: a checkpoint of a run with --lora_rank, or a PEFT folder"""
    prompts: str = field(default="", metadata={"required": True})
    """file of prompts, one JSON text or {"prompt": text} per line"""
    settings: str = field(default="", metadata={"required": True})
    """JSON file of settings: {"configurations": [{"name": text, "generate_args": {"top_p": 0.9, ...}}]}"""
    report: str = field(default="sampling.json", metadata={"writes": "file"})
    """file for the report; the page has the same name with .html"""
    beside: list[str] = field(default_factory=list)
    """reports of other models, which the page shows beside this one"""
    num_samples: int = 2
    """number of answers to each prompt with each setting; one where "do_sample" is false"""
    chat_format: str | None = None
    """chat format of the prompts; default: the one recorded in the folder"""
    seed: int = 0
    """seed of the sampling"""
    batch_size: int = 32
    """number of prompts that are answered at once"""
    bf16: bool | None = None
    """compute in bfloat16, --no_bf16: in fp32; default: bfloat16 for an exported model in bfloat16, else fp32"""


COMMAND = Command(
    name="sample",
    summary="write a sampling report of a model: prompts x settings, as JSON and as a page beside other models",
    sections=(Sample, GenerationLayout, Processes),
    examples=(
        "megatron-ft sample --load runs/base --prompts prompts.jsonl --settings settings.json --report base.json",
        "megatron-ft sample --load runs/tuned --prompts prompts.jsonl --settings settings.json --report tuned.json --beside base.json",
    ),
    common=(
        "load",
        "adapter",
        "prompts",
        "settings",
        "report",
        "beside",
        "num_samples",
        "chat_format",
        "seed",
        "batch_size",
        "bf16",
        *LAYOUT_FLAGS,
    ),
)


def run(options: Sample, parallel: GenerationLayout, processes: Processes) -> int:
    """Write the report and its page. Raise UserError for malformed prompts or settings, and for what is not a model."""
    from megatron_ft.checkpoints.folder import check_folder
    from megatron_ft.generation.sampling_report import as_report, read_report, read_settings

    if options.num_samples < 1 or options.batch_size < 1:
        raise ConfigError("--num_samples and --batch_size must be at least 1")
    prompts, settings = read_lines(Path(options.prompts)), read_settings(Path(options.settings))
    others = [read_report(Path(path)) for path in options.beside]
    for given in filter(None, (options.load, options.adapter)):
        check_folder(Path(given))

    def work(layout: Layout) -> None:
        answers = _answers(options, layout, prompts, settings)
        if layout.is_main:
            date = datetime.now(UTC).replace(tzinfo=None).isoformat()
            report = as_report(options.load, date, asdict(options), prompts, settings, answers)
            _write(Path(options.report), report, others)

    longest = max(map(len, prompts)) // 2 + max(setting.max_new_tokens for setting in settings)
    rows = min(options.batch_size, len(prompts) * options.num_samples)
    asked = Asked(options.load, options.adapter, options.bf16, rows, longest)
    return in_layout(work, [asked], parallel, processes)


def read_lines(path: Path) -> list[str]:
    """Return the prompts of a file. Raise DataError with file and line."""
    from megatron_ft.files import read_text

    prompts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from error
        text = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise DataError(f'{path}, line {number}: needs a text in quotes or {{"prompt": text}}')
        prompts.append(text)
    if not prompts:
        raise DataError(f"{path}: contains no prompts; write one JSON text per line")
    return prompts


def _answers(options: Sample, layout: Layout, prompts: list[str], settings: list[Setting]) -> list[list[list[str]]]:
    """Return for each setting the answers to each prompt, on every rank. Data-parallel ranks take every dp_size-th prompt."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_ft.generation.loading import open_chat_model

    adapter = Path(options.adapter) if options.adapter else None
    model = open_chat_model(Path(options.load), layout, options.chat_format, options.bf16, adapter=adapter)
    mine, found = prompts[layout.dp_rank :: layout.dp_size], []
    for setting in settings:
        count = 1 if setting.is_greedy else options.num_samples
        system = [{"role": "system", "content": setting.system}] if setting.system else []
        chats = [[*system, {"role": "user", "content": prompt}] for prompt in mine for _ in range(count)]
        given = model.answers(
            chats, setting.max_new_tokens, setting.sampling, options.batch_size, options.seed + layout.dp_rank
        )
        shares: list[Any] = [None] * layout.dp_size
        dist.all_gather_object(shares, given, group=parallel_state.get_data_parallel_group())
        places = [(i % layout.dp_size, i // layout.dp_size * count) for i in range(len(prompts))]
        found.append([shares[rank][at : at + count] for rank, at in places])
    return found


def _write(path: Path, report: dict[str, Any], others: list[dict[str, Any]]) -> None:
    from megatron_ft.files import write_json
    from megatron_ft.report.side_by_side import write_side_by_side

    write_json(path, report)
    page = path.with_suffix(".html")
    write_side_by_side([*others, report], page)
    print(f"report in {path}, page in {page}")


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
