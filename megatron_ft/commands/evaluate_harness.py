"""megatron-ft evaluate harness: lm-eval's benchmarks on a checkpoint or an export, in any layout."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.commands.in_layout import LAYOUT_FLAGS, Asked, GenerationLayout, in_layout
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout


@dataclass
class HarnessModel:
    """Model"""

    load: str = field(default="", metadata={"required": True})
    """folder of a checkpoint or of an exported Hugging Face model"""
    adapter: str | None = None
    """adapters of the model in --load: a checkpoint of a run with --lora_rank, or a PEFT folder"""
    chat_format: str | None = None
    """chat format for --apply_chat_template; default: the one recorded in the checkpoint"""
    template_arguments: list[str] = field(default_factory=list)
    """variables for the tokenizer's own chat template, such as enable_thinking=false; values are read as JSON, else as text"""
    max_length: int | None = None
    """largest number of tokens that the model reads at once; longer prompts lose their beginning; default: the model's positions"""
    add_bos_token: bool | None = None
    """begin texts with the begin-of-text token, --no_add_bos_token: without; default: as the tokenizer's files say"""
    batch_size: int = 8
    """number of requests that are computed at once"""
    bf16: bool | None = None
    """compute in bfloat16, --no_bf16: in fp32; default: bfloat16 for an exported model in bfloat16, else fp32"""
    verify_checkpoint: bool = True
    """compare the folder's files with their recorded digests, if there are any; --no_verify_checkpoint skips this"""


@dataclass
class HarnessTasks:
    """Tasks"""

    tasks: list[str] = field(default_factory=list)
    """names of tasks or groups of tasks, separated by commas or spaces"""
    task_folders: list[str] = field(default_factory=list)
    """folders of YAML files that define tasks, whose data may be local JSON lines"""
    lm_eval_tasks: bool = False
    """offer lm-eval's own tasks too; their data are downloaded, unless they are in the cache and HF_DATASETS_OFFLINE=1 is set"""
    num_fewshot: int | None = None
    """examples before each question; default: as the task says"""
    apply_chat_template: bool = False
    """ask in the model's chat format"""
    system: str | None = None
    """system message before each question"""
    limit: int | None = None
    """questions of each task; default: all"""
    output: str = field(default="harness", metadata={"writes": "folder"})
    """folder for harness.json"""


COMMAND = Command(
    name="evaluate harness",
    summary="score a model on lm-eval's tasks",
    sections=(HarnessModel, HarnessTasks, GenerationLayout, Processes),
    examples=(
        "megatron-ft evaluate harness --load runs/tuned --task_folders my_tasks --tasks questions --num_fewshot 2",
        "megatron-ft evaluate harness --load runs/tuned --tasks arc_challenge --num_fewshot 25 "
        "--lm_eval_tasks --tensor_model_parallel_size 2 --pipeline_model_parallel_size 2",
    ),
    common=(
        "load: folder of a checkpoint or of an export",
        "adapter",
        "chat_format",
        "max_length",
        "batch_size",
        "tasks",
        "task_folders",
        "lm_eval_tasks",
        "num_fewshot",
        "apply_chat_template",
        "system",
        "limit",
        "output",
        *LAYOUT_FLAGS,
    ),
)


def run(model: HarnessModel, given: HarnessTasks, parallel: GenerationLayout, processes: Processes) -> int:
    """Evaluate, print a table and write harness.json. Raise UserError for settings, tasks or models that do not fit."""
    check(model, given)
    if not given.lm_eval_tasks:
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    from megatron_ft.checkpoints.folder import check_folder

    for folder in filter(None, (model.load, model.adapter)):
        check_folder(Path(folder))

    def work(layout: Layout) -> None:
        results = _evaluated(model, given, layout)
        if layout.is_main:
            _write(model, given, results)

    asked = Asked(model.load, model.adapter, model.bf16, model.batch_size, model.max_length)
    return in_layout(work, [asked], parallel, processes)


def check(model: HarnessModel, given: HarnessTasks) -> None:
    """Raise ConfigError for settings that do not fit, and where lm_eval is not installed."""
    if not given.tasks:
        raise ConfigError(
            "--tasks is needed: names of tasks in --task_folders, or of lm-eval's own with --lm_eval_tasks"
        )
    if not given.task_folders and not given.lm_eval_tasks:
        raise ConfigError(
            "--task_folders is needed: folders of YAML files that define tasks; or --lm_eval_tasks for lm-eval's own"
        )
    for name, value in (("batch_size", model.batch_size), ("limit", given.limit), ("max_length", model.max_length)):
        if value is not None and value < (2 if name == "max_length" else 1):
            raise ConfigError(f"--{name} {value} is too small")
    if given.num_fewshot is not None and given.num_fewshot < 0:
        raise ConfigError("--num_fewshot must be at least 0")
    for folder in given.task_folders:
        if not Path(folder).is_dir() or not any(Path(folder).rglob("*.yaml")):
            raise ConfigError(f"--task_folders {folder}: no folder with YAML files of tasks; check the path")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('lm-eval is not installed: pip install "megatron_ft[harness]" (or lm_eval==0.4.13)')


def names_of(given: HarnessTasks) -> list[str]:
    """Return the names of tasks, also of those joined by commas."""
    return [name for word in given.tasks for name in word.replace(",", " ").split()]


def _evaluated(model: HarnessModel, given: HarnessTasks, layout: Layout) -> dict[str, Any]:
    """Return lm-eval's results; all ranks call it."""
    from megatron_ft.evaluation.harness.lm import RanksLM
    from megatron_ft.evaluation.harness.run import scores, task_manager
    from megatron_ft.evaluation.harness.texts import Texts
    from megatron_ft.generation.loading import open_chat_model

    manager = task_manager(given.task_folders, given.lm_eval_tasks, names_of(given))
    chat = open_chat_model(
        Path(model.load), layout, model.chat_format, model.bf16, model.verify_checkpoint, model.template_arguments,
        Path(model.adapter) if model.adapter else None,
    )  # fmt: skip
    texts = Texts(chat, model.add_bos_token)
    if given.apply_chat_template:
        assert texts.template  # raises where there is none
    length = model.max_length or chat.decoder.max_positions
    chat.decoder.max_positions = max(length, chat.decoder.max_positions)
    lm = RanksLM(chat, layout, texts, length, model.batch_size)
    return scores(
        lm, names_of(given), manager, num_fewshot=given.num_fewshot, limit=given.limit, batch_size=model.batch_size,
        apply_chat_template=given.apply_chat_template, system_instruction=given.system, log_samples=False,
    )  # fmt: skip


def _write(model: HarnessModel, given: HarnessTasks, results: dict[str, Any]) -> None:
    from megatron_ft.commands.evaluate_retrieval import aligned
    from megatron_ft.evaluation.harness.requests import table_rows
    from megatron_ft.files import write_json

    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        key: results[key] for key in ("results", "groups", "n-shot", "versions", "higher_is_better") if key in results
    }
    settings = {
        "load": model.load, "adapter": model.adapter, "max_length": model.max_length, "limit": given.limit,
        "num_fewshot": given.num_fewshot, "apply_chat_template": given.apply_chat_template, "system": given.system,
    }  # fmt: skip
    write_json(folder / "harness.json", {**settings, **kept})
    print(aligned([("task", "few-shot", "metric", "value"), *table_rows(results)]))
    print(f"-> {folder / 'harness.json'}")


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
