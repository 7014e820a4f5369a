#!/usr/bin/env bash
# Submits a training for each method of methods.txt, and its benchmark when the training has ended well. Run from the repository's folder.
#
#   examples/alfred_40b/methods.sh
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
while read -r name method; do
  training=$(SAVE="checkpoints/alfred-$name" LOGS="logs/alfred-$name" \
    sbatch --parsable "$here/train.sbatch" --rope_scaling_type "$method" </dev/null)
  sbatch --dependency="afterok:$training" "$here/retrieval.sbatch" "checkpoints/alfred-$name" "results/$name" </dev/null
done <"$here/methods.txt"
