"""axolotl, LLaMA-Factory and TRL: what their keys mean here. Files are written here, with the tools' own key names."""

import json

import pytest

from megatron_ft.errors import ConfigError

AXOLOTL = """
base_model: org/Small-1B
load_in_4bit: true
adapter: qlora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
datasets:
  - path: org/chats
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: who, content: what}
  - path: mine.jsonl
    type: chat_template
chat_template: chatml
val_set_size: 0.02
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
max_steps: 200
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_ratio: 0.1
gradient_checkpointing: true
attn_implementation: flash_attention_2
output_dir: out/small
saves_per_epoch: 2
neftune_noise_alpha: 5
special_tokens:
  pad_token: <pad>
lora_qkv_kernel: true
wandb_project:
"""


def test_axolotl(imported):
    found = imported(AXOLOTL, "--gpus", 4)
    settings, commands = found["settings"], found["commands"]
    assert found["tool"] == "axolotl"
    assert (settings.batch.micro_batch_size, settings.batch.global_batch_size) == (2, 2 * 4 * 4)
    assert (settings.batch.train_iters, settings.optimizer.lr_warmup_iters, settings.optimizer.lr) == (200, 20, 2e-4)
    assert (settings.adapters.lora_rank, settings.adapters.lora_alpha, settings.adapters.lora_dropout) == (16, 32, 0.05)
    assert settings.adapters.lora_target == ["q_proj", "v_proj"]
    assert settings.numerics.bf16 and settings.numerics.recompute_granularity == "full"
    assert settings.data.packing and settings.data.seq_length == 2048 and settings.optimizer.weight_decay == 0
    assert settings.data.data_path == ["shards/chats-train", "shards/mine-train"] and settings.kernels.use_flash_attn
    assert "hf download org/Small-1B --local-dir models/Small-1B" in commands
    assert "hf download --repo-type dataset org/chats --local-dir data/chats" in commands
    convert = next(line for line in commands if "hf-to-megatron" in line)
    assert "--quantize nf4 --double_quant" in convert and "--chat_format chatml" in convert
    assert any(
        "--input data/chats" in line and "--keys messages=turns role=who content=what" in line for line in commands
    )
    assert any(
        "--input mine.jsonl" in line and "--keys" not in line and "--val_split 0.02" in line for line in commands
    )
    assert commands[-1] == "megatron-ft megatron-to-hf --input_dir out/small --output_dir out/small-hf --adapter_only"
    assert (
        "fp32" in found["why"]["optimizer: paged_adamw_8bit"] and "embeddings" in found["why"]["neftune_noise_alpha: 5"]
    )
    assert "--save_interval" in found["why"]["saves_per_epoch: 2"]
    assert found["why"]["wandb_project"] == "off or empty there"


LLAMA_FACTORY = """
model_name_or_path: org/Small-1B
stage: sft
do_train: true
finetuning_type: full
deepspeed: ds_z3.json
dataset: mine, other
dataset_dir: sets
template: llama3
cutoff_len: 1024
packing: true
train_on_prompt: true
val_size: 0.1
output_dir: saves/x
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1.0e-6}
warmup_steps: 7
bf16: true
ddp_timeout: 180000000
report_to: [wandb, swanlab]
run_name: first
"""


def test_llama_factory(imported, tmp_path):
    (tmp_path / "sets").mkdir()
    info = {
        "mine": {"file_name": "mine.json"},
        "other": {"hf_hub_url": "org/other", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    }
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "ds_z3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    found = imported(LLAMA_FACTORY, "--gpus", 4)
    settings, commands = found["settings"], found["commands"]
    assert found["tool"] == "LLaMA-Factory" and settings.adapters.lora_rank is None
    assert settings.parallel.tensor_model_parallel_size == 4 and settings.parallel.use_distributed_optimizer
    assert settings.batch.global_batch_size == 1 * 2 * 4  # ZeRO 3 is data parallel over all four
    assert (settings.optimizer.min_lr, settings.optimizer.lr_warmup_iters, settings.data.scalar_loss_mask) == (
        1e-6,
        7,
        1,
    )
    assert settings.data.packing and settings.data.seq_length == 1024
    assert settings.logging.wandb_logger and settings.logging.wandb_name == "first"
    assert any("--input sets/mine.json" in line and "--chat_format llama3" in line for line in commands)
    assert any("--keys messages=conversations role=from content=value" in line for line in commands)
    assert "TensorBoard" in found["why"]["report_to: swanlab"]
    assert found["here"]["num_train_epochs: 3.0"] == "--epochs 3"
    assert settings.batch.epochs == 3


def test_llama_factorys_defaults(imported):
    found = imported(
        "model_name_or_path: m\nstage: sft\ndataset: a\ntemplate: qwen3\noutput_dir: o\nmax_steps: 9\nbf16: true\n"
    )
    settings = found["settings"]
    assert (settings.adapters.lora_rank, settings.adapters.lora_alpha) == (8, 16)
    assert (settings.optimizer.lr, settings.optimizer.lr_decay_style, settings.batch.micro_batch_size) == (
        5e-5,
        "linear",
        8,
    )
    assert not settings.data.packing and settings.data.variable_seq_lengths
    assert settings.numerics.recompute_granularity == "full"
    assert "lora_rank: 8 (its default)" in found["here"] and any(
        "--chat_format tokenizer" in one for one in found["commands"]
    )


TRL = """accelerate launch --num_processes 2 trl/scripts/sft.py \\
    --model_name_or_path org/Small-1B --dataset_name org/chats \\
    --max_steps 50 --warmup_ratio 0.05 --learning_rate 2.0e-4 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \\
    --use_peft --lora_r 32 --lora_alpha 16 --lora_target_modules q_proj v_proj --load_in_4bit \\
    --eval_strategy steps --eval_steps 100 --packing --assistant_only_loss --output_dir Small-SFT --push_to_hub
"""


def test_trl(imported):
    found = imported(TRL, name="run.sh")
    settings = found["settings"]
    assert found["tool"] == "TRL" and settings.launching.nproc_per_node == 2
    assert settings.batch.global_batch_size == 2 * 8 * 2 and settings.optimizer.lr_warmup_iters == 3
    assert (settings.adapters.lora_rank, settings.adapters.lora_dropout) == (32, 0.05)
    assert settings.adapters.lora_target == ["q_proj", "v_proj"] and settings.data.seq_length == 1024
    assert settings.data.packing and settings.numerics.bf16 and settings.logging.eval_interval == 100
    assert any("hf-to-megatron" in line and line.endswith("--quantize nf4") for line in found["commands"])
    assert "hf upload" in found["why"]["--push_to_hub true"]
    assert not [text for text in found["before"] if "assistant_only_loss" in text]


def test_trls_loss_and_adapters_by_default(imported):
    found = imported("model_name_or_path: m\ndataset_name: chats.jsonl\nuse_peft: true\nmax_steps: 5\noutput_dir: o\n")
    assert any("--scalar_loss_mask 1" in text for text in found["before"])
    assert any("lora_target_modules" in text for text in found["before"])
    assert found["settings"].adapters.lora_alpha == 32 and not found["settings"].data.packing


def test_a_script_that_names_a_yaml(imported, tmp_path):
    (tmp_path / "x.yaml").write_text(
        "model_name_or_path: m\nstage: sft\ndataset: a\ntemplate: chatml\noutput_dir: o\nmax_steps: 3\n"
    )
    found = imported(
        "FORCE_TORCHRUN=1 NPROC_PER_NODE=2 llamafactory-cli train x.yaml learning_rate=1e-4\n", name="run.sh"
    )
    assert found["settings"].optimizer.lr == 1e-4 and found["settings"].launching.nproc_per_node == 2


BASE = (
    "base_model: m\nadapter: lora\nlora_r: 8\nlora_alpha: 16\ndatasets: [{path: a.jsonl, type: chat_template}]\nmax_steps: 100\n"
    "output_dir: o\n"
)


ACCELERATE = [
    ("zero3.yaml", "", "--tensor_model_parallel_size 4", None),
    ("zero2.yaml", "", "--use_distributed_optimizer", None),
    ("x.yaml", "distributed_type: FSDP\nnum_processes: 4\n", "--tensor_model_parallel_size 4", 4),
    (
        "x.yaml",
        "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}\nnum_processes: 2\n",
        "--use_distributed_optimizer",
        2,
    ),
    ("x.yaml", "distributed_type: MULTI_GPU\nnum_processes: 4\n", "--nproc_per_node 4", 4),
]


@pytest.mark.parametrize(("name", "text", "flags", "gpus"), ACCELERATE)
def test_the_file_of_accelerate(imported, tmp_path, name, text, flags, gpus):
    if text:
        (tmp_path / name).write_text(text)
    line = f"accelerate launch --config_file {name} sft.py --model_name_or_path m --dataset_name a.jsonl --max_steps 9 --output_dir o\n"
    found = imported(line, *([] if gpus else ["--gpus", 4]), name="run.sh")
    printed = next(one for one in found["commands"] if one.startswith("megatron-ft finetune"))
    assert flags in printed and f"--nproc_per_node {gpus or 4}" in printed
    assert ("--use_distributed_optimizer" in printed) is ("MULTI" not in text)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("plugins: [axolotl.integrations.kd.KDPlugin]", "plugins are not read"),
        ("pretraining_dataset: [{path: a}]\nqat: {weight_dtype: int4}", "quantised training"),
        ("load_in_8bit: true", "16 bits"),
        ("optimizer: muon", "AdamW is the only optimizer"),
        ("peft_use_dora: true", "adapters are LoRA's"),
        ("lr_scheduler: polynomial", "no schedule here has this shape"),
        ("deepspeed: away.json", "ZeRO stage is not known"),
        ("sequnce_len: 3", "did you mean sequence_len?"),
        ("test_datasets: [{path: x}]", "--valid_data_path"),
        ("lora_target_modules: 'model.layers.[0-9]+.mlp'", "selects by a pattern"),
    ],
)
def test_what_is_impossible_is_said(imported, change, why):
    found = imported(f"{BASE}{change}\n")
    assert any(why in row["why"] for row in found["impossible"])


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ("deepspeed: configs/zero2.json", "--use_distributed_optimizer"),
        ("fsdp: [full_shard]", "--tensor_model_parallel_size 2"),
        ("train_on_inputs: true", "--scalar_loss_mask 1"),
        ("sample_packing: false", "--no_packing --variable_seq_lengths"),
        ("pad_to_sequence_len: true", "--no_packing"),
        ("cosine_min_lr_ratio: 0.1\nlearning_rate: 1e-4", "--min_lr 1e-05"),
        ("warmup_steps: 5", "--lr_warmup_iters 5"),
        ("warmup_steps: 5\nwarmup_ratio: 0.5\nnum_epochs: 3", "--lr_warmup_iters 5"),
        ("lr_scheduler: constant\nwarmup_steps: 5", "--lr_decay_style constant"),
        ("fp16: true", "--fp16"),
        ("wandb_project: p", "--wandb_logger --wandb_project p"),
        ("peft_use_rslora: true", "--lora_rs"),
    ],
)
def test_flags_of_single_keys(imported, change, flags):
    found = imported(f"{BASE}{change}\n", "--gpus", 2)
    line = next(one for one in found["commands"] if one.startswith("megatron-ft finetune"))
    assert f" {flags} " in f"{line} "
    assert ("lr_warmup_iters" in line) is ("constant" not in change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "run.yml: not recognised"),
        ("- 1\n", "holds no settings"),
        ("base_model: x\nbase_model: y\n", "given twice"),
        ("base_model: x\nlearning_rate: fast\n", "learning_rate: 'fast' is not a number"),
        ("base_model: x\nbf16: perhaps\n", "bf16: 'perhaps' is not true or false"),
        ("model: x\ntrain_dataset: y\n", "version 1 of LLaMA-Factory"),
    ],
)
def test_files_that_are_refused(imported, text, message):
    with pytest.raises(ConfigError) as caught:
        imported(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [f"{BASE}rl: dpo\n", "model_name_or_path: m\nstage: kto\ndataset: a\ntemplate: llama3\n"]
)
def test_no_commands_for_what_is_not_trained_here(tmp_path, monkeypatch, capsys, text):
    from megatron_ft.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yml").write_text(text)
    assert main(["import-command", "x.yml"]) == 0
    printed = capsys.readouterr().out
    assert "# no commands: only supervised training is done here" in printed
    assert not [line for line in printed.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("key", "why"),
    [("split: 'train[:5%]'", "files of this split"), ("name: en", "files of this part"), ("type: x.y", "no reader")],
)
def test_parts_of_datasets(imported, key, why):
    entry = f"{{path: org/x, {key}}}" if "type" in key else f"{{path: org/x, type: chat_template, {key}}}"
    found = imported(f"base_model: m\ndatasets: [{entry}]\noutput_dir: o\n")
    assert any(why in row["why"] for row in found["impossible"])


def test_chats_are_held_out_only_where_they_are_there(imported):
    for text, share in (
        (BASE, "0"),
        (f"{BASE}val_set_size: 0.1\n", "0.1"),
        ("model_name_or_path: m\ndataset_name: a.jsonl\n", "0"),
    ):
        found = imported(text)
        assert f" --val_split {share}" in next(line for line in found["commands"] if "pretokenize" in line)


def test_the_page_is_a_script(tmp_path, capsys, monkeypatch):
    """Everything but the commands is a comment."""
    from megatron_ft.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yml").write_text(AXOLOTL)
    assert main(["import-command", "x.yml"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 7 and all(line.startswith(("hf download ", "megatron-ft ")) for line in lines)
    assert main(["import-command", "away.yml"]) == 2
