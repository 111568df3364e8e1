#!/usr/bin/env bash
# launch/run_ranks.sh: exit codes, stopping and a dead rank, with scripts as programs.
set -uo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
run=$ROUTECAST_SOURCE_DIR/launch/run_ranks.sh
unset OMP_NUM_THREADS MKL_NUM_THREADS
failed=0
check() { [ "$2" = "$3" ] || { echo "FAILED $1: expected '$2', got '$3'"; failed=1; }; }

cat >"$folder/program" <<'PROGRAM'
#!/usr/bin/env bash
rank=${OMPI_COMM_WORLD_RANK:-0}
case $1 in
  code) exit "$2" ;;
  threads) echo "$OMP_NUM_THREADS $MKL_NUM_THREADS" ;;
  die) [ "$rank" != 1 ] || kill -KILL $$; sleep 30 ;;
  # Not bash, which cannot trap what was ignored when it began: signals are, until a program
  # handles them.
  wait) exec perl -e '
          sub touch { open(my $f, ">", $_[0]); print $f $_[1]; close $f }
          $SIG{USR1} = sub { touch("$ARGV[0].$ARGV[1]", "saved\n"); exit 75 };
          touch("$ARGV[0].ready.$ARGV[1]", "");
          select(undef, undef, undef, 0.1) for 1 .. 300' "$2" "$rank" ;;
  late) sleep 1; exec "$0" wait "$2" ;;
esac
PROGRAM
chmod +x "$folder/program"

for ranks in 1 2; do
  for code in 0 2 3 75; do
    "$run" -n $ranks "$folder/program" code $code >/dev/null 2>&1
    check "code $code of $ranks ranks" $code $?
  done
done
both=$("$run" -n 2 "$folder/program" threads 2>/dev/null)
each=$(($(nproc) / 2)); [ $each -ge 1 ] || each=1
check threads "$each $each" "$(head -1 <<<"$both")"
"$run" -n 2 "$folder/program" die >/dev/null 2>"$folder/errors"
check dead-rank 4 $?
check dead-rank-named 1 "$(grep -c 'rank 1 on node .* exited on signal 9' "$folder/errors")"
check dead-rank-lines 3 "$(wc -l <"$folder/errors")"
"$run" -n 2 "$folder/program" code 3 >/dev/null 2>"$folder/errors"
check silent-about-codes 0 "$(wc -l <"$folder/errors")"
"$run" -n 2 "$folder/program" code 15 >/dev/null 2>&1
check mpi-error-class 4 $?
# What it says of its own words, after ranks that ended by MPI_Abort.
mkdir "$folder/talks"
cat >"$folder/talks/mpirun" <<'MPIRUN'
#!/usr/bin/env bash
echo "program (rank 0): the mistake" >&2
echo "[vm:1] 1 more process has sent help message help-mpi-api.txt / mpi-abort" >&2
echo '[vm:1] Set MCA parameter "orte_base_help_aggregate" to 0 to see all help / error messages' >&2
echo "[vm:1] [[7,0],0] ORTE_ERROR_LOG: Out of resource in file ../../../orte/util/show_help.c at line 501" >&2
exit 2
MPIRUN
chmod +x "$folder/talks/mpirun"
PATH=$folder/talks:$PATH "$run" -n 2 "$folder/program" code 2 >/dev/null 2>"$folder/errors"
check talking-launcher 2 $?
check only-the-mistake "program (rank 0): the mistake" "$(cat "$folder/errors")"
# A launcher in Open MPI's deadlock: its dead ranks stay zombies.
mkdir "$folder/bin"
cat >"$folder/bin/mpirun" <<'MPIRUN'
#!/usr/bin/env perl
fork or exit 9 for 1 .. 2;
sleep 60;
MPIRUN
chmod +x "$folder/bin/mpirun"
begun=$SECONDS
PATH=$folder/bin:$PATH ROUTECAST_LOOK_SECONDS=1 "$run" -n 2 "$folder/program" code 0 >/dev/null \
  2>"$folder/errors"
check hung-launcher 4 $?
check hung-launcher-said 1 "$(grep -c 'hangs over 2 dead ranks' "$folder/errors")"
check hung-launcher-soon yes "$([ $((SECONDS - begun)) -le 20 ] && echo yes)"
"$run" -n x "$folder/program" code 0 >/dev/null 2>&1
check wrong-ranks 2 $?
"$run" -n 1 no-such-program >/dev/null 2>&1
check missing-program 2 $?

# stopped NAME HOW: a job of its own process group, as a terminal's; HOW stops it.
stopped() {
  local name=$1 kind=$2 pid begun=$SECONDS
  shift 2
  rm -f "$folder"/state.*
  # This shell's background jobs ignore INT, a terminal's do not.
  perl -e 'setpgrp; $SIG{INT} = "DEFAULT"; exec @ARGV' \
    "$run" -n 2 "$folder/program" "$kind" "$folder/state" >/dev/null 2>&1 &
  pid=$!
  if [ "$kind" = wait ]; then
    for _ in $(seq 200); do
      [ -e "$folder/state.ready.0" ] && [ -e "$folder/state.ready.1" ] && break
      sleep 0.05
    done
  else sleep 0.5; fi
  "$@" $pid
  wait $pid
  check "$name" 75 $?
  check "$name-saved" "saved saved" "$(echo $(cat "$folder"/state.[01]))"
  check "$name-soon" yes "$([ $((SECONDS - begun)) -le 15 ] && echo yes)"
}
to_group() { kill -INT -- "-$1"; }
stopped term wait kill -TERM
stopped usr1 wait kill -USR1
stopped ctrl-c wait to_group
stopped hang-up wait kill -HUP
stopped while-starting late to_group
exit $failed
