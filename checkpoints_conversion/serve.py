"""megatron-ft serve DIR: print which servers load an export, and their commands. It starts none."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import CheckpointError


@dataclass(frozen=True)
class Serve:
    """Export"""

    export: str = field(default="", metadata={"required": True})
    """folder that megatron-to-hf or merge-adapter has written: a model, quantised or not, a GGUF file, or an adapter"""


COMMAND = Command(
    name="serve",
    summary="print the commands of servers that load an export (vLLM, SGLang, TGI, llama.cpp); starts none",
    sections=(Serve,),
    examples=("megatron-ft serve exports/llama2-13b", "megatron-ft serve exports/llama2-13b-gguf"),
    positional=("export",),
)


def run(options: Serve) -> None:
    from checkpoints_conversion.serving import serving

    folder = Path(options.export)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give an export of megatron-to-hf or merge-adapter")
    print(serving(folder, options.export.rstrip("/") or "/").text())


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
