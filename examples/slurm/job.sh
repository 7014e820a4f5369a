# shellcheck shell=bash
# What the sbatch scripts have in common; they source it. Needs SAVE (where checkpoints go) and LOGS (a folder).
#
#   train_on_all_nodes FLAGS...    run finetune on every node of the job, then requeue the job or end it
#
# Exit codes of the job: 0 done; 2 a mistake in settings or files, not requeued; 70 given up, not requeued: MAX_RESTARTS restarts did not
# get further than the checkpoint they began from. 75 (preempted, out of time) and all others are requeued, and go on with --auto_resume.
# A job that was cancelled saves, and is not requeued.

: "${GPUS_PER_NODE:=8}" "${MAX_RESTARTS:=3}" "${PYTHON:=python}"

say() { printf '[%(%F %T)T] job %s: %s\n' -1 "$SLURM_JOB_ID" "$*"; }

# job_field NAME: what SLURM says of this job now; empty where it does not answer.
job_field() {
  local line=''
  line=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) || true
  if [[ $line =~ (^|[[:space:]])$1=([^[:space:]]*) ]]; then printf '%s' "${BASH_REMATCH[2]}"; fi
}

# All nodes have to agree on where they meet: the first node, and a port that follows from the job's number. It lies below the ports
# that Linux gives to anybody who asks for one (32768 and up).
rendezvous() {
  local hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # not `| head`: scontrol would die of the closed pipe
  MASTER_ADDR=${hosts[0]}
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
  export MASTER_ADDR MASTER_PORT
}

# Newer SLURMs tell when the job's time is over (Unix time); 22.05 does not, but knows.
end_of_job() {
  local end=''
  if [ -n "${SLURM_JOB_END_TIME:-}" ]; then return; fi
  end=$(date -d "$(job_field EndTime)" +%s 2>/dev/null) || return 0 # Unknown: no limit
  if [ "$end" -gt "$(date +%s)" ]; then export SLURM_JOB_END_TIME=$end; fi
}

train_on_all_nodes() {
  local restart=${SLURM_RESTART_COUNT:-0} code=0 running
  mkdir -p "$LOGS"
  if [ "$restart" -eq 0 ]; then rm -f "$LOGS/restarts"; fi
  rendezvous
  end_of_job
  # A node that ends with 2 leaves this file: the nodes that srun then ends have exit codes of their own, and srun reports the highest.
  export MEGATRON_FT_MISTAKE=$LOGS/restart-$restart.mistake
  rm -f "$MEGATRON_FT_MISTAKE"
  say "$SLURM_NNODES nodes x $GPUS_PER_NODE processes, restart $restart, launchers meet at $MASTER_ADDR:$MASTER_PORT"
  # One launcher a node, which starts a process for each GPU. A node that fails takes the others down with it.
  # (srun does not take over sbatch's --cpus-per-task by itself.)
  srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 "$PYTHON" -m megatron_ft finetune \
    --nnodes "$SLURM_NNODES" --nproc_per_node "$GPUS_PER_NODE" --log_dir "$LOGS/restart-$restart" --auto_resume "$@" &
  running=$!
  # The batch shell is told when the time is nearly over (--signal=B:USR1@...), or to stop; the launchers have to hear of it. Always by
  # SIGUSR1: srun passes that on, but takes a SIGTERM as an order to end its tasks at once, before they can save.
  trap 'say "time is nearly over: saving"; kill -USR1 "$running"' USR1
  trap 'say "told to stop: saving"; kill -USR1 "$running"' TERM
  while kill -0 "$running" 2>/dev/null; do wait "$running" || true; done # a signal ends wait, not srun
  wait "$running" || code=$?
  trap - USR1
  trap '' TERM # nothing is running any more that could be told
  if [ -e "$MEGATRON_FT_MISTAKE" ]; then code=2; fi
  end_or_requeue "$code" "$restart"
}

# who_ends_it RESTART: nobody, us (SLURM leaves it to the script to start the job again), slurm (it starts it again itself), user.
# While a job is being ended its state is COMPLETING whatever the reason; what differs is the number of restarts, and the reason. A script
# whose node was cut off finds the job started again elsewhere, in any state.
who_ends_it() {
  local restarts=''
  restarts=$(job_field Restarts)
  if [ "${restarts:-0}" -gt "$1" ]; then echo slurm
  elif [ "$(job_field JobState)" != COMPLETING ]; then echo nobody
  elif [ "$(job_field Reason)" = TimeLimit ]; then echo us
  else echo user; fi
}

end_or_requeue() {
  local code=$1 reached before='' restarts=0 who
  case $code in
    0) say "done"; exit 0 ;;
    2) say "a mistake in settings or files, see above: not requeued"; exit 2 ;;
  esac
  reached=$(cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || echo nothing)
  who=$(who_ends_it "$2")
  case $who in
    user) say "exit code $code, $reached saved: cancelled, not requeued"; exit "$code" ;;
    slurm) say "exit code $code, $reached saved: SLURM starts it again"; exit 75 ;;
  esac
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
