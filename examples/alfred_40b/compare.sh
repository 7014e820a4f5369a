#!/usr/bin/env bash
# Compares what was measured for each method of methods.txt (or of the file METHODS): table, figure, page. Run from the repository's folder.
#
#   examples/alfred_40b/compare.sh [RESULTS_DIR]     default: results; reads RESULTS_DIR/NAME/retrieval.json
set -euo pipefail

: "${PYTHON:=python}"
results=${1:-results}
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
: "${METHODS:=$here/methods.txt}"
files=() names=()
while read -r name _; do
  files+=("$results/$name/retrieval.json")
  names+=("$name")
done <"$METHODS"
"$PYTHON" -m megatron_ft evaluate retrieval --results "${files[@]}" --names "${names[@]}" --output "$results/methods"
