// What every program's main does around its own page: flags, help, signals, exit codes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "common/rank.h"
#include "launch/flags.h"

namespace routecast {

struct Program {
  const char* usage;      // what it does and how it is called; several lines are fine
  int max_arguments = 0;  // arguments beside the flags, e.g. the verb of routecast-trace
  Program(const char* text, int arguments = 0)  // NOLINT: Main(argc, argv, "usage", ...)
      : usage(text), max_arguments(arguments) {}
};

// Parses flags (launch/flags.h), answers --help and --version, installs stop handlers,
// starts glog (to stderr), calls `run`, and returns the exit code (common/errors.h). The
// text of an exception goes to stderr, at most three lines, the program's name in front.
// Flags of all programs (declare with gflags): --quiet --dry_run --threads --seed.
int Main(int argc, char** argv, Program program, const std::function<void()>& run);

// What is not a flag on the command line. Valid inside `run`.
const std::vector<std::string>& Arguments();

// `hook` ends the other ranks with this exit code (MPI_Abort). Called where this rank
// fails for a reason that its peers do not know: every exception but StoppedError, which
// all ranks agree on before they throw it. An MPI session must not finalise while an
// exception unwinds it (std::uncaught_exceptions() > 0): its peers would not be there.
void SetAbortHook(std::function<void(int exit_code)> hook);

// Compute threads of one rank: --threads, or the cores of this host shared by its ranks.
// OMP_NUM_THREADS and MKL_NUM_THREADS are read before main: launch/*.sh set them to the
// same.
int ThreadsPerRank(int local_world);

}  // namespace routecast
