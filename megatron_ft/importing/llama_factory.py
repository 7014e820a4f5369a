"""LLaMA-Factory: its YAML files, and the flags of `llamafactory-cli train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files import read_json
from megatron_ft.importing import handlers, trainer
from megatron_ft.importing.job import Dataset, Job, is_local, truth, whole
from megatron_ft.importing.schedule import given_steps
from megatron_ft.importing.tables import Table, read

DEFAULTS = {
    "stage": "sft", "finetuning_type": "lora", "learning_rate": 5e-5, "weight_decay": 0.0, "lr_scheduler_type": "linear",
    "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "cutoff_len": 2048, "seed": 42, "disable_gradient_checkpointing": False,
    "packing": False, "template": None,
}  # fmt: skip
OURS = {"chatml": "chatml", "llama2": "llama2", "llama3": "llama3", "vicuna": "vicuna"}
"""Templates that are chat formats here; others are those of the model's own tokenizer."""
WITHOUT = ("default", "alpaca", "empty", "fewshot")
NO_THINKING = ("_nothink", "_no_think")


def stage(job: Job, key: str, value: Any) -> None:
    if value in ("sft", "pt"):
        job.take(key, value, "finetune" if value == "sft" else "finetune; texts are trained on as a whole")
    else:
        job.unfit = "only supervised training is done here (no DPO, KTO, PPO or reward models)"
        job.refuse(key, value, job.unfit)


def kind(job: Job, key: str, value: Any) -> None:
    job.adapters = value == "lora"
    if value in ("lora", "full"):
        job.take(key, value, "--lora_rank" if value == "lora" else "all parameters, the default")
    else:
        job.refuse(key, value, "choose single parameters with --unfrozen_parameters, or adapters with --lora_rank")


def data_names(job: Job, key: str, value: Any) -> None:
    names = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
    job.datasets += [Dataset(str(name), True) for name in names if name]
    job.take(key, value, "pretokenize --input")


def folder(job: Job, key: str, value: Any) -> None:
    """Find the files of the named datasets in dataset_info.json."""
    info = _info(Path(str(value)))
    for one in job.datasets:
        _locate(job, one, info.get(one.name), Path(str(value)))
    job.take(key, value, "pretokenize --input")


def _info(place: Path) -> dict[str, Any]:
    try:
        found = read_json(place / "dataset_info.json") if (place / "dataset_info.json").is_file() else {}
    except (UserError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}


def _locate(job: Job, dataset: Dataset, entry: Any, place: Path) -> None:
    if not isinstance(entry, dict):
        if not is_local(dataset.name):
            dataset.local = False
            return
        dataset.name = f"{place}/{dataset.name}.json"
        job.before.append(f"{dataset.name} is a guess: dataset_info.json, which names the file, is not in {place}")
        return
    if "file_name" in entry:
        dataset.name = str(place / str(entry["file_name"]))
    elif name := entry.get("hf_hub_url") or entry.get("ms_hub_url"):
        dataset.name, dataset.local = str(name), False
    if entry.get("ranking"):
        job.refuse(f"dataset {dataset.name}", "ranking", "preferences are not trained on; leave this dataset out")
    _columns(dataset, entry)


def _columns(dataset: Dataset, entry: dict[str, Any]) -> None:
    """Say what the keys of the records mean, where they are not the usual ones."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if entry.get("formatting") == "sharegpt":
        wanted = {"messages": columns.get("messages", "conversations"), "role": tags.get("role_tag", "from")}
        wanted |= {"content": tags.get("content_tag", "value")}
        wanted |= {name: columns[name] for name in ("system", "tools") if name in columns}
    else:
        ours = {"prompt": "question", "query": "input", "response": "answer", "system": "system", "history": "history"}
        wanted = {ours[name]: column for name, column in columns.items() if name in ours}
    if columns or tags:
        dataset.pretokenize["keys"] = [f"{meaning}={column}" for meaning, column in wanted.items()]


def template(job: Job, key: str, value: Any) -> None:
    name = str(value)
    if name in WITHOUT:
        job.refuse(key, value, "no chat format here writes this; chatml is used, another is --chat_format")
        job.pretokenize["chat_format"] = job.convert["chat_format"] = "chatml"
        return
    ours = OURS.get(name, "tokenizer")
    job.pretokenize["chat_format"] = ours
    if ours != "tokenizer":
        job.convert["chat_format"] = ours
    if name.endswith(NO_THINKING):
        job.before.append(
            f"{key} {name} never thinks; if the tokenizer's template does, add --template_arguments enable_thinking=false"
        )
    meaning = "the tokenizer's own template" if ours == "tokenizer" else ours
    job.take(key, value, f"pretokenize --chat_format {ours} ({meaning}; megatron-ft inspect shows the text)")


def samples(job: Job, key: str, value: Any) -> None:
    job.pretokenize["max_count"] = whole(key, value)
    job.take(key, value, f"pretokenize --max_count {whole(key, value)}, of each dataset")


def thinking(job: Job, key: str, value: Any) -> None:
    if not truth(key, value):
        job.pretokenize["template_arguments"] = ["enable_thinking=false"]
        job.take(key, value, "pretokenize --template_arguments enable_thinking=false")
    else:
        job.ignore(key, value, "it is the template's default")


def bits(job: Job, key: str, value: Any) -> None:
    if whole(key, value) == 4:
        job.convert |= {"quantize": "nf4", "double_quant": True}
        job.take(key, value, "hf-to-megatron --quantize nf4 --double_quant")
    else:
        job.refuse(key, value, "a base model is trained on in 16 or in 4 bits (nf4); it stays in 16 bits")


def double(job: Job, key: str, value: Any) -> None:
    if not truth(key, value):
        job.convert.pop("double_quant", None)
    job.ignore(key, value, "it is a detail of quantization_bit")


def no_checkpointing(job: Job, key: str, value: Any) -> None:
    if truth(key, value):
        job.take(key, value, "nothing is recomputed, the default")
    else:
        job.set(key, value, "recompute_granularity", "full")


def pure(job: Job, key: str, value: Any) -> None:
    if truth(key, value):
        job.finetune["bf16"] = True
        job.take(key, value, "--bf16, with main weights in fp32 (more memory, the same method)")


def scaling(job: Job, key: str, value: Any) -> None:
    job.refuse(
        key, value, "its factor follows from cutoff_len there; give --rope_scaling_type and --rope_scaling_factor"
    )


OWN = Table(
    direct={"recompute_granularity": "recompute_granularity", "recompute_method": "recompute_method"},
    computed={
        "stage": stage,
        "finetuning_type": kind,
        "model_name_or_path": handlers.model,
        "adapter_name_or_path": lambda job, key, value: job.set(key, value, "adapter", str(value)),
        "quantization_bit": bits,
        "double_quantization": double,
        "dataset": data_names,
        "dataset_dir": folder,
        "template": template,
        "enable_thinking": thinking,
        "cutoff_len": handlers.size("seq_length"),
        "neat_packing": handlers.packing,
        "packing": handlers.packing,
        "train_on_prompt": handlers.switch("scalar_loss_mask", 1),
        "mask_history": handlers.switch("last_turn_only"),
        "max_samples": samples,
        "val_size": handlers.validation,
        "lora_rank": handlers.of_adapters("lora_rank", int),
        "lora_alpha": handlers.of_adapters("lora_alpha"),
        "lora_dropout": handlers.of_adapters("lora_dropout"),
        "lora_target": handlers.target_of_adapters,
        "use_rslora": handlers.switch("lora_rs"),
        "additional_target": handlers.modules_to_save,
        "flash_attn": lambda job, key, value: handlers.attention(job, key, "flash" if value == "fa2" else value),
        "disable_gradient_checkpointing": no_checkpointing,
        "pure_bf16": pure,
        "rope_scaling": scaling,
        "tensor_model_parallel_size": handlers.size("tensor_model_parallel_size"),
        "pipeline_model_parallel_size": handlers.size("pipeline_model_parallel_size"),
        "context_parallel_size": handlers.size("context_parallel_size"),
        "virtual_pipeline_model_parallel_size": handlers.size("virtual_pipeline_model_parallel_size"),
        "recompute_num_layers": handlers.size("recompute_num_layers"),
        "sequence_parallel": handlers.switch("sequence_parallel"),
        "use_distributed_optimizer": handlers.switch("use_distributed_optimizer"),
        "overlap_param_gather": handlers.switch("overlap_param_gather"),
        "overlap_grad_reduce": handlers.switch("overlap_grad_reduce"),
        "use_packed_sequences": handlers.packing,
    },
    ignored=(
        ("the model is read from its folder; no code of it is run", "trust_remote_code cache_dir model_revision use_fast_tokenizer "
         "low_cpu_mem_usage hf_hub_token ms_hub_token om_hub_token adapter_folder print_param_status model_max_length "
         "init_special_tokens device_map compute_dtype"),
        ("chats are tokenized once, by pretokenize", "preprocessing_num_workers preprocessing_batch_size overwrite_cache tokenized_path "
         "streaming "
         "buffer_size data_shared_file_system ignore_pad_token_for_loss media_dir tool_format split_special_tokens disable_shuffling "
         "create_new_adapter block_diag_attn mix_strategy interleave_probs"),
        ("kernels are chosen by the machine and tested (docs/performance.md)", "enable_liger_kernel use_unsloth use_unsloth_gc "
         "use_reentrant_gc "
         "use_v1_kernels use_kv_cache bias_activation_fusion apply_rope_fusion masked_softmax_fusion cross_entropy_loss_fusion"),
        ("it is for generation or export; use megatron-ft generate, chat and megatron-to-hf", "predict_with_generate do_sample "
         "temperature top_p top_k "
         "num_beams eval_num_beams max_new_tokens repetition_penalty length_penalty skip_special_tokens infer_backend infer_dtype "
         "offload_folder "
         "export_hf_on_finish default_system max_length"),
        ("report.html has the curves", "plot_loss compute_accuracy include_effective_tokens_per_second include_num_input_tokens_seen"),
        ("the loss is the mean over supervised tokens, and training is megatron-core's", "calculate_per_token_loss use_mca "
         "use_megatron_bridge "
         "mixed_precision"),
        ("the model is text only here", "freeze_vision_tower freeze_multi_modal_projector freeze_language_model image_max_pixels "
         "image_min_pixels "
         "image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video "
         "audio_sampling_rate"),
        ("Ray is not used; the launcher is finetune --nproc_per_node", "ray_num_workers ray_init_kwargs ray_run_name ray_storage_path "
         "resources_per_worker placement_strategy master_addr master_port"),
        ("quantisation is bitsandbytes' NF4", "quantization_type quantization_device_map quantization_method"),
        ("the template of the tokenizer decides", "preserve_thinking"),
    ),
    impossible=(
        ("adapters are LoRA's, and start from zero", "use_dora pissa_init pissa_convert loraplus_lr_ratio oft_rank oft_target "
         "module_dropout"),
        ("AdamW is the only optimizer", "use_galore use_apollo use_badam use_adam_mini use_muon"),
        ("the loss is plain cross-entropy", "use_dft_loss use_asft_loss use_eaft_loss moe_aux_loss_coef"),
        ("layers are not added or skipped", "use_llama_pro mixture_of_depths shift_attn"),
        ("tokens are added with --vocab_extra_ids_list of hf-to-megatron and pretokenize", "add_tokens add_special_tokens "
         "new_special_tokens_config "
         "resize_vocab"),
        ("norms and output layer are computed as the kernels do", "upcast_layernorm upcast_lmhead_output"),
        ("training starts from a converted model", "train_from_scratch megatron_pretrained_checkpoint extra_config use_hyper_parallel"),
        ("stop with --exit_interval, and compare the kept checkpoints", "early_stopping_steps"),
        ("another set of chats for validation: make shards of it with pretokenize --val_split 0, and give them to --valid_data_path",
         "eval_dataset eval_on_each_dataset"),
        ("fp8 is not supported; use --bf16", "fp8 fp8_enable_fsdp_float8_all_gather"),
        ("choose parameters with --unfrozen_parameters", "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules"),
        ("models with experts cannot be trained", "expert_model_parallel_size moe_grouped_gemm moe_token_dispatcher_type"),
        ("give --pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split"),
        ("preferences are not trained on", "ref_model reward_model ld_alpha simpo_gamma"),
        ("no profiler is built in; start the command under nsys or torch's", "enable_torch_profiler"),
    ),
    off={"expert_model_parallel_size": (1,), "freeze_trainable_layers": (2,), "freeze_trainable_modules": ("all",)},
    beginnings=(
        ("logs go to metrics.jsonl, report.html, TensorBoard and Weights & Biases only", "swanlab_ use_swanlab"),
        ("preferences are not trained on", "pref_ dpo_ kto_ ppo_ ref_model_ reward_model_"),
        ("AdamW is the only optimizer", "galore_ apollo_ badam_"),
        ("adapters are LoRA's, and start from zero", "pissa_ loraplus_ oft_"),
        ("the loss is plain cross-entropy", "asft_ eaft_"),
        ("it is for generation or export; use megatron-ft generate and megatron-to-hf", "vllm_ sglang_ export_"),
        ("no profiler is built in; start the command under nsys or torch's", "profiler_ profile_"),
        ("fp8 is not supported; use --bf16", "fp8_"),
        ("nothing is computed on the CPU beside the GPUs", "kt_ use_kt hyper_parallel_ megatron_bridge_args"),
    ),
)  # fmt: skip
TABLES = (OWN, trainer.TABLE)


def job_of(values: dict[str, Any], prefix: str) -> Job:
    """Return the job of LLaMA-Factory's arguments by name."""
    missing = dict(DEFAULTS)
    if values.get("finetuning_type", "lora") == "lora":
        rank = whole("lora_rank", values.get("lora_rank") or 8)
        missing |= {"lora_rank": rank, "lora_alpha": rank * 2, "lora_target": "all"}
    if steps := given_steps(values):
        del missing["num_train_epochs"]
    if values.get("dataset"):
        missing["dataset_dir"] = "data"
    if values.get("lora_alpha") is None:
        values = {key: value for key, value in values.items() if key != "lora_alpha"}
    absent = {key: value for key, value in missing.items() if key not in values}
    job = Job("LLaMA-Factory", prefix, defaults=frozenset(absent), steps=steps)
    read(job, {**absent, **values}, TABLES)
    if not values.get("template"):
        job.pretokenize["chat_format"] = "tokenizer"
    if not values.get("bf16") and not values.get("fp16") and not values.get("pure_bf16"):
        job.before.append("the file computes in fp32; on GPUs add --bf16")
    return job
