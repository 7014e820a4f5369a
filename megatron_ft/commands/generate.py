"""megatron-ft generate: answer prompts with a checkpoint in any layout or an exported model."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_ft.commands.in_layout import LAYOUT_FLAGS, Asked, GenerationLayout, in_layout
from megatron_ft.commands.sparse_options import SparseOptions, check_sparse_options, wait_asleep
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError
from megatron_ft.generation.prompts import read_prompt_file, with_messages

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout
    from megatron_ft.generation.loading import ChatModel
    from megatron_ft.generation.throughput import Throughput


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
    output: str | None = field(default=None, metadata={"writes": "file"})
    """file for the answers, one JSON object per prompt with the key "answer", of several answers "answers"; default: print them"""
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
    repetition_penalty: float = 1.0
    """divide the logits of tokens that the conversation contains by this, as transformers does; 1: no penalty"""
    stop: list[str] = field(default_factory=list)
    """strings that an answer ends before, besides the stop token of the chat format"""
    num_return_sequences: int = 1
    """number of answers to each prompt; more than one needs a --temperature above 0"""
    seed: int = 0
    """seed of the sampling"""
    batch_size: int = 32
    """number of prompts that are answered at once"""
    bf16: bool | None = None
    """compute in bfloat16, --no_bf16: in fp32; default: bfloat16 for an exported model in bfloat16, else fp32"""


COMMAND = Command(
    name="generate",
    summary="answer prompts with a checkpoint or an exported model",
    sections=(Generation, SamplingOptions, GenerationLayout, Processes, SparseOptions),
    examples=(
        'megatron-ft generate --load runs/demo/tuned --prompt "what colour is a plum ?"',
        "megatron-ft generate --nproc_per_node 4 --load runs/model --prompts questions.jsonl --output answers.jsonl "
        "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2",
    ),
    common=(
        "load: folder of a checkpoint or of an export",
        "adapter",
        "prompt: prompts to answer",
        "prompts",
        "output",
        "chat_format",
        "max_new_tokens",
        "temperature",
        "top_k: only from this many tokens; 0: all",
        "top_p: only from the most likely, to this sum",
        "repetition_penalty",
        "stop: strings that an answer ends before",
        "num_return_sequences",
        "seed",
        "batch_size: prompts answered at once",
        "bf16",
        *LAYOUT_FLAGS,
        "sparse: leave out what is zero",
    ),
)


def run(
    generation: Generation, options: SamplingOptions, parallel: GenerationLayout, processes: Processes,
    sparse: SparseOptions | None = None,
) -> int:  # fmt: skip
    """Answer the prompts. Raise UserError for a missing checkpoint, malformed prompts or a layout that does not fit."""
    sparse = sparse or SparseOptions()
    if sparse.sparse:
        wait_asleep()
    lines = read_prompts(generation)
    check_sampling(options)
    if options.batch_size < 1:
        raise ConfigError("--batch_size must be at least 1")
    check_number(options)
    from megatron_ft.checkpoints.folder import check_folder

    for given in filter(None, (generation.load, generation.adapter)):
        check_folder(Path(given))
    asked = [_asked(generation, options, lines)]
    check_sparse_options(sparse, asked, options.bf16, parallel, processes)

    def work(layout: Layout) -> None:
        answers, throughput = _answer(generation, options, layout, [line["messages"] for line in lines], sparse)
        if layout.is_main:
            _write(generation, lines, answers)
            print(throughput, file=sys.stderr)

    return in_layout(work, asked, parallel, processes)


def _asked(generation: Generation, options: SamplingOptions, lines: list[dict]) -> Asked:
    """Return the model and its largest batch. Tokens of prompts are not counted yet: of two characters each, few texts have more."""
    longest = max(sum(len(str(message.get("content"))) for message in line["messages"]) for line in lines)
    rows = min(options.batch_size, len(lines) * options.num_return_sequences)
    return Asked(generation.load, generation.adapter, options.bf16, rows, longest // 2 + options.max_new_tokens)


def read_prompts(generation: Generation) -> list[dict]:
    """Return every prompt as an object with the key "messages". Raise DataError with file and line."""
    if bool(generation.prompt) == bool(generation.prompts):
        raise ConfigError('give either --prompt "text" or --prompts FILE.jsonl')
    if generation.prompt:
        return [with_messages({"prompt": text}, "--prompt") for text in generation.prompt]
    assert generation.prompts is not None
    return read_prompt_file(Path(generation.prompts))


class _Sampling(Protocol):
    """A section with the fields of SamplingOptions."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop: list[str]


def check_sampling(options: _Sampling) -> None:
    """Raise ConfigError for values out of range."""
    if options.max_new_tokens < 1:
        raise ConfigError("--max_new_tokens must be at least 1")
    if options.temperature < 0 or options.top_k < 0 or not 0 < options.top_p <= 1:
        raise ConfigError("--temperature and --top_k must not be negative, --top_p must be above 0 and at most 1")
    if options.repetition_penalty <= 0:
        raise ConfigError("--repetition_penalty must be above 0; 1 is no penalty")
    if "" in options.stop:
        raise ConfigError("--stop has an empty string: every answer would end at once")


def check_number(options: SamplingOptions) -> None:
    """Raise ConfigError for a number of answers that makes no sense."""
    if options.num_return_sequences < 1:
        raise ConfigError("--num_return_sequences must be at least 1")
    if options.num_return_sequences > 1 and options.temperature == 0:
        raise ConfigError("--num_return_sequences above 1 needs --temperature above 0: greedy answers are all the same")


def _answer(
    generation: Generation, options: SamplingOptions, layout: Layout, conversations: list, sparse: SparseOptions
) -> tuple[list[list[str]], Throughput]:
    """Return the answers to each conversation, on every rank, and the speed. Data-parallel ranks take every dp_size-th prompt."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_ft.generation.sampling import Sampling
    from megatron_ft.generation.throughput import together

    model = _open(generation, options, layout, sparse)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty)
    count = options.num_return_sequences
    mine = [one for one in conversations[layout.dp_rank :: layout.dp_size] for _ in range(count)]
    answers = model.answers(
        mine, options.max_new_tokens, sampling, 1 if sparse.sparse else options.batch_size,
        options.seed + layout.dp_rank, options.stop,
    )  # fmt: skip
    shares: list[Any] = [None] * layout.dp_size
    dist.all_gather_object(shares, (answers, model.decoder.throughput), group=parallel_state.get_data_parallel_group())
    places = [(i % layout.dp_size, i // layout.dp_size * count) for i in range(len(conversations))]
    return [shares[rank][0][at : at + count] for rank, at in places], together([share[1] for share in shares])


def _open(generation: Generation, options: SamplingOptions, layout: Layout, sparse: SparseOptions) -> ChatModel:
    """Load the model; one with sparse activations answers one prompt at a time, so that a token reads only the rows of its own."""
    from megatron_ft.generation.loading import open_chat_model
    from megatron_ft.generation.sparse_loading import described, open_sparse, predictors_of

    folder = Path(generation.load)
    if sparse.sparse:
        predictors = predictors_of(sparse.predictors, sparse.sparse, described(folder).arch)
        return open_sparse(
            folder, layout, sparse.sparse_weights, sparse.sparse, predictors, generation.chat_format,
            generation.verify_checkpoint, generation.template_arguments,
        )[0]  # fmt: skip
    return open_chat_model(
        folder, layout, generation.chat_format, options.bf16, generation.verify_checkpoint,
        generation.template_arguments, Path(generation.adapter) if generation.adapter else None,
    )  # fmt: skip


def _write(generation: Generation, lines: list[dict], answers: list[list[str]]) -> None:
    from megatron_ft.files import atomic_file

    if generation.output is None:
        for line, given in zip(lines, answers, strict=True):
            print("\n  -> ".join([line["messages"][-1]["content"], *given]))
        return
    with atomic_file(generation.output, "w") as file:
        for line, given in zip(lines, answers, strict=True):
            several = {"answers": given} if len(given) > 1 else {}
            file.write(json.dumps({**line, "answer": given[0], **several}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
