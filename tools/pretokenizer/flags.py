"""The command line of the pretokenizer. A flag that is None says nothing, and the configuration stands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class Pretokenize:
    """What to tokenize

    Every other key of the YAML sections is a flag too.
    """

    configs: list[str] = field(default_factory=list)
    """Sections of the YAML files to apply, in order, after `defaults`."""
    config_dir: Path | None = None
    """Folder whose YAML files hold the sections; without it, the packaged tools/pretokenizer/configs."""
    input: list[str] = field(default_factory=list)
    """Chat files, without any YAML: their shape is recognised."""
    tokenizer: str | None = None
    """A tokenizer.model, a tokenizer.json, or a folder with one of them (vocab_file in YAML)."""
    chat_format: str | None = None
    """How a chat becomes text; chatml unless YAML says otherwise."""
    output_prefix: str | None = None
    """With --input: shards become OUTPUT_PREFIX-train-text.bin and so on."""
    output_dir: str | None = None
    """Folder of the shards, over what YAML says; output_dir_suffix is added to it."""
    val_split: float | None = None
    """Share of each dataset that validates, over what YAML says; 0 for none (with --input: 0.1)."""
    min_assistant_tokens: int | None = None
    """Skip chats whose assistant turns have fewer tokens together."""
    min_tokens: int | None = None
    """Skip samples with fewer tokens."""
    max_tokens: int | None = None
    """Skip samples with more tokens."""
    role_order: Literal["keep", "repair", "reject"] | None = None
    """What to do where roles do not follow system, user, assistant, user, ...: keep the chat as it is unless said."""
    duplicates: Literal["keep", "exact", "near"] | None = None
    """Keep the first of samples that say the same, or nearly the same; all are kept unless said."""
    on_bad_record: Literal["fail", "skip"] | None = None
    """What to do about a line that cannot be read: stop (unless said), or skip and count it."""
    workers: int | None = None
    """Processes that tokenize; as many as there are cores unless said. The result does not depend on it."""
    max_count: int | None = None
    """At most this many samples in train and in val, for a trial run."""
    write_json: bool = False
    """Write PREFIX-SPLIT.jsonl too, the chats as the model sees them."""
    compress: bool = False
    """Compress that file (.jsonl.gz)."""
    overwrite: bool = False
    """Replace finished shards that are there already."""
