"""Every rule between settings, and between settings and model, is checked by finetune, preflight and rehearse alike."""

import ast
import dataclasses
import inspect
import os
import traceback
from pathlib import Path
from textwrap import dedent

import pytest

from megatron_ft import device
from megatron_ft.checkpoints.folder import CheckpointConfig, write_config
from megatron_ft.commands import finetune, preflight
from megatron_ft.config import checks, schedule, steps
from megatron_ft.config.cli import parse, run_script
from megatron_ft.errors import UserError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.quantised import Quantization
from megatron_ft.training import fit
from tests.training.test_datasets import write

ARCH = Architecture(
    family="llama", num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=4, head_dim=8,
    vocab_size=100, max_position_embeddings=128, norm_epsilon=1e-5,
)  # fmt: skip
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_hidden_size": 64}

BROKEN = {
    "positive": "--micro_batch_size 0",
    "share": "--hidden_dropout 1",
    "not_negative": "--weight_decay -1",
    "one_way_to_split": "--num_layers_per_virtual_pipeline_stage 2",
    "one_length": "--epochs 2",
    "world_fits_layout": "--tensor_model_parallel_size 4",
    "batch_fits": "--global_batch_size 3",
    "sequence_parallel_fits": "--tensor_model_parallel_size 2 --sequence_parallel --seq_length 33",
    "context_fits": "--context_parallel_size 2",
    "shares_fit": "--data_weights 0.5 0.5",
    "shares_of_split": "--split 90,ten,0",
    "role_weights": "--role_loss_weights user:1",
    "variable_rows_fit": "--variable_seq_lengths",
    "rates_in_order": "--lr 0",
    "warmup_given_once": "--lr_warmup_fraction 1.5",
    "warmup_fits": "--lr_warmup_iters 10",
    "wsd_fits": "--lr_decay_style WSD --lr_wsd_decay_iters 11",
    "weight_decay_rises": "--weight_decay_incr_style linear --start_weight_decay 0.1",
    "lima_has_dropout": "--lima_dropout",
    "one_precision": "--bf16 --fp16",
    "recompute_is_consistent": "--recompute_num_layers 2",
    "saving_has_a_place": "--save_interval 5",
    "milestones_have_a_use": "--save {save} --save_retain_interval 5",
    "classic_saves_know_no_context_parallel": "--save {save} --ckpt_format torch --context_parallel_size 2 --no_packing",
    "overlaps_have_a_subject": "--overlap_param_gather",
    "samples_have_prompts": "--sample_interval 5 --sample_chats 0",
    "teacher_has_a_use": "--kd_temperature 2",
    "find_teacher": "--teacher {experts}",
    "refuse_experts": "--load {experts}",
    "check_model_flags": "--num_layers 5",
    "split_layers": "--pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 4",
    "check_sizes": "--load {classic}",
    "classic_saves_fit": "--pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 3 --save {save} --ckpt_format torch",
    "microbatches_fit_chunks": "--pipeline_model_parallel_size 2 --num_layers_per_virtual_pipeline_stage 1 --global_batch_size 3",
    "recompute_groups_fit": "--recompute_granularity full --recompute_num_layers 3",
    "rows_fit_positions": "--seq_length 256",
    "check_patterns": "--unfrozen_parameters layers.4",
    "find_adapting": "--load {quantised}",
    "check_training_state": "--load {resumed} --tensor_model_parallel_size 2",
}
"""Rule -> flags that break this rule and no other, for two processes."""


def called(function) -> set[str]:
    tree = ast.parse(dedent(inspect.getsource(function)))
    return {
        node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }  # fmt: skip


def test_no_rule_is_left_out():
    """What raises ConfigError in checks.py, schedule.py and steps.py is called by one of the two functions, and has its line in BROKEN."""
    reached = called(checks.check_settings) | called(fit.check_model)
    rules = {
        name
        for module in (checks, schedule, steps)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and "raise ConfigError" in inspect.getsource(function)
    }
    assert len(rules) > 20 and not rules - reached, f"nothing checks {rules - reached}"
    not_rules = {"data_parallel_size", "starts_anew", "len"}
    assert reached - not_rules == BROKEN.keys()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A checkpoint and shards that look whole from outside; no process may be started."""
    parts = {"torch_dist": ("metadata.json", ".metadata", "common.pt"), "torch": ()}
    for name, kind, tp, iteration in (
        ("model", "torch_dist", 1, "release"), ("classic", "torch", 4, "release"), ("resumed", "torch", 2, 3),
        ("experts", "torch_dist", 1, "release"), ("quantised", "torch_dist", 1, "release"),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        files = [*parts[kind], *(f"mp_rank_{t:02d}/model_optim_rng.pt" for t in range(tp if kind == "torch" else 0))]
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).touch()
        arch = dataclasses.replace(ARCH, **EXPERTS) if name == "experts" else ARCH
        nf4 = Quantization() if name == "quantised" else None
        if nf4:
            arch = dataclasses.replace(ARCH, hidden_size=64, head_dim=16)
        write_config(folder, CheckpointConfig(arch, kind, tp, 1, 128, iteration, "fp32", quantization=nf4))
    from megatron_ft.commands import rehearse
    from megatron_ft.launch import run

    for name in (*device.CPU, "WANDB_MODE", "WANDB_SILENT", rehearse.VARIABLE):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what a rehearsal sets is taken back
    for module, name in ((run, "launch"), (rehearse, "_prepare")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("no rule refused this"))
    return {
        "shards": write(tmp_path / "chats-train", [9, 5]), "save": str(tmp_path / "save"), "model": str(tmp_path / "model"),
        "classic": str(tmp_path / "classic"), "resumed": str(tmp_path / "resumed"), "experts": str(tmp_path / "experts"),
        "quantised": str(tmp_path / "quantised"),
    }  # fmt: skip


def command_line(flags: str, place: dict[str, str]) -> list[str]:
    load = [] if "--load" in flags else ["--load", place["model"]]
    length = [] if "--seq_length" in flags else ["--seq_length", "32"]
    fixed = ["--data_path", place["shards"], "--train_iters", "10", *length, *load]
    return [*fixed, *flags.format(**place).split()]


@pytest.mark.parametrize("rule", BROKEN)
@pytest.mark.refuses(
    "CP", "classic checkpoints", says="--ckpt_format torch has one file a tensor- and pipeline-parallel rank"
)
@pytest.mark.refuses(
    ["VPP", "uneven stages"],
    "classic checkpoints",
    says="--ckpt_format torch knows one equal part of the model a stage",
)
def test_a_rule_is_the_same_to_all_three(rule: str, place: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    argv = command_line(BROKEN[rule], place)
    (settings,) = parse(finetune.COMMAND, [*argv, "--nproc_per_node", "2"])
    with pytest.raises(UserError) as refused:
        finetune.run(settings)
    assert rule in [frame.name for frame in traceback.extract_tb(refused.value.__traceback__)], refused.value
    message = " ".join(str(refused.value).split())
    with pytest.raises(UserError) as rehearsed:
        finetune.run(dataclasses.replace(settings, launching=dataclasses.replace(settings.launching, rehearse=True)))
    assert message in str(rehearsed.value)
    capsys.readouterr()
    assert run_script(preflight.COMMAND, preflight.run, [*argv, "--world_size", "2"]) == 2
    assert f"error:   {message}" in capsys.readouterr().out


def test_without_a_broken_rule_all_three_go_on(place, capsys, monkeypatch):
    argv = command_line("--save {save}", place)
    assert run_script(preflight.COMMAND, preflight.run, [*argv, "--world_size", "2"]) == 0
    said = capsys.readouterr().out
    assert "0 errors" in said and "TP 1 x PP 1 fit the model: layers 1-4" in said
    (settings,) = parse(finetune.COMMAND, [*argv, "--nproc_per_node", "2"])
    for launching in (settings.launching, dataclasses.replace(settings.launching, rehearse=True)):
        with pytest.raises(pytest.fail.Exception, match="no rule refused this"):
            finetune.run(dataclasses.replace(settings, launching=launching))
