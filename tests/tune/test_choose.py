"""What tune chooses from model, chats and machine, and that the commands it prints are ones that the other commands take."""

import contextlib
import io
import shlex
from pathlib import Path

import numpy as np
import pytest

from megatron_ft import device
from megatron_ft.__main__ import main
from megatron_ft.commands import finetune, tune
from megatron_ft.commands.table import load
from megatron_ft.config.cli import parse, run_script
from megatron_ft.planner import known
from megatron_ft.planner.figures import whole_model
from megatron_ft.steps import shell
from megatron_ft.tune.choice import Choice
from megatron_ft.tune.choose import batch_size, chat_format, row_length
from megatron_ft.tune.layout import layout
from megatron_ft.tune.look import Machine, Model
from megatron_ft.tune.rates import rate
from megatron_ft.tune.six import as_words
from tests.tune.models import llama, qwen, write_chats


@pytest.mark.parametrize(
    "lengths, positions, expected, why",
    [
        ([40, 60, 134], 512, 192, "holds the longest chat"),
        ([40, 60, 65], 512, 64, "holds the longest chat"),
        ([10] * 999 + [5000], 8192, 64, "holds 99% of the chats; cut: 1 longer chat"),
        ([40, 3000], 512, 512, "the model's positions; cut: 1 longer chat"),
        ([40, 30000], 32768, 4096, "longer rows need much memory; cut: 1 longer chat"),
        ([100] * 50_000, 4096, 2048, "several chats in a row"),
        ([20, 30], 48, 48, "the model's positions"),
    ],
)
def test_row_length(lengths, positions, expected, why):
    assert row_length(np.array(lengths), positions) == (expected, why)


@pytest.mark.parametrize(
    "rows, gpus, size", [(10, 0, 1), (199, 0, 1), (200, 0, 2), (900, 0, 8), (10**6, 0, 64), (10, 6, 6), (900, 6, 12)]
)
def test_batch_size(rows, gpus, size):
    assert batch_size(rows, gpus)[0] == size


@pytest.mark.parametrize(
    "parameters, lora, lr",
    [
        (2e6, False, 3e-3),
        (5e8, False, 5e-5),
        (7e9, False, 2e-5),
        (13e9, False, 1e-5),
        (70e9, False, 1e-5),
        (7e9, True, 2e-4),
        (70e9, True, 1e-4),
    ],
)
def test_learning_rates_are_those_of_the_recipes(parameters, lora, lr):
    assert rate(int(parameters), lora).lr == lr


def model(name: str, template: bool = False) -> Model:
    arch = known.architecture(name)
    return Model(Path(name), arch, whole_model(arch), "bfloat16", template, "")


def test_chat_format():
    assert chat_format(model("llama2-7b"), None)[0] == "chatml"
    assert chat_format(model("falcon-40b"), None)[0] == "alfred"
    assert chat_format(model("qwen2.5-7b", template=True), None)[0] == "tokenizer"
    assert chat_format(model("qwen2.5-7b", template=True), "llama-3") == ("llama3", "as given")


def laid_out(name: str, gpus: int, kind: str, given: dict | None = None, lora: bool = False) -> Choice:
    choice = Choice({"lora_rank": 64} if lora else {})
    settings = parse(
        finetune.COMMAND, ["--load", "-", "--data_path", "-", "--train_iters", "1", *as_words(given or {})]
    )[0]
    layout(
        choice,
        model(name),
        Machine(gpus, known.gpu(kind).memory * 1e9, kind, 8, False),
        given or {},
        settings,
        2048,
        64,
    )
    return choice


def test_a_layout_of_gpus_fits():
    flags = laid_out("llama2-70b", 32, "h100-80gb").flags
    assert int(flags["tensor_model_parallel_size"]) * int(flags["pipeline_model_parallel_size"]) > 1
    assert flags["bf16"] is True
    assert (
        laid_out("llama2-7b", 8, "h100-80gb", {"tensor_model_parallel_size": 4}).flags["tensor_model_parallel_size"]
        == 4
    )


def test_what_does_not_fit_says_what_would():
    with pytest.raises(
        Exception, match=r"fits into no layout of 1 GPU of 86 GB: use --lora, or more GPUs: --gpus 2 are enough"
    ):
        laid_out("llama2-7b", 1, "h100-80gb")
    assert laid_out("llama2-7b", 2, "h100-80gb")


def test_adapters_on_a_model_that_fits_only_in_4_bits():
    assert "base_precision" not in laid_out("llama2-7b", 1, "h100-80gb", lora=True).flags
    choice = laid_out("llama2-70b", 1, "h100-80gb", lora=True)
    assert choice.flags["base_precision"] == "nf4"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    llama(folder / "llama")
    qwen(folder / "qwen")
    write_chats(folder / "chats.jsonl", 60)
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The pretokenizer runs in this process, which is quicker."""

    def run(self, words, watch=None) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(words[1:])
        if code:
            raise shell.CommandFailed(said.getvalue(), code, shell._mistake(code, said.getvalue()))
        return said.getvalue()

    monkeypatch.setattr(shell.Shell, "run", run)


def dry(place, capsys, name: str, *words) -> list[list[str]]:
    assert run_script(tune.COMMAND, tune.run, [str(place / name), str(place / "chats.jsonl"), "--dry_run", *words]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize(
    "name, words",
    [
        ("llama", ("--lora",)),
        ("llama", ("--gpus", "8")),
        ("qwen", ()),
        ("qwen", ("--gpus", "16", "--gpu", "h100-80gb", "--lora")),
    ],
)
def test_dry_run_prints_six_commands_that_are_taken(place, capsys, name, words, monkeypatch):
    monkeypatch.chdir(place)
    commands = dry(place, capsys, name, *words)
    names = [words[1] for words in commands]
    assert names == [
        "pretokenize", "hf-to-megatron", "generate", "finetune", "generate", "merge-adapter" if "--lora" in words else "megatron-to-hf",
    ]  # fmt: skip
    for command, *_ in [(load(line[1])[0], line) for line in commands]:
        assert command.name in names
    for line in commands:
        parse(load(line[1])[0], line[2:])
    settings = parse(finetune.COMMAND, commands[3][2:])[0]
    assert settings.launching.nproc_per_node == (8 if "--gpus" in words else 1)
    assert settings.launching.nnodes == (2 if "16" in words else None)
    assert ("--chat_format" in commands[1]) == (name == "llama")
    assert settings.adapters.train_new_tokens == ("--lora" in words and name == "llama")
    assert not list(place.glob("runs*"))


def test_flags_of_the_user_come_first(place, capsys):
    words = (
        "--lr",
        "1e-4",
        "--seq_length",
        "128",
        "--train_iters",
        "7",
        "--no_packing",
        "--adam_beta2",
        "0.95",
        "-o",
        "there",
    )
    settings = parse(finetune.COMMAND, dry(place, capsys, "llama", *words)[3][2:])[0]
    assert (settings.optimizer.lr, settings.data.seq_length, settings.batch.train_iters) == (1e-4, 128, 7)
    assert settings.batch.epochs is None and not settings.data.packing and settings.optimizer.adam_beta2 == 0.95
    assert settings.checkpointing.save == "there/tuned"


def test_a_warm_up_as_a_share_is_the_users(place, capsys):
    settings = parse(finetune.COMMAND, dry(place, capsys, "llama", "--lr_warmup_fraction", "0.1")[3][2:])[0]
    assert (settings.optimizer.lr_warmup_fraction, settings.optimizer.lr_warmup_iters) == (0.1, 0)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--epoch", "3"), "unknown flag --epoch; did you mean --epochs?"),
        (("--learning_rate", "1"), "unknown flag --learning_rate; here it is --lr"),
        (("--save", "x"), "--save is set by tune itself"),
        (("--epochs", "0"), "--epochs 0: must be above 0"),
        (("--lr", "fast"), "--lr: 'fast' is not a number"),
        (("--gpus", "2"), "--gpus 2: this machine has no GPU; --dry_run prints"),
        (("--gpus", "0"), "--gpus 0: must be at least 1"),
        (("--gpus", "12", "--dry_run"), "--gpus 12: more than 8 must be a multiple"),
        (("--chat_format", "chatmal"), "unknown chat format 'chatmal'"),
        (("--seq_length", "9999"), "beyond the model's 256 positions"),
        (("--global_batch_size", "3", "--micro_batch_size", "2"), "--global_batch_size 3 is not a multiple"),
        (("--tensor_model_parallel_size", "3"), "tensor"),
        (("-o", "{place}"), "contains files that are not tune's"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, capfd, words, message, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "memories", list)
    monkeypatch.chdir(tmp_path)
    words = [word.format(place=place) for word in words]
    assert run_script(tune.COMMAND, tune.run, [str(place / "llama"), str(place / "chats.jsonl"), *words]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith("megatron-ft tune: error: ") and message in said
    assert not list(tmp_path.rglob("tune.json"))


@pytest.mark.parametrize(
    "model_folder, chats, message",
    [
        ("none", "chats.jsonl", "no such folder; give the folder of a Hugging Face model"),
        ("", "chats.jsonl", "no Hugging Face model"),
        ("llama", "none.jsonl", "none.jsonl: cannot be read"),
        ("llama", "one.jsonl", "one chat can be trained on; two are needed"),
    ],
)
def test_wrong_places(place, capfd, model_folder, chats, message, tmp_path):
    write_chats(place / "one.jsonl", 1)
    out = tmp_path / "out"
    assert run_script(tune.COMMAND, tune.run, [str(place / model_folder), str(place / chats), "-o", str(out)]) == 2
    assert message in capfd.readouterr().err and not out.exists()
