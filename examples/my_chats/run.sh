#!/usr/bin/env bash
# Your chats through the six commands of the demo,
# from the project's folder:
#   examples/my_chats/run.sh [CHATS.jsonl [HF_MODEL_FOLDER [OUTPUT_FOLDER]]]
# Without arguments: the chats beside this script, and the tiny base model that `make demo` leaves.
# For a real model set, for instance: TP=8 PP=4 LR=1e-5 STEPS=500 SEQ_LENGTH=4096 QUESTION="..."
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
bin=$here/../../.venv/bin
[ -d "$bin" ] && PATH=$(cd "$bin" && pwd):$PATH

chats=${1:-$here/chats.jsonl}
model=${2:-runs/demo/hf_base}
out=${3:-runs/my_chats}
tp=${TP:-2} pp=${PP:-2}
layout=(--tensor_model_parallel_size "$tp" --pipeline_model_parallel_size "$pp")
ranks=(--nproc_per_node $((tp * pp)))

[ -f "$model/config.json" ] || { echo "$model is no Hugging Face model folder; \`make demo\` makes a tiny one" >&2; exit 2; }
[ -e "$out" ] && { echo "$out exists: remove it, or give another output folder" >&2; exit 2; }
first_question='import json, sys
chat = json.loads(open(sys.argv[1], encoding="utf-8").readline())
print(next(m["content"] for m in chat["messages"] if m["role"] in ("user", "prompter")))'
question=${QUESTION:-$(python -c "$first_question" "$chats")}

step() { printf '\n[%s] $' "$1"; printf ' %q' "${@:2}"; printf '\n'; "${@:2}"; }

step 1/6 megatron-ft pretokenize --input "$chats" --tokenizer "$model" --output_prefix "$out/data/chats" \
  --val_split "${VAL_SPLIT:-0}"
step 2/6 megatron-ft hf-to-megatron "$model" "$out/megatron" --chat_format chatml
step 3/6 megatron-ft generate "${ranks[@]}" --load "$out/megatron" "${layout[@]}" --max_new_tokens 40 --prompt "$question"
step 4/6 megatron-ft finetune "${ranks[@]}" --load "$out/megatron" --data_path "$out/data/chats-train" --save "$out/tuned" \
  "${layout[@]}" --seq_length "${SEQ_LENGTH:-256}" --micro_batch_size 1 --train_iters "${STEPS:-60}" \
  --lr "${LR:-3e-3}" --lr_warmup_iters 5 --log_interval 10
step 5/6 megatron-ft generate "${ranks[@]}" --load "$out/tuned" "${layout[@]}" --max_new_tokens 40 --prompt "$question"
step 6/6 megatron-ft megatron-to-hf "$out/tuned" "$out/hf"

printf '\ntalk    $ megatron-ft chat %s\n' "$out/hf"
