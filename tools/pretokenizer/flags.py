"""The command line of the pretokenizer. A flag that is None leaves the value of the configuration unchanged."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class Pretokenize:
    """Input, output and selection

    Every other key of the YAML sections is a flag too.
    """

    configs: list[str] = field(default_factory=list)
    """Sections of the YAML configuration files to apply after the section `defaults`, in this order."""
    config_dir: Path | None = None
    """Folder of the YAML configuration files; default: the packaged tools/pretokenizer/configs."""
    input: list[str] = field(default_factory=list)
    """Chat files to tokenize without a YAML configuration; their format is recognised."""
    keys: list[str] = field(default_factory=list)
    """With --input: what the keys of the files mean, as MEANING=KEY: question=prompt answer=completion system=..., or messages=..., or
    text=...; default: recognised."""
    tokenizer: str | None = None
    """Tokenizer: a tokenizer.model, a tokenizer.json, or a folder with one of them (vocab_file in YAML)."""
    chat_format: str | None = None
    """Chat format that converts chats to text; default: the YAML configuration's, else chatml."""
    template_date: str | None = None
    """Date that the tokenizer's own chat template takes for today, such as 2024-07-26; default: a template that asks is refused."""
    template_arguments: list[str] = field(default_factory=list)
    """Variables for the tokenizer's own chat template, such as enable_thinking=false; values are read as JSON, else as text."""
    rewritten_turns: Literal["samples", "one"] | None = None
    """If the tokenizer's own chat template writes earlier answers differently once later turns follow (Qwen3's drops reasoning): a sample
    for each form that inference will see (samples, the default), or one sample per chat (one)."""
    output_prefix: str | None = None
    """With --input: prefix of the shards, which are named OUTPUT_PREFIX-train-text.bin and so on."""
    output_dir: str | None = None
    """Folder of the shards, to which output_dir_suffix is added; default: the YAML configuration's."""
    val_split: float | None = None
    """Share of each dataset for validation, 0: none; default: the YAML configuration's, with --input 0.1."""
    min_assistant_tokens: int | None = None
    """Skip chats whose assistant turns have fewer tokens in total; default: no limit."""
    min_tokens: int | None = None
    """Skip samples with fewer tokens; default: no limit."""
    max_tokens: int | None = None
    """Skip samples with more tokens; default: no limit."""
    role_order: Literal["keep", "repair", "reject"] | None = None
    """Chats whose roles are not in the order system, user, assistant, user, ... are kept (default), repaired or rejected."""
    duplicates: Literal["keep", "exact", "near"] | None = None
    """Of samples with the same text (exact) or nearly the same text (near), keep only the first; default: keep all."""
    on_bad_record: Literal["fail", "skip"] | None = None
    """A record that cannot be read stops the run (fail, the default) or is skipped and counted (skip)."""
    workers: int | None = None
    """Number of tokenizing processes; default: one per CPU core for large inputs, else one. The result does not depend on it."""
    max_count: int | None = None
    """Largest number of samples in each of the train and val splits, for a trial run; default: all."""
    write_json: bool = False
    """Also write PREFIX-SPLIT.jsonl with the chats as text in the chat format."""
    compress: bool = False
    """Write the text of --write_json compressed, as PREFIX-SPLIT.jsonl.gz."""
    write_prompts: int | None = None
    """Also write the first questions of at most this many validation chats, with their answers, to PREFIX-val-prompts.jsonl, for generate
    --prompts and finetune --sample_prompts; default: no such file."""
    overwrite: bool = False
    """Replace finished shards of the same name."""
