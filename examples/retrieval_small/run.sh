#!/usr/bin/env bash
# Retrieval within and beyond the length of training: a tiny model learns to find values of keys, and is measured up to four times its length.
#
#   examples/retrieval_small/run.sh OUT_DIR
#
# Runs on the CPU, one process. Environment: CHATS, STEPS and LAST_STEPS (of training), SAMPLES (prompts for each length and depth), PYTHON.
set -euo pipefail

if [ $# -ne 1 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
out=$1
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

: "${CHATS:=32000}" "${STEPS:=1500}" "${LAST_STEPS:=500}" "${SAMPLES:=20}"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$here/../../.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
export OMP_NUM_THREADS=1 MEGATRON_FT_DEVICE=cpu

say() { printf '\n[%s] %s\n' "$1" "$2"; }
megatron_ft() { "$PYTHON" -m megatron_ft "$@"; }

say 1/7 "a random Llama of two layers and 128 positions, chats that ask for values"
"$PYTHON" "$here/make_files.py" "$out" "$CHATS"

say 2/7 "shards of both phases: small objects and lists, then objects of any size"
megatron_ft pretokenize --config_dir "$here/configs" --configs mixed --cache_dir "$out" --vocab_file "$out/base" \
  --output_dir "$out/data" --workers 1
megatron_ft pretokenize --config_dir "$here/configs" --configs large --cache_dir "$out" --vocab_file "$out/base" \
  --output_dir "$out/data" --workers 1

say 3/7 "Hugging Face to Megatron"
megatron_ft hf-to-megatron "$out/base" "$out/start" --chat_format alfred

say 4/7 "first phase: $STEPS steps of 32 chats, until values are found"
training=(--seq_length 128 --no_packing --micro_batch_size 32 --global_batch_size 32 --adam_beta2 0.95 --weight_decay 0
  --log_interval 100 --eval_iters 5)
megatron_ft finetune --load "$out/start" --save "$out/found" --data_path "$out/data/chats-train" "${training[@]}" \
  --train_iters "$STEPS" --lr 2e-3 --lr_decay_style constant --lr_warmup_iters "$((STEPS < 200 ? STEPS / 2 : 100))"

say 5/7 "second phase: $LAST_STEPS steps with a falling learning rate, until none is missed"
megatron_ft finetune --load "$out/found" --finetune --save "$out/tuned" --data_path "$out/data/large-train" "${training[@]}" \
  --train_iters "$LAST_STEPS" --lr 1e-3 --lr_warmup_iters "$((LAST_STEPS / 20))"

say 6/7 "the same weights with four times the positions, by three methods"
megatron_ft megatron-to-hf "$out/tuned" "$out/hf"
for method in linear ntk ntk-by-parts; do
  megatron_ft hf-to-megatron "$out/hf" "$out/scaled/$method" --rope_scaling_type "$method" --rope_scaling_factor 4
done

say 7/7 "retrieval at half, once, twice and four times the length of training"
megatron_ft evaluate retrieval --load "$out/tuned" "$out"/scaled/{linear,ntk,ntk-by-parts} --names unscaled PI NTK NTK-by-parts \
  --tasks key-value --key_digits 2 --lengths 64,128,256,512 --beyond_positions --samples "$SAMPLES" --max_new_tokens 4 \
  --batch_size 40 --output "$out/results"
