#!/usr/bin/env bash
# Airophin's road in small: NF4 base with four times the context, adapters trained in two phases, merged, checked, and rounded to 4 bits.
#
#   examples/adapters_small/run.sh OUT_DIR
#
# Runs on CPU processes with a random Llama that make_files.py writes. Environment: ITERS_LONG and EPOCHS (length of the phases), LR, RANK
# (of the adapters), TP (tensor parallel size of the first phase), MAX_NEW_TOKENS, PYTHON.
set -euo pipefail

if [ $# -ne 1 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
out=$1
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

: "${ITERS_LONG:=60}" "${EPOCHS:=2}" "${LR:=1e-2}" "${RANK:=32}" "${TP:=2}" "${MAX_NEW_TOKENS:=24}"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$here/../../.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
# More threads than cores only get in each other's way; the device is named so that the numbers are the same everywhere.
export OMP_NUM_THREADS=1 MEGATRON_FT_DEVICE=cpu

say() { printf '\n[%s] %s\n' "$1" "$2"; }
megatron_ft() { "$PYTHON" -m megatron_ft "$@"; }
shards() {
  megatron_ft pretokenize --config_dir "$here/configs" --configs "$1" --cache_dir "$out" --vocab_file "$out/base" \
    --output_dir "$out/data" --workers 1
}
batch=4
adam=(--adam_beta2 0.999 --clip_grad 0.3 --weight_decay 0 --micro_batch_size 1 --global_batch_size "$batch")

say 1/9 "a small random Llama, records with dolphin's keys, chats with contexts"
"$PYTHON" "$here/make_files.py" "$out"

say 2/9 "shards of both phases: long samples, then chats"
shards airophin_long
shards airophin_chats

say 3/9 "Hugging Face to Megatron: linears in NF4, 128 positions to 512 by NTK-by-parts"
megatron_ft hf-to-megatron "$out/base" "$out/nf4" --quantize nf4 --double_quant --chat_format vicuna \
  --rope_scaling_type ntk-by-parts --rope_scaling_factor 4

say 4/9 "first phase, on $TP processes: $ITERS_LONG steps of long samples"
megatron_ft finetune --nproc_per_node "$TP" --tensor_model_parallel_size "$TP" \
  --load "$out/nf4" --save "$out/phase1" --data_path "$out/data/long-train" \
  --lora_rank "$RANK" --lora_alpha 16 --lora_dropout 0.05 --seq_length 256 --train_iters "$ITERS_LONG" \
  --lr "$LR" --min_lr "$LR" --lr_decay_style constant --lr_warmup_iters "$((ITERS_LONG / 10))" \
  --log_interval "$(((ITERS_LONG + 9) / 10))" "${adam[@]}"

say 5/9 "second phase, in one process: $EPOCHS epochs of chats, from the first one's adapters"
steps=$("$PYTHON" "$here/../airophin_13b/steps.py" "$out/data/chats-train" 512 "$batch" "$EPOCHS")
megatron_ft finetune --load "$out/phase1" --finetune --save "$out/phase2" --data_path "$out/data/chats-train" \
  --lora_dropout 0.05 --seq_length 512 --train_iters "$steps" \
  --lr "$LR" --min_lr 0 --lr_decay_style cosine --lr_warmup_iters "$((steps / 10))" \
  --log_interval "$(((steps + 9) / 10))" "${adam[@]}"

say 6/9 "ask base and adapters"
megatron_ft generate --load "$out/phase2" --prompts "$here/questions.jsonl" --max_new_tokens "$MAX_NEW_TOKENS" \
  --output "$out/answers.jsonl"
cat -- "$out/answers.jsonl"

say 7/9 "the adapters as a PEFT folder, and merged into the model"
megatron_ft megatron-to-hf "$out/phase2" "$out/adapter" --adapter_only
megatron_ft merge-adapter "$out/phase2" "$out/merged"

say 8/9 "check the merged model: every weight and the logits, then its answers by transformers alone"
megatron_ft verify --hf "$out/merged" --megatron "$out/phase2"
"$PYTHON" "$here/../oasst/compare_answers.py" "$out/merged" "$out/answers.jsonl" "$MAX_NEW_TOKENS"

say 9/9 "GPTQ of the merged model, calibrated with the chats: 4 bits, groups of 32, largest inputs first"
megatron_ft hf-to-megatron "$out/merged" "$out/merged-megatron" --chat_format vicuna
megatron_ft megatron-to-hf "$out/merged-megatron" "$out/gptq" --quantize gptq --bits 4 --group_size 32 --desc_act \
  --calibration "$out/data/chats-train" --calibration_rows 32 --calibration_length 256
