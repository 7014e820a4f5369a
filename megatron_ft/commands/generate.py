"""megatron-ft generate: answer prompts with a checkpoint in any layout or an exported model."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.model_parallel import ModelParallel
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout


@dataclass
class Generation:
    """Model and prompts"""

    load: str = field(default="", metadata={"required": True})
    """folder of a checkpoint (its root, or one iter_ folder) or of an exported Hugging Face model"""
    adapter: str | None = None
    """adapters of the model in --load: a checkpoint of a run with --lora_rank, which may also be given as --load, or a PEFT folder"""
    prompt: list[str] = field(default_factory=list)
    """prompts to answer, each as a separate user message"""
    prompts: str | None = None
    """file of prompts instead of --prompt, one JSON object per line: {"prompt": text} or {"messages": [...]}"""
    output: str | None = None
    """file for the answers, one JSON object per prompt with the key "answer"; default: print them"""
    chat_format: str | None = None
    """chat format of the prompts; default: the one recorded in the checkpoint"""
    template_arguments: list[str] = field(default_factory=list)
    """variables for the tokenizer's own chat template, such as enable_thinking=false; values are read as JSON, else as text"""
    verify_checkpoint: bool = True
    """compare the folder's files with their recorded digests, if there are any; --no_verify_checkpoint skips this"""


@dataclass
class SamplingOptions:
    """Sampling"""

    max_new_tokens: int = 256
    """largest number of tokens per answer"""
    temperature: float = 0.0
    """sampling temperature; 0: always the most likely token (greedy)"""
    top_k: int = 0
    """sample only from this many most likely tokens; 0: from all"""
    top_p: float = 1.0
    """sample only from the most likely tokens whose probabilities add up to this; 1: from all"""
    seed: int = 0
    """seed of the sampling"""
    batch_size: int = 32
    """number of prompts that are answered at once"""
    bf16: bool = False
    """compute in bfloat16 instead of fp32"""


@dataclass(frozen=True)
class GenerationLayout(ModelParallel):
    """Parallel layout of the model; the remaining processes divide the prompts among them"""


COMMAND = Command(
    name="generate",
    summary="answer prompts with a checkpoint or an exported model",
    sections=(Generation, SamplingOptions, GenerationLayout, Processes),
    examples=(
        'megatron-ft generate --load runs/demo/tuned --prompt "what colour is a plum ?"',
        "megatron-ft generate --nproc_per_node 4 --load runs/model --prompts questions.jsonl --output answers.jsonl "
        "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2",
    ),
)


def run(generation: Generation, options: SamplingOptions, parallel: GenerationLayout, processes: Processes) -> int:
    """Answer the prompts. Raise UserError for a missing checkpoint, malformed prompts or a layout that does not fit."""
    lines = read_prompts(generation)
    check_sampling(options)
    if options.batch_size < 1:
        raise ConfigError("--batch_size must be at least 1")
    from megatron_ft.checkpoints.folder import check_folder
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.engine.start import prepare_engine
    from megatron_ft.launch.places import join_srun
    from megatron_ft.launch.run import launch, planned

    for given in filter(None, (generation.load, generation.adapter)):
        check_folder(Path(given))
    join_srun(processes)
    if (starts := planned(processes)) and (code := launch(starts, processes.log_dir, prepare_engine)) is not None:
        return code  # the ranks have done what follows
    with process_groups(
        ParallelSizes(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    ) as layout:
        answers = _answer(generation, options, layout, [line["messages"] for line in lines])
        if layout.is_main:
            _write(generation, lines, answers)
    return 0


def read_prompts(generation: Generation) -> list[dict]:
    """Return every prompt as an object with the key "messages". Raise DataError with file and line."""
    if bool(generation.prompt) == bool(generation.prompts):
        raise ConfigError('give either --prompt "text" or --prompts FILE.jsonl')
    if generation.prompt:
        return [_with_messages({"prompt": text}, "--prompt") for text in generation.prompt]
    assert generation.prompts is not None
    path = Path(generation.prompts)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a UTF-8 file of JSON lines") from error
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path}: contains no prompts; write one JSON object per line")
    return [_parse_line(line, f"{path}, line {number}") for number, line in numbered]


def _parse_line(line: str, where: str) -> dict:
    try:
        return _with_messages(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error


def _with_messages(entry: object, where: str) -> dict:
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list) and entry["messages"]:
        return entry
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        return {**entry, "messages": [{"role": "user", "content": entry["prompt"]}]}
    raise DataError(f'{where}: needs {{"prompt": text}} or {{"messages": [...]}}')


class _Sampling(Protocol):
    """A section with the fields of SamplingOptions."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float


def check_sampling(options: _Sampling) -> None:
    """Raise ConfigError for values out of range."""
    if options.max_new_tokens < 1:
        raise ConfigError("--max_new_tokens must be at least 1")
    if options.temperature < 0 or options.top_k < 0 or not 0 < options.top_p <= 1:
        raise ConfigError("--temperature and --top_k must not be negative, --top_p must be above 0 and at most 1")


def _answer(generation: Generation, options: SamplingOptions, layout: Layout, conversations: list) -> list[str]:
    """Return the answers to all conversations, on every rank. Data-parallel ranks take every dp_size-th prompt."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_ft.generation.loading import open_chat_model
    from megatron_ft.generation.sampling import Sampling

    model = open_chat_model(
        Path(generation.load), layout, generation.chat_format, options.bf16, generation.verify_checkpoint,
        generation.template_arguments, Path(generation.adapter) if generation.adapter else None,
    )  # fmt: skip
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    mine = conversations[layout.dp_rank :: layout.dp_size]
    answers = model.answers(mine, options.max_new_tokens, sampling, options.batch_size, options.seed + layout.dp_rank)
    shares: list[Any] = [None] * layout.dp_size
    dist.all_gather_object(shares, answers, group=parallel_state.get_data_parallel_group())
    return [shares[i % layout.dp_size][i // layout.dp_size] for i in range(len(conversations))]


def _write(generation: Generation, lines: list[dict], answers: list[str]) -> None:
    from megatron_ft.files import atomic_file

    if generation.output is None:
        for line, answer in zip(lines, answers, strict=True):
            print(f"{line['messages'][-1]['content']}\n  -> {answer}")
        return
    with atomic_file(generation.output, "w") as file:
        for line, answer in zip(lines, answers, strict=True):
            file.write(json.dumps({**line, "answer": answer}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
