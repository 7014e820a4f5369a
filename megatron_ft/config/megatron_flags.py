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
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "persistent_save_interval": "save_interval",
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
     "no_create_attention_mask_in_dataloader create_attention_mask_in_dataloader dataloader_fast_cache_load "
     "dataloader_defer_npy_index_mmap num_dataset_builder_threads= mid_level_dataset_surplus= per_dataset_sequences_path="),
    ("each sample has its own positions and attention, and no token is predicted from another sample",
     "reset_position_ids reset_attention_mask eod_mask_loss dataloader_inter_document_masking"),
    ("the loss is always the mean over all supervised tokens of the global batch", "calculate_per_token_loss"),
    ("shards with roles are always trained on the assistant's tokens", "sft"),
    ("the engine is always megatron-core, with the kernels in docs/performance.md",
     "use_mcore_models transformer_impl=local|transformer_engine use_te export_te_mcore_model onnx_safe "
     "attention_backend=auto|flash|fused|unfused|local cp_comm_type= no_masked_softmax_fusion no_bias_swiglu_fusion no_rope_fusion "
     "no_persist_layer_norm cross_entropy_loss_fusion cross_entropy_fusion_impl= use_ring_exchange_p2p te_rng_tracker "
     "no_async_tensor_model_parallel_allreduce no_scatter_gather_tensors_in_pipeline distribute_saved_activations cuda_graph_impl= "
     "cuda_graph_scope= enable_cuda_graph external_cuda_graph empty_unused_memory_level= manual_gc manual_gc_interval= "
     "enable_experimental export_force_local_attention flash_attention_version= fused_residual_rmsnorm use_transformer_engine_op_fuser "
     "use_te_activation_func disable_jit_fuser no_tp_comm_bulk_wgrad disable_tp_comm_bulk_wgrad no_tp_comm_bulk_dgrad "
     "disable_tp_comm_bulk_dgrad no_tp_comm_overlap_ag disable_tp_comm_overlap_ag no_tp_comm_overlap_rs disable_tp_comm_overlap_rs "
     "tp_comm_overlap_rs_dgrad no_tp_comm_split_ag disable_tp_comm_split_ag no_tp_comm_split_rs disable_tp_comm_split_rs "
     "tp_comm_bootstrap_backend= tp_comm_overlap_cfg= delay_wgrad_compute defer_embedding_wgrad_compute wgrad_deferral_limit= "
     "overlap_p2p_communication_warmup_flush microbatch_group_size_per_virtual_pipeline_stage= cuda_graph_warmup_steps= "
     "cuda_graph_modules* optimizer_cuda_graph no_clone_scatter_output_in_embedding disable_clone_scatter_output_in_embedding "
     "mlp_chunks_for_training= no_gradient_reduce_div_fusion symmetric_ar_type= use_grouped_gemm_for_dense_mlp no_manual_gc_eval "
     "disable_manual_gc_eval train_sync_interval="),
    ("communication is chosen by the device", "DDP_impl=local|torch distributed_backend= local_rank= ddp_num_buckets= "
     "ddp_bucket_size= use_nccl_ub nccl_ub no_contiguous_buffers_in_local_ddp disable_gloo_process_groups "
     "pipeline_model_parallel_comm_backend= nccl_communicator_config_path= use_tp_pp_dp_mapping use_sharp sharp_enabled_group= "
     "high_priority_stream_groups* lazy_mpu_init no_align_grad_reduce disable_align_grad_reduce no_align_param_gather "
     "ddp_pad_buckets_for_high_nccl_busbw ddp_average_in_collective disable_symmetric_registration create_all_gather_group "
     "overlap_param_gather_with_optimizer_step no_use_layer_wise_param_layout distributed_timeout_seconds_after_init="),
    ("softmax and loss are computed in fp32, gradients are summed in fp32 unless --grad_reduce_in_bf16 is given",
     "attention_softmax_in_fp32 accumulate_allreduce_grads_in_fp32 fp16_lm_cross_entropy no_query_key_layer_scaling "
     "apply_query_key_layer_scaling ddp_reduce_scatter_with_fp32_accumulation ddp_param_name_patterns_for_fp32_local_accumulation* "
     "output_logit_dtype="),
    ("weights come from the checkpoint", "init_method_std= init_method_xavier_uniform no_initialization use_cpu_initialization "
     "data_parallel_random_init init_model_with_meta_device embedding_init_method_std= exit_on_missing_checkpoint "
     "load_main_params_from_ckpt"),
    ("no model here has learned positions", "no_position_embedding"),
    ("norm weights are trained as they are, which gives the same steps", "apply_layernorm_1p"),
    ("padding rows of the vocabulary are outside the softmax", "make_vocab_size_divisible_by= padded_vocab_size= no_pad_vocab_size "
     "disable_pad_vocab_size"),
    ("the tokenizer is the checkpoint's", "merge_file= no_new_tokens trust_remote_code tiktoken_pattern= tiktoken_special_tokens* "
     "tiktoken_num_special_tokens= no_use_tokenizer_model_from_checkpoint_args tokenizer_metadata= tokenizer_special_tokens* "
     "tokenizer_sentencepiece_legacy no_tokenizer_sentencepiece_ignore_extra_whitespaces "
     "disable_tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast tokenizer_hf_no_include_special_tokens "
     "null_tokenizer_eod_id= null_tokenizer_pad_id= use_gigatoken allow_ambiguous_pad_tokens "
     "disable_use_tokenizer_model_from_checkpoint_args"),
    ("SIGTERM and SIGUSR1 always save and end with exit code 75", "exit_signal_handler exit_signal_handler_for_dataloader "
     "exit_signal_handler_for_training"),
    ("gradients that are not finite are always skipped", "no_check_for_nan_in_loss_and_grad rerun_mode= check_for_large_grads "
     "check_for_spiky_loss result_rejected_tracker_filename="),
    ("checkpoints always hold everything that resuming needs; how they are written does not depend on flags",
     "no_save_optim no_save_rng ckpt_fully_parallel_save ckpt_fully_parallel_load ckpt_assume_constant_structure "
     "auto_detect_ckpt_format dist_ckpt_strictness= dist_ckpt_format= use_dist_ckpt no_ckpt_fully_parallel_save "
     "ckpt_fully_parallel_load_exchange_algo= ckpt_fully_parallel_load_per_rank_objects ckpt_fully_parallel_save_process_group= "
     "ckpt_fully_parallel_load_process_group= ckpt_pg_tensors_cache_path= ckpt_pg_tensors_cache_create "
     "no_ckpt_load_validate_sharding_integrity disable_ckpt_load_validate_sharding_integrity dist_ckpt_save_pre_mcore_014 "
     "dist_ckpt_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient no_save_tokenizer_assets "
     "disable_save_tokenizer_assets async_strategy= use_persistent_ckpt_worker async_ckpt_cpu_priority= async_ckpt_io_priority= "
     "async_ckpt_use_cpu_shm dist_ckpt_workers= ckpt_drop_redundant_extra_state verify_integrity "
     "ckpt_convert_update_legacy_dist_opt_format disable_msc"),
    ("the schedule always follows the flags of this start", "override_opt_param_scheduler"),
    ("momentum is for SGD", "sgd_momentum="),
    ("what is logged is in docs/metrics.md", "metrics* log_params_norm log_num_zeros_in_grad timing_log_level= timing_log_option= "
     "barrier_with_L1_time tensorboard_log_interval= tensorboard_queue_size= log_batch_size_to_tensorboard log_throughput "
     "log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_world_size_to_tensorboard log_progress log_straggler "
     "log_learning_rate_to_tensorboard= log_loss_scale_to_tensorboard= disable_straggler_on_startup straggler_minmax_count= "
     "logging_level= wandb_resume=allow wandb_save_dir= no_log_loss_scale_to_tensorboard disable_log_loss_scale_to_tensorboard "
     "log_memory_interval= log_device_memory_used log_max_attention_logit no_barrier_with_level_1_timing log_energy otel_enabled "
     "otel_service_name= otel_span_groups= config_logger_dir= straggler_ctrlr_port= run_workload_inspector_server no_one_logger "
     "one_logger_project= one_logger_run_name= one_logger_async app_tag_run_name= app_tag_run_version= test_mode"),
    ("no test set is evaluated at the end: use megatron-ft evaluate perplexity", "test_data_path*"),
    ("this is for inference", "inference_batch_times_seqlen_threshold= max_tokens_to_oom= inference_max_seq_length= "
     "inference_max_requests= flash_decode mlp_chunks_for_prefill= nccl_all_reduce_for_prefill use_legacy_static_engine "
     "enable_chunked_prefill num_speculative_tokens= use_same_sampling_seed_across_dp_ranks no_inference_dynamic_batching_prefix_caching "
     "no_inference_text_gen_server_logging no_inference_wandb_logging no_inference_use_synchronous_zmq_collectives "
     "no_inference_disable_ep_consensus"),
    ("torch's flight recorder is set with its own variables (TORCH_NCCL_TRACE_BUFFER_SIZE and others)", "flight_recorder_dump_path= "
     "flight_recorder_trace_buffer_size= no_flight_recorder_dump_on_timeout disable_flight_recorder_dump_on_timeout "
     "flight_recorder_include_stack_trace no_flight_recorder_include_only_active disable_flight_recorder_include_only_active "
     "no_flight_recorder_extra_dump_on_exec disable_flight_recorder_extra_dump_on_exec"),
    ("megatron-ft doctor --check tests the machine", "gpu_sniff_test_interval="),
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
    ("SIGTERM and SIGUSR1 are the signals that save and end a run", "exit_signal=15"),
    ("moments, main weights and gradients are fp32; --grad_reduce_in_bf16 stores gradients in bf16", "main_grads_dtype=fp32 "
     "main_params_dtype=fp32 exp_avg_dtype=fp32 exp_avg_sq_dtype=fp32"),
)  # fmt: skip
"""(Reason, flags that are accepted with these values only)."""

REFUSED = (
    ("fp8 and fp4 are not supported; use --bf16", "fp8_e4m3 fp8_hybrid no_fp8_wgrad fp8_margin fp8_interval fp8_amax_history_len "
     "fp8_amax_compute_algo fp8_format fp8_recipe fp8_param_gather fp8_wgrad first_last_layers_bf16 num_layers_at_start_in_bf16 "
     "num_layers_at_end_in_bf16 disable_fp8_wgrad use_kitchen_attention te_precision_config_file reuse_grad_buf_for_mxfp8_param_ag"),
    ("no model here is built like this, see docs/conversion.md for those that are", "use_bias use_post_ln squared_relu quick_geglu "
     "apply_residual_connection_post_layernorm fp32_residual_connection use_fused_weighted_squared_relu window_attn_skip_freq "
     "glu_linear_offset activation_func_clamp_value multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim "
     "qk_pos_emb_head_dim v_head_dim mscale mscale_all_dim rotary_scaling_factor mtp_num_layers mtp_loss_scaling_factor spec "
     "no_rope_freq rotary_interleaved hybrid_layer_pattern hybrid_override_pattern is_hybrid_model mamba_head_dim mamba_num_groups "
     "mamba_num_heads mamba_state_dim qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold attention_output_gate "
     "experimental_attention_variant no_dsa_indexer_rotate_activation disable_dsa_indexer_rotate_activation no_dsa_indexer_scoring_relu "
     "disable_dsa_indexer_scoring_relu linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads "
     "linear_num_value_heads use_mup enable_mhc_connections mrope_section disable_mamba_mem_eff_path "
     "no_yarn_correction_range_round_to_int relative_attention_num_buckets relative_attention_max_distance openai_gelu "
     "mla_down_proj_fusion cache_mla_latents"),
    ("models with experts cannot be trained", "num_experts moe_aux_loss_coeff moe_ffn_hidden_size moe_flex_dispatcher_backend "
     "moe_grouped_gemm moe_latent_size moe_layer_freq moe_layer_recompute moe_pad_experts_for_cuda_graph_inference "
     "moe_per_layer_logging moe_permute_fusion moe_router_bias_update_rate moe_router_dtype moe_router_enable_expert_bias "
     "moe_router_force_load_balancing moe_router_group_topk moe_router_load_balancing_type moe_router_num_groups "
     "moe_router_pre_softmax moe_router_score_function moe_router_topk moe_router_topk_scaling_factor "
     "moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_token_dispatcher_type moe_token_drop_policy moe_z_loss_coeff "
     "overlap_moe_expert_parallel_comm overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release "
     "use_grouped_gemm_for_shared_expert high_priority_a2a_comm_stream save_tokens_per_expert_interval"),
    ("the batch has one size; set --global_batch_size", "rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed "
     "phase_transition_iterations"),
    ("steps cannot be left out by number", "skip_iters iterations_to_skip"),
    ("all parameters have the same learning rate; set --lr and --min_lr", "decoupled_lr decoupled_min_lr"),
    ("products are added up as torch does by default", "disable_bf16_reduced_precision_matmul"),
    ("moments and main weights are fp32", "use_precision_aware_optimizer"),
    ("a run's settings are not read from its checkpoint; give its training.yaml to --config", "use_checkpoint_opt_param_scheduler"),
    ("nothing is trained; use megatron-ft evaluate perplexity", "eval_only skip_train"),
    ("stages are written with --pipeline_model_parallel_layout", "standalone_embedding_stage account_for_embedding_in_pipeline_split "
     "account_for_loss_in_pipeline_split"),
    ("jobs are continued with --auto_resume and exit code 75", "adlr_autoresume adlr_autoresume_interval"),
    ("anyone on the machine can read a command line; set the variable WANDB_API_KEY", "wandb_api_key"),
    ("weights are split with tensor and pipeline parallelism, and optimizer state with --use_distributed_optimizer",
     "use_megatron_fsdp data_parallel_sharding_strategy outer_dp_sharding_strategy num_distributed_optimizer_instances "
     "fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer fsdp_manual_registration megatron_fsdp_grad_comm_dtype "
     "megatron_fsdp_main_grads_dtype megatron_fsdp_main_params_dtype megatron_fsdp_max_pool_double_buffer param_to_param_group_map_json "
     "use_torch_fsdp2 enable_full_sharding_in_hsdp suggested_communication_unit_size keep_fp8_transpose_cache "
     "no_strict_fsdp_dtensor_load disable_strict_fsdp_dtensor_load dump_param_to_param_group_map tensor_parallel_num_weight_shards"),
    ("no profiler is built in; start the command under nsys or torch's", "profile profile_ranks profile_step_start profile_step_end "
     "record_memory_history memory_snapshot_path use_pytorch_profiler record_shapes nvtx_ranges"),
    ("without data, try a command line with --rehearse --make_believe MODEL", "mock_data fake_process_group"),
    ("chats are made into shards by megatron-ft pretokenize, with their template and length",
     "finetune_hf_dataset tokenizer_prompt_format tokenizer_hf_include_special_tokens special_tokens force_system_message "
     "packing_seq_length prompt_path sft_tokenizer_prompt_format chat_template"),
    ("give the shards with --data_path and --valid_data_path", "per_split_data_args_path data_args_path"),
    ("models for images are not trained", "img_h img_w num_channels patch_dim num_classes classes_fraction data_per_class_fraction "
     "no_data_sharding head_lr_mult iter_per_epoch dino_local_img_size dino_local_crops_number dino_head_hidden_size "
     "dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp dino_teacher_temp "
     "dino_warmup_teacher_temp_epochs allow_missing_vision_projection_checkpoint disable_vision_class_token freeze_LM freeze_ViT "
     "image_tag_type language_model_type vision_model_type max_num_tiles num_frames pixel_shuffle recompute_vision "
     "use_area_weighted_aspect_ratio use_thumbnail use_tile_tags use_tiling use_loss_scaling dataloader_save dataloader_seq_length "
     "mask_type mask_factor"),
    ("T5 and BERT are not trained", "decoder_num_layers decoder_seq_length pipeline_model_parallel_split_rank mask_prob short_seq_prob "
     "output_bert_embeddings"),
    ("models for retrieval are not trained", "ict_head_size biencoder_projection_dim biencoder_shared_query_context_model ict_load "
     "bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path retriever_seq_length "
     "retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path indexer_batch_size indexer_log_interval"),
    ("there is no reinforcement learning", "grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_entropy_term_weight grpo_group_size "
     "grpo_iterations grpo_kl_beta grpo_prompts_per_step langrl_env_config model_temperature rl_default_temperature rl_default_top_k "
     "rl_default_top_p rl_importance_sampling_truncation_coef rl_inference_logprobs_is_correction rl_partial_rollouts "
     "rl_persist_cuda_graphs rl_sequence_packing_algo rl_skip_bos_token rl_use_sequence_packing no_rl_use_sequence_packing "
     "inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens "
     "inference_dynamic_batching_num_cuda_graphs inference_dynamic_batching_unified_memory_level decode_only_cuda_graphs "
     "inference_server_conversation_template inference_type perform_rl_step refit_method no_rl_persist_cuda_graphs "
     "no_rl_partial_rollouts no_rl_inference_logprobs_is_correction no_rl_training_cuda_graphs "
     "no_rl_offload_inference_model_weights_when_idle no_rl_verify_model_weights_swap no_rl_skip_bos_token"),
    ("quantised and pruned training of ModelOpt is not supported", "modelopt_enabled export_model_type export_moe_apply_probs_on_input "
     "export_qk_l2_norm"),
    ("there are no recipes; give the settings, or --config FILE.yaml", "recipe model mode step_func dataset hf_model hf_path"),
    ("there is no switch for it; how far results repeat is in docs/reliability.md", "deterministic deterministic_mode "
     "batch_invariant_mode batch_invariant_backend"),
    ("the environment is shown by megatron-ft doctor", "dump_env"),
    ("rows are shared with --context_parallel_size alone", "hierarchical_context_parallel_sizes hybrid_context_parallel "
     "max_seqlen_per_dp_cp_rank"),
    ("nothing is moved to the CPU; use --recompute_granularity full and --use_distributed_optimizer", "cpu_offloading_num_layers "
     "cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading fine_grained_offloading_max_inflight_offloads "
     "offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks "
     "activation_offload_fraction optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload "
     "overlap_cpu_optimizer_d2h_h2d no_pin_cpu_grads no_pin_cpu_params"),
    ("norms and biases have no weight decay", "apply_wd_to_qk_layernorm no_weight_decay_cond_type"),
    ("an old name; use --micro_batch_size", "batch_size"),
    ("an old name; use --tensor_model_parallel_size", "model_parallel_size"),
    ("an old name; use --lr_warmup_fraction", "warmup"),
    ("an old name; use --recompute_granularity full", "checkpoint_activations activations_checkpoint_method"),
    ("validation has the batch of training, begins with the first --eval_interval, and takes --eval_iters batches",
     "eval_global_batch_size eval_micro_batch_size start_eval_at_iter full_validation"),
    ("validation shards are evaluated together; evaluate single ones with megatron-ft evaluate perplexity", "multiple_validation_sets "
     "validation_set_names"),
    ("choose what is trained with --unfrozen_parameters or --lora_rank", "freeze_all_layers"),
    ("checkpoints are saved to --save only", "non_persistent_save_interval non_persistent_ckpt_type non_persistent_global_ckpt_dir "
     "non_persistent_local_ckpt_dir non_persistent_local_ckpt_algo replication replication_jump replication_factor"),
    ("tensors of single steps are not written", "save_params_interval save_activations_interval save_wgrads_interval save_dgrads_interval"),
    ("give the sizes of the layout; torch_dist checkpoints load into any", "use_mp_args_from_checkpoint_args"),
    ("a run continues at the iteration of its checkpoint; start anew with --finetune", "override_ckpt_iteration"),
    ("convert with megatron-ft reshard", "ckpt_convert_format ckpt_convert_save"),
    ("files are read from folders", "enable_msc object_storage_cache_path"),
    ("give the settings in a file with --config", "yaml_cfg"),
    ("no faults are injected", "error_injection_rate error_injection_type"),
    ("the launcher watches the processes; jobs are continued with --auto_resume", "enable_ft_package calc_ft_timeouts"),
)  # fmt: skip
"""(Reason, flags that are refused)."""


FAMILIES = (
    ("models with experts cannot be trained", "moe_ expert_"),
    ("there is no reinforcement learning", "rl_ grpo_"),
    ("no model here is built like this, see docs/conversion.md for those that are", "mamba_ mtp_ yarn_ heterogeneous_ linear_attention_ "
     "dsa_ mup_ mhc_ gdp_"),
    ("this is for inference", "inference_"),
    ("fp8 and fp4 are not supported; use --bf16", "fp8_ fp4_ kitchen_"),
    ("AdamW is the only optimizer", "muon_ lion_"),
    ("models for images are not trained", "vision_ swin_ dino_ img_"),
    ("BERT and models for retrieval are not trained", "bert_ biencoder_ retriever_ retro_ ict_"),
    ("text is not trained with its middle at the end", "fim_"),
    ("the launcher watches the processes; jobs are continued with --auto_resume", "ft_ inprocess_"),
    ("weights are split with tensor and pipeline parallelism", "megatron_fsdp_ fsdp_ torch_fsdp2_ gtp_"),
    ("no profiler is built in; start the command under nsys or torch's", "pytorch_profiler_"),
    ("no faults are injected", "fault_injector_"),
    ("a teacher's likely tokens are stored with megatron-ft score, and given with --teacher_logits", "logits_"),
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
