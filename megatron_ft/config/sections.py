"""The settings of training, one dataclass per section. Each field is a flag and its docstring is the help text. Names are Megatron's.

Only values: the rules between them are in checks.py, and settings.TrainingSettings holds all sections together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

CkptFormat = Literal["torch_dist", "torch"]


@dataclass
class Parallelism:
    """Parallel layout of the model"""

    tensor_model_parallel_size: int = 1
    """number of processes that share each layer's weight matrices (TP)"""
    pipeline_model_parallel_size: int = 1
    """number of pipeline stages that the layers are divided over (PP); the remaining processes are data parallel"""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """interleaved pipeline, with less idle time: each stage holds several chunks of this many layers; default: one chunk per stage"""
    virtual_pipeline_model_parallel_size: int | None = None
    """interleaved pipeline: number of chunks of layers that each stage holds; default: one"""
    decoder_first_pipeline_num_layers: int | None = None
    """number of layers of the first pipeline stage, which also holds the embedding; default: as many as the other stages"""
    decoder_last_pipeline_num_layers: int | None = None
    """number of layers of the last pipeline stage, which also holds the output layer; default: as many as the other stages"""
    pipeline_model_parallel_layout: str | None = None
    """layers of every pipeline chunk as text, such as Et*3|(tt|)*2t*3L: E embedding, t one layer, L loss, | between chunks, *n repeats"""
    context_parallel_size: int = 1
    """number of processes that share the positions of each row (CP), for long rows; needs GPUs, Transformer Engine and --no_packing"""
    sequence_parallel: bool = False
    """with TP > 1: also split the activations outside the matrix products along the sequence"""
    use_distributed_optimizer: bool = False
    """split the optimizer state over the data-parallel processes (ZeRO-1)"""
    distributed_timeout_minutes: float = 30.0
    """minutes that a process waits for another one before the run fails"""

    @property
    def model_parallel_sizes(self) -> tuple[int, ...]:
        """Return the sizes of the groups that share one replica of the model: TP, PP, CP."""
        return (self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size)

    @property
    def model_parallel_size(self) -> int:
        """Return the number of processes that hold one replica of the model: TP x PP x CP."""
        return math.prod(self.model_parallel_sizes)


@dataclass
class Data:
    """Training data"""

    data_path: list[str] = field(default_factory=list, metadata={"required": True})
    """prefixes of the training shards (PREFIX of PREFIX-text.bin), one or more"""
    valid_data_path: list[str] = field(default_factory=list)
    """prefixes of the validation shards; default: the -val shards beside each -train prefix, if they exist"""
    seq_length: int = 4096
    """tokens per row (the context length of training)"""
    packing: bool = True
    """put several samples in one row, each with its own positions and attention; --no_packing: one padded sample per row"""
    variable_seq_lengths: bool = False
    """with --no_packing: pad rows to the longest sample of the microbatch instead of seq_length"""
    over_long: Literal["cut", "drop", "split"] = "cut"
    """a sample longer than seq_length is shortened to its beginning (cut), left out (drop) or divided over several rows (split)"""
    data_type: Literal["instruction", "gpt"] | None = None
    """expected kind of the shards: with roles (instruction) or plain text (gpt); default: either"""
    split: str | None = None
    """shares of the documents of plain shards to train on, to validate on and to leave out, such as 969,30,1; default: all are trained on;
    shards with roles are divided when they are made"""
    data_weights: list[float] = field(default_factory=list)
    """share of each data_path in an epoch, one number per prefix; default: in proportion to the number of samples"""
    data_weights_by: Literal["samples", "supervised_tokens"] = "samples"
    """unit of --data_weights: shares of samples, or of tokens that are trained on"""
    verify_data: bool = True
    """compare all shards with their hashes before the run, once per machine (gigabytes per second); --no_verify_data skips this"""
    data_cache_path: str | None = None
    """folder for the packing plans of large datasets, shared by processes; default: .plans beside the first data_path; "none": no files"""
    scalar_loss_mask: float = 0.0
    """loss weight of all tokens that are not the assistant's; assistant tokens have weight 1"""
    role_loss_weights: list[str] = field(default_factory=list)
    """loss weights of single roles, such as user=0.1 system=0; default: 1 for the assistant, --scalar_loss_mask for all others"""
    train_on_reasoning: bool = True
    """train on the assistant's reasoning, such as <think> blocks; --no_train_on_reasoning: only on what follows it"""
    train_on_empty_reasoning: bool = True
    """train on reasoning blocks without text, which some chat templates add; --no_train_on_empty_reasoning: not on these"""
    train_on_tool_calls: bool = True
    """train on the assistant's tool calls; --no_train_on_tool_calls: only on its other text"""
    last_turn_only: bool = False
    """train on the last assistant turn of each sample only"""
    marked_loss_weight: float = 1.0
    """loss weight of tokens that the shards mark for language modelling, in any role; 0: ignore the marks"""
    seed: int = 1234
    """seed of the random sample order and of dropout"""


@dataclass
class Batch:
    """Batch size and number of steps"""

    micro_batch_size: int = 1
    """rows that one process computes at once"""
    global_batch_size: int | None = None
    """rows per optimizer step, over all processes; default: micro_batch_size x data-parallel size"""
    train_iters: int = field(default=0, metadata={"required": True, "instead": "epochs"})
    """number of optimizer steps of the whole run, counted from its first start"""
    epochs: float | None = None
    """in place of --train_iters: train on all samples this many times. With --data_weights an epoch is as long as all data_paths
    together and repeats some samples; a row that is not full moves to the next epoch, and the last step is filled with further rows"""
    max_skipped_iters: int = 10
    """stop the run after this many consecutive steps were skipped because of gradients that are not finite; overflows with a
    dynamic loss scale do not count"""


@dataclass
class Optimizer:
    """AdamW and learning rate schedule"""

    lr: float = 1e-5
    """highest learning rate, reached after the warm-up"""
    min_lr: float = 0.0
    """learning rate at the end of the decay"""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """shape of the learning rate decay; WSD: warm-up, then lr, then a decay in the last lr_wsd_decay_iters steps"""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """with --lr_decay_style WSD: shape of its decay"""
    lr_wsd_decay_iters: int | None = None
    """with --lr_decay_style WSD: number of steps of its decay, the last of lr_decay_iters"""
    lr_warmup_iters: int = 0
    """number of steps in which the learning rate rises linearly from lr_warmup_init to lr"""
    lr_warmup_fraction: float | None = None
    """in place of lr_warmup_iters: share of the steps of the schedule (lr_decay_iters, else all of the run)"""
    lr_warmup_init: float = 0.0
    """learning rate from which the warm-up rises"""
    lr_decay_iters: int | None = None
    """number of steps after which the learning rate is min_lr; default: train_iters"""
    weight_decay: float = 0.01
    """decoupled weight decay; norms and biases have none"""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """how weight decay changes over train_iters: not at all, or from start_weight_decay to end_weight_decay"""
    start_weight_decay: float | None = None
    """with --weight_decay_incr_style linear or cosine: the first weight decay, in place of weight_decay"""
    end_weight_decay: float | None = None
    """with --weight_decay_incr_style linear or cosine: the last weight decay"""
    adam_beta1: float = 0.9
    """decay rate of Adam's first moment"""
    adam_beta2: float = 0.999
    """decay rate of Adam's second moment"""
    adam_eps: float = 1e-8
    """epsilon that Adam adds to the square root of the second moment"""
    clip_grad: float = 1.0
    """clip the gradient to this global norm; 0: no clipping"""
    unfrozen_parameters: list[str] = field(default_factory=list)
    """train only parameters whose name in the checkpoint matches one of these regular expressions, such as
    layers.(30|31).mlp; default: all parameters"""


@dataclass
class Numerics:
    """Precision, dropout, memory"""

    bf16: bool = False
    """compute in bfloat16, with fp32 main weights and gradients"""
    fp16: bool = False
    """compute in float16, with fp32 main weights and gradients and a loss scale"""
    loss_scale: float | None = None
    """with --fp16: fixed loss scale; default: dynamic, lowered after overflows of the gradients and raised when there are none"""
    initial_loss_scale: float = 4294967296.0
    """with --fp16 and a dynamic loss scale: its first value"""
    min_loss_scale: float = 1.0
    """with --fp16 and a dynamic loss scale: its lowest value"""
    loss_scale_window: int = 1000
    """with --fp16 and a dynamic loss scale: number of steps without an overflow after which it is doubled"""
    hysteresis: int = 2
    """with --fp16 and a dynamic loss scale: number of overflows after which it is halved"""
    grad_reduce_in_bf16: bool = False
    """with --bf16: also store and reduce gradients in bfloat16, 2 bytes per parameter instead of 4; less exact"""
    hidden_dropout: float = 0.0
    """dropout probability on the residual stream"""
    attention_dropout: float = 0.0
    """dropout probability on the attention weights"""
    lima_dropout: bool = False
    """increase the residual dropout linearly from 0 at the first layer to hidden_dropout at the last"""
    recompute_granularity: Literal["selective", "full"] | None = None
    """recompute activations in the backward pass to save memory: parts of each layer (selective) or whole layers (full); default: none"""
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm"]] = field(default_factory=list)
    """parts of a layer that --recompute_granularity selective recomputes; default: core_attn"""
    recompute_method: Literal["uniform", "block"] | None = None
    """with --recompute_granularity full: all layers, in groups (uniform, the default), or only the first layers of each stage (block)"""
    recompute_num_layers: int | None = None
    """with --recompute_granularity full: layers per group (uniform), or recomputed layers per stage (block); default: 1"""
    check_replicas_every: int | None = None
    """number of steps between bit-exact comparisons of the weights of data-parallel replicas; default: never"""


@dataclass
class Adapters:
    """LoRA adapters"""

    lora_rank: int | None = None
    """train LoRA adapters of this rank and freeze the model; checkpoints then hold only the adapters; default: train the model"""
    lora_alpha: float | None = None
    """scale of the adapters' output, which is multiplied by alpha / rank; default: 16"""
    lora_dropout: float | None = None
    """dropout probability on the adapters' input; its masks do not depend on the layout; default: 0"""
    lora_target: list[str] = field(default_factory=list)
    """parts of a layer with adapters: qkv, proj, fc1, fc2, or module names such as q_proj, separated by commas; default: all"""
    lora_rs: bool = False
    """multiply the adapters' output by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)"""
    train_new_tokens: bool = False
    """with --lora_rank: also train the rows of added tokens in the embedding and the output layer, and save them with the adapters"""
    base_precision: Literal["nf4"] | None = None
    """with adapters: hold the linears of the frozen model in 4 bits (nf4, QLoRA); default: as the checkpoint does, see hf-to-megatron
    --quantize"""
    adapter: str | None = None
    """folder of a PEFT adapter for the model in --load (adapter_config.json), whose training continues; default: new adapters"""
    base: str | None = None
    """checkpoint with the model's own weights, when --load holds adapters; default: the one that the adapters name"""


@dataclass
class Distillation:
    """Distillation from a teacher"""

    teacher: str | None = None
    """checkpoint of a frozen teacher with the same vocabulary, in memory beside the model; the loss is then ce_weight x cross-entropy +
    kd_weight x T^2 x KL(teacher || model); default: no distillation"""
    teacher_logits: list[str] = field(default_factory=list)
    """prefixes of a teacher's stored log-probabilities (megatron-ft score), one for each --data_path, in place of --teacher"""
    kd_weight: float = 1.0
    """with a teacher: weight of the KL divergence"""
    ce_weight: float = 1.0
    """with a teacher: weight of the cross-entropy"""
    kd_temperature: float = 1.0
    """with a teacher: temperature T of both distributions of the KL divergence"""

    @property
    def has_teacher(self) -> bool:
        return self.teacher is not None or bool(self.teacher_logits)


@dataclass
class Checkpointing:
    """Loading and saving checkpoints"""

    load: str = field(default="", metadata={"required": True})
    """checkpoint to start from (made by hf-to-megatron) or to resume"""
    save: str | None = None
    """folder for the checkpoints of this run; default: nothing is saved"""
    save_interval: int | None = None
    """number of steps between checkpoints; default: one checkpoint at the end"""
    keep_last: int | None = None
    """keep only this many checkpoints in --save, the newest; default: all"""
    save_retain_interval: int | None = None
    """with --keep_last: never remove checkpoints at multiples of this iteration"""
    async_save: bool = False
    """write checkpoints in the background while training continues"""
    ckpt_format: CkptFormat = "torch_dist"
    """format of the saved checkpoints; torch_dist: loads into any layout; torch: mp_rank folders, which load into the same layout only"""
    verify_checkpoint: bool = True
    """compare every file of a checkpoint with its digest before loading it; --no_verify_checkpoint skips this"""
    auto_resume: bool = False
    """continue from the newest checkpoint in --save if there is one, else start from --load"""
    finetune: bool = False
    """load only the weights from --load; iteration, optimizer and schedule start from the beginning"""


@dataclass
class Kernels:
    """Faster kernels and communication (GPU)"""

    use_flash_attn: bool = False
    """use the flash-attn package for packed rows if it is installed, else torch's own flash attention"""
    fused_kernels: bool = True
    """on a GPU: compile activation, loss, rotary embedding and dropout into one kernel each; --no_fused_kernels: use torch's separate
    operations"""
    gradient_accumulation_fusion: bool = True
    """on a GPU: add weight gradients to their buffer within the matrix product, if apex's extension for it is installed"""
    no_bias_gelu_fusion: bool = False
    """has no effect, accepted because Megatron command lines contain it: bias and GELU are never fused"""
    no_bias_dropout_fusion: bool = False
    """has no effect, accepted because Megatron command lines contain it: bias and dropout are never fused"""
    overlap_grad_reduce: bool = False
    """reduce gradients over data-parallel processes during the backward pass"""
    overlap_param_gather: bool = False
    """with --use_distributed_optimizer: gather parameters during the forward pass"""
    overlap_p2p_communication: bool = False
    """with an interleaved pipeline: exchange activations between stages during the computation"""
    tp_comm_overlap: bool = False
    """has no effect, accepted because Megatron command lines contain it: Transformer Engine's linear layers are not used"""


@dataclass
class Logging:
    """Progress, metrics and reports"""

    log_interval: int = 10
    """number of steps between lines of progress"""
    eval_interval: int | None = None
    """number of steps between evaluations on the validation shards; default: only at the end"""
    eval_iters: int = 10
    """largest number of global batches per evaluation; 0: no evaluation"""
    sample_prompts: str | None = None
    """file of prompts that the model answers before the first step, while it is trained and at the end, one JSON object per line:
    {"prompt": text} or {"messages": [...]}, with an "answer" to compare with where there is one; answers are greedy"""
    sample_chats: int = 4
    """without --sample_prompts: number of chats of the validation data (else of the training data) whose last question the model answers
    before the first step and after the last; answers are greedy and at most as long as those of the data; 0: none"""
    sample_interval: int | None = None
    """number of steps between answers to --sample_prompts or --sample_chats; default: for --sample_prompts that of --eval_interval, for
    chats of the data only before the first step and after the last"""
    sample_max_new_tokens: int = 64
    """largest number of tokens per answer to --sample_prompts or --sample_chats; each costs a forward pass of the model"""
    run_dir: str | None = None
    """folder for metrics.jsonl, training.yaml and report.html; default: the --save folder"""
    report: bool = True
    """write report.html into the run's folder at the end; `megatron-ft report` writes it at any other time"""
    tensorboard_dir: str | None = None
    """folder for TensorBoard's event files; default: none are written"""
    log_sparsity: bool | None = None
    """log the share of exact zeros in the MLPs (at the input of the down projection), overall and by layer; default: only for models with
    ReLU or its square"""
    log_timers_to_tensorboard: bool = False
    """wait for the device after each phase of a step, so that the logged seconds per phase are exact; slower"""
    wandb_logger: bool = False
    """log to Weights & Biases; with WANDB_MODE=offline the logs stay on this machine"""
    wandb_project: str = "megatron_ft"
    """name of the Weights & Biases project"""
    wandb_name: str | None = None
    """name of the run in Weights & Biases; default: generated by wandb"""
    wandb_entity: str | None = None
    """user or team of the Weights & Biases project; default: your own"""
    wandb_id: str | None = None
    """id of the run in Weights & Biases, which is continued if it exists; default: a new one"""

    def is_watched(self, checkpointing: Checkpointing) -> bool:
        """Return whether a report, TensorBoard or Weights & Biases shows more than the lines on the screen."""
        return bool(self.run_dir or checkpointing.save or self.tensorboard_dir or self.wandb_logger)


@dataclass
class Processes:
    """Processes and machines"""

    nproc_per_node: int | None = None
    """number of processes to start on this machine, one per GPU; default: only this process, or those started by torchrun or srun"""
    nnodes: int | None = None
    """number of machines of the run, each with the same command; default: from srun's variables, else 1"""
    node_rank: int | None = None
    """index of this machine, from 0; default: from srun's variables"""
    master_addr: str | None = None
    """host name or address of the first machine (node_rank 0); default: the variable MASTER_ADDR"""
    master_port: int | None = None
    """free port on the first machine (node_rank 0); default: the variable MASTER_PORT, or any free port on a single machine"""
    log_dir: str | None = None
    """folder for a copy of each process's output, in rank-000.log and so on; default: no copy"""


@dataclass
class Launching(Processes):
    """Processes and machines, and trials of a command line"""

    dry_run: bool = False
    """read settings and data, build and load the model, print what would be done, and stop before the first step; nothing is written"""
    rehearse: bool = False
    """run the same command with a small model and short rows on CPU processes, to find mistakes of a launch script without GPUs"""
    make_believe: str | None = None
    """with --rehearse: generate a missing checkpoint or missing shards for this model (a name such as llama2-70b, or a config.json)"""


@dataclass
class Stopping:
    """Saving and stopping before train_iters"""

    exit_duration_in_mins: float | None = None
    """save and stop with exit code 75 after this many minutes; start again with --auto_resume; default: no limit"""
    exit_interval: int | None = None
    """save and stop with exit code 0 at the next iteration that is a multiple of this number; default: never"""
    exit_before_end_in_mins: float = 5.0
    """save and stop with exit code 75 this many minutes before the end of a SLURM job (SLURM_JOB_END_TIME); 0: never"""
