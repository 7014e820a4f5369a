"""Scripts of Megatron-LM and Megatron-LLM: the flags by their fate, what the script leaves open, and the launcher's numbers."""

import shlex

import pytest

from megatron_ft.commands.finetune import COMMAND
from megatron_ft.config.cli import parse
from megatron_ft.errors import ConfigError
from tests.cli.test_megatron_flags import DATA

SCRIPT = """#!/bin/bash
GPUS_PER_NODE=4
NUM_NODES=${SLURM_NNODES:-2}
LOAD=$1
DISTRIBUTED_ARGS="--nproc_per_node $GPUS_PER_NODE --nnodes $NUM_NODES --master_addr localhost"
MODEL_ARGS=(
    --num-layers 32   # as published
    --swiglu
    --num-query-groups 8 --group-query-attention
    --attention-dropout 0.0 --hidden-dropout 0.0
)
TRAINING_ARGS=(
    --micro-batch-size 1 --global-batch-size 32
    --train-samples 3200 --lr-warmup-fraction 0.1
    --lr 1e-5 --bf16
    --num-experts 8
    --no-load-optim --finetune --num-workers 2
)
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \\
    ${MODEL_ARGS[@]} ${TRAINING_ARGS[@]} \\
    --tensor-model-parallel-size 2 --load $LOAD --save out/$NAME \\
    --data-path 0.3 a 0.7 b --log-throughputs --no-bias-gelu-fusion $EXTRA 2>&1 | tee log.txt
"""


def test_a_script_with_arrays(imported):
    found = imported(SCRIPT, name="run.sh")
    settings = found["settings"]
    assert found["tool"] == "Megatron" and (settings.launching.nproc_per_node, settings.launching.nnodes) == (4, 2)
    assert (settings.batch.train_iters, settings.optimizer.lr_warmup_fraction) == (100, 0.1)
    assert settings.data.data_path == ["a", "b"] and settings.data.data_weights == [0.3, 0.7]
    assert settings.parallel.tensor_model_parallel_size == 2 and settings.checkpointing.finetune
    assert settings.model.num_attention_heads_kv == 8 and settings.model.glu_activation == "swiglu"
    assert settings.optimizer.lr_decay_style == "linear"  # Megatron's default
    assert found["here"]["--train_samples 3200"] == "--train_iters 100"
    assert found["why"]["--num_experts 8"] == "models with experts cannot be trained"
    assert "read in a thread" in found["why"]["--num_workers 2"]
    assert "did you mean --log_throughput?" in found["why"]["--log_throughputs"]
    before = "\n".join(found["before"])
    assert "LOAD (line 4) is not set" in before and "NAME" in before and "EXTRA has no value in the script" in before


def test_values_for_its_variables(imported):
    words = ["--set", "1=checkpoints/x", "NAME=mine", "EXTRA=--seed=5", "GPUS_PER_NODE=8"]
    found = imported(SCRIPT, *words, name="run.sh")
    assert (
        found["settings"].checkpointing.load == "checkpoints/x" and found["settings"].checkpointing.save == "out/mine"
    )
    assert found["settings"].data.seed == 5 and found["settings"].launching.nproc_per_node == 8
    assert not [text for text in found["before"] if "is not set in the script" in text]


def test_a_number_that_the_script_does_not_say(imported):
    found = imported(SCRIPT.replace("--lr 1e-5", "--lr $LR --train-iters $3"), name="run.sh")
    assert "--lr LR: the script does not say the number: add --lr, or import with --set" in found["before"]


def test_what_finetune_would_refuse_is_said(imported):
    line = "torchrun --nproc_per_node 8 pretrain_gpt.py --train-iters 5 --tensor-model-parallel-size 16 --micro-batch-size 1 --lr 1"
    with pytest.raises(ConfigError, match="8 process"):
        imported(line, name="run.sh")  # by this test's own check


LINES = [line.split(" => ") for line in (DATA / "megatron_llm_finetune.txt").read_text().splitlines()]


@pytest.mark.parametrize(("mode", "words"), LINES, ids=[mode for mode, _ in LINES])
def test_command_lines_of_megatron_llms_finetune_script(imported, mode, words):
    """As `import-command` prints them, they mean what finetune reads."""
    argv = shlex.split(words)
    load = argv[argv.index("--load") + 1]
    if load == argv[argv.index("--save") + 1]:
        return  # a run is continued: it has no number of steps
    launcher, flags = argv[:10], argv[10:]
    found = imported(f"torchrun {shlex.join(launcher)} finetune.py {shlex.join(flags)}\n", name="run.sh")
    (theirs,) = parse(COMMAND, argv)
    ours = found["settings"]
    assert not found["why"].keys() & {"--load", "--save"}
    for section in ("data", "batch", "parallel", "optimizer", "numerics", "model", "checkpointing"):
        assert getattr(ours, section) == getattr(theirs, section)
    assert ours.launching.nproc_per_node == theirs.launching.nproc_per_node


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello\n", "no training command found"),
        ('if [ -z "$1" ]; then exit 1; fi\ntorchrun pretrain_gpt.py --num-layers 2 --lr 1\n', "run.sh, line 1: the script ends here"),
        ("torchrun pretrain_gpt.py --num-layers 2 stray --lr 1\n", "nothing takes: stray"),
        ("accelerate launch examples/scripts/dpo.py --model_name_or_path x\n", "dpo.py is no supervised training"),
        ("trl grpo --model_name_or_path x\n", "run.sh, line 1: grpo is no supervised training"),
    ],
)  # fmt: skip
def test_files_without_a_training_command(imported, text, message):
    with pytest.raises(ConfigError) as caught:
        imported(text, name="run.sh")
    assert message in str(caught.value) and "\n" not in str(caught.value)
