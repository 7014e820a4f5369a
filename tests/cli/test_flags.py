"""Flags: both spellings, every kind of value, and messages that say what to type instead."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ft.config.cli import Command, parse
from tests.cli.sections_for_tests import COMMAND


def test_defaults_are_the_dataclass_s(read):
    got = read()
    assert (got.lr, got.train_iters, got.bf16, got.data_path, got.name) == (1e-5, 100, True, [], None)
    assert got.load == Path("checkpoint")


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--train_iters", "7"], "train_iters", 7),
        (["--train-iters", "7"], "train_iters", 7),
        (["--train-iters=7"], "train_iters", 7),
        (["--train_iters", "1e3"], "train_iters", 1000),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--lr", "-1e-3"], "lr", -1e-3),
        (["--lr", "-.5"], "lr", -0.5),
        (["--lr", "3"], "lr", 3.0),
        (["--lr_decay_style", "linear"], "lr_decay_style", "linear"),
        (["--lr_decay_iters", "50"], "lr_decay_iters", 50),
        (["--lr_decay_iters", "50", "--lr_decay_iters", "null"], "lr_decay_iters", None),
        (["--betas", "0.9", "0.99"], "betas", (0.9, 0.99)),
        (["--betas", "-1", "-2"], "betas", (-1.0, -2.0)),
        (["--data_path", "a", "b c"], "data_path", ["a", "b c"]),
        (["--data_path=a"], "data_path", ["a"]),
        (["--role_weights", "{context: 0.5, user: 0}"], "role_weights", {"context": 0.5, "user": 0.0}),
        (["--extra_tokens", "<|im_start|>,<|im_end|>"], "extra_tokens", "<|im_start|>,<|im_end|>"),
        (["--extra_tokens", '"<|im_start|>,<|im_end|>"'], "extra_tokens", "<|im_start|>,<|im_end|>"),
        (["--extra_tokens", "'a'"], "extra_tokens", "a"),
        (["--extra_tokens", "a=b"], "extra_tokens", "a=b"),
        (["--extra_tokens=--x"], "extra_tokens", "--x"),
        (["--extra_tokens", "- a list\nof lines"], "extra_tokens", "- a list\nof lines"),
        (["--extra_tokens", '"'], "extra_tokens", '"'),
        (["--name", "007"], "name", "007"),
    ],
)
def test_value(read, argv, name, value):
    got = getattr(read(*argv), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "flag, name, value",
    [
        ("--sequence_parallel", "sequence_parallel", True),
        ("--sequence-parallel", "sequence_parallel", True),
        ("--sequence_parallel=true", "sequence_parallel", True),
        ("--no_bf16", "bf16", False),
        ("--no-bf16", "bf16", False),
        ("--bf16=False", "bf16", False),
        ("--bf16=0", "bf16", False),
        ("--no_bf16=no", "bf16", True),
        ("--no_tie_embed_logits", "no_tie_embed_logits", True),
        ("--no-tie-embed-logits=false", "no_tie_embed_logits", False),
    ],
)
def test_switch(read, flag, name, value):
    assert getattr(read(flag), name) is value


def test_a_switch_takes_no_value_from_what_follows(read):
    assert read("--sequence_parallel", "--lr", "1").lr == 1.0


def test_the_last_of_two_wins(read):
    assert read("--lr", "1", "--lr", "2", "--no_bf16", "--bf16").lr == 2.0


@pytest.mark.parametrize("argv", [["there", "--lr", "1"], ["--lr", "1", "there"], ["--load", "there"]])
def test_positional(argv):
    _, model = parse(COMMAND, argv)
    assert model.load == Path("there")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lr_decay_stile", "linear"], "unknown flag --lr_decay_stile; did you mean --lr_decay_style?"),
        (["--train-itters=3"], "unknown flag --train-itters; did you mean --train_iters?"),
        (["--train_it", "3"], "unknown flag --train_it; did you mean --train_iters?"),  # no abbreviations
        (["-lr", "3"], "unknown flag -lr; did you mean --lr?"),
        (["--zzzzzz"], "unknown flag --zzzzzz"),
        (["--learning_rate", "3"], "unknown flag --learning_rate; here it is --lr"),
        (["--max-steps", "3"], "unknown flag --max-steps; here it is --train_iters"),
        (["--num_train_epochs", "3"], "unknown flag --num_train_epochs; here it is --epochs"),
        (["--no_no_tie_embed_logits"], "unknown flag --no_no_tie_embed_logits; did you mean --no_tie_embed_logits?"),
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--train_iters", "1.5"], "--train_iters: '1.5' is not a whole number"),
        (["--lr_decay_style", "linaer"], "--lr_decay_style: 'linaer' is none of cosine, linear; did you mean linear?"),
        (["--bf16=maybe"], "--bf16=maybe: 'maybe' is not true or false"),
        (["--lr"], "--lr: expected one argument"),
        (["--betas", "1"], "--betas"),
        (["--role_weights", "{user: much}"], "--role_weights: 'much'"),
        (["a"], "load is given twice: 'a' and --load 'checkpoint'"),
        (["--load", "x", "--", "a", "b"], "nothing takes: b"),
    ],
)
def test_refusal_says_what_to_type(refusal, argv, message):
    assert message in refusal(*argv)


def test_required_is_asked_for():
    with pytest.raises(Exception, match="needed and not given: --load; see --help"):
        parse(COMMAND, [])


def test_a_translation_is_offered_only_where_the_command_has_the_flag(refusal):
    assert "here it is" not in refusal("--max_grad_norm", "1")


def test_help_has_groups_helps_defaults_and_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(COMMAND, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for part in (
        "Tries things.",
        "How weights change:",
        "model:",
        "--lr X Peak learning rate, reached after 10% of the steps. (default: 1e-05)",
        "--lr_decay_style {cosine,linear} Shape of the decay. (default: cosine)",
        "--bf16, --no_bf16 Compute in bf16. (default: true)",
        "--no_tie_embed_logits Own output matrix.",
        "--load PATH Checkpoint. (required)",
        "--betas X [X ...] Adam's decays. (default: 0.9 0.95)",
        "--config FILE.yaml",
        "examples: megatron-ft try --load x --lr 1e-4",
    ):
        assert part in text
    assert "second paragraph" not in text and "=false" not in text


@dataclass(frozen=True)
class Open:
    """A command with a file format of its own."""

    config: tuple[str, ...] = ()
    """Names of sections in its file: the command's own --config."""
    output: str = "out"


def test_open_flags_are_collected_and_typed():
    command = Command("open", "Takes anything.", (Open,), open_flags=True)
    argv = (
        "--config a b --seed 3 --output x --datasets.min-len=1e-2 --no-val_split --drop --list [1,2] --text a:b".split()
    )
    section, others = parse(command, argv)
    assert section == Open(("a", "b"), "x")
    assert others == {
        "seed": 3,
        "datasets.min_len": 0.01,
        "val_split": None,
        "drop": True,
        "list": [1, 2],
        "text": "a:b",
    }


def test_one_name_in_two_sections_is_our_mistake():
    with pytest.raises(ValueError, match="config is a field of both"):
        parse(Command("twice", "", (Open, Open)), [])


@dataclass
class Renamed:
    """Checks"""

    verify_data: bool = True
    """compare"""


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--no_verify"], False), (["--verify"], True), (["--quick"], False), (["--no-verify"], False),
        (["--no_verify_data"], False), (["--verify=false"], False), (["--quick=false"], True), ([], True),
    ],
)  # fmt: skip
def test_old_names_go_on_working_and_say_the_new_one(argv, value, caplog):
    (got,) = parse(Command("renamed", "", (Renamed,)), argv)
    assert got.verify_data is value
    old = argv and "data" not in argv[0]
    assert len(caplog.messages) == bool(old)
    if old:
        name = argv[0].split("=")[0].replace("-", "_").replace("__", "--")
        assert caplog.messages[0].startswith(f"{name} is now --{'' if name == '--verify' else 'no_'}verify_data;")


@pytest.mark.parametrize(
    ("line", "value"), [("verify: false", False), ("quick: true", False), ("quick: false", True)]
)  # fmt: skip
def test_old_names_in_a_file(line, value, tmp_path, caplog):
    for text in (line, f"renamed:\n  {line}"):
        (tmp_path / "a.yaml").write_text(text)
        (got,) = parse(Command("renamed", "", (Renamed,)), ["--config", str(tmp_path / "a.yaml")])
        assert got.verify_data is value
    assert all("is now" in message for message in caplog.messages) and len(caplog.messages) == 2


def test_an_old_name_that_a_command_still_has_is_its_own(caplog):
    from checkpoints_conversion.verify import COMMAND as VERIFY

    (got,) = parse(VERIFY, ["--hf", "a", "--megatron", "b", "--no_digests"])
    assert not got.verify_checkpoint and "--no_digests is now --no_verify_checkpoint" in caplog.text
