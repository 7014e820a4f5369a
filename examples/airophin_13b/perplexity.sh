#!/usr/bin/env bash
# Airophin's table: perplexity of the tuned model and of the model without scaled positions, by length of the context. Two GPUs.
#
#   examples/airophin_13b/perplexity.sh BOOK.txt ...
set -euo pipefail

: "${PYTHON:=python}"
: "${1:?give text files of more than 12,000 tokens each}"
"$PYTHON" -m megatron_ft evaluate perplexity --nproc_per_node 2 --tensor_model_parallel_size 2 --bf16 --batch_size 1 \
  --load exports/airophin-13b llama2/Llama-2-13b --names scaled unscaled --data "$@" \
  --lengths 512,1024,2048,4096,8192,12000 --output runs/airophin-13b-perplexity
