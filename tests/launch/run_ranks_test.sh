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
  wait) trap 'echo saved >"$2.$rank"; exit 75' USR1
        touch "$2.ready.$rank"
        for _ in $(seq 300); do sleep 0.1; done ;;
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
"$run" -n 2 "$folder/program" die >/dev/null 2>&1
check dead-rank 4 $?
"$run" -n 2 "$folder/program" code 15 >/dev/null 2>&1
check mpi-error-class 4 $?
"$run" -n x "$folder/program" code 0 >/dev/null 2>&1
check wrong-ranks 2 $?
"$run" -n 1 no-such-program >/dev/null 2>&1
check missing-program 2 $?

"$run" -n 2 "$folder/program" wait "$folder/state" >/dev/null 2>&1 &
pid=$!
for _ in $(seq 200); do
  [ -e "$folder/state.ready.0" ] && [ -e "$folder/state.ready.1" ] && break
  sleep 0.05
done
kill -TERM $pid
wait $pid
check stopped 75 $?
check both-saved "saved saved" "$(echo $(cat "$folder/state.0" "$folder/state.1"))"
exit $failed
