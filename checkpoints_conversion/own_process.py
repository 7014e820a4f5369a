"""Work in a process of its own, which may start ranks: a folder takes the request there and the answer back, as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ft import device
from megatron_ft.errors import CheckpointError, UserError


def ask(module: str, request: Any, folder: Path, what: str) -> dict[str, Any]:
    """Run `python -m module`, which reads the folder's name, and return its answer. Raise CheckpointError for a user's error there.

    request: a dataclass, for FOLDER/request.json. what: the subject of the message if the process fails.
    """
    (folder / "request.json").write_text(json.dumps(asdict(request)))
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), **device.CPU}
    environment = {key: value for key, value in os.environ.items() if key not in ("MASTER_ADDR", "WORLD_SIZE", "RANK")}
    command = [sys.executable, "-m", module]
    ended = subprocess.run(command, input=str(folder), env={**environment, **settings}, capture_output=True, text=True)
    path = folder / "answer.json"
    if ended.returncode or not path.is_file():
        raise RuntimeError(f"{what} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(path.read_text())
    if "user_error" in answer:
        raise CheckpointError(answer["user_error"])
    return answer


def answer_alone(folder: Path, request: Callable[..., Any], work: Callable[[Any], Any]) -> None:
    """Do the work of such a process in one rank: read the request, a dataclass, and write what `work` returns, another."""
    from megatron_ft.engine.forked import die_with_parent, run_forked

    die_with_parent()
    asked = request(**json.loads((folder / "request.json").read_text()))
    try:
        answer = asdict(run_forked(1, work, asked)[0])
    except UserError as error:
        answer = {"user_error": str(error)}
    (folder / "answer.json").write_text(json.dumps(answer))
