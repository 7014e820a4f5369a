#!/usr/bin/env bash
# Shards of the mix and the split model, on one machine without GPUs. Needs the files that tools/pretokenizer/configs/alfred.yaml names
# in .cache, and Falcon-40B in falcon-40b/.
#
#   examples/alfred_40b/prepare.sh
set -euo pipefail

: "${PYTHON:=python}"
"$PYTHON" -m megatron_ft pretokenize --configs alfred falcon --output_dir data/alfred
"$PYTHON" -m megatron_ft hf-to-megatron falcon-40b checkpoints/falcon-40b-tp8-pp2 \
  --tensor_model_parallel_size 8 --pipeline_model_parallel_size 2 --ckpt_format torch --params_dtype bf16 --chat_format alfred \
  --vocab_extra_ids_list "<start_system>,<start_user>,<start_assistant>,<end_message>"
