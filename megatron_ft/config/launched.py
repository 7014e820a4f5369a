"""What a process says when a launcher started several of them: a mistake is said once a machine, and where torchrun looks.

torchrun gives each process it starts an error file, ATTEMPT/LOCAL_RANK/error.json, and quotes it as the root cause at the
end of its own report. ATTEMPT is shared by the processes of one machine, so that it also serves to agree on who speaks,
without asking anyone: the process that creates a file there does. Knows nothing of torch.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path

_SAID = "said-"
_PATIENCE = 1.0  # seconds in which a process that failed first has said why


def say(line: str) -> None:
    """Print a user's mistake to standard error, unless a process of this machine has said the same."""
    _tell_torchrun(line)
    if _first_to_say(line):
        print(line, file=sys.stderr, flush=True)


def is_aftermath() -> bool:
    """Whether another process of this machine has reported a mistake: its end breaks the connections of all others."""
    attempt = _attempt()
    deadline = time.monotonic() + _PATIENCE
    while attempt is not None:
        if any(attempt.glob(f"{_SAID}*")):
            return True
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return False


def _attempt() -> Path | None:
    """The folder that torchrun made for the processes of this machine; None without torchrun."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(file).parent.parent if file else None
    return folder if folder is not None and folder.is_dir() else None


def _first_to_say(line: str) -> bool:
    attempt = _attempt()
    if attempt is None:
        return True
    try:
        (attempt / (_SAID + hashlib.sha256(line.encode()).hexdigest()[:16])).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _tell_torchrun(line: str) -> None:
    if _attempt() is None:
        return
    content = {"message": {"message": line, "extraInfo": {"timestamp": int(time.time())}}}
    with contextlib.suppress(OSError):
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content), encoding="utf-8")
