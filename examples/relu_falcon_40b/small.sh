#!/usr/bin/env bash
# ReluFalcon in small: a Falcon-like model learns real text, its GELU is swapped for ReLU, and it recovers with and without its teacher.
#
#   examples/relu_falcon_40b/small.sh OUT_DIR [TEXT_FILE...]
#
# Runs on the CPU. Without text files: this project's pages and Python's docstrings. Environment: STEPS (of the first training), RECOVERY
# (steps of each recovery), SEEDS (of the order of the data, separated by spaces), OBJECTIVES (lm, kd or both), HIDDEN, LAYERS, VOCAB (of the
# model), CHARACTERS (of text), MAX_NEW_TOKENS (of the measurement of decoding), SPARSE (ways of sparse decoding to measure too: dense, exact,
# predicted, or "" for none), PYTHON.
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
out=$1
shift
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

: "${STEPS:=1600}" "${RECOVERY:=40}" "${SEEDS:=1 2 3}" "${OBJECTIVES:=lm kd}" "${HIDDEN:=128}" "${LAYERS:=4}" "${VOCAB:=1024}"
: "${MAX_NEW_TOKENS:=64}" "${SPARSE=dense exact predicted}"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$here/../../.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
# More threads than cores only get in each other's way; the device is named so that the numbers are the same everywhere.
export OMP_NUM_THREADS=1 MEGATRON_FT_DEVICE=cpu

say() { printf '\n[%s] %s\n' "$1" "$2"; }
megatron_ft() { "$PYTHON" -m megatron_ft "$@"; }
# The first training and both recoveries: rows of 128 tokens, a cosine, held-out text at the end.
train() {
  megatron_ft finetune --data_path "$out/data/text-train" --valid_data_path "$out/data/text-val" --seq_length 128 \
    --over_long split --micro_batch_size 8 --global_batch_size 8 --lr_decay_style cosine --weight_decay 0.1 --adam_beta2 0.95 \
    --eval_iters 20 "$@"
}
decode() { # MODEL FILE FLAGS...: tokens per second of one answer after the other, to OUT/speed/FILE.txt
  local model=$1 file=$out/speed/$2
  shift 2
  mkdir -p "$out/speed"
  megatron_ft generate --load "$out/$model" --prompts "$here/prompts.jsonl" --batch_size 1 --max_new_tokens "$MAX_NEW_TOKENS" \
    --output "$file.jsonl" "$@" 2>&1 | tee "$file.txt"
}

# The models with ReLU, by the kernel of sparse decoding: GELU leaves no zeros, so it has no such numbers.
decode_sparsely() { # MODEL
  local model=$1 mode predictors
  for mode in $SPARSE; do
    predictors=()
    if [ "$mode" = predicted ]; then
      predictors=(--predictors "$out/predictors/$model")
      megatron_ft train-predictors --load "$out/$model" --data "$out/data/text-train" --rank "$((HIDDEN / 4))" --seq_length 128 \
        --tokens 10000 --steps 100 --output "$out/predictors/$model"
    fi
    decode "$model" "$model-$mode" --sparse "$mode" "${predictors[@]}"
  done
}

say 1/6 "real text, and a random Falcon with the parts of the 40B model"
"$PYTHON" "$here/make_text.py" "$out/texts.jsonl" "$@"
"$PYTHON" "$here/../falcon_40b_instruct/make_tiny_falcon.py" "$out/falcon" --hidden_size "$HIDDEN" --num_layers "$LAYERS" \
  --texts "$out/texts.jsonl" --vocab_size "$VOCAB"
megatron_ft pretokenize --config_dir "$here/configs" --configs small --cache_dir "$out" --vocab_file "$out/falcon" \
  --output_dir "$out/data" --workers 1

say 2/6 "the model learns the text with GELU: $STEPS steps"
megatron_ft hf-to-megatron "$out/falcon" "$out/random" --params_dtype fp32 --chat_format vicuna
train --load "$out/random" --save "$out/gelu" --train_iters "$STEPS" --lr 3e-3 --min_lr 0 --lr_warmup_iters "$((STEPS / 20))" \
  --log_interval "$(((STEPS + 9) / 10))" --log_sparsity

say 3/6 "its GELU is swapped for ReLU, and the weights are checked"
megatron_ft megatron-to-hf "$out/gelu" "$out/gelu-hf"
megatron_ft hf-to-megatron "$out/gelu-hf" "$out/swapped" --activation relu
megatron_ft verify --hf "$out/gelu-hf" --megatron "$out/swapped"

say 4/6 "recovery, $RECOVERY steps each: $OBJECTIVES"
models=(gelu swapped)
for seed in $SEEDS; do
  for objective in $OBJECTIVES; do
    kd=()
    if [ "$objective" = kd ]; then kd=(--teacher "$out/gelu" --kd_weight 1.0 --ce_weight 1.0 --kd_temperature 1.0); fi
    train --load "$out/swapped" --save "$out/$objective-$seed" --train_iters "$RECOVERY" --lr 3e-4 --min_lr 0 \
      --lr_warmup_iters "$((RECOVERY / 20))" --log_interval "$(((RECOVERY + 9) / 10))" --eval_interval "$(((RECOVERY + 7) / 8))" \
      --seed "$seed" "${kd[@]}"
    models+=("$objective-$seed")
  done
done

say 5/6 "held-out loss and zeros of each model, and tokens per second of decoding"
megatron_ft evaluate sparsity --load "${models[@]/#/$out/}" --data "$out/data/text-val" --length 128 --output "$out/sparsity"
for model in "${models[@]}"; do
  decode "$model" "$model"
  if [ "$model" != gelu ]; then decode_sparsely "$model"; fi
done

say 6/6 "the report"
"$PYTHON" "$here/results.py" "$out"
