#!/usr/bin/env bash
# Rehearse a batch script on this machine, without SLURM and GPUs: the same script, the same number of processes, the model shrunk.
#
#   examples/slurm/rehearse.sh SCRIPT.sbatch [MODEL] [FLAGS...]
#
# MODEL (llama2-70b, falcon-40b, a config.json): make up a checkpoint or shards that are not there yet. STAND_IN_NODES: fewer nodes.
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
script=$1
model=${2:-}
shift "$(($# < 2 ? $# : 2))"
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$here/../../.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
# The script's own logs go to a folder that is removed: a rehearsal leaves nothing behind.
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
export PYTHON LOGS MEGATRON_FT_REHEARSE=1 MEGATRON_FT_MAKE_BELIEVE=$model MEGATRON_FT_DEVICE=cpu OMP_NUM_THREADS=1 MAX_RESTARTS=0
"$here/stand_in/sbatch" "$script" "$@"
