"""Memory of each GPU in bytes, per stage: exact for parameters, gradients and optimizer, a formula for activations.

Activations: Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models), section 4, with these changes:
no matrix of attention scores (flash attention keeps q, k, v, the output and one number per head), grouped key-value heads, gated MLPs,
norms that keep their input in the compute type, no dropout masks if dropout is 0. Packed rows need as much memory as full ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from megatron_ft.adapters.spec import Lora, projections
from megatron_ft.models.architecture import Architecture, padded_vocab_size
from megatron_ft.models.families import family_of
from megatron_ft.models.pipeline import PipelineSplit, split_beside
from megatron_ft.models.quantised import is_quantised
from megatron_ft.quantization.sizes import bits_in_memory
from megatron_ft.shares import deal

Recompute = Literal["none", "selective", "full"]
Method = Literal["uniform", "block"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
RESERVE = 3e9
"""Assumed bytes for the driver's context, communication buffers and fragmentation."""


@dataclass(frozen=True)
class Job:
    """A training configuration. split: the layers of each stage."""

    split: PipelineSplit
    tp: int
    dp: int
    seq_length: int
    micro_batch: int
    global_batch: int
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: Recompute = "none"
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """with selective: what of a layer is computed again"""
    recompute_method: Method = "uniform"
    recompute_layers: int = 1
    """with full: layers of a group, of which only the input is kept (uniform), or the first layers of each chunk (block)"""
    bf16: bool = True
    dropout: bool = False
    cp: int = 1
    nf4: bool = False
    """the base is frozen, and the linears of its layers are NF4"""
    teacher: Architecture | None = None
    """Resident, for distillation: weights without gradients."""
    lora: Lora | None = None
    """Adapters, which are then all that has gradients and optimizer state."""

    @property
    def pp(self) -> int:
        return self.split.stages

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def replicas(self) -> int:
        """Return the number of GPUs that hold the same parameters: DP x CP."""
        return self.dp * self.cp

    @property
    def positions(self) -> int:
        """Return the positions of a row on one GPU."""
        return self.seq_length // self.cp

    @property
    def microbatches(self) -> int:
        """Return the number of microbatches that each GPU computes per step."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def width(self) -> int:
        """Return the bytes per number in the compute type."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Stage:
    """Memory of one GPU of a pipeline stage; all fields but layers, parameters and trained in bytes."""

    layers: int
    parameters: int
    """Of the model, without adapters."""
    trained: int
    """Parameters that have gradients: all, or those of the adapters."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    """The largest temporary memory: logits, gathered inputs, or the layer that is recomputed."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + int(RESERVE)


def parameter_sizes(arch: Architecture, tp: int, layers: int, first: bool, last: bool) -> list[int]:
    """Return the size of each parameter of one rank, with padding rows and the last stage's copy of tied embeddings."""
    rows = padded_vocab_size(arch.vocab_size, tp)
    sizes = []
    for rule in family_of(arch).rules(arch):
        times = {"first": int(first), "layer": layers, "last": int(last)}[rule.stage]
        if arch.tied_embeddings and rule.cut == "vocab_parallel":
            times = int(first or last)
        sizes += [prod(rule.part_shape(arch, tp, rows))] * times
    return sizes


def parameters(arch: Architecture, tp: int, layers: int, first: bool, last: bool) -> int:
    """Return the number of parameters of one rank."""
    return sum(parameter_sizes(arch, tp, layers, first, last))


def adapter_sizes(arch: Architecture, job: Job, number: int) -> list[int]:
    """Return the size of each adapter parameter of one rank of a stage, rows of new tokens included; [] without adapters."""
    if job.lora is None:
        return []
    sizes = []
    for one in job.lora.of(arch):
        cut = (one.columns // job.tp, one.rows) if one.is_row_parallel else (one.columns, one.rows // job.tp)
        sizes += [job.lora.rank * size for size in cut]
    first, last = number == 0, number == job.pp - 1
    tables = int(first or last) if arch.tied_embeddings else int(first) + int(last)
    rows = len(job.lora.new_tokens) * arch.hidden_size  # whole on every tensor-parallel rank
    return sizes * len(job.split.layers_of(number)) + [rows] * (tables if rows else 0)


def stages(arch: Architecture, job: Job) -> list[Stage]:
    """Return the memory of one GPU of each pipeline stage."""
    return [_stage(arch, job, number) for number in range(job.pp)]


def kind_of_stage(job: Job, number: int) -> tuple[int, int]:
    """Return what stages must have in common to hold the same parameters: layers, and where they are (first, within, last)."""
    return len(job.split.layers_of(number)), (number == 0) + 2 * (number == job.pp - 1)


def distinct_stages(job: Job) -> list[int]:
    """Return the first stage of each kind: of a kind, it holds the most microbatches in flight."""
    found: dict[tuple[int, int], int] = {}
    for number in range(job.pp):
        found.setdefault(kind_of_stage(job, number), number)
    return list(found.values())


def most_memory(arch: Architecture, job: Job) -> int:
    """Return the bytes of the fullest GPU."""
    return max(_stage(arch, job, number).total for number in distinct_stages(job))


def _stage(arch: Architecture, job: Job, number: int) -> Stage:
    layers, first, last = len(job.split.layers_of(number)), number == 0, number == job.pp - 1
    count = parameters(arch, job.tp, layers, first, last)
    own = sum(adapter_sizes(arch, job, number))
    trained = own if job.lora else 0 if job.nf4 else count
    return Stage(
        layers, count, trained,
        weights=(count + own) * job.width - _saved(arch, job, layers) + _teacher_weights(arch, job, number),
        gradients=trained * 4,  # one fp32 buffer, whatever the compute type
        optimizer=optimizer_bytes(trained, job),
        activations=_activations(arch, job, number),
        working=_working(arch, job, last),
    )  # fmt: skip


def _teacher_weights(arch: Architecture, job: Job, number: int) -> int:
    """Return the bytes of a stage's part of the teacher."""
    if job.teacher is None:
        return 0
    layers = len(split_beside(job.split, arch.num_layers, job.teacher.num_layers).layers_of(number))
    return parameters(job.teacher, job.tp, layers, number == 0, number == job.pp - 1) * job.width


def quantised_parts(arch: Architecture, tp: int) -> list[int]:
    """Return the size of each quantised weight of a layer on a rank, in weights."""
    return [prod(rule.part_shape(arch, tp, 0)) for rule in family_of(arch).rules(arch) if is_quantised(rule)]


def saved_by_nf4(arch: Architecture, tp: int, layers: int, width: int) -> int:
    """Return the bytes that NF4 takes less on a rank than a compute type of `width` bytes."""
    return round(layers * sum(quantised_parts(arch, tp)) * (width - bits_in_memory() / 8))


def _saved(arch: Architecture, job: Job, layers: int) -> int:
    return saved_by_nf4(arch, job.tp, layers, job.width) if job.nf4 else 0


def optimizer_bytes(count: int, job: Job) -> int:
    """Return the bytes of Adam's two fp32 moments and of fp32 copies of bf16 weights, divided over ranks with ZeRO-1."""
    each = 12 if job.bf16 else 8
    return each * (-(-count // job.replicas) if job.distributed_optimizer else count)


def host_memory(arch: Architecture, job: Job, gpus_per_node: int) -> int:
    """Return the largest host memory of a node at a torch_dist save, in bytes, for the tensors that its ranks write.

    This is an upper bound: norms count on every tensor-parallel rank, and so does the last stage's copy of tied embeddings.
    """
    if job.nf4 and not job.lora:  # the base is not saved
        return 0
    ranks = []  # in the order of the world: tensor parallel first, then data parallel, then stages
    for number in range(job.pp):
        layers = len(job.split.layers_of(number))
        sizes = parameter_sizes(arch, job.tp, layers, number == 0, number == job.pp - 1)
        sizes = adapter_sizes(arch, job, number) if job.lora else sizes
        ranks += [share for share in _held_at_a_save(sizes, job) for _ in range(job.tp)]
    return max(sum(ranks[first : first + gpus_per_node]) for first in range(0, len(ranks), gpus_per_node))


def _held_at_a_save(sizes: list[int], job: Job) -> list[int]:
    """Return the bytes of each rank of a replica group; with the distributed optimizer its own parameters and one that it collects."""
    if not job.distributed_optimizer:  # the first rank writes everything
        return [sum(sizes) * (job.width + (12 if job.bf16 else 8))] + [0] * (job.replicas - 1)
    # The engine copies the state twice: measured with benchmarks/checkpoint_memory.py --ranks 1 --bf16.
    if job.replicas == 1:
        return [sum(sizes) * 36]
    owners, loads = deal(sizes, job.replicas), [4 * max(sizes)] * job.replicas
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size * (job.width + 12)
    return loads


def layer_activations(arch: Architecture, job: Job, recompute: Recompute | None = None) -> int:
    """Return the bytes that one layer keeps for one microbatch until its backward pass. full: what a group of layers keeps."""
    recompute = recompute or job.recompute
    tokens, shared = job.positions * job.micro_batch, job.tp if job.sequence_parallel else 1
    residual = arch.hidden_size / shared
    if recompute == "full":
        return round(tokens * residual * job.width)
    again = job.recompute_modules if recompute == "selective" else ()
    heads, groups, head = arch.num_attention_heads / job.tp, arch.num_query_groups / job.tp, arch.head_dim
    norms = 1 if arch.shared_norm else 2  # their outputs are the inputs of the matrices that follow
    inputs = 1 if arch.parallel_block else 2  # of norms: a parallel block has one residual
    around = (inputs + (0 if "layernorm" in again else norms)) * residual
    projections = (heads + 2 * groups) * head
    attention = projections + heads * head  # q, k, v as projected; the output, which the next matrix reads too
    attention += (
        (heads + groups) * head * (2 if arch.qk_norm else 1)
    )  # q and k once more, rotated; and once more, normalised
    ffn = arch.ffn_hidden_size / job.tp
    # [gate; up] and act(gate) * up; else the activation's input and output.
    mlp = 0 if "mlp" in again else (3 if arch.gated else 2) * ffn
    # Flash attention keeps one fp32 number per head and token; recomputing it saves only that.
    scores = 0 if "core_attn" in again else heads * 4
    masks = (1 if arch.parallel_block else 2) * residual if job.dropout else 0  # one byte per entry
    statistics = inputs * 4 / shared * (2 if arch.norm == "layernorm" else 1)
    kept = tokens * ((around + attention + mlp) * job.width + scores + masks + statistics)
    return round(kept + _adapter_activations(arch, job, tokens, again))


def recomputed_share(job: Job, number: int) -> float:
    """Return the share of a stage's layers that are computed again as a whole."""
    if job.recompute != "full":
        return 0.0
    sizes = [len(chunk) for chunk in job.split.chunks[number]]
    if job.recompute_method == "uniform" or not sum(sizes):
        return 1.0
    return sum(min(job.recompute_layers, size) for size in sizes) / sum(sizes)


def _kept_by_a_layer(arch: Architecture, job: Job, number: int) -> float:
    """Return the mean of a stage's layers."""
    if job.recompute != "full":
        return layer_activations(arch, job)
    group = job.recompute_layers if job.recompute_method == "uniform" else 1
    share, whole = recomputed_share(job, number), layer_activations(arch, job, "none")
    return share * layer_activations(arch, job, "full") / group + (1 - share) * whole


def _adapter_activations(arch: Architecture, job: Job, tokens: int, again: tuple[str, ...]) -> float:
    """Return the bytes that a layer with adapters keeps beyond those of a trained layer; negative if these are fewer.

    What lies between A and B; the joined A of q, k and v, or of gate and up; dropout's masks. A frozen linear does not keep its input: an
    adapter does, with dropout its own copy. The input of linear_proj is the output of attention, which keeps it anyway. again: parts of
    the layer that are recomputed.
    """
    if job.lora is None:
        return 0.0
    pairs = Counter(one.linear for one in job.lora.of(arch))
    width = {one.linear: one.columns // (job.tp if one.is_row_parallel else 1) for one in projections(arch)}
    kept = 0.0
    for linear, count in pairs.items():
        if "mlp" in again and linear.startswith("mlp."):
            continue
        kept += count * job.lora.rank * (tokens + (width[linear] if count > 1 else 0)) * job.width
        kept += tokens * width[linear] if job.lora.dropout else 0
    attention = ("self_attention.linear_qkv",)
    mlp: list[tuple[str, ...]] = [("mlp.linear_fc1",), ("mlp.linear_fc2",)]
    if "mlp" in again:  # its input is kept once, as without adapters
        mlp = [(), ()]
    groups = [(*attention, *mlp[0]), mlp[1]] if arch.shared_norm else [attention, *mlp]
    for readers in filter(None, groups):  # of one input
        users = sum(linear in pairs for linear in readers)
        copies = users if job.lora.dropout else min(users, 1)
        normed = readers is not mlp[1]
        discarded = (
            "layernorm" in again and normed and copies and job.lora.dropout
        )  # the norm's output, but not the copies
        kept += (copies - (0 if discarded else 1)) * tokens * width[readers[0]] * job.width
    if job.lora.dropout and "self_attention.linear_proj" in pairs:
        kept += tokens * width["self_attention.linear_proj"] * job.width
    return kept


def in_flight(job: Job, number: int) -> int:
    """Return the largest number of (layer, microbatch) pairs whose activations a stage holds (1F1B, interleaved: Narayanan et al. 2021)."""
    virtual, layers = job.split.virtual_size, len(job.split.layers_of(number))
    if virtual == 1:
        return layers * min(job.pp - number, job.microbatches)
    ahead = (job.pp - number - 1) * 2 + (virtual - 1) * job.pp + 1
    return -(-layers * min(ahead, job.microbatches * virtual) // virtual)


def _activations(arch: Architecture, job: Job, number: int) -> int:
    shared = job.tp if job.sequence_parallel else 1
    residual = job.positions * job.micro_batch * arch.hidden_size / shared * job.width
    ends = 2 * residual if number == job.pp - 1 else 0  # the last norm's input and output
    if job.teacher and job.pp > 1:  # what stages exchange, forward and backward
        ends += 2 * residual * (1 + job.teacher.hidden_size / arch.hidden_size)
    return round(in_flight(job, number) * _kept_by_a_layer(arch, job, number) + ends)


def _working(arch: Architecture, job: Job, last: bool) -> int:
    """Return the largest temporary memory."""
    tokens = job.positions * job.micro_batch
    rows = padded_vocab_size(arch.vocab_size, job.tp) // job.tp
    logits = (
        tokens * rows * (job.width + (job.width if job.teacher else 4 + 4)) if last else 0
    )  # as computed; in fp32; their softmax, later the gradient; distilled: the teacher's, and the gradient in place
    gathered = 2 * tokens * arch.hidden_size * job.width  # sequence parallelism gathers inputs before a matrix product
    group = job.recompute_layers if job.recompute_method == "uniform" else 1
    again = group * layer_activations(arch, job, "none") if job.recompute == "full" else 0
    if job.recompute == "selective":
        again = layer_activations(arch, job, "none") - layer_activations(arch, job)
    widest = (2 if arch.gated else 1) * tokens * arch.ffn_hidden_size // job.tp * job.width  # a gradient inside the MLP
    # A dequantised weight: pairs of codes as int32, levels in fp32, the result. bitsandbytes' kernel needs only the last.
    dense = (2 + 4 + job.width) * max(quantised_parts(arch, job.tp)) if job.nf4 else 0
    theirs = _working(job.teacher, _alone(job), False) if job.teacher else 0
    return max(logits, gathered + again + 2 * widest + dense, theirs)


def _alone(job: Job) -> Job:
    """Return the job of the teacher's forward pass."""
    return replace(job, teacher=None, recompute="none", nf4=False, lora=None)
