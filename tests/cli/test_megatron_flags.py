"""Flags of Megatron-LM, Megatron-LLM and Megatron-Bridge: each has a fate, and the fate is what happens."""

import shlex
from collections import Counter
from pathlib import Path

import pytest

from megatron_ft.commands.finetune import COMMAND
from megatron_ft.config.argv import switch_flags
from megatron_ft.config.checks import check_settings
from megatron_ft.config.cli import parse
from megatron_ft.config.expected import Model
from megatron_ft.config.fields import options_of
from megatron_ft.config.megatron_flags import MEANS, SAME, as_table, fate_of, foreign
from megatron_ft.errors import ConfigError
from tests.test_layers import ROOT

DATA = Path(__file__).with_name("data")
LISTS = {
    "Megatron-LM's `arguments.py` (commit d98e8a64)": "megatron_lm_arguments.txt",
    "Megatron-LLM's `arguments.py` and `finetune.py`": "megatron_llm.txt",
    "example scripts of Megatron-LM": "megatron_lm_examples.txt",
    "recipe scripts of Megatron-Bridge": "megatron_bridge_recipes.txt",
}
FATES = ("taken", "compared", "translated", "no effect", "refused")
NEEDED = ["--load", "/nowhere", "--data_path", "x", "--train_iters", "100", "--global_batch_size", "10", "--finetune"]


def flags_of(options):
    return {
        flag
        for option in options.values()
        for flag in (switch_flags(option, options) if option.is_switch else [option.name])
    }


OURS, COMPARED = flags_of(options_of(COMMAND.sections)), flags_of(options_of((Model,)))


def row_of_fates(title: str) -> str:
    names = (DATA / LISTS[title]).read_text().split()
    fates = {name: fate_of(name, OURS, COMPARED) for name in names}
    assert not (lost := [name for name, fate in fates.items() if fate is None]), f"without a fate: {', '.join(lost)}"
    counts = Counter(fates.values())
    return f"| {title} | {len(names)} | {' | '.join(str(counts[fate]) for fate in FATES)} |"


@pytest.mark.parametrize("title", LISTS)
def test_every_flag_has_a_fate_and_the_page_has_their_numbers(title):
    assert row_of_fates(title) in (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")


def test_the_page_has_the_table():
    assert as_table() in (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def every_line(caplog):
    caplog.set_level("INFO")


def test_no_name_is_both_ours_and_foreign():
    assert not OURS & {*SAME, *MEANS, *foreign()}
    assert len(foreign()) > 250 and {*SAME.values()} | {ours for ours, _ in MEANS.values()} <= OURS


def settings(*words, needed=NEEDED):
    return parse(COMMAND, [*needed, *map(str, words)])[0]


def sample(name: str) -> list[str]:
    flag = foreign()[name]
    return [f"--{name}", *([flag.values[0] if flag.values else "0.5"] if flag.arity else [])]


IDLE = [name for name, flag in foreign().items() if flag.fate in ("no effect", "only")]


def test_flags_without_effect_change_no_setting_and_are_named_in_one_line(caplog):
    assert settings(*(word for name in IDLE for word in sample(name))) == settings()
    lines = [line for line in caplog.messages if line.startswith("accepted, without an effect here: ")]
    assert len(lines) == 1 and all(f"--{name}" in lines[0] for name in IDLE)


def test_other_values_are_refused():
    for name in IDLE:
        if foreign()[name].values:
            with pytest.raises(ConfigError, match=f"--{name} is refused: other is none of "):
                settings(f"--{name.replace('_', '-')}=other")


def test_all_refused_and_unknown_flags_are_in_one_message():
    names = [name for name, flag in foreign().items() if flag.fate == "refused"]
    words = [word for name in names for word in (f"--{name}", "7", "-1")]
    with pytest.raises(ConfigError) as caught:
        settings(*words, "--swiglu", "--zzzzzz", "--train_itres", "3", "--learning_rate", "1")
    message = str(caught.value)
    assert message.startswith(f"{len(names) + 3} flags are not taken: ") and "\n" not in message
    assert all(f"--{name} (refused: {foreign()[name].reason})" in message for name in names)
    for hint in (
        "--zzzzzz (unknown)",
        "--train_itres (did you mean --train_iters?)",
        "--learning_rate (here it is --lr)",
    ):
        assert hint in message


TRANSLATED = [
    ("--swiglu", "--glu_activation swiglu"),
    ("--swiglu=false", ""),
    ("--num-query-groups 4 --group-query-attention", "--num_attention_heads_kv 4 --group_query_attention"),
    ("--untie-embeddings-and-output-weights", "--no_tie_embed_logits"),
    ("--rope_theta 1e6", "--rotary_base 1e6"),
    ("--norm-epsilon 1e-6", "--layernorm_epsilon 1e-6"),
    ("--use-rotary-position-embeddings", "--position_embedding_type rope"),
    ("--recompute-activations", "--recompute_granularity selective"),
    ("--rotary-seq-len-interpolation-factor 2", "--rope_scaling_type linear --rope_scaling_factor 2"),
    ("--train_samples 1009", "--train_iters 100"),
    ("--lr_warmup_samples 30 --lr_decay_samples 800", "--lr_decay_iters 80 --lr_warmup_iters 3"),
    ("--no-load-optim --no-load-rng", ""),
    ("--num-virtual-stages-per-pipeline-rank 2", "--virtual_pipeline_model_parallel_size 2"),
    ("--window-size (128,0)", "--window_size=(128,0)"),
    ("--load_iters 30", "--load /nowhere/iter_0000030"),
    ("--pretrained_checkpoint /elsewhere", "--load /elsewhere --finetune"),
    ("--data_path 0.3 a 0.7 b", "--data_path a b --data_weights 0.3 0.7"),
    ("--train_data_path a b", "--data_path a b"),
    ("--data_type instruction --variable_seq_lengths", "--data_type instruction --variable_seq_lengths --no_packing"),
    ("--tokenizer_model meta-llama/Llama-2", ""),
    ("--wandb-exp-name mine", "--wandb_name mine"),
]  # fmt: skip


def test_what_they_became_is_in_one_line(caplog):
    settings(
        *"--lr_warmup_samples 100 --train_samples 1000 --no_load_rng --data_type instruction --variable_seq_lengths".split()
    )
    line = "taken from --train_samples, --lr_warmup_samples: --train_iters 100, --lr_warmup_iters 10, --no_packing"
    assert caplog.messages == [line]


@pytest.mark.parametrize(("theirs", "ours"), TRANSLATED)
def test_what_flags_mean(theirs, ours):
    assert settings(*theirs.split()) == settings(*ours.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train_samples 1000", "--train_samples means --train_iters 100, and --train_iters 7 is given too: keep one"),
        ("--lr_decay_samples much", "--lr_decay_samples: 'much' is not a whole number"),
        ("--lr_decay_samples 9", "--lr_decay_samples 9 is less than one step of --global_batch_size 10"),
        ("--lr_decay_samples 9 --global_batch_size null", "--lr_decay_samples 9 needs --global_batch_size"),
        ("--no_load_optim --no_finetune", "--no_load_optim without --finetune: a resumed run loads everything; add --finetune"),
        ("--num_workers", "--num_workers: expected one argument"),
        ("--use_mcore_models=perhaps", "'perhaps' is not true or false"),
        ("--optimizer sgd", "--optimizer is refused: sgd is none of adam, adamw: AdamW is the only optimizer"),
        ("train.train_iters=50 model.seq_length=8", "model.seq_length=8 (as flags: --train_iters 50 --seq_length 8)"),
        ("--moe-of-tomorrow 8", "--moe_of_tomorrow is refused: models with experts cannot be trained"),
        ("--num-experts 8", "--num_experts is refused: models with experts cannot be trained"),
        ("--exp-avg-dtype fp8", "--exp_avg_dtype is refused: fp8 is none of fp32: moments, main weights and gradients are fp32"),
        ("--logits-save-top-k 8", "--logits_save_top_k is refused: a teacher's likely tokens are stored with megatron-ft score"),
        ("--batch-size 8", "--batch_size is refused: an old name; use --micro_batch_size"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated(words, message):
    with pytest.raises(ConfigError) as caught:
        settings("--train_iters", 7, *words.split())
    assert message in str(caught.value)


def test_a_checkpoint_of_the_run_comes_before_the_pretrained_one(tmp_path):
    words = ["--load", tmp_path, "--pretrained_checkpoint", "/elsewhere", "--no_finetune"]
    begun = settings(*words).checkpointing
    assert (begun.load, begun.finetune) == ("/elsewhere", True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    goes_on = settings(*words).checkpointing
    assert (goes_on.load, goes_on.finetune) == (str(tmp_path), False)


def test_a_tokenizer_that_is_here_is_compared(tmp_path):
    assert settings("--tokenizer_model", tmp_path).model.vocab_file == str(tmp_path)


def test_in_a_file_they_mean_the_same_and_flags_win(file, caplog):
    text = (
        "load: /nowhere\ndata_path: ['0.3', a, '0.7', b]\nglobal_batch_size: 10\nfinetune: true\ntrain-samples: 1000\nswiglu: true\n"
        "num_workers: 4\nexit_signal_handler: true\nmodel:\n  num_query_groups: 4\noptimizer:\n  lr_warmup_fraction: 0.1\n"
        "no_save_optim: false\nmetrics: [all]\n"
    )
    path = file(text)
    ours = settings(
        *"--data_path a b --data_weights 0.3 0.7 --glu_activation swiglu --num_attention_heads_kv 4 --lr_warmup_fraction 0.1".split()
    )
    assert settings("--config", path, needed=[]) == ours
    assert "--num_workers" in caplog.text and "--no_save_optim" not in caplog.text
    assert settings("--config", path, "--train_iters", 50, needed=[]).batch.train_iters == 50
    fewer = settings("--config", path, "--train_samples", 500, needed=[])
    assert (fewer.batch.train_iters, fewer.optimizer.lr_warmup_fraction) == (50, 0.1)
    assert (
        settings("--config", file(text + "train_iters: 3\n"), "--train_samples", 500, needed=[]).batch.train_iters == 50
    )


def test_refused_and_unknown_keys_are_in_one_message(file):
    path = file("num_experts: 8\nmodel:\n  hiden_size: 3\noptimizer: sgd\n")
    with pytest.raises(ConfigError) as caught:
        settings("--config", file("num_experts: 8\nmodel:\n  hiden_size: 3\nimg_h: 224\n"))
    assert (
        f"{path}: 3 keys are not taken: num_experts in line 1 (refused: models with experts cannot be trained)"
        in str(caught.value)
    )
    assert "hiden_size in model in line 3 (did you mean hidden_size?), img_h in line 4 (refused" in str(caught.value)


LINES = [line.split(" => ") for line in (DATA / "megatron_llm_finetune.txt").read_text().splitlines()]


@pytest.mark.parametrize(("mode", "words"), LINES, ids=[mode for mode, _ in LINES])
def test_command_lines_of_megatron_llms_finetune_script(mode, words, tmp_path):
    argv = shlex.split(words)
    load, save = argv[argv.index("--load") + 1], argv[argv.index("--save") + 1]
    if load == save:  # a run is continued: its script leaves out the number of steps
        (tmp_path / "training.yaml").write_text("batch:\n  train_iters: 1000\n")
        argv = [str(tmp_path) if word == load else word for word in argv]
    got = settings(*argv, needed=[])
    check_settings(got, got.launching.nproc_per_node * got.launching.nnodes)
    steps = 500 if "--iters 500" in mode else 1000
    assert (got.batch.train_iters, got.optimizer.lr_warmup_fraction) == (steps, 0.1)
    assert got.data.packing is ("--instruct" not in mode) and got.model.model_name == mode.split()[0]
    assert got.model.rotary_base == (1e6 if mode.startswith("codellama") else None)
    assert got.model.parallel_attn is mode.startswith("falcon")


def test_a_run_without_its_settings_asks_for_the_number_of_steps():
    _, words = next(line for line in LINES if "--checkpoint /data/a" in line[0])
    with pytest.raises(ConfigError, match=r"--train_iters"):
        settings(*shlex.split(words), needed=[])
