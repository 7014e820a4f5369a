"""What else follows from a layout: idle time of the pipeline, time of a step, size of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ft.models.architecture import Architecture
from megatron_ft.planner.known import Gpu
from megatron_ft.planner.memory import Job, parameters

EFFICIENCY = 0.45
"""Share of a GPU's peak that its matrix products reach, assumed."""
BETWEEN_NODES = 25.0
"""GB/s each way that a GPU has to another node, assumed (200 Gbit/s a GPU)."""
_OTHER_FILES = 5  # config.json, training.yaml, common.pt, metadata.json, .metadata; the tokenizer's own are not counted


def bubble(job: Job) -> float:
    """Share of a step in which a stage waits: (p-1)/(v m + p - 1). Narayanan et al. 2021; v chunks a stage, m microbatches."""
    wait = job.pp - 1
    return wait / (job.split.virtual_size * job.microbatches + wait)


def whole_model(arch: Architecture) -> int:
    """Parameters without padding or copies: tp 1 pads to 128 rows, which are taken off again."""
    count = parameters(arch, 1, arch.num_layers, True, True)
    padding = -arch.vocab_size % 128
    return count - padding * arch.hidden_size * (1 if arch.tied_embeddings else 2)


def flops(arch: Architecture, job: Job) -> float:
    """Floating-point operations of a step: 6 a parameter and token, attention's products, and what is computed twice."""
    tokens = job.global_batch * job.seq_length
    embedding = 0 if arch.tied_embeddings else arch.vocab_size * arch.hidden_size  # a look-up, no product
    matrices = 6 * (whole_model(arch) - embedding) * tokens
    attention = (
        6 * arch.num_layers * arch.num_attention_heads * arch.head_dim * job.seq_length * tokens
    )  # causal: half the square
    again = {"none": 0.0, "selective": attention / 3, "full": (matrices + attention) / 3}[job.recompute]
    return matrices + attention + again


@dataclass(frozen=True)
class Time:
    """Seconds of a step, estimated."""

    compute: float
    waiting: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.communication


def step_time(arch: Architecture, job: Job, gpu: Gpu, gpus_per_node: int) -> Time:
    """Compute at EFFICIENCY of the peak, the bubble, and communication that nothing hides. To compare layouts; not a measurement."""
    compute = flops(arch, job) / (job.gpus * gpu.tflops * 1e12 * EFFICIENCY * _shape_efficiency(arch, job))
    waiting = compute * bubble(job) / (1 - bubble(job))
    return Time(compute, waiting, _communication(arch, job, gpu, gpus_per_node))


def _shape_efficiency(arch: Architecture, job: Job) -> float:
    """Narrow matrices use a GPU less well: half speed where a rank's share of the hidden size and tokens is small."""
    rows, columns = job.seq_length * job.micro_batch, arch.ffn_hidden_size / job.tp
    return rows / (rows + 512) * columns / (columns + 512)


def _communication(arch: Architecture, job: Job, gpu: Gpu, gpus_per_node: int) -> float:
    """Tensor parallel: four sums of the residual a layer and microbatch (twice the bytes of a gather; as many with sequence
    parallelism, as gathers and scatters), six where layers are recomputed. Data parallel: gradients once a step. Pipeline: the residual.
    """
    residual = job.seq_length * job.micro_batch * arch.hidden_size * job.width
    layers = -(-arch.num_layers // job.pp)
    link = (gpu.link if job.tp <= gpus_per_node else BETWEEN_NODES) * 1e9
    sums = 6 if job.recompute == "full" else 4
    tensor = sums * 2 * residual * (job.tp - 1) / job.tp / link * layers * job.microbatches if job.tp > 1 else 0.0
    shared = job.tp if job.sequence_parallel else 1
    edge = (gpu.link if job.gpus <= gpus_per_node else BETWEEN_NODES) * 1e9
    passes = 2 * job.microbatches * job.split.virtual_size if job.pp > 1 else 0
    pipeline = passes * residual / shared / edge
    gradients = 2 * 4 * whole_model(arch) / (job.tp * job.pp) * (job.dp - 1) / job.dp / edge
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
    """torch_dist: the whole model once, padding included, whatever the layout; its Adam state; two files a rank that writes."""
    rows = -(-arch.vocab_size // (128 * job.tp)) * 128 * job.tp - arch.vocab_size
    count = whole_model(arch) + rows * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    return Saved(
        count * job.width, count * (12 if job.bf16 or job.distributed_optimizer else 8), 2 * job.gpus + _OTHER_FILES
    )
