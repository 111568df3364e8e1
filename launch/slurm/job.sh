# shellcheck shell=bash disable=SC2154  # the template sets routecast
# What the templates of this folder do in an allocation. Sourced: run_job PROGRAM FLAGS...
# As many ranks as the job has tasks, under mpirun, which finds the allocation's hosts by itself.
# USR1 (sbatch --signal, sent before the time limit) and TERM (preemption) stop the program; it
# saves and ends with 75, and the job is put back into the queue, to go on with the same command.

run_job() {
  local program=$1 code tasks stopping=
  shift
  tasks=${SLURM_NTASKS:-$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))}
  if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    # run_ranks.sh would talk over this host's shared memory and loopback alone.
    export ROUTECAST_MPIRUN_ARGS=${ROUTECAST_MPIRUN_ARGS:---map-by slot}
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  export MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS}
  ranks_pid=
  trap 'stopping=yes; [ -z "$ranks_pid" ] || kill -USR1 $ranks_pid 2>/dev/null' USR1 TERM
  "$routecast/launch/run_ranks.sh" -n "$tasks" "$program" \
    --threads="$OMP_NUM_THREADS" "$@" &
  ranks_pid=$!
  [ -z "$stopping" ] || kill -USR1 $ranks_pid 2>/dev/null
  while :; do  # a trapped signal ends wait before the program has ended
    wait $ranks_pid
    kill -0 $ranks_pid 2>/dev/null || break
  done
  wait $ranks_pid  # its own code, where it ended just as a signal came
  code=$?
  # The signal found it before it had begun.
  case $stopping$code in yes138 | yes143) code=75 ;; esac
  if [ $code = 75 ]; then
    echo "$(date +%FT%T) stopped with everything saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || echo "not requeued: submit the same command again"
  fi
  exit $code
}
