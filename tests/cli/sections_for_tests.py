"""Sections of the tests' own with every kind of field, and a script: `python sections_for_tests.py --flag ...`."""

import errno
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import DataError


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights change.

    The second paragraph is not the title.
    """

    lr: float = 1e-5
    """Peak learning rate, reached
    after 10% of the steps."""
    train_iters: int = 100
    """Steps."""
    epochs: float | None = None
    """Passes over the data."""
    lr_decay_style: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Steps until the end of the decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decays."""


@dataclass(frozen=True)
class Model:
    load: Path = field(default=Path(), metadata={"required": True})
    """Checkpoint."""
    bf16: bool = True
    """Compute in bf16."""
    sequence_parallel: bool = False
    """Split norms."""
    no_tie_embed_logits: bool = False
    """Own output matrix."""
    extra_tokens: str = ""
    """Comma-separated."""
    data_path: list[str] = field(default_factory=list)
    """Prefixes."""
    role_weights: dict[str, float] = field(default_factory=dict)
    """Loss weight by role."""
    name: str | None = None
    """Of the run."""


COMMAND = Command(
    "try",
    "Tries things.",
    (OptimizerConfig, Model),
    examples=("megatron-ft try --load x --lr 1e-4",),
    positional=("load",),
)


def run(optimizer: OptimizerConfig, model: Model) -> int | None:
    """Ends in each of the ways a command can end."""
    match model.name:
        case "user":
            raise DataError("shards end early\nrun pretokenize again")
        case "bug":
            raise RuntimeError("a bug")
        case "disk":
            raise OSError(errno.ENOSPC, "No space left on device", "runs/tuned")
        case "stop":
            raise KeyboardInterrupt
        case "three":
            return 3
    print(optimizer, model)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
