# shellcheck shell=bash
# What the stand-ins share. A job's folder holds: batch (the batch shell's pid), tasks (pids, a line each, while a step runs), state
# (RUNNING, COMPLETING), reason, restarts (as scontrol shows them), requeued (start it again).

state_of() { printf '%s/megatron_ft-stand-in-%s-%s' "${TMPDIR:-/tmp}" "$UID" "$1"; }

# tree PID: it and what it started, deepest first.
tree() {
  local child
  while read -r child; do tree "$child"; done < <(cat /proc/"$1"/task/*/children 2>/dev/null | tr ' ' '\n' | grep .)
  echo "$1"
}

# signal_trees NAME PID...: every process below these, as SLURM does.
signal_trees() {
  local name=$1 pid
  shift
  for pid in "$@"; do
    # shellcheck disable=SC2046
    kill -"$name" $(tree "$pid") 2>/dev/null
  done
  return 0
}

# end_job JOB REASON RESTARTS: what SLURM does to a job that it ends, for whatever reason: SIGTERM to the batch shell and to every process
# of its steps, SIGKILL to all that is left after KillWait (STAND_IN_KILL_WAIT, 30 s).
end_job() {
  local folder tasks=() batch
  folder=$(state_of "$1")
  [ -d "$folder" ] || { echo "stand-in: no job $1" >&2; return 1; }
  echo COMPLETING >"$folder/state"
  echo "$2" >"$folder/reason"
  echo "$3" >"$folder/restarts"
  batch=$(cat "$folder/batch")
  mapfile -t tasks < <(cat "$folder/tasks" 2>/dev/null)
  signal_trees CONT "${tasks[@]}"
  signal_trees TERM "${tasks[@]}"
  kill -TERM "$batch" 2>/dev/null
  (
    sleep "${STAND_IN_KILL_WAIT:-30}"
    if [ "$(cat "$folder/batch" 2>/dev/null)" = "$batch" ]; then signal_trees KILL "${tasks[@]}" "$batch"; fi
  ) </dev/null >/dev/null 2>&1 &
}
