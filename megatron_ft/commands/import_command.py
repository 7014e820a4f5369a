"""megatron-ft import-command: a script or a configuration of another tool as our commands, with what became of each of its settings."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass, field
from typing import Literal

from megatron_ft.config.checks import positive
from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError


@dataclass
class Import:
    """File to import"""

    file: str = field(default="", metadata={"required": True})
    """script or command line of Megatron-LM, Megatron-LLM, TRL or LLaMA-Factory, or YAML of axolotl, LLaMA-Factory or TRL; it is read,
    not run"""
    gpus: int | None = None
    """number of GPUs per machine to write the commands for; default: what the file says, else 1"""
    tool: Literal["megatron", "axolotl", "llama-factory", "trl"] | None = None
    """tool that the file is for; default: recognised"""
    set: list[str] = field(default_factory=list)
    """values for variables of a script, as in DATA_PATH=data/chats-train; they win over the script's own"""
    args: str | None = None
    """arguments that the script is started with, in one pair of quotes"""
    json: bool = False
    """print commands and lists as JSON"""


COMMAND = Command(
    name="import-command",
    summary="print our commands for a script or a configuration of another tool",
    sections=(Import,),
    examples=(
        "megatron-ft import-command finetune.sh --args 'llama2 --size 7 --tp 8' --set CHECKPOINT_PATH=checkpoints/llama2",
        "megatron-ft import-command axolotl/examples/llama-3/lora-8b.yml --gpus 8",
    ),
    positional=("file",),
)


def run(options: Import) -> int:
    """Print the commands and the lists. Raise ConfigError for a file of no known tool."""
    from megatron_ft.importing.page import as_data, page
    from megatron_ft.importing.recognise import Source, read
    from megatron_ft.importing.steps import commands

    positive(options, "gpus")
    job = read(Source(options.file, _variables(options.set), _words(options.args), options.tool))
    lines = commands(job, options.gpus)
    if options.json:
        print(json.dumps(as_data(job, lines), indent=2, ensure_ascii=False))
    else:
        print(page(job, lines, options.file), end="")
    return 0


def _variables(given: list[str]) -> dict[str, str]:
    for one in given:
        if not re.match(r"\w+=", one):
            raise ConfigError(f"--set {one}: write NAME=VALUE")
    return dict(one.split("=", 1) for one in given)


def _words(text: str | None) -> list[str]:
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise ConfigError(f"--args {text}: {error}; check the quotes") from None


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
