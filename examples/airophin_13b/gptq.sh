#!/usr/bin/env bash
# The merged model in 4 bits by GPTQ, as Airophin was published: groups of 32, columns with the largest inputs first (desc_act).
#
# Runs on the CPU, layer by layer: docs/quantized_exports.md says how much memory it takes. The calibration, chats of the second phase, is a
# guess. The model card has the perplexity before and after.
#
#   examples/airophin_13b/gptq.sh
set -euo pipefail

: "${PYTHON:=python}"
"$PYTHON" -m megatron_ft hf-to-megatron exports/airophin-13b checkpoints/airophin-13b-merged --chat_format vicuna
"$PYTHON" -m megatron_ft megatron-to-hf checkpoints/airophin-13b-merged exports/airophin-13b-gptq --params_dtype fp16 \
  --quantize gptq --bits 4 --group_size 32 --desc_act --calibration data/airophin/chats-train
