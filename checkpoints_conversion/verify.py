"""Proof that a Hugging Face model and a Megatron checkpoint are the same model: every bit, then what both answer.

Our answers are computed in the checkpoint's own layout, by that many processes on this machine's CPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints_conversion.options import CheckpointSource, check_source
from megatron_ft.config.cli import Command, run_script

if TYPE_CHECKING:
    from checkpoints_conversion.certificate import Certificate


@dataclass(frozen=True)
class _Pair:
    hf: str = field(metadata={"required": True})
    """Hugging Face model folder."""
    megatron: str = field(metadata={"required": True})
    """Checkpoint: its root, or one release or iter_ folder."""


@dataclass(frozen=True)
class Verify(CheckpointSource, _Pair):
    """What to compare"""

    logits: bool = True
    """Compare what both models answer, too. --no_logits: only the weights, for a model larger than this machine."""
    tensor_model_parallel_size: int | None = None
    """TP of the processes that compute our logits, on CPU; default: the checkpoint's."""
    pipeline_model_parallel_size: int | None = None
    """PP of those processes; default: the checkpoint's."""
    tolerance: float = 1e-4
    """Largest difference of a logit, in fp32."""
    prompts: str | None = None
    """Chats to ask, one JSON line each with a list "messages" (or a "text"); default: three of ours."""
    longest: int = 4096
    """At most so many tokens in the prompt that reaches beyond the original context."""


COMMAND = Command(
    name="verify",
    summary="prove that a Hugging Face model and a checkpoint are the same model, and certify it",
    sections=(Verify,),
    examples=(
        "megatron-ft verify --hf llama2-7b --megatron checkpoints/llama2-7b-tp2-pp2",
        "megatron-ft verify --hf llama2-70b --megatron checkpoints/llama2-70b-tp8-pp4 --no_logits",
    ),
)


def run(options: Verify) -> None:
    print(verify(options))


def verify(options: Verify) -> Certificate:
    """Compare, and write certificate.json into the checkpoint's folder. Raises CheckpointError at the first difference."""
    # Here and not above: --help should not wait for torch.
    from checkpoints_conversion.certificate import compare_weights, make_certificate
    from checkpoints_conversion.megatron_source import open_megatron

    check_source(options.hf, options.verify_checkpoint)
    opened = open_megatron(Path(options.megatron), options)
    weights = compare_weights(Path(options.hf), opened)
    answers = None
    if options.logits:
        from checkpoints_conversion.answers import Asked, compare_answers

        asked = Asked(**{each.name: getattr(options, each.name) for each in fields(Asked)})
        answers = compare_answers(Path(options.hf), opened, asked)
    return make_certificate(Path(options.hf), opened, weights, answers)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
