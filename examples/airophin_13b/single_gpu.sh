#!/usr/bin/env bash
# Both phases on one GPU of 48 GB. Stopped, or killed: start it again, it goes on from the last checkpoint.
#
#   examples/airophin_13b/single_gpu.sh [flags of finetune that win over those of phase1.yaml and phase2.yaml, in both phases]
#
# Environment: EPOCHS (2, of the chats), PYTHON.
set -euo pipefail

: "${PYTHON:=python}" "${EPOCHS:=2}"
here=examples/airophin_13b
finetune() { "$PYTHON" -m megatron_ft finetune --auto_resume "$@"; }

finetune --config "$here/phase1.yaml" --save checkpoints/airophin-13b-phase1 "$@"
steps=$("$PYTHON" "$here/steps.py" data/airophin/chats-train 8192 16 "$EPOCHS")
finetune --config "$here/phase2.yaml" --save checkpoints/airophin-13b --train_iters "$steps" "$@"
