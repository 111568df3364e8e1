# Steps that are done once. Sourced after lib.sh by demo.sh, pipeline.sh and bundle.sh, which set
# num_steps and call begin_steps FOLDER first.
# FOLDER/log has a file a step; FOLDER/done says with which arguments a step was done.

# The running step. TERM and INT reach it, and it saves before it ends; between steps they are
# heeded before the next one begins.
child=
stopping=
stop() {
  stopping=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT HUP
heed_stop() {  # heed_stop WHAT
  [ -z "$stopping" ] || die 75 "stopped at '$1'; everything is saved" "start the same command again"
}
# Waits for the child; what it ended with is in $code. A signal ends wait before the child has, and
# a child that ends just then has left its own code with the shell: hence once more.
await_child() {
  while :; do
    wait "$child" || true
    kill -0 "$child" 2>/dev/null || break
  done
  code=0
  wait "$child" || code=$?
  child=
}
# A command that is no step, and saves nothing; one that a stop has ended is not a failure.
interruptible() {  # interruptible WHAT COMMAND...
  local what=$1 code
  shift
  heed_stop "$what"
  "$@" &
  child=$!
  await_child
  heed_stop "$what"
  return "$code"
}

step_number=0
chain=
times=()
steps_folder=
begin_steps() {  # begin_steps FOLDER
  steps_folder=$1
  mkdir -p "$steps_folder/log" "$steps_folder/done"
  # Held by what a run starts as well, until the last of it has ended.
  exec 9>"$steps_folder/lock"
  flock -n 9 || die 4 "another run is at work in $steps_folder" "wait for it, or give another folder"
}
# The keys of earlier steps go in: what follows a step that ran anew runs anew too.
extend_chain() {  # extend_chain COMMAND...
  step_number=$((step_number + 1))
  chain=$(printf '%s\n' "$chain" "$@" | sha256sum | cut -c1-16)
}
pass_step() {  # pass_step WHAT COMMAND...: it is not run now; later steps are as if it were
  local what=$1
  shift
  extend_chain "$@"
  printf '[%d/%d] %s: left out\n' "$step_number" "$num_steps" "$what"
}
# step NAME WHAT COMMAND...: runs COMMAND unless it was done with these arguments before.
step() {
  local name=$1 what=$2 begin=$SECONDS code=0 key
  shift 2
  heed_stop "$what"
  extend_chain "$@"
  key=$chain
  if [ "$(head -1 "$steps_folder/done/$name" 2>/dev/null)" = "$key" ]; then
    times+=("$(printf '%-44s %5s s (done before)' "$what" "$(sed -n 2p "$steps_folder/done/$name")")")
    printf '[%d/%d] %s: done before\n' "$step_number" "$num_steps" "$what"
    return
  fi
  printf '\n[%d/%d] %s\n' "$step_number" "$num_steps" "$what"
  # A signal to the whole group (Ctrl-C, timeout, a batch system) ends the step, not its log.
  local log_pid
  exec 3> >(trap '' INT TERM HUP; exec tee "$steps_folder/log/$name.log")
  log_pid=$!
  "$@" >&3 2>&1 3>&- &
  child=$!
  exec 3>&-
  await_child
  wait "$log_pid" || true
  # Scripts without a word of their own on HUP, INT and TERM.
  case $stopping$code in yes129 | yes130 | yes143) code=75 ;; esac
  case $code in
    0) ;;
    75) die 75 "stopped at '$what'; everything is saved" "start the same command again" ;;
    *) die "$code" "'$what' failed with exit code $code" "its log: $steps_folder/log/$name.log" ;;
  esac
  local seconds=$((SECONDS - begin))
  printf '%s\n%s\n' "$key" "$seconds" >"$steps_folder/done/$name"
  times+=("$(printf '%-44s %5s s' "$what" "$seconds")")
}
