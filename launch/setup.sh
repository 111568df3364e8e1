#!/usr/bin/env bash
# Everything this machine needs: Debian packages, LibTorch, a build. Safe to run again, to
# interrupt and to run twice at once; done already, it takes a few seconds.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

usage() {
  cat <<'TEXT'
Usage: launch/setup.sh [--tests] [--no-packages] [-- CMAKE ARGUMENTS]
  --tests        build the tests too, and install the Python references that they compare with
  --no-packages  do not look at Debian packages (clusters: dependencies placed by
                 CMAKE ARGUMENTS such as -DRocksDB_ROOT=... -DMPI_HOME=...)
  --help         this text
Environment: ROUTECAST_CACHE (default ~/.cache/routecast), ROUTECAST_BUILD (default build/),
ROUTECAST_CUDA (AUTO, ON, OFF), CUDAToolkit_ROOT, ROUTECAST_PYTHON3, ROUTECAST_JOBS.
TEXT
}

tests=no packages=yes cmake_args=()
while [ $# -gt 0 ]; do
  case $1 in
    --tests) tests=yes ;;
    --no-packages) packages=no ;;
    --help) usage; exit 0 ;;
    --) shift; cmake_args=("$@"); break ;;
    *) die 2 "unknown argument $1" "launch/setup.sh --help" ;;
  esac
  shift
done

install_packages() {
  command -v dpkg-query >/dev/null ||
    die 4 "this is not Debian" "install what launch/packages.txt names, then --no-packages"
  local missing=() package
  for package in $(grep -v '^#' "$root/launch/packages.txt"); do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
      missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || die 4 "Debian packages are missing; run this line, then again:" \
      "sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}"
    sudo=(sudo)
  fi
  say "installing ${#missing[@]} Debian packages: ${missing[*]}"
  local apt=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq
             -o DPkg::Lock::Timeout=600)
  # An interrupted dpkg leaves packages half configured; this repairs them.
  "${sudo[@]}" dpkg --configure -a >/dev/null
  "${apt[@]}" update || die 4 "apt-get update failed" "check the network and the sources"
  "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null ||
    die 4 "apt-get install failed" "run it by hand to see why: ${missing[*]}"
}

configure_and_build() {
  local cuda=OFF site
  if [ "${ROUTECAST_CUDA:-AUTO}" != OFF ] && [ -n "$(find_nvcc)" ]; then
    cuda=ON
  elif [ "${ROUTECAST_CUDA:-AUTO}" = ON ]; then
    die 4 "ROUTECAST_CUDA=ON, but nvcc was not found" "set CUDAToolkit_ROOT"
  fi
  if [ "$cuda" = ON ]; then
    say "CUDA: on ($(find_nvcc))"
    site=$(site_of libtorch-cuda torch-cuda.txt)
    install_site "$site" torch-cuda.txt
  else
    say "CUDA: off (no nvcc); programs run on the CPU"
    site=$(site_of libtorch-cpu torch-cpu.txt)
    install_site "$site" torch-cpu.txt
  fi
  export CCACHE_DIR=${CCACHE_DIR:-$cache/ccache} CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1
  mkdir -p "$build"
  (
    flock 9  # two set-ups of one clone build one after the other
    local wanted="$cuda $site ${cmake_args[*]:-}"
    if [ ! -e "$build/build.ninja" ] ||
       [ "$(cat "$build/.setup_configuration" 2>/dev/null)" != "$wanted" ]; then
      say "configuring $build"
      cmake -S "$root" -B "$build" -G Ninja -DROUTECAST_CUDA="$cuda" \
        -DROUTECAST_TORCH_SITE="$site" ${cmake_args[@]+"${cmake_args[@]}"} \
        >"$build/configure.log" 2>&1 ||
        die 4 "configuring failed: $(grep -m1 -A2 'CMake Error' "$build/configure.log" |
          tail -1)" "see $build/configure.log"
      echo "$wanted" >"$build/.setup_configuration"
    fi
    local target=programs
    [ "$tests" = no ] || target=all
    if ! ninja -C "$build" -n "$target" | grep -q 'no work to do'; then
      local jobs=${ROUTECAST_JOBS:-$(build_jobs)}
      say "building $target with $jobs jobs (log: $build/build.log)"
      ninja -C "$build" -j "$jobs" "$target" >"$build/build.log" 2>&1 || {
        grep -m 20 -E 'error|FAILED' "$build/build.log" >&2 || tail -20 "$build/build.log" >&2
        die 1 "the build failed" "see $build/build.log"
      }
    fi
  ) 9>"$build/.setup.lock"
}

# The Python of the references: a virtual environment that sees two package folders. torch and
# the NVIDIA libraries are those of CUDA builds (torch's Python side needs them all to import),
# so they are never installed twice.
make_python() {
  local torch_site extra_site environment=$build/python
  torch_site=$(site_of libtorch-cuda torch-cuda.txt)
  extra_site=$(site_of python-tests python-tests.txt)
  install_site "$torch_site" torch-cuda.txt
  install_site "$extra_site" python-tests.txt
  mkdir -p "$build"
  (
    flock 9
    if [ ! -x "$environment/bin/python" ] ||
       [ "$(cat "$environment/.sites" 2>/dev/null)" != "$torch_site $extra_site" ]; then
      rm -rf "$environment"
      "$(python_for_wheels)" -m venv --without-pip "$environment"
      printf '%s\n%s\n' "$torch_site" "$extra_site" \
        >"$(echo "$environment"/lib/python3*/site-packages)/routecast.pth"
      echo "$torch_site $extra_site" >"$environment/.sites"
    fi
  ) 9>"$build/.python.lock"
}

started=$SECONDS
[ "$packages" = no ] || install_packages
references=
# The references come over the network while compilers have the cores; in a process group of
# their own, so that nothing of it is left where this ends early.
stop_references() { [ -z "$references" ] || kill -TERM -- "-$references" 2>/dev/null || true; }
if [ "$tests" = yes ]; then
  trap stop_references EXIT
  set -m
  make_python &
  references=$!
  set +m
fi
configure_and_build
if [ -n "$references" ]; then
  wait "$references"
  references=
fi
say "ready in $((SECONDS - started)) s: $build/bin"
