// A stop that ranks take together: a loop that may be long ends early where one was asked
// for (common/stop.h), and what follows it asks all ranks.
// Thread rule: every rank makes the same calls.
#pragma once

#include "comm/communicator.h"
#include "common/errors.h"
#include "common/stop.h"

namespace routecast {

// StoppedError on every rank where a stop was requested of one. What is saved stays: the
// run's last checkpoint.
inline void ThrowIfAnyStopped(Communicator* comm, const char* what) {
  if (!comm->Any(StopRequested())) return;
  throw StoppedError(std::string("stopped ") + what +
                     "; start the same command again and it goes on");
}

}  // namespace routecast
