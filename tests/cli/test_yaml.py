"""Configuration files: where keys may stand, what is refused and in which line, who wins."""

import tracemalloc

import pytest

from megatron_ft.config.cli import parse
from tests.cli.sections_for_tests import COMMAND


@pytest.mark.parametrize(
    "text",
    [
        "lr: 1e-3\ntrain_iters: 7\nbf16: false\n",
        "optimizer:\n  lr: 1e-3\n  train-iters: 7\nmodel:\n  bf16: no\n",
        "optimizer: {lr: 0.001}\ntrain_iters: 7\nbf16: false\nmodel:\n",
        "optimizer: &o\n  lr: 1.0e-3\n  train_iters: 7\nbf16: false\n",
    ],
    ids=["flat", "nested", "mixed", "anchor"],
)
def test_flat_and_nested(read, file, text):
    got = read("--config", file(text))
    assert (got.lr, got.train_iters, got.bf16) == (1e-3, 7, False)


def test_every_kind_of_value(read, file):
    text = (
        "lr: 1\ntrain_iters: 1e3\nlr_decay_iters: null\nbetas: [0.8, 0.9]\ndata_path: [a, b]\nrole_weights: {user: 1}\n"
    )
    got = read("--config", file(text))
    assert (got.lr, got.train_iters, got.lr_decay_iters) == (1.0, 1000, None)
    assert (got.betas, got.data_path, got.role_weights) == ((0.8, 0.9), ["a", "b"], {"user": 1.0})
    assert type(got.lr) is float and type(got.train_iters) is int


def test_flags_win_over_the_file_and_the_file_over_defaults(read, file):
    got = read("--lr", "3", "--config", file("lr: 1\ntrain_iters: 7\nbf16: false"), "--bf16")
    assert (got.lr, got.train_iters, got.bf16, got.lr_decay_style) == (3.0, 7, True, "cosine")


def test_required_may_come_from_the_file(file):
    assert str(parse(COMMAND, ["--config", file("load: there")])[1].load) == "there"


def test_an_empty_file_is_no_mistake(read, file):
    assert read("--config", file("# nothing yet\n")).lr == 1e-5


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr: 1\ntrain_itters: 3\n", "line 2: unknown key train_itters; did you mean train_iters?"),
        ("model:\n  lr: 1\n", "line 2: lr belongs in optimizer, not in model"),
        ("optimiser:\n  lr: 1\n", "line 1: unknown key optimiser; did you mean optimizer?"),
        ("learning_rate: 1\n", "line 1: unknown key learning_rate; here it is lr"),
        ("lr: 1\nbf16: true\nlr: 2\n", "line 3: lr is given twice, first in line 1; keep one"),
        ("lr: 1\noptimizer:\n  lr: 2\n", "line 3: lr is given twice, first in"),
        ("train_iters: 1\ntrain-iters: 2\n", "line 2: train-iters is given twice, first in line 1"),
        ("role_weights:\n  user: 1\n  user: 2\n", "line 3: user is given twice, first in line 2"),
        ("lr: fast\n", "line 1: lr: 'fast' is not a number"),
        ("lr: true\n", "line 1: lr: True is not a number"),
        ("bf16: 3\n", "line 1: bf16: 3 is not true or false"),
        ("\nname: 3\n", "line 2: name: 3 is not text (put it in quotes)"),
        ("train_iters: null\n", "line 1: train_iters: None is not a whole number"),
        (
            "lr_decay_style: linaer\n",
            "line 1: lr_decay_style: 'linaer' is none of cosine, linear; did you mean linear?",
        ),
        ("data_path: a\n", "line 1: data_path: 'a'"),
        ("optimizer: 3\n", "line 1: optimizer is a section; write its settings below it"),
        ("lr: [1\n", "not valid YAML"),
        ("lr: 1\n\tbf16: true\n", "line 2: not valid YAML"),
        ("- lr\n", "holds no settings"),
        ("lr: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_refusal_names_file_and_line(refusal, file, text, message):
    got = refusal("--config", file(text))
    assert "run.yaml" in got and message in got


def bomb(start: str, link: str, times: int = 9) -> str:
    """Anchors of which each stands for the one before nine times over."""
    lines = [f"data_path:\n- &a0 {start}\n"]
    lines += [f"- &a{n} {link.format(', '.join([f'*a{n - 1}'] * times))}\n" for n in range(1, 12)]
    return "".join(lines)


@pytest.mark.parametrize(
    "text, message",
    [
        (bomb("[x, x]", "[{}]"), "its aliases expand to more than 100,000 values"),
        (bomb("{x: 1}", "{{<<: [{}]}}"), "its aliases expand to more than 100,000 values"),
        ("data_path: &a [*a]\n", "its aliases expand to more than 100,000 values"),
        ("data_path: " + "[" * 100_000 + "]" * 100_000 + "\n", "nested more than 200 deep"),
        ("".join(f"{' ' * n}a:\n" for n in range(3000)), "nested more than 200 deep"),
    ],
    ids=["lists", "merged mappings", "an alias inside itself", "brackets", "indentation"],
)
def test_bombs_are_refused_before_they_go_off(refusal, file, text, message):
    tracemalloc.start()
    assert message in refusal("--config", file(text))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_an_alias_is_no_mistake(read, file):
    assert read("--config", file("data_path: [&a x, *a]\n"))


def test_a_missing_file_is_named(refusal):
    assert (
        refusal("--config", "nowhere.yaml")
        == "nowhere.yaml: cannot be read (no such file or directory); check the path"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["a"],
        ["a", "--lr", "1e-7", "--no_bf16", "--no_tie_embed_logits", "--betas", "0.5", "0.25", "--lr_decay_iters", "9"],
        [
            "a: b #c",
            "--data_path",
            "no",
            "1e5",
            "ü",
            "--name",
            "1e-5",
            "--extra_tokens",
            "{x}",
            "--role_weights",
            "{a: 1}",
        ],
    ],
)
def test_what_print_config_prints_is_read_back_to_the_same(capsys, file, argv):
    with pytest.raises(SystemExit) as stop:
        parse(COMMAND, [*argv, "--print-config"])
    assert stop.value.code == 0
    assert parse(COMMAND, ["--config", file(capsys.readouterr().out)]) == parse(COMMAND, argv)


def test_print_config_is_a_template_where_something_required_is_missing(capsys):
    with pytest.raises(SystemExit):
        parse(COMMAND, ["--print_config"])
    out = capsys.readouterr().out
    assert out.startswith("optimizer:\n  lr: 1.0e-05\n") and "model:\n  # load:  (required)\n" in out
