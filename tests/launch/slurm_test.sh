#!/usr/bin/env bash
# The templates of launch/slurm/ as Slurm runs them: a copy of the file, Slurm's variables, with
# stand-ins for scontrol and for the programs.
set -uo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
check() { [ "$2" = "$3" ] || { echo "FAILED $1: expected '$2', got '$3'"; failed=1; }; }

mkdir -p "$folder/bin" "$folder/build/bin"
printf '#!/bin/sh\necho "$@" >>%s\n' "$folder/scontrol.log" >"$folder/bin/scontrol"
cat >"$folder/build/bin/program" <<'PROGRAM'
#!/usr/bin/env perl
my $rank = $ENV{OMPI_COMM_WORLD_RANK} // 0;
open(my $f, ">", "$ENV{STATE}/rank.$rank"); print $f "@ARGV\n"; close $f;
exit $1 if $ARGV[1] =~ /^--code=(\d+)/;
$SIG{USR1} = sub { exit 75 };
open($f, ">", "$ENV{STATE}/ready.$rank"); close $f;
select(undef, undef, undef, 0.1) for 1 .. 300;
PROGRAM
chmod +x "$folder/bin/scontrol" "$folder/build/bin/program"
for name in collect pretrain train; do
  cp "$folder/build/bin/program" "$folder/build/bin/routecast-$name"
done
unset OMP_NUM_THREADS MKL_NUM_THREADS
export PATH=$folder/bin:$PATH ROUTECAST_BUILD=$folder/build STATE=$folder
export SLURM_JOB_ID=77 SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=2 SLURM_CPUS_PER_TASK=3
export SLURM_SUBMIT_DIR=$ROUTECAST_SOURCE_DIR

# What the run before has left: gone before the next one starts, which may run beside us.
clear_traces() { rm -f "$folder"/{rank,ready}.* "$folder/scontrol.log"; }
# run TEMPLATE FLAGS...: of a copy, elsewhere, as slurmd keeps it.
run() {
  cp "$ROUTECAST_SOURCE_DIR/launch/slurm/$1.sbatch" "$folder/slurm_script"
  shift
  (cd / && exec bash "$folder/slurm_script" "$@") >"$folder/log" 2>&1
}
requeued() { cat "$folder/scontrol.log" 2>/dev/null; }

for template in collect pretrain train; do
  grep -q '^#SBATCH --requeue$' "$ROUTECAST_SOURCE_DIR/launch/slurm/$template.sbatch"
  check "$template may be requeued" 0 $?
  grep -q '^#SBATCH --signal=B:USR1@[0-9]*$' "$ROUTECAST_SOURCE_DIR/launch/slurm/$template.sbatch"
  check "$template is told of its limit" 0 $?
  clear_traces
  run $template --code=75 --more
  check "$template: stopped" 75 $?
  check "$template: back into the queue" "requeue 77" "$(requeued)"
  check "$template: two ranks" 2 "$(ls "$folder" | grep -c '^rank\.')"
  check "$template: flags" "--threads=3 --code=75 --more" "$(cat "$folder/rank.1")"
done
for code in 0 3; do
  clear_traces
  run collect --code=$code
  check "code $code" $code $?
  check "code $code stays out of the queue" "" "$(requeued)"
done
for signal in USR1 TERM; do
  clear_traces  # a ready file that is left over would send the signal too early
  run collect --wait &
  job=$!
  for _ in $(seq 200); do
    [ -e "$folder/ready.0" ] && [ -e "$folder/ready.1" ] && break
    sleep 0.05
  done
  # The batch shell alone gets the signal: run's own subshell has become it.
  kill -$signal "$(ps -o pid= --ppid $job | tr -d ' ')"
  wait $job
  check "$signal stops" 75 $?
  check "$signal: back into the queue" "requeue 77" "$(requeued)"
done
exit $failed
