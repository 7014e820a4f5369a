# shellcheck shell=bash
# What the sbatch scripts have in common; they source it. Needs SAVE (where checkpoints go) and LOGS (a folder).
#
#   train_on_all_nodes FLAGS...    run finetune on every node of the job, then requeue the job or end it
#
# Exit codes of the job: 0 done; 2 a mistake in settings or files, not requeued; 70 given up, not requeued: MAX_RESTARTS restarts did not
# get further than the checkpoint they began from. 75 (preempted, out of time) and all others are requeued, and go on with --auto_resume.

: "${GPUS_PER_NODE:=8}" "${MAX_RESTARTS:=3}" "${PYTHON:=python}"

say() { printf '[%(%F %T)T] job %s: %s\n' -1 "$SLURM_JOB_ID" "$*"; }

# All nodes have to agree on where rank 0 is: the first node, and a port that follows from the job's number.
rendezvous() {
  local hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # not `| head`: scontrol would die of the closed pipe
  MASTER_ADDR=${hosts[0]}
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT
}

train_on_all_nodes() {
  local restart=${SLURM_RESTART_COUNT:-0} code=0 running
  mkdir -p "$LOGS"
  if [ "$restart" -eq 0 ]; then rm -f "$LOGS/restarts"; fi
  rendezvous
  # A node that ends with 2 leaves this file: the nodes that srun then ends have exit codes of their own, and srun reports the highest.
  export MEGATRON_FT_MISTAKE=$LOGS/restart-$restart.mistake
  rm -f "$MEGATRON_FT_MISTAKE"
  say "$SLURM_NNODES nodes x $GPUS_PER_NODE processes, restart $restart, rank 0 on $MASTER_ADDR:$MASTER_PORT"
  # One launcher a node, which starts a process for each GPU. A node that fails takes the others down with it.
  # (srun does not take over sbatch's --cpus-per-task by itself.)
  srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 "$PYTHON" -m megatron_ft finetune \
    --nnodes "$SLURM_NNODES" --nproc_per_node "$GPUS_PER_NODE" --log_dir "$LOGS/restart-$restart" --auto_resume "$@" &
  running=$!
  # The batch shell is told when the time is nearly over (--signal=B:USR1@...); the processes have to hear of it.
  trap 'say "time is nearly over: saving"; kill -USR1 "$running"' USR1
  trap 'say "told to stop: saving"; kill -TERM "$running"' TERM
  while kill -0 "$running" 2>/dev/null; do wait "$running" || true; done # a signal ends wait, not srun
  wait "$running" || code=$?
  trap - USR1 TERM
  if [ -e "$MEGATRON_FT_MISTAKE" ]; then code=2; fi
  end_or_requeue "$code"
}

end_or_requeue() {
  local code=$1 reached before='' restarts=0
  case $code in
    0) say "done"; exit 0 ;;
    2) say "a mistake in settings or files, see above: not requeued"; exit 2 ;;
  esac
  reached=$(cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || echo nothing)
  if [ -r "$LOGS/restarts" ]; then read -r before restarts <"$LOGS/restarts"; fi
  if [ "$reached" != "$before" ]; then restarts=0; fi
  if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
    say "exit code $code; $restarts restarts have not got further than $reached saved: given up, not requeued"
    exit 70
  fi
  printf '%s %s\n' "$reached" "$((restarts + 1))" >"$LOGS/restarts"
  say "exit code $code, $reached saved: requeued"
  scontrol requeue "$SLURM_JOB_ID" || say "could not be requeued (is SLURM doing so itself?)"
  exit 75
}
