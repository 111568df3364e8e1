#!/usr/bin/env bash
# Exit codes, texts and signals of Main(), seen from outside.
set -uo pipefail
probe=$1
failed=0
check() {  # check NAME EXPECTED ACTUAL
  [ "$2" = "$3" ] || { echo "FAILED $1: expected '$2', got '$3'"; failed=1; }
}
code_of() { "$probe" "$@" >/dev/null 2>&1; echo $?; }

check done 0 "$(code_of)"
check defect 1 "$(code_of defect)"
check failed-CHECK 1 "$(code_of check)"
check usage 2 "$(code_of usage)"
check missing-path 2 "$(code_of missing)"
for files in missing full-disk; do
  error=$("$probe" $files 2>&1 >/dev/null)
  check $files-lines 3 "$(wc -l <<<"$error")"
  check $files-says "main_probe: a file operation failed: No s" "$(head -c 41 <<<"$error")"
done
check full-disk 4 "$(code_of full-disk)"
case $error in *"/from -> /to"*"free space"*) ;; *) check full-disk-says "where, and what to do" "$error" ;; esac
check data 3 "$(code_of data)"
check foreign-json 3 "$(code_of json)"
check environment 4 "$(code_of environment)"
check memory 4 "$(code_of memory)"
check device-trouble 4 "$(code_of device-trouble)"
error=$("$probe" device-trouble 2>&1 >/dev/null)
check device-trouble-lines 3 "$(wc -l <<<"$error")"
case $error in *"no kernel image"*--device=cpu*) ;; *) check device-trouble-says "what, and what to do" "$error" ;; esac
for memory in device-memory library-memory; do
  check $memory 4 "$(code_of $memory)"
  error=$("$probe" $memory 2>&1 >/dev/null)
  check $memory-lines "main_probe: out of memory" "$(head -1 <<<"$error")"
  check $memory-lines 3 "$(wc -l <<<"$error")"
  case $error in *allocate*smaller*) ;; *) check $memory-says "how much, and what to do" "$error" ;; esac
  case $error in *frame*) check $memory-says "no stack" "$error" ;; esac
done
check stopped 75 "$(code_of stopped)"
check two-signals 75 "$(code_of signal)"
check unknown-flag 2 "$(code_of --thread=2)"
check bad-value 2 "$(code_of --threads=two)"
check missing-value 2 "$(code_of --threads)"
check negative-threads 2 "$(code_of --threads=-1)"
check too-many-threads 2 "$(code_of --threads=100000)"
check extra-argument 2 "$(code_of one two)"
check missing-flag-file 2 "$(code_of --flagfile=/nonexistent/file)"
check help 0 "$(code_of --help)"
check version 0 "$(code_of --version)"

error=$("$probe" usage 2>&1 >/dev/null)
check three-lines 3 "$(echo "$error" | wc -l)"
check name-in-front "main_probe: first" "$(echo "$error" | head -1)"
case $("$probe" --thread=2 2>&1) in *--threads\?*) ;; *) check nearest-flag named other ;; esac
check abort-hook "abort 3" "$("$probe" data 2>/dev/null)"
check no-abort-when-stopped "" "$("$probe" stopped 2>/dev/null)"
rank=$(OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 "$probe" usage 2>&1 >/dev/null | head -1)
check rank-in-front "main_probe (rank 1): first" "$rank"
exit $failed
