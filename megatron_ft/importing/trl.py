"""TRL: the arguments of `trl sft` and of scripts that parse SFTConfig, ModelConfig and ScriptArguments, from flags or from YAML."""

from __future__ import annotations

from typing import Any

from megatron_ft.importing import handlers, trainer
from megatron_ft.importing.job import Dataset, Job, is_local, truth
from megatron_ft.importing.schedule import given_steps
from megatron_ft.importing.tables import OFF, Table, read

DEFAULTS = {
    "learning_rate": 2e-5, "weight_decay": 0.0, "lr_scheduler_type": "linear", "num_train_epochs": 3.0, "per_device_train_batch_size": 8,
    "max_length": 1024, "bf16": True, "gradient_checkpointing": True, "packing": False, "seed": 42, "assistant_only_loss": False,
}  # fmt: skip
LORA_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}


def dataset(job: Job, key: str, value: Any) -> None:
    for name in [part.strip() for part in str(value).split(",")]:
        job.datasets.append(Dataset(name, is_local(name)))
    job.take(key, value, "pretokenize --input; the format of the records is recognised")


def mixture(job: Job, key: str, value: Any) -> None:
    """Take a list of datasets: mappings with a path."""
    for one in value if isinstance(value, list) else []:
        if isinstance(one, dict) and one.get("path"):
            job.datasets.append(Dataset(str(one["path"]), is_local(str(one["path"]))))
    job.take(key, "...", "pretokenize --input")


def text_field(job: Job, key: str, value: Any) -> None:
    if value == "text":
        job.ignore(key, value, "the shape of the records is recognised")
    else:
        job.pretokenize["keys"] = [f"text={value}"]
        job.take(key, value, f"pretokenize --keys text={value}")


def assistant_only(job: Job, key: str, value: Any) -> None:
    if truth(key, value):
        job.take(key, value, "the default: only the assistant's tokens are trained on")
        return
    job.before.append(
        f"{job.prefix}{key} is off: TRL then trains on every token of chats (`messages`), here only on the assistant's; for TRL's loss add "
        "--scalar_loss_mask 1. Records of prompt and completion are trained on by their completion in both; as plain texts they get a chat "
        "format here"
    )


def completion_only(job: Job, key: str, value: Any) -> None:
    if truth(key, value):
        job.take(key, value, "the default: only the answer is trained on")
    else:
        job.set(key, value, "scalar_loss_mask", 1)


def use_peft(job: Job, key: str, value: Any) -> None:
    job.adapters = truth(key, value)
    job.take(key, value, "--lora_rank")


def nested(job: Job, key: str, value: Any) -> None:
    if truth(key, value) and job.convert.get("quantize"):
        job.convert["double_quant"] = True
        job.take(key, value, "hf-to-megatron --double_quant")
    else:
        job.ignore(key, value, OFF)


def dtype(job: Job, key: str, value: Any) -> None:
    job.ignore(key, value, "weights are trained from fp32 main weights; --bf16 says what is computed in")


def strategy(job: Job, key: str, value: Any) -> None:
    if value in ("bfd", "bfd_split"):
        job.ignore(key, value, "rows are filled with the samples that fit best")
        job.finetune |= {"over_long": "split"} if value == "bfd_split" else {}
    else:
        job.refuse(key, value, "samples are not cut to fill rows; they are packed whole")


def padding_free(job: Job, key: str, value: Any) -> None:
    job.ignore(key, value, "with --no_packing rows are as long as the longest sample of a microbatch")


def template(job: Job, key: str, value: Any) -> None:
    job.refuse(
        key,
        value,
        "put the template into the tokenizer's folder as chat_template.jinja, which --chat_format tokenizer then uses",
    )


OWN = Table(
    direct={},
    computed={
        "model_name_or_path": handlers.model,
        "use_peft": use_peft,
        "lora_r": handlers.of_adapters("lora_rank", int),
        "lora_alpha": handlers.of_adapters("lora_alpha"),
        "lora_dropout": handlers.of_adapters("lora_dropout"),
        "lora_target_modules": handlers.target_of_adapters,
        "lora_modules_to_save": handlers.modules_to_save,
        "use_rslora": handlers.switch("lora_rs"),
        "load_in_4bit": handlers.nf4(double=False),
        "use_bnb_nested_quant": nested,
        "dataset_name": dataset,
        "datasets": mixture,
        "dataset_text_field": text_field,
        "max_length": handlers.size("seq_length"),
        "max_seq_length": handlers.size("seq_length"),
        "packing": handlers.packing,
        "packing_strategy": strategy,
        "padding_free": padding_free,
        "assistant_only_loss": assistant_only,
        "completion_only_loss": completion_only,
        "attn_implementation": handlers.attention,
        "dtype": dtype,
        "torch_dtype": dtype,
        "chat_template_path": template,
    },
    ignored=(
        ("the dataset is read as files; give those to pretokenize --input", "dataset_test_split "
         "dataset_streaming dataset_num_proc dataset_kwargs dataset_batch_size streaming shuffle_dataset"),
        ("the model is read from its folder; no code of it is run", "trust_remote_code model_revision model_init_kwargs lora_task_type "
         "bnb_4bit_quant_storage ignore_bias_buffers"),
        ("the tokenizer and the chat format say it", "eos_token pad_token pad_to_multiple_of"),
        ("validation rows are packed as the others", "eval_packing"),
        ("TRL reads it before it starts", "env config"),
    ),
    impossible=(
        ("adapters are LoRA's", "use_dora lora_target_parameters"),
        ("a base in 8 bits is not trained on: it stays in 16 bits; 4 bits are --base_precision nf4", "load_in_8bit"),
        ("4 bits are nf4", "bnb_4bit_quant_type"),
        ("the loss is plain cross-entropy", "loss_type"),
        ("nothing is moved to the CPU; use --recompute_granularity full", "activation_offloading"),
        ("models with experts cannot be trained", "router_aux_loss_coef"),
        ("samples are shortened to their beginning", "truncation_mode"),
        ("give the files of this part of the dataset to --input", "dataset_config dataset_train_split"),
        ("a share for validation is pretokenize --val_split", "test_split_size"),
    ),
    off={
        "bnb_4bit_quant_type": ("nf4",),
        "loss_type": ("nll", "chunked_nll"),
        "truncation_mode": ("keep_start",),
        "dataset_train_split": ("train",),
    },
)  # fmt: skip
TABLES = (OWN, trainer.TABLE)


def job_of(values: dict[str, Any], prefix: str) -> Job:
    """Return the job of TRL's arguments by name."""
    missing = dict(DEFAULTS)
    if truth("use_peft", values.get("use_peft")):
        missing |= LORA_DEFAULTS
    if values.get("fp16"):
        del missing["bf16"]
    if steps := given_steps(values):
        missing.pop("num_train_epochs")
    if "dtype" not in values and "max_seq_length" in values:
        missing.pop("max_length")
    absent = {key: value for key, value in missing.items() if key not in values}
    job = Job("TRL", prefix, defaults=frozenset(absent), steps=steps)
    read(job, {**absent, **values}, TABLES)
    if job.adapters and "lora_target_modules" not in values:
        job.before.append(
            "without --lora_target_modules PEFT adapts the modules that it lists for the family (q_proj and v_proj in Llama), the printed "
            "command all linears: choose with --lora_target"
        )
    job.pretokenize["chat_format"] = "tokenizer"
    return job
