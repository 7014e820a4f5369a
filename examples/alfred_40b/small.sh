#!/usr/bin/env bash
# Alfred's comparison of methods in small: a tiny random model, extended by each method, tuned a few steps, measured, compared.
#
#   examples/alfred_40b/small.sh OUT_DIR
#
# Runs on the CPU. Environment: STEPS (of training), SAMPLES (prompts for each task, length and depth), METHODS (a file), PYTHON.
set -euo pipefail

if [ $# -ne 1 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
out=$1
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

: "${STEPS:=20}" "${SAMPLES:=2}" "${METHODS:=$here/methods.txt}"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$here/../../.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
export METHODS PYTHON OMP_NUM_THREADS=1 MEGATRON_FT_DEVICE=cpu
small=$here/../adapters_small

"$PYTHON" "$small/make_files.py" "$out"
"$PYTHON" -m megatron_ft pretokenize --config_dir "$small/configs" --configs airophin_chats --cache_dir "$out" \
  --vocab_file "$out/base" --output_dir "$out/data" --workers 1
while read -r name method; do
  "$PYTHON" -m megatron_ft hf-to-megatron "$out/base" "$out/start/$name" --chat_format vicuna \
    --rope_scaling_type "$method" --rope_scaling_factor 8
  "$PYTHON" -m megatron_ft finetune --load "$out/start/$name" --save "$out/tuned/$name" --data_path "$out/data/chats-train" \
    --seq_length 256 --train_iters "$STEPS" --micro_batch_size 2 --global_batch_size 2 --lr 1e-3 --lr_warmup_iters 0
  "$PYTHON" -m megatron_ft evaluate retrieval --load "$out/tuned/$name" --output "$out/results/$name" \
    --system "$(cat -- "$here/system.txt")" --lengths 512,1024 --tasks key-value,lines --key_digits 2 --depths 2 \
    --samples "$SAMPLES" --max_new_tokens 8
done <"$METHODS"
"$here/compare.sh" "$out/results"
