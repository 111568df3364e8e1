// Waiting for MPI with a deadline.
#pragma once

#include <mpi.h>

#include "common/rank.h"

namespace routecast {

// Polls a request until it is done: MPI has no deadline of its own, and a rank that waits
// for a dead peer would wait for ever. Throws EnvironmentError (rank, call, seconds)
// after `deadline` seconds; the request is then still under way.
void WaitFor(MPI_Request* request, const char* call, const RankInfo& rank,
             double deadline);

}  // namespace routecast
