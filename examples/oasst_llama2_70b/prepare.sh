#!/usr/bin/env bash
# Shards of both stages and the split model, on one machine without GPUs. Needs the chat files in .cache (see the section in
# tools/pretokenizer/configs/oasst.yaml) and Llama-2-70B in llama2/. 280 GB of disk for the model, twice.
#
#   examples/oasst_llama2_70b/prepare.sh
set -euo pipefail

: "${PYTHON:=python}"
tokens=(--tokenizer_type SentencePieceTokenizer --vocab_extra_ids_list "<|im_start|>,<|im_end|>")

# llama2, a section, adds the tokenizer and "_llama2" to the folders' names.
"$PYTHON" -m megatron_ft pretokenize --configs oasst_pre10_min25 llama2 --output_dir data/oasst_pre10_min25
"$PYTHON" -m megatron_ft pretokenize --configs oasst_top1 llama2 --output_dir data/oasst_top1_2023-07-23
"$PYTHON" -m megatron_ft hf-to-megatron llama2/Llama-2-70b checkpoints/llama2-70b-tp8-pp4 \
  --tensor_model_parallel_size 8 --pipeline_model_parallel_size 4 --ckpt_format torch --params_dtype bf16 \
  --chat_format chatml "${tokens[@]}"
