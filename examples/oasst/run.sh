#!/usr/bin/env bash
# The whole road on an Open-Assistant export: trees -> shards, model -> TP2 x PP2, ask, fine-tune, ask again, -> Hugging Face.
#
#   examples/oasst/run.sh EXPORT.jsonl TOKENIZER.model OUT_DIR
#
# Runs on CPU processes with a small random Llama. Environment: ITERS, SEQ_LENGTH, GLOBAL_BATCH, LR, HIDDEN,
# MAX_NEW_TOKENS, NPROC (a multiple of 4; what is beyond 4 is data parallel), QUESTIONS (a JSONL file),
# ASK_BEFORE (0 leaves out step 4), PYTHON.
set -euo pipefail

if [ $# -ne 3 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
export_file=$(realpath -- "$1")
tokenizer=$2
out=$3
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

: "${ITERS:=100}" "${SEQ_LENGTH:=512}" "${GLOBAL_BATCH:=4}" "${LR:=3e-3}" "${HIDDEN:=64}"
: "${MAX_NEW_TOKENS:=40}" "${NPROC:=4}" "${QUESTIONS:=$here/questions.jsonl}" "${ASK_BEFORE:=1}"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$here/../../.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
# More threads than cores only get in each other's way; the device is named so that the numbers are the same everywhere.
export OMP_NUM_THREADS=1 MEGATRON_FT_DEVICE=cpu

say() { printf '\n[%s] %s\n' "$1" "$2"; }
megatron_ft() { "$PYTHON" -m megatron_ft "$@"; }
# The same command on NPROC processes. Tensor parallel 2, pipeline parallel 2.
split=(--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2)
on_processes() { megatron_ft "$@" --nproc_per_node "$NPROC" "${split[@]}"; }

mkdir -p -- "$out"

say 1/8 "a small random Llama with the real vocabulary"
"$PYTHON" "$here/make_tiny_llama.py" "$tokenizer" "$out/base" --hidden_size "$HIDDEN"

say 2/8 "conversation trees to shards of tokens and roles"
ln -sfn -- "$export_file" "$out/export.jsonl"
megatron_ft pretokenize --config_dir "$here/configs" --configs oasst_small \
  --cache_dir "$out" --vocab_file "$tokenizer" --output_dir "$out/shards"

say 3/8 "Hugging Face to Megatron: tensor parallel 2 x pipeline parallel 2"
megatron_ft hf-to-megatron "$out/base" "$out/tp2-pp2" "${split[@]}" --ckpt_format torch \
  --vocab_extra_ids_list "<|im_start|>,<|im_end|>" --chat_format chatml

if [ "$ASK_BEFORE" != 0 ]; then
  say 4/8 "ask before training, on $NPROC processes"
  on_processes generate --load "$out/tp2-pp2" --prompts "$QUESTIONS" --max_new_tokens "$MAX_NEW_TOKENS" \
    --output "$out/answers-before.jsonl"
  cat -- "$out/answers-before.jsonl"
fi

say 5/8 "fine-tune, $ITERS steps on $NPROC processes"
on_processes finetune --load "$out/tp2-pp2" --save "$out/tuned" --data_path "$out/shards/oasst-train" \
  --sequence_parallel --use_distributed_optimizer --packing \
  --seq_length "$SEQ_LENGTH" --micro_batch_size 1 --global_batch_size "$GLOBAL_BATCH" --train_iters "$ITERS" \
  --lr "$LR" --min_lr "$LR" --lr_decay_style constant --lr_warmup_iters "$((ITERS / 10))" \
  --adam_beta2 0.95 --log_interval "$(((ITERS + 9) / 10))"

say 6/8 "ask again: what training saved loads into any layout, here into one process"
megatron_ft generate --load "$out/tuned" --prompts "$QUESTIONS" --max_new_tokens "$MAX_NEW_TOKENS" \
  --output "$out/answers.jsonl"
cat -- "$out/answers.jsonl"

say 7/8 "Megatron to Hugging Face"
megatron_ft megatron-to-hf "$out/tuned" "$out/hf"

say 8/8 "the export, by transformers alone"
"$PYTHON" "$here/compare_answers.py" "$out/hf" "$out/answers.jsonl" "$MAX_NEW_TOKENS"
