"""Estimates for a layout: idle time of the pipeline, time of a step, size of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import family_of
from megatron_ft.models.pipeline import split_beside
from megatron_ft.models.quantised import is_quantised
from megatron_ft.planner.known import Gpu
from megatron_ft.planner.memory import Job, adapter_sizes, distinct_stages, kind_of_stage, parameters, recomputed_share
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


@dataclass(frozen=True)
class _Forward:
    """Floating-point operations of a forward pass for one token: of a layer's matrices, of its MLP's, of its attention, of the logits.

    Narayanan et al. 2021 (Efficient Large-Scale Language Model Training), section 5.1: 2 per weight, and 2 s h in attention over a causal
    row of s positions.
    """

    matrices: int
    mlp: int
    attention: int
    logits: int

    @property
    def layer(self) -> int:
        return self.matrices + self.attention


def _forward(arch: Architecture, seq_length: int) -> _Forward:
    matrices = 2 * parameters(arch, 1, 1, False, False)
    mlp = 2 * (3 if arch.gated else 2) * arch.hidden_size * arch.ffn_hidden_size
    attention = 2 * arch.num_attention_heads * arch.head_dim * seq_length
    return _Forward(matrices, mlp, attention, 2 * arch.vocab_size * arch.hidden_size)


def _stage_flops(arch: Architecture, job: Job, number: int, layers: float) -> float:
    """Return the operations of a stage with so many layers for one token: forward, twice as many backward, what is computed again, and the
    teacher's forward. A frozen matrix has no product for its gradient.
    """
    one, last = _forward(arch, job.seq_length), number == job.pp - 1
    passes = 2 if job.lora or job.nf4 else 3
    done = layers * (passes * one.matrices + 3 * one.attention + _again(one, job, number)) + last * passes * one.logits
    own = len(job.split.layers_of(number))
    done += 6 * sum(adapter_sizes(arch, job, number)) * job.tp * layers / own if job.lora and own else 0
    if job.teacher:
        theirs = _forward(job.teacher, job.seq_length)
        done += _teacher_layers(arch, job, number) * theirs.layer + last * theirs.logits
    return done


def _again(one: _Forward, job: Job, number: int) -> float:
    """Return what recomputation adds to a layer of a stage, on average (Korthikanti et al. 2022, section 5)."""
    if job.recompute == "full":
        return recomputed_share(job, number) * one.layer
    if job.recompute == "none":
        return 0.0
    return one.attention * ("core_attn" in job.recompute_modules) + one.mlp * ("mlp" in job.recompute_modules)


def _teacher_layers(arch: Architecture, job: Job, number: int) -> int:
    assert job.teacher is not None
    return len(split_beside(job.split, arch.num_layers, job.teacher.num_layers).layers_of(number))


def flops(arch: Architecture, job: Job) -> float:
    """Return the floating-point operations of a step, over all stages."""
    return job.global_batch * job.seq_length * sum(_stages_flops(arch, job))


def _stages_flops(arch: Architecture, job: Job) -> list[float]:
    found: dict[tuple[int, int], float] = {}
    for number, kind in enumerate(kinds := [kind_of_stage(job, number) for number in range(job.pp)]):
        if kind not in found:
            found[kind] = _stage_flops(arch, job, number, kind[0])
    return [found[kind] for kind in kinds]


def _busiest(arch: Architecture, job: Job) -> float:
    """Return the operations of the stage for which all others wait. Interleaved stages wait for the largest of all chunks in every turn."""
    turns, largest = job.split.virtual_size, max(len(chunk) for stage in job.split.chunks for chunk in stage)
    sizes = {number: len(job.split.layers_of(number)) for number in distinct_stages(job)}
    return max(
        _stage_flops(arch, job, number, turns * largest if turns > 1 else size) for number, size in sizes.items()
    )


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
    """Estimate a step: compute at EFFICIENCY of the peak, bubble, communication without overlap. For comparing layouts only.

    compute: of a GPU on average. All stages wait for the one with the most work: its layers, the logits on the last.
    """
    each = _stages_flops(arch, job)
    tokens = job.global_batch * job.seq_length
    speed = gpu.tflops * 1e12 * EFFICIENCY * _shape_efficiency(arch, job)
    compute = tokens * sum(each) / (job.gpus * speed)
    slowest = compute * _busiest(arch, job) * job.pp / sum(each)
    return Time(compute, max(0.0, slowest / (1 - bubble(job)) - compute), _communication(arch, job, gpu, gpus_per_node))


def _shape_efficiency(arch: Architecture, job: Job) -> float:
    """Return the efficiency for narrow matrices: it falls if a rank's share of the MLP width, or its tokens per step, is small."""
    rows, columns = job.positions * job.micro_batch, arch.ffn_hidden_size / job.tp
    return rows / (rows + 512) * columns / (columns + 512)


def _communication(arch: Architecture, job: Job, gpu: Gpu, gpus_per_node: int) -> float:
    """Return the seconds of communication, of which none is hidden behind computation."""
    near, far = gpu.link * 1e9, BETWEEN_NODES * 1e9
    edge = near if job.gpus <= gpus_per_node else far
    tensor = _tensor_bytes(arch, job) / (near if job.tp <= gpus_per_node else far)
    context = _context_bytes(arch, job) / (near if job.tp * job.cp <= gpus_per_node else far)
    return tensor + context + (_pipeline_bytes(arch, job) + _gradient_bytes(arch, job)) / edge


def _residual(arch: Architecture, job: Job) -> int:
    return job.positions * job.micro_batch * arch.hidden_size * job.width


def _tensor_bytes(arch: Architecture, job: Job) -> float:
    """Return the bytes of a step's all-reduces of the residual: four per layer and microbatch (Shoeybi et al. 2019), two more where the
    layer is computed again, one more where its MLP is; two per layer of a teacher. Sequence parallelism sends as many bytes, as gathers
    and scatters.
    """
    if job.tp == 1:
        return 0.0
    mlp = job.recompute == "selective" and "mlp" in job.recompute_modules
    most = 0.0
    for number in distinct_stages(job):
        sums = 4 + 2 * recomputed_share(job, number) + mlp
        sent = sums * len(job.split.layers_of(number)) * _residual(arch, job)
        if job.teacher:
            sent += 2 * _teacher_layers(arch, job, number) * _residual(job.teacher, job)
        most = max(most, sent)
    return 2 * most * (job.tp - 1) / job.tp * job.microbatches


def _context_bytes(arch: Architecture, job: Job) -> float:
    """Return the bytes of keys and values that pass around the ring: once forward, twice backward (Liu et al. 2023, Ring Attention)."""
    groups = max(1, arch.num_query_groups // job.tp)
    keys = 2 * job.positions * job.micro_batch * groups * arch.head_dim * job.width
    layers = max(len(job.split.layers_of(number)) for number in range(job.pp))
    return 3 * keys * (job.cp - 1) * layers * job.microbatches


def _pipeline_bytes(arch: Architecture, job: Job) -> float:
    """Return the bytes of the residual, and a teacher's, that pass from stage to stage and back."""
    passes = 2 * job.microbatches * job.split.virtual_size if job.pp > 1 else 0
    residual = _residual(arch, job) + (_residual(job.teacher, job) if job.teacher else 0)
    return passes * residual / (job.tp if job.sequence_parallel else 1)


def _gradient_bytes(arch: Architecture, job: Job) -> float:
    """Return the bytes of the gradients' reduction over the replicas, once a step."""
    trained = job.lora.parameters(arch) if job.lora else 0 if job.nf4 else whole_model(arch)
    return 2 * 4 * trained / (job.tp * job.pp) * (job.replicas - 1) / job.replicas


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
