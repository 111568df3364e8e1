#!/usr/bin/env bash
# Tries launch/slurm/ on a Slurm of one node that runs in FOLDER alone (packages slurm-wlm and
# munge; no cgroups, no service is touched): a collection is submitted, stopped by USR1, requeued,
# finished and verified; srun without PMI is refused; srun with PMIx is two ranks. Stops the
# daemons at the end.
#
# Usage: bench/slurm_trial.sh FOLDER FLAGS...     FLAGS: those of routecast-collect without --store
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath -m "$1")
shift
bin=${ROUTECAST_BUILD:-$root/build}/bin
export SLURM_CONF=$folder/slurm.conf
rm -rf "$folder"
mkdir -p "$folder"/{state,spool,munge}

cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$folder/munge/socket
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc --all) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
(umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --force \
  --log-file="$folder/munge/log" --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed"
down() {
  for pid in "$folder"/{slurmd.pid,slurmctld.pid,munge/pid}; do
    [ ! -e "$pid" ] || kill "$(cat "$pid")" || true
  done
}
trap down EXIT
slurmctld
slurmd

state() { scontrol show job "$1" | sed -n "s/.*$2=\([^ ]*\).*/\1/p" | head -1; }
await() {  # await JOB FIELD VALUE
  local is=""
  for _ in $(seq 600); do
    is=$(state "$1" "$2")
    [ "$is" != "$3" ] || return 0
    [ "$is" != FAILED ] || break
    sleep 0.5
  done
  echo "job $1: $2 is $is, not $3"
  exit 1
}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
cd "$root"
job=$(sbatch --parsable --output="$folder/job.log" launch/slurm/collect.sbatch \
  --store="$folder/store" "$@")
await "$job" JobState RUNNING
for _ in $(seq 600); do
  ! grep -qs '"chunk"' "$folder"/store/spans/*.jsonl || break
  sleep 0.1
done
begun=$(date +%s)
scancel --batch --signal=USR1 "$job"
await "$job" Restarts 1
echo "stopped and requeued after $(($(date +%s) - begun)) s"
await "$job" JobState PENDING
# Not at once: slurmd refuses a job number that it has just ended (else Slurm waits two minutes).
scontrol update JobId="$job" StartTime=now+10
await "$job" JobState COMPLETED
"$bin/routecast-trace" verify --store="$folder/store"

program=("$bin/routecast-collect" --quiet --threads=1 "$@" --max_sequences=20)
code=0
srun -n 2 "${program[@]}" --store="$folder/none" 2>"$folder/refusal" || code=$?
if [ "$code" != 2 ] || [ -e "$folder/none" ]; then echo "srun without PMI gave $code"; exit 1; fi
srun -n 2 --mpi=pmix "${program[@]}" --store="$folder/pmix"
grep -q '"ranks": 2' "$folder/pmix/run.json"
echo "srun without PMI is refused, with PMIx it is two ranks"
