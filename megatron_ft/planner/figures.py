"""Estimates for a layout: idle time of the pipeline, time of a step, size of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import family_of
from megatron_ft.models.quantised import is_quantised
from megatron_ft.planner.known import Gpu
from megatron_ft.planner.memory import Job, parameters
from megatron_ft.quantization.sizes import bytes_on_disk

EFFICIENCY = 0.45
"""Assumed share of a GPU's peak that its matrix products reach."""
BETWEEN_NODES = 25.0
"""Assumed GB/s in each direction between a GPU and another node (200 Gbit/s per GPU)."""
_OTHER_FILES = 5  # config.json, training.yaml, common.pt, metadata.json, .metadata; tokenizer files are not counted


def bubble(job: Job) -> float:
    """Return the share of a step in which a stage waits: (p-1)/(v m + p - 1), v chunks, m microbatches (Narayanan et al. 2021)."""
    wait = job.pp - 1
    return wait / (job.split.virtual_size * job.microbatches + wait)


def whole_model(arch: Architecture) -> int:
    """Return the number of parameters without padding or copies: the padding to 128 rows at TP 1 is subtracted."""
    count = parameters(arch, 1, arch.num_layers, True, True)
    padding = -arch.vocab_size % 128
    return count - padding * arch.hidden_size * (1 if arch.tied_embeddings else 2)


def flops(arch: Architecture, job: Job) -> float:
    """Return the floating-point operations of a step: 6 per parameter and token, attention's products, and recomputation.

    A frozen parameter takes 4: there is no product for its gradient.
    """
    tokens = job.global_batch * job.seq_length
    embedding = 0 if arch.tied_embeddings else arch.vocab_size * arch.hidden_size  # a lookup, no matrix product
    matrices = (4 if job.lora or job.nf4 else 6) * (whole_model(arch) - embedding) * tokens
    matrices += 6 * job.lora.parameters(arch) * tokens if job.lora else 0
    attention = (
        6 * arch.num_layers * arch.num_attention_heads * arch.head_dim * job.seq_length * tokens
    )  # causal: half the square
    forward = matrices / 2 + attention / 3 if job.nf4 else (matrices + attention) / 3
    again = {"none": 0.0, "selective": attention / 3, "full": forward}[job.recompute]
    return matrices + attention + again


@dataclass(frozen=True)
class Time:
    """Estimated seconds of a step."""

    compute: float
    waiting: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.communication


def step_time(arch: Architecture, job: Job, gpu: Gpu, gpus_per_node: int) -> Time:
    """Estimate a step: compute at EFFICIENCY of the peak, bubble, communication without overlap. For comparing layouts only."""
    compute = flops(arch, job) / (job.gpus * gpu.tflops * 1e12 * EFFICIENCY * _shape_efficiency(arch, job))
    waiting = compute * bubble(job) / (1 - bubble(job))
    return Time(compute, waiting, _communication(arch, job, gpu, gpus_per_node))


def _shape_efficiency(arch: Architecture, job: Job) -> float:
    """Return the efficiency for narrow matrices: it falls if a rank's share of the MLP width, or its tokens per step, is small."""
    rows, columns = job.positions * job.micro_batch, arch.ffn_hidden_size / job.tp
    return rows / (rows + 512) * columns / (columns + 512)


def _communication(arch: Architecture, job: Job, gpu: Gpu, gpus_per_node: int) -> float:
    """Return the seconds of communication. Tensor parallel: four all-reduces of the residual per layer and microbatch, six with
    recomputed layers; sequence parallelism sends as many bytes, as gathers and scatters. Data parallel: the gradients once per step.
    Pipeline: the residual. Context parallel: not counted.
    """
    residual = job.positions * job.micro_batch * arch.hidden_size * job.width
    layers = -(-arch.num_layers // job.pp)
    link = (gpu.link if job.tp <= gpus_per_node else BETWEEN_NODES) * 1e9
    sums = 6 if job.recompute == "full" else 4
    tensor = sums * 2 * residual * (job.tp - 1) / job.tp / link * layers * job.microbatches if job.tp > 1 else 0.0
    shared = job.tp if job.sequence_parallel else 1
    edge = (gpu.link if job.gpus <= gpus_per_node else BETWEEN_NODES) * 1e9
    passes = 2 * job.microbatches * job.split.virtual_size if job.pp > 1 else 0
    pipeline = passes * residual / shared / edge
    trained = job.lora.parameters(arch) if job.lora else 0 if job.nf4 else whole_model(arch)
    gradients = 2 * 4 * trained / (job.tp * job.pp) * (job.replicas - 1) / job.replicas / edge
    return tensor + pipeline + gradients


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk."""

    weights: int
    optimizer: int
    files: int

    @property
    def bytes(self) -> int:
        return self.weights + self.optimizer


def checkpoint(arch: Architecture, job: Job) -> Saved:
    """Return the size in torch_dist format: the padded model once, in any layout, or only its adapters; the Adam state; two files per
    writing rank.
    """
    if job.lora or job.nf4:
        return _saved(job.lora.parameters(arch) if job.lora else 0, job)
    rows = -(-arch.vocab_size // (128 * job.tp)) * 128 * job.tp - arch.vocab_size
    count = whole_model(arch) + rows * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    return _saved(count, job)


def _saved(count: int, job: Job) -> Saved:
    return Saved(
        count * job.width, count * (12 if job.bf16 or job.distributed_optimizer else 8), 2 * job.gpus + _OTHER_FILES
    )


def nf4_on_disk(arch: Architecture, job: Job, double_quant: bool) -> int:
    """Return the bytes of the weights of a quantised checkpoint, without padding rows."""
    matrices = [
        shape for rule in family_of(arch).rules(arch) if is_quantised(rule) for shape in rule.hf_shapes(arch)
    ] * arch.num_layers
    others = whole_model(arch) - sum(rows * columns for rows, columns in matrices)
    return others * job.width + bytes_on_disk([(rows, columns) for rows, columns in matrices], double_quant)
