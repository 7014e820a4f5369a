"""megatron-ft verify-invariance: compare loss and gradients of one step in every layout with one process, on CPU."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Numerics, Parallelism
from megatron_ft.device import choose_cpu
from megatron_ft.errors import ConfigError, UserError
from megatron_ft.files import read_json
from megatron_ft.wording import counted

if TYPE_CHECKING:
    from megatron_ft.adapters.spec import Lora
    from megatron_ft.models.architecture import Architecture
    from megatron_ft.training.invariance import Case, Measured


@dataclass
class Invariance:
    """Model and layouts"""

    load: str = field(default="", metadata={"required": True})
    """model to test: a checkpoint, a Hugging Face model folder or its config.json"""
    shrink: bool = True
    """test a small model of the same architecture with random weights; --no_shrink: the model itself, with the checkpoint's weights"""
    seq_length: int = 64
    """tokens per row"""
    hidden_dropout: float = 0.0
    """dropout probability on the residual stream; its masks do not depend on the layout"""
    lima_dropout: bool = False
    """increase the residual dropout linearly from 0 at the first layer to hidden_dropout at the last"""
    lora_rank: int | None = None
    """compare LoRA adapters of this rank on a frozen model; default: all gradients of the model"""
    lora_dropout: float = 0.0
    """with --lora_rank: dropout probability on the adapters' input; its masks do not depend on the layout"""
    layouts: list[str] = field(default_factory=list)
    """names of the layouts to test, as printed in the table; default: all that the model allows"""
    tolerance: float = 1e-4
    """largest accepted relative difference of the loss, the gradient norm or any gradient"""
    seed: int = 1234
    """seed of the random rows, loss masks and dropout"""


COMMAND = Command(
    name="verify-invariance",
    summary="check that every layout computes the same loss and gradients for a model",
    sections=(Invariance,),
    examples=("megatron-ft verify-invariance --load runs/model", "megatron-ft verify-invariance --load hf/config.json"),
)

CAUGHT = "norms not summed (broken on purpose)"
LAYERS, HIDDEN, VOCABULARY = 4, 64, 203
"""Sizes of the small model. The vocabulary is odd, so that its padding differs between layouts."""


class LayoutsDiffer(UserError):
    """A layout differs from one process, or the comparison does not detect the broken layout."""


def run(options: Invariance) -> int:
    """Print the table. Raise LayoutsDiffer if a row fails, ConfigError or CheckpointError if the model cannot be tested."""
    arch, checkpoint = _model(options)
    lora = _lora(options, arch)
    # Many small processes on one CPU, whatever else the machine has; set before torch is imported.
    choose_cpu()
    from megatron_ft.engine.forked import run_forked
    from megatron_ft.engine.start import prepare_engine

    prepare_engine()
    from megatron_ft.training.invariance import Case, Problem, compare, measure

    cases = _chosen(arch, options.layouts)
    numerics = Numerics(hidden_dropout=options.hidden_dropout, lima_dropout=options.lima_dropout)
    problem = Problem(arch, options.seq_length, numerics, lora=lora, checkpoint=checkpoint, seed=options.seed)

    def measured(case: Case) -> Measured:
        return run_forked(case.processes, lambda ranks: measure(problem, ranks), case)[0]

    print(
        f"{arch.family}: {counted(arch.num_layers, 'layer')} of {arch.hidden_size}, rows of {options.seq_length}; relative differences"
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
            f"differences above --tolerance {options.tolerance:g}: {'; '.join(failed)}: train in another layout, and report this table"
        )
    print(f"every layout computes the same as one process (within {options.tolerance:g})")
    return 0


def _lora(options: Invariance, arch: Architecture) -> Lora | None:
    from megatron_ft.adapters.spec import from_settings
    from megatron_ft.config.sections import Adapters

    # Made-up adapters have large weights: a larger scale would amplify rounding.
    alpha = None if options.lora_rank is None else options.lora_rank / 2
    return from_settings(Adapters(options.lora_rank, alpha, options.lora_dropout or None), arch)


def cases_for(arch: Architecture) -> list[Case]:
    """Return all layouts that the model's sizes allow on four processes, and one that is broken on purpose."""
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
        raise ConfigError(
            f"--layouts {unknown[0]!r} is not a layout of this model; choose from: {'; '.join(sorted(known))}"
        )
    return [case for case in cases if case.name in names] if names else cases


def _model(options: Invariance) -> tuple[Architecture, str | None]:
    """Return (the architecture to test, the folder of its weights or None)."""
    from megatron_ft.checkpoints.folder import CONFIG, describe, find_checkpoint
    from megatron_ft.models.families import parse_hf_config

    path = Path(options.load)
    file = path / CONFIG if path.is_dir() else path
    if file.is_file():
        hf_config = read_json(file)
        if isinstance(hf_config, dict) and "model_type" in hf_config:
            if not options.shrink:
                raise ConfigError(
                    f"--no_shrink needs a checkpoint, but {path} is a Hugging Face model: convert it with hf-to-megatron"
                )
            return shrunk(parse_hf_config(hf_config)[1]), None
    folder = find_checkpoint(path)
    config = describe(folder)
    if config.adapter is not None and not options.shrink:
        raise ConfigError(f"{folder} holds adapters: give the checkpoint of their model, and --lora_rank")
    return (shrunk(config.architecture), None) if options.shrink else (config.architecture, str(folder))


def shrunk(arch: Architecture) -> Architecture:
    """Return a small model of the same kind: block, norms, activation, RoPE, biases and window are unchanged, sizes are reduced.

    A model whose heads share one key and value head, or share none, keeps that property.
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
