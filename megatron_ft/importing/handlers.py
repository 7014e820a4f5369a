"""What is done with keys that several tools have, whatever they call them. Each function takes the job, the key and its value."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_ft.errors import ConfigError, UserError
from megatron_ft.files import read_json
from megatron_ft.importing.job import Job, flag_text, is_off, number, truth, whole
from megatron_ft.importing.tables import OFF, Handler

WITHOUT_ADAPTERS = "without adapters it has no effect there"
SAME_OPTIMIZER = (
    "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw",
)  # fmt: skip
SAVES_MEMORY = (
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw", "adamw_torch_8bit", "adamw_torch_4bit",
    "adamw_anyprecision",
)  # fmt: skip


def output_dir(job: Job, key: str, value: Any) -> None:
    job.set(key, value, "save", str(value))


def micro_batch(job: Job, key: str, value: Any) -> None:
    job.micro_batch = whole(key, value)
    job.set(key, value, "micro_batch_size", job.micro_batch)


def accumulation(job: Job, key: str, value: Any) -> None:
    job.accumulation = whole(key, value)
    job.take(key, value, "--global_batch_size: micro batch x accumulation x data-parallel GPUs")


def optimizer(job: Job, key: str, value: Any) -> None:
    name = str(value).removeprefix("OptimizerNames.").lower()
    if name in SAME_OPTIMIZER:
        job.take(key, value, "AdamW, which is the only optimizer")
    elif name in SAVES_MEMORY:
        job.ignore(
            key,
            value,
            "the method is AdamW, with moments in fp32; --use_distributed_optimizer divides them over the GPUs",
        )
        job.finetune["use_distributed_optimizer"] = True
    else:
        job.refuse(key, value, "AdamW is the only optimizer, and is used; its learning rate may have to differ")


def bf16(job: Job, key: str, value: Any) -> None:
    if truth(key, value):
        job.set(key, value, "bf16", True)
    else:
        job.ignore(key, value, OFF)


def fp16(job: Job, key: str, value: Any) -> None:
    if truth(key, value) and not job.finetune.get("bf16"):
        job.set(key, value, "fp16", True)
    else:
        job.ignore(key, value, OFF)


def checkpointing(job: Job, key: str, value: Any) -> None:
    if str(value).lower() not in ("false", "none", "0", ""):
        job.set(key, value, "recompute_granularity", "full")
    else:
        job.ignore(key, value, OFF)


def report_to(job: Job, key: str, value: Any) -> None:
    names = value if isinstance(value, list) else str(value).replace(",", " ").split()
    for name in map(str, names):
        if name in ("wandb", "all"):
            job.set(key, name, "wandb_logger", True)
        if name in ("tensorboard", "all"):
            job.set(key, name, "tensorboard_dir", f"{job.finetune.get('save', 'runs')}/logs")
        if name == "none":
            job.ignore(key, name, OFF)
        elif name not in ("wandb", "tensorboard", "all"):
            job.refuse(key, name, "logs go to metrics.jsonl, report.html, TensorBoard and Weights & Biases only")


def timeout(job: Job, key: str, value: Any) -> None:
    minutes = number(key, value) / 60
    if minutes > 60 * 24 * 30:
        job.ignore(key, value, "waits for ever there; the limit here is --distributed_timeout_minutes 30")
    else:
        job.set(key, value, "distributed_timeout_minutes", minutes)


def deepspeed(job: Job, key: str, value: Any) -> None:
    """Take the stage of ZeRO from a file that is here, from the value itself, or from the file's name."""
    settings = value if isinstance(value, dict) else _file(str(value))
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else {}
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage is None and (named := re.search(r"z(?:ero)?[_-]?([0-3])", Path(str(value)).name.lower())):
        stage = int(named[1])
    if stage is None:
        job.refuse(
            key,
            value,
            "the file is not here, so its ZeRO stage is not known: stage 1 and 2 are --use_distributed_optimizer",
        )
        return
    if ("offload" in json.dumps(zero) and "none" not in json.dumps(zero)) or "offload" in str(value):
        job.refuse(
            f"{key} (offload)",
            "to the CPU",
            "nothing is moved to the CPU: use more GPUs, --lora_rank or --base_precision nf4",
        )
    if stage == 3:
        shard(job, key, value)
    elif stage:
        job.set(key, value, "use_distributed_optimizer", True)
    else:
        job.ignore(key, value, "ZeRO stage 0 divides nothing")


def shard(job: Job, key: str, value: Any) -> None:
    """Note that the weights are divided over all GPUs there; steps.py chooses the sizes."""
    if is_off(value):
        return
    job.sharded = key
    job.finetune["use_distributed_optimizer"] = True
    job.take(
        key,
        value if not isinstance(value, dict) else "...",
        "weights: --tensor_model_parallel_size; optimizer: --use_distributed_optimizer",
    )


def fsdp_config(job: Job, key: str, value: Any) -> None:
    settings = value if isinstance(value, dict) else _file(str(value))
    if not job.sharded:
        shard(job, key, value)
    else:
        job.ignore(key, value, "how FSDP wraps layers; tensor parallelism divides every matrix")
    if isinstance(settings, dict):
        if any(not is_off(settings.get(name)) for name in ("offload_params", "fsdp_offload_params")):
            job.refuse(
                f"{key} offload_params",
                True,
                "nothing is moved to the CPU: use more GPUs, or --base_precision nf4 with adapters",
            )
        if any(
            not is_off(settings.get(name)) for name in ("activation_checkpointing", "fsdp_activation_checkpointing")
        ):
            job.finetune["recompute_granularity"] = "full"


def resume(job: Job, key: str, value: Any) -> None:
    if is_off(value):
        job.ignore(key, value, OFF)
    elif value is True or str(value).lower() == "true":
        job.set(key, value, "auto_resume", True)
    else:
        job.refuse(
            key,
            value,
            "checkpoints of other trainers hold another optimizer state; continue from its weights, with hf-to-megatron",
        )


def eval_batch(job: Job, key: str, value: Any) -> None:
    job.ignore(key, value, "evaluation has the batch of training")


def _file(name: str) -> Any:
    """Return the content of a JSON file that is here; None without it."""
    try:
        return read_json(name) if Path(name).is_file() else None
    except (UserError, ValueError):
        return None


def lora_target(job: Job, key: str, value: Any) -> None:
    """Take the names of modules with adapters."""
    names = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
    names = [str(one) for name in names for one in str(name).split()]
    if set(names) & {"all", "all-linear", "all_linear"}:
        job.take(key, value, "all linears of the layers, the default of --lora_target")
    elif strange := [name for name in names if not re.fullmatch(r"\w+", name)]:
        job.refuse(
            key,
            value,
            f"{strange[0]} selects by a pattern; --lora_target takes parts or names of modules, in every layer",
        )
    elif {"embed_tokens", "lm_head"} & set(names):
        job.refuse(
            key, value, "embedding and output layer have no adapters; added tokens are trained with --train_new_tokens"
        )
        if kept := [name for name in names if name not in ("embed_tokens", "lm_head")]:
            job.finetune["lora_target"] = kept
    else:
        job.set(key, value, "lora_target", names)


def modules_to_save(job: Job, key: str, value: Any) -> None:
    names = value if isinstance(value, list) else str(value).replace(",", " ").split()
    if set(map(str, names)) <= {"embed_tokens", "lm_head", "wte"}:
        job.set(key, value, "train_new_tokens", True)
        job.before.append(
            f"{job.prefix}{key} trains the whole embedding and output layer there, --train_new_tokens the rows of added tokens only"
        )
    else:
        job.refuse(key, value, "beside adapters only the rows of added tokens are trained (--train_new_tokens)")


def model(job: Job, key: str, value: Any) -> None:
    job.model = str(value)
    job.take(key, value, "hf-to-megatron, then finetune --load")


def attention(job: Job, key: str, value: Any) -> None:
    if "flash" in str(value):
        job.set(key, value, "use_flash_attn", True)
    else:
        job.ignore(key, value, "attention is computed by what the machine has (docs/performance.md)")


def size(flag: str) -> Handler:
    """Return what takes a whole number as a flag."""

    def take(job: Job, key: str, value: Any) -> None:
        if (found := whole(key, value)) < 1:
            raise ConfigError(f"{key}: {found} must be at least 1")
        job.set(key, value, flag, found)

    return take


def switch(flag: str, ours: Any = True) -> Handler:
    """Return what takes a truth as a flag, with this value of ours."""

    def take(job: Job, key: str, value: Any) -> None:
        if truth(key, value):
            job.set(key, value, flag, ours)
        else:
            job.ignore(key, value, OFF)

    return take


def of_adapters(flag: str, kind: type = float) -> Handler:
    """Return what takes a number that counts where adapters are trained."""

    def take(job: Job, key: str, value: Any) -> None:
        if job.adapters:
            job.set(key, value, flag, whole(key, value) if kind is int else number(key, value))
        else:
            job.ignore(key, value, WITHOUT_ADAPTERS)

    return take


def target_of_adapters(job: Job, key: str, value: Any) -> None:
    if job.adapters:
        lora_target(job, key, value)
    else:
        job.ignore(key, value, WITHOUT_ADAPTERS)


def packing(job: Job, key: str, value: Any) -> None:
    if truth(key, value):
        job.finetune.pop("packing", None)
        job.finetune.pop("variable_seq_lengths", None)
        job.take(key, value, "the default; samples in a row do not see each other")
    elif "packing" not in job.finetune:
        job.finetune |= {"packing": False, "variable_seq_lengths": True}
        job.take(key, value, "--no_packing --variable_seq_lengths")
    else:
        job.ignore(key, value, OFF)


def validation(job: Job, key: str, value: Any) -> None:
    share = number(key, value)
    if share < 1:
        job.pretokenize["val_split"] = share
        job.take(key, value, f"pretokenize --val_split {share:g}")
    else:
        job.refuse(key, value, "the validation set is a share of the chats: pretokenize --val_split")


def pretokenized(flag: str, ours: Any) -> Handler:
    """Return what takes a truth as a flag of pretokenize."""

    def take(job: Job, key: str, value: Any) -> None:
        if truth(key, value):
            job.pretokenize[flag] = ours
            job.take(key, value, f"pretokenize {flag_text(flag, ours)}")
        else:
            job.ignore(key, value, OFF)

    return take


def nf4(double: bool) -> Handler:
    """Return what takes 4 bits for the base model. double: the scales are quantised too."""

    def take(job: Job, key: str, value: Any) -> None:
        if not truth(key, value):
            job.ignore(key, value, OFF)
            return
        job.convert |= {"quantize": "nf4", "double_quant": True} if double else {"quantize": "nf4"}
        job.take(key, value, "hf-to-megatron --quantize nf4" + " --double_quant" * double)

    return take
