"""axolotl: its YAML files."""

from __future__ import annotations

from typing import Any

from megatron_ft.importing import axolotl_data, handlers, schedule, trainer
from megatron_ft.importing.job import Job, is_off, number, truth
from megatron_ft.importing.tables import OFF, Table, read

DEFAULTS = {
    "sequence_len": 512, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1.0, "lr_scheduler": "cosine",
    "weight_decay": 0.0, "seed": 42, "bf16": "auto", "sample_packing": False,
}  # fmt: skip
WARMUP = 0.03
"""Share of all steps, at most 100, where neither warmup_steps nor warmup_ratio is given."""


def padding(job: Job, key: str, value: Any) -> None:
    if job.finetune.get("packing") is False and truth(key, value):
        job.finetune.pop("variable_seq_lengths", None)
        job.take(key, value, "--no_packing: rows of --seq_length")
    else:
        job.ignore(key, value, "packed rows are full; others are padded to the longest of a microbatch")


def adapter(job: Job, key: str, value: Any) -> None:
    if value in ("lora", "qlora"):
        job.adapters = True
        job.take(key, value, "--lora_rank")
    else:
        job.refuse(key, value, "adapters are LoRA's")


def target(job: Job, key: str, value: Any) -> None:
    if not job.adapters:
        job.ignore(key, value, "without `adapter` it has no effect there")
    elif not job.finetune.pop("all_linear", None):
        handlers.lora_target(job, key, value)
    else:
        job.ignore(key, value, "lora_target_linear selects all linears")


def all_linear(job: Job, key: str, value: Any) -> None:
    if job.adapters and truth(key, value):
        job.finetune["all_linear"] = True
        job.take(key, value, "all linears of the layers, the default of --lora_target")
    else:
        job.ignore(key, value, OFF)


def lowest_rate(job: Job, key: str, value: Any) -> None:
    rate = job.finetune.get("lr")
    if rate is None:
        job.refuse(key, value, "it is a share of learning_rate, which is not given; give --min_lr")
    else:
        job.set(key, value, "min_lr", number(key, value) * float(rate))


def unfrozen(job: Job, key: str, value: Any) -> None:
    job.refuse(
        key,
        value,
        "names are those of the checkpoint here: --unfrozen_parameters with their patterns (megatron-ft flags)",
    )


def overrides(job: Job, key: str, value: Any) -> None:
    job.refuse(
        key,
        value,
        "the model is converted as it is; a longer context is --rope_scaling_type with --rope_scaling_factor",
    )


def over_long(job: Job, key: str, value: Any) -> None:
    name = {"truncate": "cut", "drop": "drop"}.get(str(value))
    if name:
        job.set(key, value, "over_long", name)
    else:
        job.refuse(key, value, "a sample that is too long is cut, dropped or split (--over_long)")


def special_tokens(job: Job, key: str, value: Any) -> None:
    given = {name: one for name, one in value.items() if not is_off(one)} if isinstance(value, dict) else {}
    if set(given) - {"pad_token"}:
        job.refuse(
            key,
            value,
            "special tokens are the tokenizer's and the chat format's; others are added with --vocab_extra_ids_list",
        )
    else:
        job.ignore(key, value, "padding is known from lengths, not from a token")


def added_tokens(job: Job, key: str, value: Any) -> None:
    names = ",".join(map(str, value if isinstance(value, list) else [value]))
    job.convert["vocab_extra_ids_list"] = job.pretokenize["vocab_extra_ids_list"] = names
    job.take(key, value, "--vocab_extra_ids_list of hf-to-megatron and pretokenize")


def wandb(job: Job, key: str, value: Any) -> None:
    flag = {
        "wandb_project": "wandb_project",
        "wandb_entity": "wandb_entity",
        "wandb_name": "wandb_name",
        "wandb_run_id": "wandb_id",
    }[key]
    job.finetune["wandb_logger"] = True
    job.set(key, value, flag, str(value))


def tensorboard(job: Job, key: str, value: Any) -> None:
    if truth(key, value):
        job.set(key, value, "tensorboard_dir", f"{job.finetune.get('save', 'runs')}/logs")


def flash(job: Job, key: str, value: Any) -> None:
    handlers.attention(job, key, "flash" if truth(key, value) else value)


def fp16_names(job: Job, key: str, value: Any) -> None:
    (handlers.bf16 if key == "bfloat16" else handlers.fp16)(job, key, value)


def other_training(job: Job, key: str, value: Any) -> None:
    if is_off(value):
        job.ignore(key, value, OFF)
        return
    job.unfit = "only supervised training is done here (no DPO, KTO, ORPO, GRPO or reward models)"
    job.refuse(key, value, job.unfit)


def plugins(job: Job, key: str, value: Any) -> None:
    for name in map(str, value if isinstance(value, list) else [value]):
        if "liger" in name.lower() or "cut_cross" in name.lower():
            job.ignore(
                key, name.rpartition(".")[2], "kernels are chosen by the machine and tested (docs/performance.md)"
            )
        else:
            job.refuse(
                key, name.rpartition(".")[2], "axolotl's plugins are not read; leave it out, or see what it changes"
            )


OWN = Table(
    direct={},
    computed={
        "base_model": handlers.model,
        "rl": other_training,
        "reward_model": other_training,
        "process_reward_model": other_training,
        "adapter": adapter,
        "output_dir": handlers.output_dir,
        "lora_r": handlers.of_adapters("lora_rank", int),
        "lora_alpha": handlers.of_adapters("lora_alpha"),
        "lora_dropout": handlers.of_adapters("lora_dropout"),
        "lora_target_linear": all_linear,
        "lora_target_modules": target,
        "lora_modules_to_save": handlers.modules_to_save,
        "peft_use_rslora": handlers.switch("lora_rs"),
        "lora_model_dir": lambda job, key, value: job.set(key, value, "adapter", str(value)),
        "load_in_4bit": handlers.nf4(double=True),
        "datasets": axolotl_data.datasets,
        "pretraining_dataset": axolotl_data.pretraining,
        "chat_template": axolotl_data.template,
        "dataset_exact_deduplication": handlers.pretokenized("duplicates", "exact"),
        "val_set_size": handlers.validation,
        "sequence_len": handlers.size("seq_length"),
        "sample_packing": handlers.packing,
        "pad_to_sequence_len": padding,
        "train_on_inputs": handlers.switch("scalar_loss_mask", 1),
        "excess_length_strategy": over_long,
        "micro_batch_size": handlers.micro_batch,
        "num_epochs": schedule.epochs,
        "optimizer": handlers.optimizer,
        "learning_rate": lambda job, key, value: job.set(key, value, "lr", number(key, value)),
        "lr_scheduler": schedule.scheduler,
        "cosine_min_lr_ratio": lowest_rate,
        "saves_per_epoch": schedule.per_epoch("save_interval"),
        "evals_per_epoch": schedule.per_epoch("eval_interval"),
        "bfloat16": fp16_names,
        "float16": fp16_names,
        "flash_attention": flash,
        "attn_implementation": handlers.attention,
        "unfrozen_parameters": unfrozen,
        "overrides_of_model_config": overrides,
        "rope_scaling": overrides,
        "special_tokens": special_tokens,
        "tokens": added_tokens,
        "wandb_project": wandb,
        "wandb_entity": wandb,
        "wandb_name": wandb,
        "wandb_run_id": wandb,
        "use_tensorboard": tensorboard,
        "auto_resume_from_checkpoints": handlers.resume,
        "tensor_parallel_size": handlers.size("tensor_model_parallel_size"),
        "context_parallel_size": handlers.size("context_parallel_size"),
        "sequence_parallel_degree": handlers.size("context_parallel_size"),
        "dp_shard_size": handlers.shard,
        "plugins": plugins,
    },
    ignored=(
        ("the model and its tokenizer are read from their folder; no code of it is run", "base_model_config tokenizer_config model_type "
         "type_of_model revision_of_model tokenizer_type tokenizer_legacy tokenizer_use_fast tokenizer_use_mistral_common "
         "trust_remote_code "
         "is_llama_derived_model is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model low_cpu_mem_usage cls_model_config "
         "processor_type processor_kwargs strict hf_use_auth_token tokenizer_save_jinja_files use_kernels "
         "experimental_skip_move_to_device"),
        ("chats are tokenized once, by pretokenize", "dataset_prepared_path dataset_processes dataset_num_proc skip_prepare_dataset "
         "dataset_keep_in_memory num_dataset_shards_to_save dataset_shard_num dataset_shard_idx push_dataset_to_hub is_preprocess "
         "preprocess_iterable streaming streaming_multipack_buffer_size pretrain_multipack_buffer_size pretrain_multipack_attn "
         "shuffle_merged_datasets shuffle_before_merging_datasets total_num_tokens total_supervised_tokens"),
        ("rows are filled with the samples that fit best", "sample_packing_group_size sample_packing_bin_size sample_packing_eff_est "
         "sample_packing_sequentially sample_packing_mp_start_method multipack_real_batches batch_flattening eval_sample_packing "
         "pad_to_multiple_of curriculum_sampling pretraining_sample_concatenation"),
        ("kernels are chosen by the machine and tested (docs/performance.md)", "xformers_attention sdp_attention flex_attention "
         "eager_attention "
         "sage_attention flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp flash_attn_fuse_qkv flex_attn_compile_kwargs "
         "flash_optimum lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel chunked_cross_entropy "
         "chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp cut_cross_entropy fused_attn_kernel "
         "torch_compile_options gc_steps gc_collect_steps deepcompile fsdp_final_state_dict_type heads_k_stride ring_attn_func "
         "experts_implementation"),
        ("the launcher and the device decide", "device device_map world_size local_rank ddp max_memory gpu_memory_limit dp_replicate_size "
         "fsdp_version fp32_norms fp32_norm_classes"),
        ("validation is the loss on the validation shards", "eval_batch_size eval_table_size eval_max_new_tokens eval_causal_lm_metrics "
         "do_causal_lm_eval do_bench_eval bench_dataset bench_split eval_sequence_len"),
        ("report.html has the curves; megatron-ft evaluate measures", "generate_samples num_generation_samples wandb_watch "
         "wandb_log_model wandb_mode "
         "use_wandb include_tkps save_first_step profiler_steps profiler_steps_start axolotl_config_path"),
        ("it is for merging or serving; use megatron-ft merge-adapter and chat", "merge_lora merge_method default_system_message"),
        ("it is a detail of what is not used", "lora_fan_in_fan_out qlora_sharded_model_loading lora_on_cpu bnb_config_kwargs "
         "peft_autocast_adapter_dtype loraplus_lr_embedding fix_untrained_tokens embeddings_skip_upcast resize_token_embeddings_to_32x "
         "mean_resizing_embeddings shrink_embeddings dynamic_checkpoint batch_size max_packed_sequence_len float32"),
        ("the tokenizer's template and stop token are used", "eot_tokens chat_template_kwargs"),
    ),
    impossible=(
        ("a base in 8 bits is not trained on: it stays in 16 bits; 4 bits are --base_precision nf4", "load_in_8bit gptq "
         "model_quantization_config "
         "model_quantization_config_kwargs"),
        ("only supervised training is done here (no DPO, KTO, ORPO, GRPO or reward models)", "trl "
         "vllm ebft "
         "orpo_alpha dpo_beta simpo_gamma cpo_alpha rl_beta num_labels reinforcement trainer_cls"),
        ("adapters are LoRA's, in every layer", "peft_use_dora lora_target_parameters peft_layers_to_transform peft_layers_pattern "
         "peft_layer_replication peft_init_lora_weights peft_trainable_token_indices peft_ensure_weight_tying lora_rank_pattern "
         "lora_alpha_pattern loraplus_lr_ratio loftq peft relora"),
        ("AdamW with one learning rate is the only optimizer", "embedding_lr embedding_lr_scale lr_groups adam_epsilon2 adam_beta3 "
         "torchdistx_path"),
        ("no schedule here has this shape (--lr_decay_style)", "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor"),
        ("no noise is added to embeddings; leave it out", "noisy_embedding_alpha"),
        ("stop with --exit_interval, and compare the kept checkpoints", "early_stopping_patience loss_watchdog_threshold "
         "loss_watchdog_patience"),
        ("nothing is moved to the CPU; use --recompute_granularity full", "activation_offloading layer_offloading selective_checkpointing"),
        ("quantised training is adapters on NF4 (--base_precision)", "qat use_onebitllms quantization fp8 "
         "fp8_enable_fsdp_float8_all_gather"),
        ("another set of chats for validation: make shards of it with pretokenize --val_split 0, and give them to --valid_data_path",
         "test_datasets"),
        ("the softmax and the loss are the model's own", "scaling_softmax scaling_softmax_factor use_eaft s2_attention"),
        ("positions are the sample's own", "use_pose pose_max_context_len"),
        ("put the template into the tokenizer's folder as chat_template.jinja, for --chat_format tokenizer", "chat_template_jinja"),
        ("weights are those of the model", "reinit_weights added_tokens_overrides overrides_of_model_kwargs"),
        ("chats are selected with --min_tokens and --max_tokens of pretokenize", "min_sample_len max_prompt_len"),
        ("models with experts cannot be trained", "quantize_moe_experts llama4_linearized_experts"),
        ("models for images are not trained", "image_size image_resize_algorithm freeze_mm_modules role_boundaries"),
        ("attention is the model's own", "large_head_attention sdpa_varlen gemma4_hybrid_attn_impl flash_attn_d512"),
    ),
    off={"loss_watchdog_patience": (3,), "excess_length_strategy": ("drop",)},
    beginnings=(
        ("logs go to metrics.jsonl, report.html, TensorBoard and Weights & Biases only", "use_mlflow mlflow_ hf_mlflow use_comet comet_ "
         "use_swanlab "
         "swanlab_ use_trackio trackio_ use_otel otel_"),
        ("only supervised training is done here (no DPO, KTO, ORPO, GRPO or reward models)", "dpo_ kto_ rpo_ center_rewards "
         "precompute_ref"),
        ("adapters are LoRA's, in every layer", "relora_ lisa_ spectrum_ loftq_"),
        ("AdamW with one learning rate is the only optimizer", "qgalore_ dion_ muon_ jagged_"),
        ("the loss is plain cross-entropy", "eaft_ kd_ scaling_ use_dft"),
        ("models with experts cannot be trained", "moe_ expert_parallel use_scattermoe use_sonicmoe dsv4_ use_dsv4"),
        ("a base in 8 bits is not trained on: it stays in 16 bits; 4 bits are --base_precision nf4", "gptq_ nvfp4_"),
        ("positions are the sample's own", "pose_"),
    ),
    ignored_beginnings=(
        ("kernels are chosen by the machine and tested (docs/performance.md)", "liger_ cut_cross_entropy"),
        ("it is for a web page or a cluster", "gradio_ use_ray ray_ resources_per generation_"),
    ),
)  # fmt: skip
TABLES = (OWN, trainer.TABLE)


def job_of(values: dict[str, Any], prefix: str) -> Job:
    """Return the job of an axolotl YAML."""
    missing = dict(DEFAULTS)
    if steps := schedule.given_steps(values):
        del missing["num_epochs"]
    if values.get("fp16") or values.get("float16") or values.get("bfloat16"):
        del missing["bf16"]
    if values.get("warmup_steps") is None and values.get("warmup_ratio") is None:
        missing |= {"warmup_steps": min(int(WARMUP * steps), 100)} if steps else {"warmup_ratio": WARMUP}
    absent = {key: value for key, value in missing.items() if values.get(key) is None}
    given = {key: value for key, value in values.items() if key not in absent}
    job = Job("axolotl", prefix, defaults=frozenset(absent), steps=steps)
    read(job, {**absent, **given}, TABLES)
    job.finetune.pop("all_linear", None)
    job.pretokenize.setdefault("chat_format", "tokenizer")
    if job.pretokenize["chat_format"] != "tokenizer":
        job.convert["chat_format"] = job.pretokenize["chat_format"]
    return job
