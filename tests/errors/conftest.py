"""A tokenizer, a tiny model, checkpoints and shards, made once by the commands themselves, and damaged copies of them."""

import contextlib
import functools
import json
import os
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTRA = "<|im_start|>,<|im_end|>"


@dataclass(frozen=True)
class Done:
    """What a command left. torch: whether it imported torch by itself; None where it was killed."""

    code: int
    out: str
    err: str
    torch: bool | None


class Desk:
    """A process that runs command lines; see desk.py."""

    def __init__(self, *argv: str):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER_", "RANK"))}
        environment |= {"OMP_NUM_THREADS": "1", "MEGATRON_FT_DEVICE": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.errors.desk", *argv],
            cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *argv, module: str = "megatron_ft", **request) -> Done:
        line = json.dumps({"module": module, "argv": [str(word) for word in argv], **request})
        print(line, file=self.process.stdin, flush=True)
        return Done(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="session")
def desk():
    """Commands that have to fail before torch is imported."""
    desk = Desk()
    yield desk
    desk.close()


@functools.cache
def engine_desk() -> Desk:
    """Return the desk of this test process that has imported the engine."""
    return Desk("engine")


_RUN_FILE = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
_CLIENT = """#!{python} -IS
import json, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
stream = link.makefile("rw")
print(json.dumps(sys.argv[1:]), file=stream, flush=True)
code, out, err = json.loads(stream.readline())
sys.stderr.write(err)
sys.stdout.write(out)
sys.exit(code)
"""


class _ToTheDesk(socketserver.StreamRequestHandler):
    """One call of the stand-in for an interpreter."""

    def handle(self) -> None:
        words = json.loads(self.rfile.readline())
        if words[:2] == ["-m", "megatron_ft"]:
            done = engine_desk()(*words[2:], patience=300)
        else:
            done = engine_desk()(*words, program=_RUN_FILE, patience=300)
        self.wfile.write(json.dumps([done.code, done.out, done.err]).encode() + b"\n")


@contextlib.contextmanager
def interpreter_of_the_desk():
    """Yield the path of a program that a script may call as its Python: what it runs is forked from the desk of the engine."""
    with tempfile.TemporaryDirectory() as folder:  # a short path: that of a socket is limited
        address, program = f"{folder}/s", Path(folder, "python")
        program.write_text(_CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        with socketserver.UnixStreamServer(address, _ToTheDesk) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield program
            server.shutdown()


@pytest.fixture(scope="session")
def engine():
    """Commands that need torch and the engine."""
    yield engine_desk()
    engine_desk().close()
    engine_desk.cache_clear()


@pytest.fixture(scope="session")
def shop(tmp_path_factory, desk, engine):
    """Names -> paths. Only copies of what lies here are damaged."""
    root = tmp_path_factory.mktemp("shop")

    def must(done: Done):
        assert done.code == 0, done.err
        return done

    at = SimpleNamespace(root=root, tokenizer=train_tokenizer(root / "t", 300), other=train_tokenizer(root / "o", 310))
    at.chats = write_chats(root / "chats.jsonl", 60)
    at.hf = root / "hf"
    tiny = ("--hidden_size", 64, "--max_position_embeddings", 128)
    must(engine(at.tokenizer, at.hf, *tiny, module="examples.oasst.make_tiny_llama"))
    for name, more in {
        "classic": ("--ckpt_format", "torch"), "dist": (),
        "split": ("--tensor_model_parallel_size", 2, "--pipeline_model_parallel_size", 2, "--ckpt_format", "torch"),
    }.items():  # fmt: skip
        setattr(at, name, root / name)
        must(engine("hf-to-megatron", at.hf, root / name, "--chat_format", "chatml", *more))
    at.bare = root / "bare"  # without the chat format's tokens
    must(engine("hf-to-megatron", at.hf, at.bare))
    for name, tokenizer in {"shards": at.tokenizer, "foreign": at.other}.items():
        prefix = root / name / "c"
        must(desk("pretokenize", "--input", at.chats, "--tokenizer", tokenizer, "--output_prefix", prefix))
        setattr(at, name, f"{prefix}-train")
    questions = write_chats(root / "questions.jsonl", 5, roles=("user",))
    must(desk("pretokenize", "--input", questions, "--tokenizer", at.tokenizer, "--output_prefix", root / "q" / "q"))
    at.questions = f"{root}/q/q-train"
    at.trained = root / "trained"
    must(engine(*finetune(at, save=at.trained)))
    return at


def finetune(shop, load=None, data=None, save=None, *more, iters=2) -> list:
    """The words of a short run in one process."""
    words = ["finetune", "--load", load or shop.classic, "--data_path", data or shop.shards, "--seq_length", 128]
    words += ["--train_iters", iters, "--global_batch_size", 2, "--lr", "1e-3", "--log_interval", 1, *more]
    return words + (["--save", save] if save else [])


def train_tokenizer(folder: Path, size: int) -> Path:
    import sentencepiece

    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = (f"{a}{b} {b}{a}{c} plum {c}{b}" for a in letters for b in letters for c in letters[::5])
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words, model_writer=file, vocab_size=size, model_type="bpe",
            character_coverage=1.0, num_threads=1, minloglevel=2,
        )  # fmt: skip
    return folder / "tokenizer.model"


def write_chats(path: Path, count: int, roles: tuple[str, ...] = ("user", "assistant")) -> Path:
    words = "plum fox bird tree stone cloud river lamp".split()
    with path.open("w") as file:
        for n in range(count):
            text = " ".join(words[(n + i) % 8] for i in range(3 + n % 5))
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role in roles]}) + "\n")
    return path


def copy(source, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
