#!/usr/bin/env bash
# Runs a program under mpirun on this machine, so that it can be stopped: TERM and INT reach the
# ranks as USR1 (mpirun itself would kill them after a second), they save and end with 75.
# Exit code: the program's; 4 where a rank died.
#
# Usage: launch/run_ranks.sh [-n RANKS] PROGRAM [FLAGS]     RANKS: default 1
# Environment: ROUTECAST_MPIRUN_ARGS replaces the single-machine transport flags, for several
# hosts: ROUTECAST_MPIRUN_ARGS="--hostfile hosts" launch/run_ranks.sh -n 8 ...
set -uo pipefail
. "$(dirname "$0")/lib.sh"

ranks=1
case ${1:-} in
  -n) ranks=${2:-}; shift 2 || true ;;
  --help | "") sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
case $ranks in '' | *[!0-9]* | 0) die 2 "-n $ranks is not a number of ranks" "write -n 2" ;; esac
program=$1
shift
[ -x "$program" ] || program=$build/bin/$program
[ -x "$program" ] || die 2 "$program is not there" "run launch/setup.sh"

# Read by the OpenMP runtime and MKL before main; --threads of the program has the same default.
threads=$(($(nproc) / ranks))
[ "$threads" -ge 1 ] || threads=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} MKL_NUM_THREADS=${MKL_NUM_THREADS:-$threads}
# libgomp's threads spin for milliseconds between parallel regions; where another process wants
# the core too, a training of small tensors then spends nine tenths of its time waiting.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-2000}
# One rank is meant, however many tasks the allocation has; srun's own tasks stay refused.
[ "$ranks" -gt 1 ] || exec env -u SLURM_NTASKS "$program" "$@"

transport=(--mca btl self,vader --mca btl_vader_single_copy_mechanism none
           --mca oob_tcp_if_include lo --oversubscribe)
[ -z "${ROUTECAST_MPIRUN_ARGS:-}" ] || read -r -a transport <<<"$ROUTECAST_MPIRUN_ARGS"
[ "$(id -u)" -ne 0 ] || transport+=(--allow-run-as-root)
# mpirun's own words at the end of a job are four lines of dashes about an exit code that the
# program has explained; of these only who died is kept. Other reports pass as they are.
only_who_died() {
  trap '' TERM INT HUP USR1
  local line report="" inside=0
  while IFS= read -r line || [ -n "$line" ]; do
    if [[ $line =~ ^-{70,}$ ]]; then
      if [ $inside = 0 ]; then inside=1 report=""; continue; fi
      inside=0
      case $report in
        *"Primary job  terminated normally"* | *"exited with non-zero status, thus"* | *"MPI_ABORT was invoked"*) ;;
        *"noticed that process rank"*) sed -n 's/.*process \(rank [0-9]*\) with PID [0-9]* \(on node .*\)/run_ranks.sh: \1 \2/p' <<<"$report" ;;
        *) printf '%s\n%s%s\n' "$line" "$report" "$line" ;;
      esac
    elif [ $inside = 1 ]; then report+=$line$'\n'
    elif [[ $line == "mpirun: Forwarding signal "* ]]; then continue
    # That it left out, or lost, some of those words.
    elif [[ $line == *"sent help message help-mpi-api.txt"* || $line == *orte_base_help_aggregate* ||
            $line == *ORTE_ERROR_LOG*show_help.c* ]]; then continue
    else printf '%s\n' "$line"; fi
  done
  [ $inside = 0 ] || printf '%s' "$report"
}
exec 3> >(only_who_died >&2)
filter_pid=$!

mpirun_pid="" stopper_pid="" stopping=""
# Again every second until mpirun is gone: a rank that is still starting ignores it.
stop() {
  stopping=yes
  [ -n "$mpirun_pid" ] && [ -z "$stopper_pid" ] || return
  (
    exec 4<> <(:)
    while kill -USR1 $mpirun_pid 2>/dev/null; do read -rt 1 -u 4; done
  ) &
  stopper_pid=$!
}
trap stop TERM INT HUP USR1

# A session of its own: Ctrl-C in a terminal reaches whole process groups, and mpirun kills its
# ranks on INT. USR1 is ignored until mpirun, and later the program, handle it: by default it
# would end whoever is still starting.
ignoring_usr1=(bash -c 'trap "" USR1; exec "$@"' routecast)
setsid "${ignoring_usr1[@]}" mpirun --bind-to none "${transport[@]}" \
  -x OMP_NUM_THREADS -x MKL_NUM_THREADS -x GOMP_SPINCOUNT \
  -n "$ranks" "${ignoring_usr1[@]}" "$program" "$@" 2>&3 3>&- &
mpirun_pid=$!
exec 3>&-
# mpirun can deadlock where a rank dies while it connects (Open MPI 4.1.4, PMIx 4.2.2; seen once in
# some 200 kills): the dead then stay zombies, which it else collects at once.
end_hung_mpirun() {
  trap '' INT HUP USR1
  local looks=0 child dead
  exec 4<> <(:)  # silent for ever: waiting on it needs no process that would outlive the job
  while :; do
    read -rt "${ROUTECAST_LOOK_SECONDS:-5}" -u 4 child
    dead=0
    for child in $(cat /proc/$mpirun_pid/task/*/children 2>/dev/null); do
      ! grep -q '^State:.Z' "/proc/$child/status" 2>/dev/null || dead=$((dead + 1))
    done
    if [ $dead = 0 ]; then looks=0; else looks=$((looks + 1)); fi
    [ $looks -ge 3 ] || continue
    echo "run_ranks.sh: mpirun hangs over $dead dead ranks, and is ended" >&2
    # shellcheck disable=SC2046  # a list of process ids
    kill -KILL $mpirun_pid $(cat /proc/$mpirun_pid/task/*/children)
    return
  done
}
end_hung_mpirun &
watch_pid=$!
[ -z "$stopping" ] || stop  # it came before there was anybody to tell
while :; do  # a trapped signal ends wait before mpirun has ended
  wait $mpirun_pid
  kill -0 $mpirun_pid 2>/dev/null || break
done
wait $mpirun_pid  # its own code, where it ended just as a signal came
code=$?
kill $watch_pid $stopper_pid 2>/dev/null
wait $filter_pid
case $code in
  # Ours pass; a signal's, or an error class of MPI's own that ended the job, is a death.
  0 | 1 | 2 | 3 | 4 | 75) ;;
  *) die 4 "a rank died (mpirun returned $code)" "start the same command again" ;;
esac
exit $code
