#!/usr/bin/env bash
# Scores a model on a list of lm-eval's tasks, each with its number of examples. Run from the repository's folder; needs
# pip install "megatron_ft[harness]". The data are downloaded, or come from the cache with HF_DATASETS_OFFLINE=1.
#
#   examples/benchmarks/run.sh LIST MODEL OUTPUT [more flags of evaluate harness]
#
# ReluFalcon's six benchmarks, on 8 GPUs:
#   examples/benchmarks/run.sh examples/benchmarks/six.txt runs/relu results/relu --tensor_model_parallel_size 8
# The same model at 2K and at 8K:
#   examples/benchmarks/run.sh examples/benchmarks/context.txt runs/base results/2k --max_length 2048
#   examples/benchmarks/run.sh examples/benchmarks/context.txt runs/extended results/8k --max_length 8192
set -euo pipefail

: "${PYTHON:=python}"
list=$1 model=$2 output=$3
shift 3
while read -r task shots; do
  [[ $task == "" || $task == \#* ]] && continue
  "$PYTHON" -m megatron_ft evaluate harness --load "$model" --lm_eval_tasks --tasks "$task" --num_fewshot "$shots" \
    --output "$output/$task" "$@"
done <"$list"
