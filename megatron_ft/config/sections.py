"""What training can be told, as dataclasses: each field is a flag, its docstring the help. Names are Megatron's.

Values only; the rules between them are in checks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Parallelism:
    """How the model is spread over processes"""

    tensor_model_parallel_size: int = 1
    """processes that share each layer's matrices (TP)"""
    pipeline_model_parallel_size: int = 1
    """stages the layers are divided over (PP); the remaining processes are data parallel"""
    sequence_parallel: bool = False
    """split activations outside the matrix products along the sequence too (with TP > 1)"""
    use_distributed_optimizer: bool = False
    """split optimizer state over the data-parallel processes (ZeRO-1)"""
    distributed_timeout_minutes: float = 30.0
    """how long a process waits for another before it gives up"""


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
    scalar_loss_mask: float = 0.0
    """loss weight of tokens that are not the assistant's (assistant tokens have 1)"""
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


@dataclass
class Numerics:
    """Precision, dropout, memory"""

    bf16: bool = False
    """compute in bfloat16, with fp32 main weights and gradients"""
    hidden_dropout: float = 0.0
    """dropout on the residual stream"""
    attention_dropout: float = 0.0
    """dropout on the attention weights"""
    lima_dropout: bool = False
    """let the residual dropout rise linearly from 0 at the first layer to hidden_dropout at the last"""
    recompute_granularity: Literal["selective", "full"] | None = None
    """recompute activations in the backward pass: of the attention (selective) or of whole layers (full)"""


@dataclass
class Checkpointing:
    """Where weights come from and go to"""

    load: str = field(default="", metadata={"required": True})
    """checkpoint to start from (hf-to-megatron makes one) or to resume"""
    save: str | None = None
    """where checkpoints go; default: nowhere"""
    save_interval: int | None = None
    """steps between checkpoints; default: only at the end"""
    finetune: bool = False
    """take the weights only: iteration, optimizer and schedule start anew"""


@dataclass
class Logging:
    """What is printed and measured"""

    log_interval: int = 10
    """steps between progress lines"""
    eval_interval: int | None = None
    """steps between evaluations on the validation shards; default: only at the end"""
    eval_iters: int = 10
    """global batches an evaluation takes, at most"""
    run_dir: str | None = None
    """where metrics.jsonl and config.yaml go; default: the --save folder"""


TRAINING = (Checkpointing, Data, Batch, Parallelism, Optimizer, Numerics, Logging)
"""The sections of `megatron-ft finetune`, in the order in which its run() takes them."""
