"""Runs command lines one after another, each in a process of its own that is forked from one with the imports done.

`python -m tests.errors.desk [engine]` reads requests from standard input, one JSON object a line, and answers each with
one; or the text of a program, to be run with these words.
What a command line meets is what it meets in the shell: its own standard streams, environment and exit code. With
`engine` torch and megatron-core are imported before; without, the answer tells whether the command imported torch.
"""

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

PATIENCE = 90  # seconds a command may take, unless its request says otherwise
LAUNCHERS = ("RANK", "WORLD", "MASTER", "SLURM", "TORCHELASTIC")
"""What a launcher's variables begin with; a command starts without them."""


def serve() -> None:
    if sys.argv[1:] == ["engine"]:
        _import_engine()
    for line in sys.stdin:
        answer = _in_a_fork(json.loads(line))
        print(json.dumps(answer), flush=True)


def _import_engine() -> None:
    from megatron_ft.engine.start import prepare_engine

    prepare_engine()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401  # each takes a while

    for name in ("commands.finetune", "commands.generate", "training.loop", "training.setup", "generation.loading"):
        importlib.import_module(f"megatron_ft.{name}")
    import torch

    torch.set_num_threads(1)
    gc.freeze()


def _in_a_fork(request: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("out", "err", "torch")}
        pid = os.fork()
        if pid == 0:
            _child(request, files)
        timer = threading.Timer(request.get("patience", PATIENCE), os.kill, (pid, signal.SIGKILL))
        timer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        timer.cancel()
        torch = files["torch"].read_text() == "True" if files["torch"].exists() else None
        return {
            "code": status, "out": files["out"].read_text(), "err": files["err"].read_text(), "torch": torch
        }  # fmt: skip


def _child(request: dict, files: dict[str, Path]) -> None:
    """Never returns: an exception must not reach the loop above."""
    code = 70
    try:
        for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
            del os.environ[name]
        os.environ.update(request.get("env", {}))
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(files[name], os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        if request.get("hook"):
            module, function = request["hook"].split(":")
            getattr(importlib.import_module(module), function)(*request.get("hook_args", ()))
        if request.get("program"):
            code = _run_program(request["program"], request["argv"])
        else:
            code = _run(request["module"], request["argv"])
        files["torch"].write_text(str("torch" in sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run_program(program: str, argv: list[str]) -> int:
    """Run it as `python -c` does; also in the ranks that it forks."""
    sys.argv = ["-c", *argv]
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(module: str, argv: list[str]) -> int:
    if module == "megatron_ft":
        from megatron_ft.__main__ import main

        return main(argv)
    from megatron_ft.config.cli import run_script

    script = importlib.import_module(module)
    return run_script(script.COMMAND, script.run, argv)


if __name__ == "__main__":
    serve()
