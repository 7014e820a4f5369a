"""The keys of transformers' TrainingArguments, which TRL and LLaMA-Factory share; axolotl has many of them under the same names."""

from __future__ import annotations

from megatron_ft.importing import handlers, schedule
from megatron_ft.importing.tables import Table

TABLE = Table(
    direct={
        "learning_rate": "lr",
        "weight_decay": "weight_decay",
        "adam_beta1": "adam_beta1",
        "adam_beta2": "adam_beta2",
        "adam_epsilon": "adam_eps",
        "max_grad_norm": "clip_grad",
        "seed": "seed",
        "run_name": "wandb_name",
        "logging_dir": "tensorboard_dir",
        "save_total_limit": "keep_last",
    },
    computed={
        "output_dir": handlers.output_dir,
        "per_device_train_batch_size": handlers.micro_batch,
        "gradient_accumulation_steps": handlers.accumulation,
        "max_steps": schedule.max_steps,
        "num_train_epochs": schedule.epochs,
        "bf16": handlers.bf16,
        "fp16": handlers.fp16,
        "lr_scheduler_type": schedule.scheduler,
        "lr_scheduler_kwargs": schedule.scheduler_arguments,
        "warmup_ratio": schedule.warmup,
        "warmup_steps": schedule.warmup,
        "optim": handlers.optimizer,
        "gradient_checkpointing": handlers.checkpointing,
        "activation_checkpointing": handlers.checkpointing,
        "report_to": handlers.report_to,
        "logging_steps": schedule.logging_steps,
        "save_steps": schedule.save_steps,
        "eval_steps": schedule.eval_steps,
        "save_strategy": schedule.save_strategy,
        "eval_strategy": schedule.eval_strategy,
        "evaluation_strategy": schedule.eval_strategy,
        "logging_strategy": lambda job, key, value: job.ignore(key, value, "lines of progress come every --log_interval steps"),
        "ddp_timeout": handlers.timeout,
        "deepspeed": handlers.deepspeed,
        "fsdp": handlers.shard,
        "fsdp_config": handlers.fsdp_config,
        "resume_from_checkpoint": handlers.resume,
        "per_device_eval_batch_size": handlers.eval_batch,
    },
    ignored=(
        ("training is always done, and evaluated if there are validation shards", "do_train do_eval do_predict overwrite_output_dir"),
        ("kernels are chosen by the machine and tested (docs/performance.md)", "tf32 torch_compile torch_compile_backend "
         "torch_compile_mode "
         "use_liger_kernel liger_kernel_config gradient_checkpointing_kwargs activation_checkpointing_kwargs use_cache "
         "torch_empty_cache_steps "
         "optim_args use_cpu no_cuda use_mps_device"),
        ("the loss is always the mean over all supervised tokens of the global batch", "average_tokens_across_devices"),
        ("chats are read from shards, in a thread of each process", "dataloader_num_workers dataloader_pin_memory "
         "dataloader_persistent_workers "
         "dataloader_prefetch_factor dataloader_drop_last dataloader_multiprocessing_context dataloader_in_order remove_unused_columns "
         "label_names length_column_name ignore_data_skip accelerator_config group_by_length data_seed"),
        ("the device decides how processes exchange", "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
         "ddp_backend local_rank log_on_each_node save_on_each_node"),
        ("metrics.jsonl and report.html hold everything that is logged", "logging_first_step logging_nan_inf_filter log_level "
         "log_level_replica "
         "disable_tqdm include_num_input_tokens_seen skip_memory_metrics debug project include_tokens_per_second include_for_metrics"),
        ("checkpoints hold all that resuming needs; megatron-to-hf exports the weights", "save_only_model enable_jit_checkpoint "
         "restore_callback_states_from_checkpoint save_safetensors"),
        ("evaluation is the loss on the validation shards", "eval_delay prediction_loss_only eval_on_start eval_do_concat_batches "
         "eval_use_gather_object eval_accumulation_steps batch_eval_metrics bf16_full_eval fp16_full_eval greater_is_better"),
        ("nothing is uploaded; use `hf upload` with the exported folder", "push_to_hub hub_token hub_private_repo hub_model_id "
         "hub_strategy "
         "hub_always_push hub_revision trackio_space_id trackio_bucket_id trackio_static_space_id"),
        ("how far results repeat is in docs/reliability.md", "full_determinism"),
    ),
    impossible=(
        ("the loss is plain cross-entropy", "label_smoothing_factor"),
        ("no noise is added to embeddings; leave it out", "neftune_noise_alpha"),
        ("AdamW trains all parameters alike", "optim_target_modules"),
        ("the micro batch is fixed: megatron-ft plan shows which one fits", "auto_find_batch_size"),
        ("compare the kept checkpoints with megatron-ft evaluate perplexity", "load_best_model_at_end metric_for_best_model"),
        ("sizes of the layout are flags: --tensor_model_parallel_size and others", "parallelism_config"),
        ("samples are shuffled anew in each epoch", "train_sampling_strategy"),
    ),
    off={"train_sampling_strategy": ("random",), "metric_for_best_model": ("loss", "eval_loss")},
)  # fmt: skip
"""Keys of transformers' TrainingArguments."""
