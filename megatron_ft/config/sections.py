"""The settings of training, a dataclass a section: each field is a flag, its docstring the help. Names are Megatron's.

Values only. The rules between them are in checks.py; all sections together are settings.TrainingSettings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

RopeScaling = Literal["linear", "ntk", "ntk-margin", "ntk-yarn", "ntk-by-parts", "yarn", "dynamic"]
"""Methods that a factor alone describes: models/rope.py."""
CkptFormat = Literal["torch_dist", "torch"]


@dataclass
class Parallelism:
    """How the model is spread over processes"""

    tensor_model_parallel_size: int = 1
    """processes that share each layer's matrices (TP)"""
    pipeline_model_parallel_size: int = 1
    """stages the layers are divided over (PP); the remaining processes are data parallel"""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """interleave: each stage holds several chunks of this many layers, which shortens the pipeline's idle time"""
    virtual_pipeline_model_parallel_size: int | None = None
    """the same said the other way: chunks a stage"""
    decoder_first_pipeline_num_layers: int | None = None
    """layers of the first stage, where it is to hold fewer (it has the embedding too); default: as many as the others"""
    decoder_last_pipeline_num_layers: int | None = None
    """layers of the last stage, which has the output layer too"""
    pipeline_model_parallel_layout: str | None = None
    """every chunk written out: E embedding, t a layer, L loss, | between chunks, *n repeats: Et*3|(tt|)*2t*3L"""
    context_parallel_size: int = 1
    """processes that share the positions of each row (CP): for long rows, on GPUs with Transformer Engine, with --no_packing"""
    sequence_parallel: bool = False
    """split activations outside the matrix products along the sequence too (with TP > 1)"""
    use_distributed_optimizer: bool = False
    """split optimizer state over the data-parallel processes (ZeRO-1)"""
    distributed_timeout_minutes: float = 30.0
    """how long a process waits for another before it gives up"""

    @property
    def model_parallel_sizes(self) -> tuple[int, ...]:
        """Sizes of the groups that share one replica of the model: TP, PP, CP."""
        return (self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size)

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one replica of the model: TP x PP x CP."""
        return math.prod(self.model_parallel_sizes)


@dataclass
class Data:
    """What is trained on"""

    data_path: list[str] = field(default_factory=list, metadata={"required": True})
    """prefix of the training shards (PREFIX of PREFIX-text.bin), one or more"""
    valid_data_path: list[str] = field(default_factory=list)
    """prefix of the validation shards; default: the -val shards beside a -train prefix, where there are any"""
    seq_length: int = 4096
    """positions in a row"""
    packing: bool = True
    """put several samples in a row, each with its own positions and attention; --no_packing: one padded sample a row"""
    variable_seq_lengths: bool = False
    """with --no_packing: rows as long as the longest sample of the microbatch, not seq_length"""
    over_long: Literal["cut", "drop", "split"] = "cut"
    """what becomes of a sample longer than a row: its beginning, nothing, or all of it in several rows"""
    data_weights: list[float] = field(default_factory=list)
    """share of each data_path in an epoch; default: as many samples as each has"""
    data_weights_by: Literal["samples", "supervised_tokens"] = "samples"
    """what the shares are shares of"""
    verify_data: bool = True
    """compare all shards with their hashes before the run, once on each machine (gigabytes a second); --no_verify_data skips this"""
    data_cache_path: str | None = None
    """folder for the packing plans of large sets, which processes share; default: .plans beside the first data_path; "none": no files"""
    scalar_loss_mask: float = 0.0
    """loss weight of tokens that are not the assistant's (assistant tokens have 1)"""
    role_loss_weights: list[str] = field(default_factory=list)
    """loss weight of single roles: user=0.1 system=0"""
    marked_loss_weight: float = 1.0
    """loss weight of tokens that the shards mark for language modelling, whoever speaks; 0 ignores the marks"""
    seed: int = 1234
    """of the sample order and of dropout"""


@dataclass
class Batch:
    """How much at a time"""

    micro_batch_size: int = 1
    """rows a process computes at once"""
    global_batch_size: int | None = None
    """rows an optimizer step; default: micro_batch_size x data-parallel size"""
    train_iters: int = field(default=0, metadata={"required": True})
    """optimizer steps in the whole run"""
    max_skipped_iters: int = 10
    """steps in a row that may be skipped for gradients that are not finite, before the run gives up; overflows with a dynamic loss
    scale do not count"""


@dataclass
class Optimizer:
    """AdamW and its schedule"""

    lr: float = 1e-5
    """highest learning rate"""
    min_lr: float = 0.0
    """learning rate at the end of the decay"""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """shape of the decay"""
    lr_warmup_iters: int = 0
    """steps of linear warm-up from 0"""
    lr_decay_iters: int | None = None
    """steps until min_lr; default: train_iters"""
    weight_decay: float = 0.01
    """decoupled weight decay, not on norms and biases"""
    adam_beta1: float = 0.9
    """decay of the first moment"""
    adam_beta2: float = 0.999
    """decay of the second moment"""
    adam_eps: float = 1e-8
    """added to the root of the second moment"""
    clip_grad: float = 1.0
    """largest gradient norm; 0: no clipping"""
    unfrozen_parameters: list[str] = field(default_factory=list)
    """train only parameters whose name in the checkpoint holds a match of one of these regular expressions, such as
    layers.(30|31).mlp; default: all parameters"""


@dataclass
class Numerics:
    """Precision, dropout, memory"""

    bf16: bool = False
    """compute in bfloat16, with fp32 main weights and gradients"""
    fp16: bool = False
    """compute in float16 instead, with fp32 main weights and gradients and a loss scale"""
    loss_scale: float | None = None
    """fixed scale of the loss with fp16; default: one that falls when gradients overflow and rises when they do not"""
    initial_loss_scale: float = 4294967296.0
    """first value of that scale"""
    min_loss_scale: float = 1.0
    """below which it does not fall"""
    loss_scale_window: int = 1000
    """steps without an overflow after which it doubles"""
    hysteresis: int = 2
    """overflows after which it halves"""
    grad_reduce_in_bf16: bool = False
    """with bf16: gradients too are kept and reduced in bfloat16, 2 bytes a parameter instead of 4, less exact"""
    hidden_dropout: float = 0.0
    """dropout on the residual stream"""
    attention_dropout: float = 0.0
    """dropout on the attention weights"""
    lima_dropout: bool = False
    """let the residual dropout rise linearly from 0 at the first layer to hidden_dropout at the last"""
    recompute_granularity: Literal["selective", "full"] | None = None
    """recompute activations in the backward pass: of parts of each layer (selective) or of whole layers (full)"""
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm"]] = field(default_factory=list)
    """which parts with selective; default: core_attn"""
    recompute_method: Literal["uniform", "block"] | None = None
    """with full: all layers, in groups (uniform, the default), or only the first of each stage (block)"""
    recompute_num_layers: int | None = None
    """layers a group (uniform), or how many of the stage (block); default: 1"""
    check_replicas_every: int | None = None
    """compare the weights of data-parallel replicas, to the bit, every so many steps; default: never"""


@dataclass
class Checkpointing:
    """Where weights come from and go to"""

    load: str = field(default="", metadata={"required": True})
    """checkpoint to start from (hf-to-megatron makes one) or to resume"""
    save: str | None = None
    """where checkpoints go; default: nowhere"""
    save_interval: int | None = None
    """steps between checkpoints; default: only at the end"""
    keep_last: int | None = None
    """checkpoints to keep in --save, the newest; default: all"""
    save_retain_interval: int | None = None
    """with --keep_last: checkpoints at multiples of this iteration stay for good"""
    async_save: bool = False
    """write checkpoints in the background while training goes on"""
    ckpt_format: CkptFormat = "torch_dist"
    """torch_dist: loads into any layout; torch: classic mp_rank folders, for the layout they were saved in"""
    verify_checkpoint: bool = True
    """compare every file of a checkpoint with its digest before loading it; --no_verify_checkpoint skips this"""
    auto_resume: bool = False
    """continue from the newest checkpoint in --save where there is one, else begin from --load"""
    finetune: bool = False
    """take the weights only: iteration, optimizer and schedule start anew"""


@dataclass
class Model:
    """What the model is said to be (the checkpoint knows; a flag that differs is refused)"""

    use_checkpoint_args: bool = False
    """let the checkpoint win where a flag of this section differs, with a warning"""
    model_name: str | None = None
    """family: llama, llama2, mistral, falcon, ..."""
    num_layers: int | None = None
    """transformer layers"""
    hidden_size: int | None = None
    """width of the residual stream"""
    ffn_hidden_size: int | None = None
    """width of the MLP"""
    num_attention_heads: int | None = None
    """query heads"""
    num_attention_heads_kv: int | None = None
    """key-value heads"""
    max_position_embeddings: int | None = None
    """positions the model was made for"""
    position_embedding_type: Literal["rotary", "rope"] | None = None
    """rotary is the only kind"""
    use_rms_norm: bool = False
    """RMSNorm rather than LayerNorm"""
    layernorm_epsilon: float | None = None
    """added to the variance in norms"""
    glu_activation: Literal["swiglu"] | None = None
    """gated activation of the MLP"""
    no_tie_embed_logits: bool = False
    """the output layer has weights of its own"""
    tokenizer_type: str | None = None
    """SentencePieceTokenizer or a Hugging Face kind; with vocab_file"""
    vocab_file: str | None = None
    """tokenizer the model should have: compared with the checkpoint's"""
    vocab_extra_ids_list: str | None = None
    """tokens added to it, with commas between"""
    rope_scaling_type: RopeScaling | None = None
    """method that stretches the positions of a model that has none yet; default with a factor: linear"""
    rope_scaling_factor: float | None = None
    """how many times longer; 1.0 is no scaling"""


@dataclass
class Kernels:
    """Faster ways to compute the same (GPU)"""

    use_flash_attn: bool = False
    """flash-attn for packed rows where it is installed, else torch's own flash attention"""
    fused_kernels: bool = True
    """on a GPU, activation, loss, rotary embedding and dropout compiled into one kernel each; --no_fused_kernels: torch's operations
    one by one"""
    gradient_accumulation_fusion: bool = True
    """add weight gradients to their buffer within the matrix product, where apex's extension for it is installed (GPU)"""
    no_bias_gelu_fusion: bool = False
    """accepted as written in Megatron command lines: nothing is fused with a bias here"""
    no_bias_dropout_fusion: bool = False
    """likewise"""
    overlap_grad_reduce: bool = False
    """reduce gradients while the backward pass goes on"""
    overlap_param_gather: bool = False
    """gather parameters while the forward pass goes on (with the distributed optimizer)"""
    overlap_p2p_communication: bool = False
    """exchange activations between interleaved pipeline stages while computing"""
    tp_comm_overlap: bool = False
    """accepted as written in Megatron command lines: it needs Transformer Engine's linear layers, which are not used here"""


@dataclass
class Logging:
    """What is printed and measured"""

    log_interval: int = 10
    """steps between progress lines"""
    eval_interval: int | None = None
    """steps between evaluations on the validation shards; default: only at the end"""
    eval_iters: int = 10
    """global batches an evaluation takes, at most; 0: no evaluation"""
    run_dir: str | None = None
    """where metrics.jsonl and training.yaml go; default: the --save folder"""
    report: bool = True
    """write report.html there when the run ends; at any other time: megatron-ft report"""
    tensorboard_dir: str | None = None
    """where TensorBoard's event files go"""
    log_timers_to_tensorboard: bool = False
    """wait for the device after each phase of a step, so that the seconds logged per phase are exact"""
    wandb_logger: bool = False
    """log to Weights & Biases (WANDB_MODE=offline keeps it on this machine)"""
    wandb_project: str = "megatron_ft"
    """project there"""
    wandb_name: str | None = None
    """name of the run there; default: wandb's own"""


@dataclass
class Processes:
    """Starting the processes"""

    nproc_per_node: int | None = None
    """processes to start on this machine, one for each GPU; default: this one alone, or those that torchrun or srun started"""
    nnodes: int | None = None
    """machines that take part, each with the same command; default: as many as srun says, else 1"""
    node_rank: int | None = None
    """number of this machine, from 0; default: as srun says"""
    master_addr: str | None = None
    """name of the first machine; default: MASTER_ADDR"""
    master_port: int | None = None
    """a free port there; default: MASTER_PORT, or any on a single machine"""
    log_dir: str | None = None
    """what each process prints also goes to rank-000.log and so on in this folder"""


@dataclass
class Launching(Processes):
    """Starting the processes, and trying a command line out"""

    dry_run: bool = False
    """do all but the steps: read the settings and the data, build and load the model, say what would be done; nothing is written"""
    rehearse: bool = False
    """the same command on CPU processes of one machine, model and rows shrunk: shows a launch script's mistakes before it has GPUs"""
    make_believe: str | None = None
    """with --rehearse: make up a checkpoint or shards that are not there, for this model (llama2-70b, or a config.json)"""


@dataclass
class Stopping:
    """When to save and stop before train_iters"""

    exit_duration_in_mins: float | None = None
    """minutes after which the run saves and stops, with exit code 75: start it again with --auto_resume"""
    exit_interval: int | None = None
    """save and stop, with exit code 0, after an iteration that this divides"""
    exit_before_end_in_mins: float = 5.0
    """minutes before the end of a SLURM job (SLURM_JOB_END_TIME) at which to save and stop, with exit code 75; 0: do not"""
