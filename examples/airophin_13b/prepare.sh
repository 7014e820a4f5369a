#!/usr/bin/env bash
# Shards of both phases and the base in NF4, on one machine without GPUs. Needs dolphin's files in .cache/ehartford/dolphin, Airoboros' as
# .cache/airoboros.jsonl (see configs/airophin.yaml), and Llama-2-13B in llama2/Llama-2-13b.
#
#   examples/airophin_13b/prepare.sh
set -euo pipefail

: "${PYTHON:=python}"
here=examples/airophin_13b
"$PYTHON" -m megatron_ft pretokenize --config_dir "$here/configs" --configs airophin_long
"$PYTHON" -m megatron_ft pretokenize --config_dir "$here/configs" --configs airophin_chats
"$PYTHON" -m megatron_ft hf-to-megatron llama2/Llama-2-13b checkpoints/llama2-13b-nf4 --params_dtype bf16 \
  --quantize nf4 --double_quant --chat_format vicuna --rope_scaling_type ntk-by-parts --rope_scaling_factor 4
