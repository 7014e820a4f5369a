"""Loggers that fail, hang or lose their other half: the run trains, saves and ends as it would without them, and says so once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_ft.errors import ConfigError
from megatron_ft.training import guard
from megatron_ft.training.hooks import Hook
from tests.errors.conftest import ROOT, finetune
from tests.errors.test_before_torch import layout
from tests.errors.test_launcher import PLAIN, said, start

LOST = "nothing more is logged there, the run continues"
PATIENCE = 150.0  # seconds, for whatever is waited for


class Started:
    """A command in two processes with wandb, offline; what it prints lies in files."""

    def __init__(self, folder: Path, *words):
        self.out, self.err = folder / "out", folder / "err"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "MASTER", "SLURM"))}
        environment |= {"OMP_NUM_THREADS": "1", "MEGATRON_FT_DEVICE": "cpu", "WANDB_MODE": "offline"}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PLAIN, *map(str, words)], cwd=ROOT, stdout=out, stderr=err, env=environment
            )

    def wait_for_step(self, number: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while f"iteration {number:4d}/" not in (said := self.out.read_text()) and f" {number}/ " not in said:
            assert self.process.poll() is None and time.monotonic() < deadline, said + self.err.read_text()
            time.sleep(0.05)

    def family(self) -> dict[int, str]:
        """Its process and all below it: number -> name."""
        parents, names = {}, {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                before, after = path.read_text().rsplit(")", 1)
            except OSError:
                continue  # it has just ended
            number = int(path.parent.name)
            parents[number], names[number] = int(after.split()[1]), before.split("(", 1)[1]
        found = [self.process.pid]
        for one in found:
            found += [number for number, parent in parents.items() if parent == one]
        return {number: names[number] for number in found}

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and error."""
        try:
            code = self.process.wait(PATIENCE)
        finally:
            self.process.kill()
        return code, self.out.read_text(), self.err.read_text()


def saved(folder: Path) -> int:
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


def test_every_process_is_told_to_end(shop, tmp_path):
    """As SLURM does it: wandb's own process gets SIGTERM too, and ends. All is saved at the step where it stopped."""
    words = finetune(shop, shop.dist, None, tmp_path / "run", "--nproc_per_node", 2, "--wandb_logger", iters=100_000)
    run = Started(tmp_path, *words)
    run.wait_for_step(3)
    family = run.family()
    assert any(name.startswith("wandb-core") for name in family.values()), family
    for number in family:
        os.kill(number, signal.SIGTERM)
    code, _, err = run.end()
    assert code == 75, err
    assert f"stopped by a signal at iteration {saved(tmp_path / 'run')} of 100000, saved in" in err
    assert err.count(LOST) <= 1 and "Traceback" not in err  # none where the run was quicker to end than wandb
    assert "Traceback" not in (tmp_path / "run" / "finetune.log").read_text()


def test_wandb_is_killed(shop, tmp_path):
    """By the machine's lack of memory, say: one line, and the run goes on to its end."""
    words = finetune(shop, shop.dist, None, tmp_path / "run", "--nproc_per_node", 2, "--wandb_logger", iters=150)
    run = Started(tmp_path, *words)
    run.wait_for_step(2)
    (core,) = [number for number, name in run.family().items() if name.startswith("wandb-core")]
    os.kill(core, signal.SIGKILL)
    code, _, err = run.end()
    assert code == 0, err
    assert err.count(LOST) == 1 and "warning: wandb: " in err and "Traceback" not in err
    assert saved(tmp_path / "run") == 150
    assert "Traceback" not in (tmp_path / "run" / "finetune.log").read_text()


BROKEN = """
import sys
from megatron_ft.report import run_page
from megatron_ft.training import console, hooks, run_record, tensorboard_hook, wandb_hook
from megatron_ft.training.hooks import Hook

def broken(*_, **__):
    raise KeyError("the fox")

class Ended(Hook):  # as a library that ends the program where it should raise
    def on_step(self, iteration, metrics):
        sys.exit(9)

run_record.record = run_page.write_run_report = tensorboard_hook.TensorBoard.__init__ = broken
hooks.MetricsFile.on_eval = console.Console.on_save = broken
wandb_hook.WeightsAndBiases = lambda *_: Ended()
"""


def test_every_logger_fails(shop, tmp_path):
    """Each at another moment, with what no system raises: a line for each, and not another word."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finetune.log").symlink_to("/dev/full")
    (tmp_path / "run" / "training.yaml").mkdir()
    more = ("--nproc_per_node", 2, "--tensorboard_dir", tmp_path / "board", "--wandb_logger", *layout(1, 2))
    words = finetune(shop, shop.dist, None, tmp_path / "run", *more, iters=3)
    done = start(f"{BROKEN}{PLAIN}", *words)
    assert done.code == 0 and saved(tmp_path / "run") == 3, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    for name in ("finetune.log: no space left", "run.json: KeyError", "training.yaml: ", "metrics.jsonl: KeyError: 'the fox'",
                 "wandb: SystemExit: 9", "TensorBoard in", "the progress on the screen: KeyError"):  # fmt: skip
        assert len([line for line in lines if name in line and line.endswith(LOST)]) == 1, done.err
    assert (
        len([line for line in lines if "no report was written (KeyError: 'the fox')" in line]) == 1 and len(lines) == 8
    ), done.err
    assert "Traceback" not in done.err and "Logging error" not in done.err


def test_nobody_reads_what_is_printed(shop, tmp_path):
    """`finetune | tee log`, and tee gets the signal as well: the run ends as it would have."""
    words = finetune(shop, shop.dist, None, tmp_path / "run", iters=3)
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEGATRON_FT_DEVICE": "cpu"}
    command = [sys.executable, "-c", PLAIN, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=write, stderr=write, timeout=PATIENCE)
    os.close(write)
    assert done.returncode == 0 and saved(tmp_path / "run") == 3
    log = (tmp_path / "run" / "finetune.log").read_text()
    assert "the progress on the screen: broken pipe; nothing more is logged there" in log and "Traceback" not in log


def test_what_only_the_user_can_mend_is_an_error(shop, tmp_path):
    """wandb does not know whose run it is: told before the first step."""
    words = finetune(shop, shop.dist, None, tmp_path / "run", "--wandb_logger", iters=3)
    nobody = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = start(PLAIN, *words, **nobody)
    assert done.code == 2, done.err
    (line,) = said(done)
    assert "--wandb_logger: No API key configured" in line and "WANDB_MODE=offline" in line
    assert "iteration" not in done.out


class Hangs(Hook):
    """At the moment that is named, until `awake`."""

    def __init__(self, when: str, awake: threading.Event):
        self.when, self.awake, self.steps, self.abandoned = when, awake, [], False
        self._perhaps("make")

    def on_step(self, iteration, metrics):
        self._perhaps("on_step")
        self.steps.append(iteration)

    def on_end(self):
        self._perhaps("on_end")

    def abandon(self):
        self.abandoned = True

    def _perhaps(self, what):
        if self.when == what:
            self.awake.wait(PATIENCE)


@pytest.mark.parametrize(
    "when, message, lines",
    [
        ("make", "has not begun within", 1), ("on_step", "does not answer", 1), ("on_end", "has not finished within", 1),
        ("never", "", 0),
    ],
)  # fmt: skip
def test_a_logger_that_hangs(when, message, lines, monkeypatch, caplog):
    """Nobody waits for it longer than is promised."""
    for name in ("TO_START", "TO_ANSWER", "TO_FINISH"):
        monkeypatch.setattr(guard, name, 0.2 if message else PATIENCE)
    awake, made = threading.Event(), []

    def make():
        made.append(Hangs(when, awake))
        return made[0]

    hook = guard.Aside("the board", make)
    hook.on_step(1, {})
    time.sleep(0.5 if message else 0)
    hook.on_step(2, {})
    hook.on_end()
    hook.on_end()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == lines and all(line.startswith(f"the board: {message}") for line in told), told
    awake.set()
    if not message:
        assert made[0].steps == [1, 2] and not made[0].abandoned


@pytest.mark.parametrize("kind", [guard.Guarded, guard.Aside])
@pytest.mark.parametrize("when", ["make", "on_step", "on_eval", "on_save", "on_end"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MemoryError(), RuntimeError("two\nlines")], ids=type
)
def test_a_logger_that_raises(kind, when, error, caplog):
    """Said once, in one line, whatever it raises and whenever; then it is not called again."""
    called = []

    def moment(name):
        def method(*_):
            called.append(name)
            if name == when:
                raise error

        return method

    def make():
        moment("make")()
        return hook

    hook = Hook()
    for name in ("on_step", "on_eval", "on_save", "on_end", "abandon"):
        setattr(hook, name, moment(name))
    guarded = kind("the board", make)
    for _ in range(2):
        guarded.on_step(1, {})
        guarded.on_eval(1, {})
        guarded.on_save(1, Path())
    guarded.on_end()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the board: ") and line.endswith(LOST) and "\n" not in line
    assert called.count(when) == 1 and called[-1] == ("make" if when == "make" else "abandon")


def test_a_user_mistake_goes_through():
    def make():
        raise ConfigError("not installed")

    for kind in (guard.Guarded, guard.Aside):
        with pytest.raises(ConfigError, match="not installed"):
            kind("the board", make)


def test_ctrl_c_is_not_a_logger_that_fails():
    def pressed(*_):
        raise KeyboardInterrupt

    hook = Hook()
    hook.on_step = pressed
    with pytest.raises(KeyboardInterrupt):
        guard.Guarded("the board", lambda: hook).on_step(1, {})
