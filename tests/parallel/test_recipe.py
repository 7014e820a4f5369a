"""The published Open-Assistant command lines, as written: every flag is taken, and they train."""

import os
import shlex

import pytest

from megatron_ft.commands.finetune import COMMAND
from megatron_ft.config.cli import parse
from tests.parallel.jobs import read_metrics

STAGE_1 = r"""
    --tensor_model_parallel_size 8 --pipeline_model_parallel_size 4
    --load ./checkpoints/llama2-70b-tp8-pp4 --save ./checkpoints/llama2-70b-tp8-pp4-oasst_pre10
    --tensorboard_dir ./checkpoints/llama2-70b-tp8-pp4-oasst_pre10/logging
    --data_path ./data/oasst_pre10_min25_llama2/oasst_sft10-train
    --model_name llama2 --tokenizer_type SentencePieceTokenizer --bf16
    --global_batch_size 64 --micro_batch_size 2 --vocab_file=./llama2/Llama-2-7b/tokenizer.model
    --use_rms_norm --glu_activation swiglu --no_tie_embed_logits
    --vocab_extra_ids_list "\"<|im_start|>,<|im_end|>\""
    --layernorm_epsilon 1e-5 --use_flash_attn --no_bias_gelu_fusion
    --seq_length 4096 --max_position_embeddings 4096
    --log_interval 1 --save_interval 500 --eval_interval 50 --eval_iters 10
    --hidden_dropout 0.0 --position_embedding_type rotary --no_bias_dropout_fusion
    --use_checkpoint_args --train_iters 12000 --attention_dropout 0.0
    --adam_beta1 0.9 --adam_beta2 0.95 --adam_eps 1e-12
    --lr_decay_style cosine --lr_warmup_iters 100 --lr 1e-5 --min_lr 1e-6 --weight_decay 0.000001
    --sequence_parallel --recompute_granularity selective --log_timers_to_tensorboard
    --rope_scaling_factor 1.0 --wandb_logger
"""
STAGE_2 = "--save_interval 346 --train_iters 519 --hidden_dropout 0.25 --lima_dropout --finetune"


def test_stage_1_is_understood():
    (found,) = parse(COMMAND, shlex.split(STAGE_1))
    assert (found.parallel.tensor_model_parallel_size, found.parallel.pipeline_model_parallel_size) == (8, 4)
    assert found.model.vocab_extra_ids_list == "<|im_start|>,<|im_end|>"
    assert found.model.vocab_file.endswith("tokenizer.model")
    assert (found.optimizer.adam_eps, found.optimizer.weight_decay, found.optimizer.min_lr) == (1e-12, 1e-6, 1e-6)
    assert found.numerics.bf16 and found.numerics.recompute_granularity == "selective" and found.kernels.use_flash_attn
    assert (found.batch.global_batch_size, found.checkpointing.save_interval) == (64, 500)
    assert found.logging.eval_interval == 50 and found.data.seq_length == 4096
    assert found.logging.wandb_logger and found.logging.log_timers_to_tensorboard


def test_stage_2_is_understood():
    (found,) = parse(COMMAND, shlex.split(STAGE_1 + STAGE_2))
    assert found.checkpointing.finetune and found.numerics.lima_dropout and found.numerics.hidden_dropout == 0.25
    assert (found.batch.train_iters, found.checkpointing.save_interval) == (519, 346)


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_1 + STAGE_2], ids=["stage-1", "stage-2"])
@pytest.mark.works("bf16", "recompute", "dropout", "packing", "SP", "PP")
def test_the_stages_train_at_a_small_size(stage, four_ranks, checkpoint, shards, tmp_path):
    """The whole command line at TP2 x PP2 on four CPU processes; only paths and sizes are changed."""
    small = [
        *shlex.split(stage),
        "--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2", "--seq_length", "64",
        "--max_position_embeddings", "256", "--global_batch_size", "8", "--train_iters", "8", "--save_interval", "2",
        "--lr_warmup_iters", "1", "--load", checkpoint, "--save", str(tmp_path / "run"), "--data_path", shards,
        "--tensorboard_dir", str(tmp_path / "board"), "--lr", "5e-3", "--vocab_file", "null",
    ]  # fmt: skip
    four_ranks.run(train, small)
    losses = read_metrics(tmp_path / "run")
    assert len(losses) == 8 and sum(losses[-2:]) < sum(losses[:2])
    assert (tmp_path / "run" / "iter_0000002" / "training.yaml").is_file()
    assert any((tmp_path / "board").glob("events*"))
    assert any((tmp_path / "run" / "wandb").glob("offline-run*"))


def train(argv):
    from megatron_ft.commands.finetune import run

    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_SILENT"] = "true"
    run(*parse(COMMAND, argv))
