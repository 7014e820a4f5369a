"""Suggestions for an unknown setting: the most similar known name, or our name for a flag of Hugging Face."""

import difflib
from collections.abc import Iterable

# Flag of transformers' TrainingArguments and of its scripts -> (our flag, what is different about it).
HUGGING_FACE = {
    "learning_rate": ("lr", ""),
    "per_device_train_batch_size": ("micro_batch_size", ""),
    "gradient_accumulation_steps": (
        "global_batch_size",
        "samples in one step: micro batch x data parallel x accumulation",
    ),
    "max_steps": ("train_iters", ""),
    "num_train_epochs": ("train_iters", "iterations: samples x epochs / global batch size"),
    "warmup_steps": ("lr_warmup_iters", ""),
    "warmup_ratio": ("lr_warmup_iters", "a number of iterations"),
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


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean X?" for the most similar known name, "" if none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the hint for a name that is not known here. prefix: "--" for flags, nothing for YAML keys."""
    known = list(known)
    ours, remark = HUGGING_FACE.get(name, ("", ""))
    if ours in known:
        return f"; here it is {prefix}{ours}" + (f" ({remark})" if remark else "")
    return nearest(name, known, prefix)
