#!/usr/bin/env bash
# The measurement of Falcon-40B-Instruct in small: a random Falcon on the CPU, memory and time in 16, 8 and 4 bits.
#
#   examples/falcon_40b_instruct/run.sh OUT_DIR
#
# 8 and 4 bits need bitsandbytes; without it 16 and 4 bits are measured with the project's engine. Environment: HIDDEN, LAYERS (of the model),
# MAX_NEW_TOKENS, PROMPTS (a JSONL file), PYTHON.
set -euo pipefail

if [ $# -ne 1 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
out=$1
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

: "${HIDDEN:=768}" "${LAYERS:=8}" "${MAX_NEW_TOKENS:=20}" "${PROMPTS:=$here/prompts.jsonl}"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$here/../../.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
export MEGATRON_FT_DEVICE=cpu

say() { printf '\n[%s] %s\n' "$1" "$2"; }
measure() {
  "$PYTHON" -m megatron_ft measure "$out/falcon" --prompts "$PROMPTS" --max_new_tokens "$MAX_NEW_TOKENS" "$@"
}

say 1/3 "a random Falcon with the parts of the 40B model"
"$PYTHON" "$here/make_tiny_falcon.py" "$out/falcon" --hidden_size "$HIDDEN" --num_layers "$LAYERS"

say 2/3 "transformers and bitsandbytes, as published"
if "$PYTHON" -c 'import bitsandbytes' 2>/dev/null; then
  measure --bits 16,8,4 --output "$out/transformers"
else
  echo "left out: bitsandbytes is not installed (pip install bitsandbytes)"
fi

say 3/3 "the project's engine with its own NF4"
measure --backend engine --bits 16,4 --output "$out/engine"
