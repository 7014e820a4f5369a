"""megatron-ft verify: check that a Hugging Face model and a checkpoint are the same model, by their weights and their logits.

The checkpoint's logits are computed in its own layout, with one CPU process per rank.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from checkpoints_conversion.options import CheckpointSource, check_source
from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from checkpoints_conversion.certificate import Certificate


@dataclass(frozen=True)
class _Pair:
    hf: str = field(metadata={"required": True})
    """Hugging Face model folder to compare; with a checkpoint of adapters: the merged model, or the PEFT folder exported from it."""
    megatron: str = field(metadata={"required": True})
    """Checkpoint to compare: its root, or one release or iter_ folder."""


@dataclass(frozen=True)
class Verify(CheckpointSource, _Pair):
    """Models and comparison"""

    logits: bool = True
    """Also compare the logits of both models; --no_logits: only the weights, for models that do not fit into memory."""
    tensor_model_parallel_size: int | None = None
    """Tensor parallel size of the CPU processes that compute the checkpoint's logits; default: the checkpoint's."""
    pipeline_model_parallel_size: int | None = None
    """Pipeline parallel size of the CPU processes that compute the checkpoint's logits; default: the checkpoint's."""
    tolerance: float = 1e-4
    """Largest accepted difference of a logit, in fp32."""
    prompts: str | None = None
    """File of prompts, one JSON object per line with "messages" (a list) or "text"; default: three built-in chats."""
    longest: int = 4096
    """Largest number of tokens of the long prompt, which exceeds the original context."""
    base: str | None = None
    """With a checkpoint of adapters: the checkpoint of their model; default: the one that they name."""
    onto: Literal["dequantized", "original"] | None = None
    """With a merged model whose adapters were trained on an NF4 base: the weights that they were added to, as in merge-adapter."""


COMMAND = Command(
    name="verify",
    summary="check that a Hugging Face model and a checkpoint are the same model, and write a certificate",
    sections=(Verify,),
    examples=(
        "megatron-ft verify --hf llama2-7b --megatron checkpoints/llama2-7b-tp2-pp2",
        "megatron-ft verify --hf llama2-70b --megatron checkpoints/llama2-70b-tp8-pp4 --no_logits",
        "megatron-ft verify --hf exports/merged --megatron runs/adapters",
    ),
)


def run(options: Verify) -> None:
    print(verify(options))


def verify(options: Verify) -> Certificate:
    """Compare, and write certificate.json to the checkpoint's folder. Raise CheckpointError for the first difference."""
    # Imported here, so that --help does not wait for torch.
    from checkpoints_conversion.certificate import compare_weights, make_certificate
    from checkpoints_conversion.megatron_source import open_megatron
    from checkpoints_conversion.verify_adapters import holds_adapters, verify_adapters

    check_source(options.hf, options.verify_checkpoint)
    if holds_adapters(Path(options.megatron), options.iteration):
        return verify_adapters(options, options)
    for name in ("base", "onto"):
        if given := getattr(options, name):
            raise ConfigError(f"--{name} {given}: --megatron holds a model, not adapters: drop --{name}")
    opened = open_megatron(Path(options.megatron), options)
    weights = compare_weights(Path(options.hf), opened)
    answers = None
    if options.logits:
        from checkpoints_conversion.answers import LogitOptions, compare_answers

        logit_options = LogitOptions(**{each.name: getattr(options, each.name) for each in fields(LogitOptions)})
        answers = compare_answers(Path(options.hf), opened, logit_options)
    return make_certificate(Path(options.hf), opened, weights, answers)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
