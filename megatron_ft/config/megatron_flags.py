"""What becomes of the flags of Megatron-LM, Megatron-LLM and Megatron-Bridge in a training command. Plain data.

A flag that is not here is a setting of the command itself, or unknown. Names are as in hints.py, with `_`. In lists of names `x` is a
switch, `x=` takes a value, `x=a|b` only these values, and `x*` any number of them.
"""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import Any, NamedTuple

SAME = {
    "num_query_groups": "num_attention_heads_kv",
    "norm_epsilon": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "encoder_num_layers": "num_layers",
    "encoder_seq_length": "seq_length",
    "train_data_path": "data_path",
    "wandb_exp_name": "wandb_name",
    "check_weight_hash_across_dp_replicas_interval": "check_replicas_every",
    "max_steps": "train_iters",
    "warmup_iters": "lr_warmup_iters",
    "save_dir": "save",
    "load_dir": "load",
}
"""Name there -> our name; the value means the same."""

MEANS = {
    "swiglu": ("glu_activation", "swiglu"),
    "untie_embeddings_and_output_weights": ("no_tie_embed_logits", True),
    "use_rotary_position_embeddings": ("position_embedding_type", "rope"),
    "recompute_activations": ("recompute_granularity", "selective"),
}
"""Switch there -> our flag and its value."""

COMPUTED = {
    "pretrained_checkpoint=": "`--load` with `--finetune`; where `--load` is given too and holds checkpoints, the run continues from those",
    "train_samples=": "`--train_iters`: samples / `--global_batch_size`",
    "lr_decay_samples=": "`--lr_decay_iters`: samples / `--global_batch_size`",
    "lr_warmup_samples=": "`--lr_warmup_iters`: samples / `--global_batch_size`",
    "lr_wsd_decay_samples=": "`--lr_wsd_decay_iters`: samples / `--global_batch_size`",
    "lr_warmup_fraction=": "`--lr_warmup_iters`: this share of `--lr_decay_iters`, else of `--train_iters`",
    "load_iters=": "`--load` with the folder of this iteration",
    "ckpt_step=": "`--load` with the folder of this iteration",
    "rotary_seq_len_interpolation_factor=": "`--rope_scaling_type linear --rope_scaling_factor`",
    "tokenizer_model=": "`--vocab_file` if it is a file or folder here; the name of a tokenizer elsewhere is not compared",
    "no_load_optim": "part of `--finetune`; refused without it",
    "no_load_rng": "part of `--finetune`; refused without it",
}
"""Flags whose value in ours is computed by translate.py -> how."""

NO_EFFECT = (
    ("samples are read in a thread of each process, and shuffled anew in each epoch",
     "num_workers= dataloader_type=single|cyclic data_impl=mmap|infer dataset_impl=mmap|infer mmap_warmup no_mmap_bin_files "
     "no_create_attention_mask_in_dataloader create_attention_mask_in_dataloader"),
    ("each sample has its own positions and attention, and no token is predicted from another sample",
     "reset_position_ids reset_attention_mask eod_mask_loss"),
    ("the loss is always the mean over all supervised tokens of the global batch", "calculate_per_token_loss"),
    ("shards with roles are always trained on the assistant's tokens", "sft"),
    ("the engine is always megatron-core, with the kernels in docs/performance.md",
     "use_mcore_models transformer_impl=local|transformer_engine use_te export_te_mcore_model onnx_safe "
     "attention_backend=auto|flash|fused|unfused|local cp_comm_type= no_masked_softmax_fusion no_bias_swiglu_fusion no_rope_fusion "
     "no_persist_layer_norm cross_entropy_loss_fusion cross_entropy_fusion_impl= use_ring_exchange_p2p te_rng_tracker "
     "no_async_tensor_model_parallel_allreduce no_scatter_gather_tensors_in_pipeline distribute_saved_activations cuda_graph_impl= "
     "cuda_graph_scope= enable_cuda_graph external_cuda_graph empty_unused_memory_level= manual_gc manual_gc_interval= "
     "enable_experimental export_force_local_attention"),
    ("communication is chosen by the device", "DDP_impl=local|torch distributed_backend= local_rank= ddp_num_buckets= "
     "ddp_bucket_size= use_nccl_ub nccl_ub no_contiguous_buffers_in_local_ddp disable_gloo_process_groups"),
    ("softmax and loss are computed in fp32, gradients are summed in fp32 unless --grad_reduce_in_bf16 is given",
     "attention_softmax_in_fp32 accumulate_allreduce_grads_in_fp32 fp16_lm_cross_entropy no_query_key_layer_scaling "
     "apply_query_key_layer_scaling"),
    ("weights come from the checkpoint", "init_method_std= init_method_xavier_uniform no_initialization use_cpu_initialization "
     "data_parallel_random_init init_model_with_meta_device"),
    ("no model here has learned positions", "no_position_embedding"),
    ("norm weights are trained as they are, which gives the same steps", "apply_layernorm_1p"),
    ("padding rows of the vocabulary are outside the softmax", "make_vocab_size_divisible_by= padded_vocab_size="),
    ("the tokenizer is the checkpoint's", "merge_file= no_new_tokens trust_remote_code tiktoken_pattern= tiktoken_special_tokens* "
     "tiktoken_num_special_tokens= no_use_tokenizer_model_from_checkpoint_args"),
    ("SIGTERM and SIGUSR1 always save and end with exit code 75", "exit_signal_handler"),
    ("gradients that are not finite are always skipped", "no_check_for_nan_in_loss_and_grad rerun_mode="),
    ("checkpoints always hold everything that resuming needs; how they are written does not depend on flags",
     "no_save_optim no_save_rng ckpt_fully_parallel_save ckpt_fully_parallel_load ckpt_assume_constant_structure "
     "auto_detect_ckpt_format dist_ckpt_strictness= dist_ckpt_format= use_dist_ckpt"),
    ("the schedule always follows the flags of this start", "override_opt_param_scheduler"),
    ("momentum is for SGD", "sgd_momentum="),
    ("what is logged is in docs/metrics.md", "metrics* log_params_norm log_num_zeros_in_grad timing_log_level= timing_log_option= "
     "barrier_with_L1_time tensorboard_log_interval= tensorboard_queue_size= log_batch_size_to_tensorboard log_throughput "
     "log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_world_size_to_tensorboard log_progress log_straggler "
     "log_learning_rate_to_tensorboard= log_loss_scale_to_tensorboard= disable_straggler_on_startup straggler_minmax_count= "
     "logging_level= wandb_resume=allow wandb_save_dir="),
    ("no test set is evaluated at the end: use megatron-ft evaluate perplexity", "test_data_path*"),
    ("this is for inference", "inference_batch_times_seqlen_threshold= max_tokens_to_oom= inference_max_seq_length= "
     "inference_max_requests="),
)  # fmt: skip
"""(Reason, flags that are accepted and change nothing that is computed)."""

ONLY = (
    ("AdamW is the only optimizer", "optimizer=adam|adamw"),
    ("only decoder-only models are trained", "model_type=encoder_or_decoder"),
    ("models with experts cannot be trained", "expert_model_parallel_size=1 expert_tensor_parallel_size=1"),
    ("the softmax has no sink", "softmax_type=vanilla"),
    ("sentinel tokens are T5's; added tokens are named with --vocab_extra_ids_list", "vocab_extra_ids=0"),
    ("only plain rotary embeddings are known", "rope_type=rope"),
    ("samples are never left out at random", "sample_rate=1|1.0"),
)  # fmt: skip
"""(Reason, flags that are accepted with these values only)."""

REFUSED = (
    ("fp8 and fp4 are not supported; use --bf16", "fp8_e4m3 fp8_hybrid no_fp8_wgrad fp8_margin fp8_interval fp8_amax_history_len "
     "fp8_amax_compute_algo fp8_format fp8_recipe fp8_param_gather fp8_wgrad first_last_layers_bf16 num_layers_at_start_in_bf16 "
     "num_layers_at_end_in_bf16"),
    ("no model here is built like this, see docs/conversion.md for those that are", "use_bias use_post_ln squared_relu quick_geglu "
     "apply_residual_connection_post_layernorm fp32_residual_connection use_fused_weighted_squared_relu window_attn_skip_freq "
     "glu_linear_offset activation_func_clamp_value multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim "
     "qk_pos_emb_head_dim v_head_dim mscale mscale_all_dim rotary_scaling_factor mtp_num_layers mtp_loss_scaling_factor spec "
     "no_rope_freq rotary_interleaved hybrid_layer_pattern hybrid_override_pattern is_hybrid_model mamba_head_dim mamba_num_groups "
     "mamba_num_heads mamba_state_dim"),
    ("it is the checkpoint's and cannot be compared; leave it out", "window_size use_rope_scaling"),
    ("models with experts cannot be trained", "num_experts moe_aux_loss_coeff moe_ffn_hidden_size moe_flex_dispatcher_backend "
     "moe_grouped_gemm moe_latent_size moe_layer_freq moe_layer_recompute moe_pad_experts_for_cuda_graph_inference "
     "moe_per_layer_logging moe_permute_fusion moe_router_bias_update_rate moe_router_dtype moe_router_enable_expert_bias "
     "moe_router_force_load_balancing moe_router_group_topk moe_router_load_balancing_type moe_router_num_groups "
     "moe_router_pre_softmax moe_router_score_function moe_router_topk moe_router_topk_scaling_factor "
     "moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_token_dispatcher_type moe_token_drop_policy moe_z_loss_coeff"),
    ("the batch has one size; set --global_batch_size", "rampup_batch_size step_batch_size_schedule"),
    ("steps cannot be left out by number", "skip_iters"),
    ("all parameters have the same learning rate; set --lr and --min_lr", "decoupled_lr decoupled_min_lr"),
    ("products are added up as torch does by default", "disable_bf16_reduced_precision_matmul"),
    ("moments and main weights are fp32", "use_precision_aware_optimizer"),
    ("a run's settings are not read from its checkpoint; give its training.yaml to --config", "use_checkpoint_opt_param_scheduler"),
    ("nothing is trained; use megatron-ft evaluate perplexity", "eval_only"),
    ("stages are written with --pipeline_model_parallel_layout", "standalone_embedding_stage"),
    ("jobs are continued with --auto_resume and exit code 75", "adlr_autoresume adlr_autoresume_interval"),
    ("anyone on the machine can read a command line; set the variable WANDB_API_KEY", "wandb_api_key"),
    ("weights are split with tensor and pipeline parallelism, and optimizer state with --use_distributed_optimizer",
     "use_megatron_fsdp data_parallel_sharding_strategy outer_dp_sharding_strategy num_distributed_optimizer_instances "
     "fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer fsdp_manual_registration megatron_fsdp_grad_comm_dtype "
     "megatron_fsdp_main_grads_dtype megatron_fsdp_main_params_dtype megatron_fsdp_max_pool_double_buffer param_to_param_group_map_json"),
    ("no profiler is built in; start the command under nsys or torch's", "profile profile_ranks profile_step_start profile_step_end "
     "record_memory_history memory_snapshot_path use_pytorch_profiler"),
    ("without data, try a command line with --rehearse --make_believe MODEL", "mock_data"),
    ("chats are made into shards by megatron-ft pretokenize, with their template and length",
     "finetune_hf_dataset tokenizer_prompt_format tokenizer_hf_include_special_tokens special_tokens force_system_message "
     "packing_seq_length prompt_path"),
    ("give the shards with --data_path and --valid_data_path", "per_split_data_args_path data_args_path"),
    ("models for images are not trained", "img_h img_w num_channels patch_dim num_classes classes_fraction data_per_class_fraction "
     "no_data_sharding head_lr_mult iter_per_epoch dino_local_img_size dino_local_crops_number dino_head_hidden_size "
     "dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp dino_teacher_temp "
     "dino_warmup_teacher_temp_epochs allow_missing_vision_projection_checkpoint disable_vision_class_token freeze_LM freeze_ViT "
     "image_tag_type language_model_type vision_model_type max_num_tiles num_frames pixel_shuffle recompute_vision "
     "use_area_weighted_aspect_ratio use_thumbnail use_tile_tags use_tiling use_loss_scaling dataloader_save dataloader_seq_length"),
    ("T5 and BERT are not trained", "decoder_num_layers decoder_seq_length pipeline_model_parallel_split_rank mask_prob short_seq_prob"),
    ("models for retrieval are not trained", "ict_head_size biencoder_projection_dim biencoder_shared_query_context_model ict_load "
     "bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path retriever_seq_length "
     "retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path indexer_batch_size indexer_log_interval"),
    ("there is no reinforcement learning", "grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_entropy_term_weight grpo_group_size "
     "grpo_iterations grpo_kl_beta grpo_prompts_per_step langrl_env_config model_temperature rl_default_temperature rl_default_top_k "
     "rl_default_top_p rl_importance_sampling_truncation_coef rl_inference_logprobs_is_correction rl_partial_rollouts "
     "rl_persist_cuda_graphs rl_sequence_packing_algo rl_skip_bos_token rl_use_sequence_packing no_rl_use_sequence_packing "
     "inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens "
     "inference_dynamic_batching_num_cuda_graphs inference_dynamic_batching_unified_memory_level decode_only_cuda_graphs "
     "inference_server_conversation_template inference_type"),
    ("quantised and pruned training of ModelOpt is not supported", "modelopt_enabled export_model_type export_moe_apply_probs_on_input "
     "export_qk_l2_norm"),
    ("there are no recipes; give the settings, or --config FILE.yaml", "recipe model mode step_func dataset hf_model hf_path"),
    ("there is no switch for it; how far results repeat is in docs/reliability.md", "deterministic"),
    ("the environment is shown by megatron-ft doctor", "dump_env"),
)  # fmt: skip
"""(Reason, flags that are refused)."""


FAMILIES = (
    ("models with experts cannot be trained", "moe_"),
    ("there is no reinforcement learning", "rl_ grpo_"),
    ("no model here is built like this, see docs/conversion.md for those that are", "mamba_ mtp_ yarn_ heterogeneous_ linear_attention_"),
    ("this is for inference", "inference_"),
    ("fp8 and fp4 are not supported; use --bf16", "fp8_ fp4_ kitchen_"),
    ("AdamW is the only optimizer", "muon_ lion_"),
    ("models for images are not trained", "vision_ swin_ dino_ img_"),
    ("BERT and models for retrieval are not trained", "bert_ biencoder_ retriever_ retro_ ict_"),
    ("text is not trained with its middle at the end", "fim_"),
    ("the launcher watches the processes; jobs are continued with --auto_resume", "ft_ inprocess_"),
    ("weights are split with tensor and pipeline parallelism", "megatron_fsdp_ fsdp_ torch_fsdp2_"),
)  # fmt: skip
"""(Reason, beginnings of names of further flags that are refused)."""


class Foreign(NamedTuple):
    """A flag of Megatron that is not ours. fate: computed, no effect, only or refused. arity: "", "=" or "*". values: allowed; (): all."""

    fate: str
    reason: str
    arity: str = ""
    values: tuple[str, ...] = ()


@functools.cache
def foreign() -> dict[str, Foreign]:
    """Return every flag above but those of SAME and MEANS, by name."""
    found = {}
    one_each = tuple((text, spec) for spec, text in COMPUTED.items())
    for fate, groups in (("computed", one_each), ("no effect", NO_EFFECT), ("only", ONLY), ("refused", REFUSED)):
        for reason, specs in groups:
            for spec in specs.split():
                name, equals, values = spec.rstrip("*").partition("=")
                arity = "*" if spec.endswith("*") else equals
                found[name] = Foreign(fate, reason, arity, tuple(values.split("|")) if values else ())
    return found


class Given(NamedTuple):
    """A flag as it was given. value: text of the command line, a list of texts, a value of a file, or True. where: for messages.

    level: 2 on the command line, 1 in a file.
    """

    value: Any
    where: str
    level: int


def find(name: str) -> Foreign | None:
    """Return a flag of foreign(), or one of FAMILIES."""
    reasons = (reason for reason, beginnings in FAMILIES if name.startswith(tuple(beginnings.split())))
    family = next(reasons, None)
    return foreign().get(name) or (Foreign("refused", family) if family else None)


def refusal(name: str, value: Any = None) -> str | None:
    """Return why a foreign flag is refused with this value; None if it is not."""
    known = find(name)
    if known is None or known.fate == "refused":
        return known and known.reason
    if known.values and str(value).strip() not in known.values:
        return f"{value} is none of {', '.join(known.values)}: {known.reason}"
    return None


def accepted() -> list[str]:
    """Return the names that are taken with some value."""
    return [*SAME, *MEANS, *(name for name, flag in foreign().items() if flag.fate != "refused")]


def fate_of(name: str, ours: Container[str], compared: Container[str]) -> str | None:
    """Return what becomes of a flag; None: it is unknown. ours: all our flags. compared: those that describe the model."""
    if (MEANS[name][0] if name in MEANS else SAME.get(name, name)) in compared:
        return "compared"
    if name in ours:
        return "taken"
    if name in SAME or name in MEANS:
        return "translated"
    flag = find(name)
    return {"computed": "translated", "only": "no effect"}.get(flag.fate, flag.fate) if flag else None


def is_known(name: str) -> bool:
    """Return whether one of the Megatrons has this flag, as far as this table knows."""
    return name in SAME or name in MEANS or find(name) is not None


def as_table() -> str:
    """Return the table as Markdown."""
    rows = [(f"`--{name}`", f"`--{ours}`") for name, ours in SAME.items()]
    rows += [
        (f"`--{name}`", f"`--{ours}`" + ("" if value is True else f" `{value}`"))
        for name, (ours, value) in MEANS.items()
    ]
    rows += [(f"`--{spec.rstrip('=')}`", text) for spec, text in COMPUTED.items()]
    for fate, groups in (("no effect: ", NO_EFFECT), ("only these values: ", ONLY), ("refused: ", REFUSED)):
        rows += [(_flags(specs), fate + reason) for reason, specs in groups]
    rows += [(", ".join(f"`--{start}...`" for start in starts.split()), "refused: " + why) for why, starts in FAMILIES]
    return "\n".join(["| there | here |", "|---|---|", *(f"| {there} | {here} |" for there, here in rows)])


def _flags(specs: str) -> str:
    """Return names for a cell: `--x`, and with their values where only some are accepted."""
    return ", ".join("`--" + spec.rstrip("=*").replace("=", " ").replace("|", "` or `") + "`" for spec in specs.split())
