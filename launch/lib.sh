# Shell functions that setup.sh, demo.sh and test.sh share. Sourced, not run.
# Places: ROUTECAST_CACHE (or XDG_CACHE_HOME) holds what clones share; ROUTECAST_BUILD the build.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${ROUTECAST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/routecast}
build=${ROUTECAST_BUILD:-$root/build}
locks=$root/launch/locks

say() { printf '[%s] %s\n' "$(basename "$0")" "$*"; }
die() {  # die EXIT_CODE WHAT [WHAT TO DO]
  printf '%s: %s\n' "$(basename "$0")" "$2" >&2
  [ -z "${3:-}" ] || printf '  %s\n' "$3" >&2
  exit "$1"
}

# Debian's python3 where it is: the wheels in launch/locks/ are for CPython 3.11.
python_for_wheels() {
  if [ -n "${ROUTECAST_PYTHON3:-}" ]; then echo "$ROUTECAST_PYTHON3"
  elif [ -x /usr/bin/python3 ]; then echo /usr/bin/python3
  else command -v python3 || die 4 "python3 is missing" "install Python 3.11 with pip"; fi
}

find_nvcc() {
  if [ -n "${CUDAToolkit_ROOT:-}" ] && [ -x "$CUDAToolkit_ROOT/bin/nvcc" ]; then
    echo "$CUDAToolkit_ROOT/bin/nvcc"
  elif command -v nvcc >/dev/null; then command -v nvcc
  elif [ -x /usr/local/cuda/bin/nvcc ]; then echo /usr/local/cuda/bin/nvcc; fi
}

# The folder of a lock file's packages: its name carries the hash of the lock file.
site_of() {  # site_of KIND LOCK_FILE
  local hash
  hash=$(sha256sum "$locks/$2" | cut -c1-12)
  echo "$cache/$1-$hash"
}

# Installs LOCK_FILE into FOLDER unless it is there. Written under a temporary name and renamed,
# so a folder under its final name is always whole; a second caller waits for the first.
install_site() {  # install_site FOLDER LOCK_FILE
  local folder=$1 lock=$locks/$2 python
  [ -e "$folder/.sealed" ] && return
  mkdir -p "$cache"
  (
    flock 9
    [ -e "$folder/.sealed" ] && exit 0
    python=$(python_for_wheels)
    "$python" -m pip --version >/dev/null 2>&1 ||
      die 4 "$python has no pip" "apt-get install python3-pip, or set ROUTECAST_PYTHON3"
    say "installing $(grep -c == "$lock") Python packages of $2 into $folder"
    rm -rf "$folder" "$folder.tmp"
    mkdir -p "$folder.tmp/.pip"
    # TMPDIR: unpacked on the same file system, so that pip's last step is a rename.
    TMPDIR="$folder.tmp/.pip" "$python" -m pip install --quiet --no-deps --require-hashes \
      --only-binary :all: --no-compile --no-cache-dir --no-warn-conflicts \
      --disable-pip-version-check --root-user-action ignore \
      --target "$folder.tmp/site" -r "$lock" ||
      die 4 "pip could not install $2" "check the network and start the same command again"
    rm -rf "$folder.tmp/.pip"
    mv "$folder.tmp/site" "$folder"
    sync -f "$folder"
    touch "$folder/.sealed"
    rm -rf "$folder.tmp"
  ) 9>"$folder.lock"
}

# The cores that this process may use, whatever is said to OpenMP: nproc heeds its variables.
cores() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc; }

# Compile jobs: cores, but 2.5 GB of memory each (a LibTorch translation unit takes 1.5-2 GB).
build_jobs() {
  local cores memory_kb limit
  cores=$(cores)
  memory_kb=$(awk '/^MemTotal/ {print $2}' /proc/meminfo)
  limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || echo max)
  if [ "$limit" != max ] && [ $((limit / 1024)) -lt "$memory_kb" ]; then
    memory_kb=$((limit / 1024))
  fi
  local jobs=$((memory_kb / 2500000))
  [ "$jobs" -ge 1 ] || jobs=1
  [ "$jobs" -le "$cores" ] || jobs=$cores
  echo "$jobs"
}

# Ends the script with what the tests of $build say.
run_tests() {  # run_tests [CTEST ARGUMENTS]
  # Before CTest, so that a crash of CTest itself cannot leave an older result to be read.
  rm -f "$build/tests.xml"
  ctest --test-dir "$build" --parallel "$(cores)" --output-on-failure \
    --output-junit "$build/tests.xml" --test-output-size-passed 1000000 \
    --test-output-size-failed 1000000 "$@" || true
  ctest --test-dir "$build" --show-only=json-v1 "$@" >"$build/tests.json"
  exec "$(python_for_wheels)" "$root/tests/support/summarise.py" "$build/tests.xml" \
    "$build/tests.json"
}
