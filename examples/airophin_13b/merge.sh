#!/usr/bin/env bash
# The adapters as a PEFT folder, and added to the model: a Hugging Face model in fp16 with its model card, checked.
#
# Checked are all weights, bit for bit. The logits of both models need 2 x 52 GB of memory in fp32: where there is as much, drop --no_logits.
#
#   examples/airophin_13b/merge.sh
set -euo pipefail

: "${PYTHON:=python}"
adapters=checkpoints/airophin-13b
"$PYTHON" -m megatron_ft megatron-to-hf "$adapters" exports/airophin-13b-adapter --adapter_only --base_model_name meta-llama/Llama-2-13b-hf
"$PYTHON" -m megatron_ft merge-adapter "$adapters" exports/airophin-13b --params_dtype fp16
"$PYTHON" -m megatron_ft verify --hf exports/airophin-13b --megatron "$adapters" --no_logits
