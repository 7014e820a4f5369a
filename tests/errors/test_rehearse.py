"""--rehearse and --dry_run: alone and under a batch script, with what is there and with what is not; nothing is left behind."""

import concurrent.futures
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ft.errors import ConfigError
from megatron_ft.rehearsal.meeting import Meeting, shared_place
from tests.errors.conftest import ROOT, finetune
from tests.errors.test_before_torch import layout
from tests.errors.test_launcher import PLAIN, start

PORT = 20_000 + os.getpid() % 10_000


def temporary(tmp_path) -> dict[str, str]:
    """A place of its own for temporary files, so that what is left there is seen."""
    (tmp_path / "tmp").mkdir()
    return {"TMPDIR": str(tmp_path / "tmp")}


def assert_nothing_left(tmp_path) -> None:
    assert not list((tmp_path / "tmp").glob("megatron_ft*")) and [path.name for path in tmp_path.iterdir()] == ["tmp"]


def test_alone(shop, tmp_path):
    """A command for 2 machines x 2 processes on one; checkpoint and shards are there and read."""
    save = tmp_path / "run"
    more = (
        "--nnodes",
        2,
        "--nproc_per_node",
        2,
        "--node_rank",
        1,
        "--master_addr",
        "n1",
        "--master_port",
        1,
        "--save_interval",
        1000,
    )
    done = start(
        PLAIN,
        *finetune(shop, shop.split, None, save, *layout(2, 2), *more, "--rehearse", iters=5000),
        **temporary(tmp_path),
    )
    assert done.code == 0, done.err
    assert "rehearsal passed" in done.out and "4 processes connected" in done.out
    assert "all files exist" in done.out and "54 samples" in done.out and "steps 5000 -> 3" in done.out
    assert "iteration 3/ 3" in done.out and done.out.count("saved checkpoint") == 2
    assert_nothing_left(tmp_path)


def test_context_parallel_processes_become_replicas(shop, tmp_path):
    """Context parallelism needs GPUs; a rehearsal starts the same number of processes without it."""
    more = ("--context_parallel_size", 2, "--nproc_per_node", 2, "--no_packing", "--rehearse")
    done = start(PLAIN, *finetune(shop, shop.dist, None, None, *more, iters=3), **temporary(tmp_path))
    assert done.code == 0, done.err
    assert "TP1 x PP1 x CP2 x DP1, consistent" in done.out and "context parallel 2 -> 1" in done.out
    assert "rehearsal passed" in done.out and "2 processes connected" in done.out


def test_what_is_missing_is_told_at_once(shop, tmp_path):
    words = finetune(
        shop, tmp_path / "model", tmp_path / "chats", tmp_path / "run", "--vocab_file", tmp_path / "t.model"
    )
    done = start(PLAIN, *words, "--rehearse", *layout(2, 2))
    assert done.code == 2 and not list(tmp_path.iterdir())
    (line,) = [line for line in done.err.splitlines() if "error" in line]
    assert "model: no such folder" in line and "t.model: no such file" in line and "--make_believe" in line


def rehearsed(script: str, tmp_path, nodes: int, *words: str) -> str:
    """Rehearse a batch script with two processes a node, with a made-up llama2-7b; return what it printed."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "STAND_IN_NODES": str(nodes),
        "GPUS_PER_NODE": "2",
        "SAVE": str(tmp_path / "run"),
        **temporary(tmp_path),
    }
    command = [str(ROOT / "examples/slurm/rehearse.sh"), str(ROOT / "examples" / script), "llama2-7b", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal passed" in done.stdout
    assert_nothing_left(tmp_path)
    return done.stdout


def test_made_up_under_the_batch_script(tmp_path):
    """Two nodes x two processes by the stand-in for SLURM; neither checkpoint nor shards are there yet."""
    sizes = ["--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2"]
    printed = rehearsed("oasst_llama2_70b/stage2.sbatch", tmp_path, 2, *sizes)
    assert "checkpoints/llama2-70b-tp8-pp4-oasst_pre10: MISSING, generated" in printed


@pytest.mark.parametrize(("phase", "rank"), [pytest.param("phase1", 64, marks=pytest.mark.thorough), ("phase2", 8)])
def test_made_up_adapters(phase, rank, tmp_path):
    """Airophin's; the second phase begins from a checkpoint of adapters, which alone has their rank."""
    printed = rehearsed(f"airophin_13b/{phase}.sbatch", tmp_path, 1)
    assert f"rank {rank}, on a base in NF4" in printed


IMPATIENT = """
from megatron_ft.commands import rehearse
from megatron_ft.rehearsal import meeting
rehearse.AT_ONCE, meeting.MORE = 6.0, 3.0
"""


def node(number: int, tmp_path, program: str, *words, before: tuple[str, ...] = (), **more) -> subprocess.Popen:
    """A process as srun starts it, one of two machines'."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "MASTER", "SLURM"))
    }
    slurm = {
        "SLURM_PROCID": number,
        "SLURM_NODEID": number,
        "SLURM_STEP_NUM_NODES": 2,
        "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_JOB_ID": 7,
    }
    met = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": PORT,
        "SLURM_LOCALID": 0,
        "TMPDIR": tmp_path / "tmp" / str(number),
    }
    (tmp_path / "tmp" / str(number)).mkdir(parents=True)
    return subprocess.Popen(
        [*before, sys.executable, "-c", program, *map(str, words), "--rehearse"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**clean, **{name: str(value) for name, value in {**slurm, **met, **more}.items()}},
    )  # fmt: skip


def ended(*nodes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of each."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        try:
            said = list(pool.map(lambda one: one.communicate(timeout=170), nodes))
        finally:
            for one in nodes:
                one.kill()
    return [(one.returncode, *texts) for one, texts in zip(nodes, said, strict=True)]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error: " in line]


@pytest.mark.parametrize("launcher", [True, False], ids=["launchers", "ranks"])
def test_several_machines(launcher, shop, tmp_path):
    """Each with its own place for temporary files: they meet beside --save, and leave nothing there."""
    more = ("--nproc_per_node", 1) if launcher else ()
    words = finetune(shop, shop.dist, None, tmp_path / "runs" / "one", *layout(2, 1), *more, iters=900)
    (tmp_path / "runs").mkdir()
    for code, _, err in (said := ended(*(node(number, tmp_path, PLAIN, *words) for number in range(2)))):
        assert code == 0, err
    assert "rehearsal passed" in said[0][1] and "2 processes connected" in said[0][1]
    assert not list((tmp_path / "runs").iterdir())
    assert not [path for path in (tmp_path / "tmp").rglob("*megatron_ft*")]


def test_machines_that_do_not_share_the_folder(shop, tmp_path):
    """The second one has a disk of its own where the first one's --save lies."""
    (tmp_path / "runs").mkdir()
    own = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path / "runs"} && exec "$@"', "sh")
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    words = finetune(shop, shop.dist, None, tmp_path / "runs" / "one", *layout(2, 1), "--nproc_per_node", 1, iters=900)
    program = f"{IMPATIENT}{PLAIN}"
    first, second = ended(node(0, tmp_path, program, *words), node(1, tmp_path, program, *words, before=own))
    for code, _, err in (first, second):
        (line,) = errors(err)
        assert code == 2 and len(err.splitlines()) == 1
        assert (
            f"{tmp_path}/runs/.megatron_ft-rehearsal-" in line
            and "set --save to a folder that all machines see" in line
        )
        assert socket.gethostname() in line
    assert "got no answer" in first[2] and "sees no file that localhost writes" in second[2]
    assert not list((tmp_path / "runs").iterdir())


def test_ranks_that_do_not_share_the_folder(shop, tmp_path):
    """Of each machine, one says so."""
    nodes = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        words = finetune(shop, shop.dist, None, tmp_path / str(number) / "one", *layout(2, 1), iters=900)
        nodes.append(node(number, tmp_path, f"{IMPATIENT}{PLAIN}", *words, SLURM_LOCALID=number))
    first, second = ended(*nodes)
    assert (first[0], len(errors(first[2]))) == (2, 1) and (second[0], second[2]) == (2, "")


def test_what_the_first_machine_lacks_ends_the_others(shop, tmp_path):
    """It is not waited for what will never come."""
    words = finetune(shop, shop.dist, None, tmp_path / "one", *layout(2, 1), "--nproc_per_node", 1, iters=900)
    lacking = [tmp_path / "gone" if word == shop.dist else word for word in words]
    program = "from megatron_ft.rehearsal import meeting; meeting.GONE = 1.0\n" + PLAIN
    first, second = ended(node(0, tmp_path, program, *lacking), node(1, tmp_path, program, *words))
    assert first[0] == 2 and "gone: no such folder" in errors(first[2])[0]
    assert second[0] == 2 and "localhost ended the rehearsal" in errors(second[2])[0]
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]


def test_no_place_to_meet(tmp_path, monkeypatch):
    """Beside --save, whose own folder stays untouched."""
    (tmp_path / "run").mkdir()
    assert shared_place({"--save": str(tmp_path / "run" / "a" / "b"), "--run_dir": "x"}) == ("--save", tmp_path / "run")
    assert shared_place({"--run_dir": str(tmp_path / "run")}) == ("--run_dir", tmp_path)
    with pytest.raises(ConfigError, match=r"rehearsal-7: no such file or directory; .* share a folder beside --save"):
        Meeting(Path("/proc/.rehearsal-7"), 0, 2, "localhost", "--save", 1.0).begin()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"run: cannot be written to; .* share a folder beside --save"):
        shared_place({"--save": str(tmp_path / "run" / "a")})


def test_dry_run(shop, tmp_path):
    """All but the steps, in every process; nothing is written."""
    done = start(
        PLAIN,
        *finetune(
            shop, shop.split, None, tmp_path / "run", *layout(2, 2), "--nproc_per_node", 4, "--dry_run", iters=900
        ),
    )
    assert done.code == 0, done.err
    assert "would train iterations 1 to 900" in done.out and "would save" in done.out and "iteration 1/" not in done.out
    assert not list(tmp_path.iterdir())
    done = start(PLAIN, *finetune(shop, shop.split, None, None, *layout(2, 1), "--dry_run"))
    assert done.code == 2  # the checkpoint is for another layout
