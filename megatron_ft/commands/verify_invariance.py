"""megatron-ft verify-invariance: one step in every layout against one process, loss and every gradient, on this machine's CPU."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Numerics, Parallelism
from megatron_ft.errors import ConfigError, UserError
from megatron_ft.files import read_json

if TYPE_CHECKING:
    from megatron_ft.models.architecture import Architecture
    from megatron_ft.training.invariance import Case, Measured


@dataclass
class Invariance:
    """What to compare"""

    load: str = field(default="", metadata={"required": True})
    """checkpoint, Hugging Face model or its config.json: the model whose kind is tried"""
    shrink: bool = True
    """a small model of the same kind with made-up weights; --no_shrink: the model itself, with a checkpoint's own weights"""
    seq_length: int = 64
    """positions in a row"""
    hidden_dropout: float = 0.0
    """residual dropout, whose masks do not depend on the layout either"""
    lima_dropout: bool = False
    """let it rise from 0 at the first layer to hidden_dropout at the last"""
    layouts: list[str] = field(default_factory=list)
    """names of the layouts to try, as in the table; default: all that the model allows"""
    tolerance: float = 1e-4
    """largest relative difference of the loss, the gradient norm or any gradient that passes"""
    seed: int = 1234
    """of rows, masks and dropout"""


COMMAND = Command(
    name="verify-invariance",
    summary="prove that every layout computes the same loss and gradients for a model",
    sections=(Invariance,),
    examples=("megatron-ft verify-invariance --load runs/model", "megatron-ft verify-invariance --load hf/config.json"),
)

CAUGHT = "norms not summed (broken on purpose)"
LAYERS, HIDDEN, VOCABULARY = 4, 64, 203
"""Of the small model; the vocabulary is odd, so that its padding differs between layouts."""


class LayoutsDiffer(UserError):
    """A layout does not compute what one process computes, or the comparison does not notice a broken one."""


def run(options: Invariance) -> int:
    """Print the table; raises LayoutsDiffer where a row fails, ConfigError or CheckpointError where nothing can be tried."""
    arch, checkpoint = _model(options)
    # Many small processes on one CPU, whatever else the machine has. Before torch looks.
    os.environ.update(MEGATRON_FT_DEVICE="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    from megatron_ft.engine.forked import run_forked
    from megatron_ft.engine.start import prepare_engine

    prepare_engine()
    from megatron_ft.training.invariance import Case, Problem, compare, measure

    cases = _chosen(arch, options.layouts)
    numerics = Numerics(hidden_dropout=options.hidden_dropout, lima_dropout=options.lima_dropout)
    problem = Problem(arch, options.seq_length, numerics, checkpoint=checkpoint, seed=options.seed)

    def measured(case: Case) -> Measured:
        return run_forked(case.processes, lambda ranks: measure(problem, ranks), case)[0]

    print(
        f"{arch.family}: {arch.num_layers} layers of {arch.hidden_size}, rows of {options.seq_length}; relative differences"
    )
    print(f"{'layout':38} {'loss':>10} {'2nd loss':>9} {'norm':>9} {'gradient':>9}  largest in")
    failed = []
    for packing in sorted({case.packing for case in cases}, reverse=True):
        reference = measured(Case("one process", 1, packing=packing))
        print(f"{'one process, ' + ('packed' if packing else 'padded'):38} {reference.loss:10.6f}  (the reference)")
        for case in (case for case in cases if case.packing == packing):
            found = compare(reference, measured(case))
            alike = found.largest <= options.tolerance
            good = alike != case.broken
            failed += [] if good else [case.name]
            words = ("caught" if good else "NOT CAUGHT") if case.broken else ("pass" if good else "FAIL")
            numbers = " ".join(f"{x:9.1e}" for x in (found.loss, found.later_loss, found.grad_norm, found.gradient))
            print(f"{case.name:38}  {numbers}  {found.where.removeprefix('model.')}: {words}", flush=True)
    if failed:
        raise LayoutsDiffer(
            f"beyond --tolerance {options.tolerance:g}: {'; '.join(failed)}: train in another layout, and report this table"
        )
    print(f"every layout computes what one process computes (to {options.tolerance:g})")
    return 0


def cases_for(arch: Architecture) -> list[Case]:
    """All layouts that the model's sizes allow on four processes, and one that is broken on purpose."""
    from megatron_ft.training.invariance import Case

    def parallel(tp: int = 1, pp: int = 1, sp: bool = False, **more: Any) -> Parallelism:
        return Parallelism(tp, pp, sequence_parallel=sp, **more)

    chunks = arch.num_layers // 2
    rows: list[tuple[str, int, Parallelism, dict[str, Any]]] = [
        ("TP2", 2, parallel(2), {}),
        ("TP2 + sequence parallel", 2, parallel(2, sp=True), {"micro_batch_size": 2}),
        ("TP4", 4, parallel(4), {}),
        ("TP4 + sequence parallel", 4, parallel(4, sp=True), {}),
        ("PP2", 2, parallel(pp=2), {}),
        ("PP4", 4, parallel(pp=4), {"micro_batch_size": 2}),
        ("PP2, interleaved", 2, parallel(pp=2, virtual_pipeline_model_parallel_size=chunks), {}),
        ("PP2, uneven", 2, parallel(pp=2, decoder_first_pipeline_num_layers=1), {}),
        ("TP2 x PP2 + sequence parallel", 4, parallel(2, 2, True), {"micro_batch_size": 2}),
        ("DP2", 2, parallel(), {}),
        ("DP4", 4, parallel(), {"micro_batch_size": 2}),
        ("TP2 x DP2 + sequence parallel", 4, parallel(2, sp=True), {}),
        ("two rows at once", 1, parallel(), {"micro_batch_size": 2}),
    ]
    cases = [
        Case(name + ("" if packing else ", padded"), processes, layout, packing=packing, **more)
        for packing in (True, False)
        for name, processes, layout, more in rows
        if _allowed(arch, layout)
    ]
    if _allowed(arch, parallel(2, sp=True)):
        cases.append(Case(CAUGHT, 2, parallel(2, sp=True), broken=True))
    return cases


def _allowed(arch: Architecture, parallel: Parallelism) -> bool:
    from megatron_ft.models.architecture import check_layout
    from megatron_ft.models.pipeline import split_layers

    try:
        check_layout(arch, parallel.tensor_model_parallel_size)
        split_layers(arch.num_layers, parallel)
    except ConfigError:
        return False
    return True


def _chosen(arch: Architecture, names: list[str]) -> list[Case]:
    cases = cases_for(arch)
    known = {case.name for case in cases}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--layouts {unknown[0]!r} is not one of this model's: {'; '.join(sorted(known))}")
    return [case for case in cases if case.name in names] if names else cases


def _model(options: Invariance) -> tuple[Architecture, str | None]:
    """(the architecture to try, the folder of its weights or None)."""
    from megatron_ft.checkpoints.folder import CONFIG, describe, find_checkpoint
    from megatron_ft.models.families import understood

    path = Path(options.load)
    file = path / CONFIG if path.is_dir() else path
    if file.is_file():
        said = read_json(file)
        if isinstance(said, dict) and "model_type" in said:
            if not options.shrink:
                raise ConfigError(f"--no_shrink needs a checkpoint, {path} is a Hugging Face model: convert it first")
            return shrunk(understood(said)[1]), None
    folder = find_checkpoint(path)
    config = describe(folder)
    return (shrunk(config.architecture), None) if options.shrink else (config.architecture, str(folder))


def shrunk(arch: Architecture) -> Architecture:
    """A small model of the same kind: block, norms, activation, rope, biases and window stay, sizes and head counts fall.

    Models whose heads share one key and value (or that share none) stay so.
    """
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    new_heads = 8
    new_groups = 1 if groups == 1 else 8 if groups == heads else 4
    scaling = dict(arch.rope_scaling) if arch.rope_scaling else None
    if scaling:  # factors by frequency fit the head's size; the small model's is another
        for name in ("short_factor", "long_factor"):
            if name in scaling:
                scaling[name] = scaling[name][: HIDDEN // new_heads // 2]
    return dataclasses.replace(
        arch.with_layers(min(LAYERS, arch.num_layers)), num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=160,
        num_attention_heads=new_heads,
        num_query_groups=new_groups, head_dim=HIDDEN // new_heads, vocab_size=VOCABULARY, rope_scaling=scaling,
        sliding_window=min(arch.sliding_window, 24) if arch.sliding_window else None,
        full_attention_layers=min(arch.full_attention_layers, LAYERS // 2),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
