"""Suggestions for unknown settings: the most similar known name, or our name for a flag of another tool."""

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from megatron_ft.config.megatron_flags import SAME, is_known

# Flag of transformers' TrainingArguments and of its scripts -> (our flag, what is different about it).
HUGGING_FACE = {
    "learning_rate": ("lr", ""),
    "per_device_train_batch_size": ("micro_batch_size", ""),
    "gradient_accumulation_steps": (
        "global_batch_size",
        "samples in one step: micro batch x data parallel x accumulation",
    ),
    "max_steps": ("train_iters", ""),
    "num_train_epochs": ("epochs", ""),
    "num_epochs": ("epochs", ""),
    "warmup_steps": ("lr_warmup_iters", ""),
    "warmup_ratio": ("lr_warmup_fraction", ""),
    "lr_scheduler_type": ("lr_decay_style", ""),
    "model_name_or_path": ("load", "a checkpoint made by megatron-ft hf-to-megatron"),
    "resume_from_checkpoint": ("load", ""),
    "output_dir": ("save", ""),
    "train_file": ("data_path", "the prefix of shards made by megatron-ft pretokenize"),
    "dataset_name": ("data_path", "the prefix of shards made by megatron-ft pretokenize"),
    "tokenizer_name": ("vocab_file", ""),
    "logging_steps": ("log_interval", ""),
    "logging_dir": ("tensorboard_dir", ""),
    "save_steps": ("save_interval", ""),
    "eval_steps": ("eval_interval", ""),
    "max_seq_length": ("seq_length", ""),
    "max_length": ("seq_length", ""),
    "max_grad_norm": ("clip_grad", ""),
    "gradient_checkpointing": ("recompute_granularity", "selective or full"),
    "adam_epsilon": ("adam_eps", ""),
    "lora_r": ("lora_rank", ""),
    "lora_target_modules": ("lora_target", ""),
    "use_rslora": ("lora_rs", ""),
    "adapter_name_or_path": ("adapter", ""),
    "report_to": ("wandb_logger", "or --tensorboard_dir FOLDER"),
}


def meant(name: str, known: Iterable[str], beginnings: bool = True) -> str | None:
    """Return the known name that is meant: the same letters and digits, in any case, else the only one that begins so. None: none is.

    beginnings: whether at least three letters of a name stand for it.
    """
    by_letters = {_letters(one): one for one in known}
    if (letters := _letters(name)) in by_letters:
        return by_letters[letters]
    found = [one for key, one in by_letters.items() if key.startswith(letters)]
    return found[0] if beginnings and len(letters) >= 3 and len(found) == 1 else None


def alternatives(name: str, known: Iterable[str]) -> str:
    """Return "; which of X, Y?" for the known names that contain these letters, else as nearest()."""
    known, letters = list(known), _letters(name)
    found = [one for one in known if letters in _letters(one)] if len(letters) >= 2 else []
    if len(found) == 1:
        return f"; did you mean {found[0]}?"
    return f"; which of {', '.join(found)}?" if 1 < len(found) < len(known) else nearest(name.lower(), known)


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def nearest(name: str, known: Iterable[str], prefix: str = "", similarity: float = 0.6) -> str:
    """Return "; did you mean X?" for the most similar known name, "" if none is similar. similarity: the least, from 0 to 1."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=similarity)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the hint for a name that is not known here. prefix: "--" for flags, nothing for YAML keys.

    A flag of Megatron's training is not a misspelling, so there is no guess for it in other commands.
    """
    known = list(known)
    ours, remark = HUGGING_FACE.get(name, ("", ""))
    ours = ours if ours in known else SAME.get(name, "")
    if ours in known:
        return f"; here it is {prefix}{ours}" + (f" ({remark})" if remark else "")
    return "" if is_known(name) else nearest(name, known, prefix, similarity=0.7)


class Wrong(NamedTuple):
    """A name that is not taken. hint: as suggestion() returns it. refused: why, for a flag of Megatron."""

    name: str
    hint: str = ""
    refused: str = ""


def refused_names(what: str, wrong: list[Wrong]) -> str:
    """Return one message about all names that are not taken. what: "flag" or "key"."""
    if len(wrong) == 1 and wrong[0].refused:
        return f"{wrong[0].name} is refused: {wrong[0].refused}"
    if len(wrong) == 1:
        return f"unknown {what} {wrong[0].name}{wrong[0].hint}"
    listed = []
    for one in wrong:
        remark = f"refused: {one.refused}" if one.refused else one.hint.removeprefix("; ") or "unknown"
        listed.append(f"{one.name} ({remark})")
    return f"{len(wrong)} {what}s are not taken: {', '.join(listed)}"
