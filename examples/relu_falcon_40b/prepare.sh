#!/usr/bin/env bash
# Shards of plain text, the teacher, and the student: the same weights with ReLU. On one machine without GPUs. Needs the text that
# configs/relu_falcon.yaml names in .cache, and Falcon-40B in falcon-40b/.
#
#   examples/relu_falcon_40b/prepare.sh
set -euo pipefail

: "${PYTHON:=python}"
layout=(--tensor_model_parallel_size 8 --pipeline_model_parallel_size 5 --ckpt_format torch_dist --params_dtype bf16 --chat_format vicuna)
"$PYTHON" -m megatron_ft pretokenize --config_dir examples/relu_falcon_40b/configs --configs relu_falcon --vocab_file falcon-40b
"$PYTHON" -m megatron_ft hf-to-megatron falcon-40b checkpoints/falcon-40b "${layout[@]}"
"$PYTHON" -m megatron_ft hf-to-megatron falcon-40b checkpoints/relu-falcon-40b-start "${layout[@]}" --activation relu
