// Waiting for MPI with a deadline.
#pragma once

#include <mpi.h>

#include "comm/call_watch.h"
#include "common/rank.h"

namespace routecast {

// Polls a request until it is done: MPI has no deadline of its own, and a rank that waits
// for a dead peer would wait for ever. False after `deadline` seconds; the request is
// then still under way.
bool DoneWithin(MPI_Request* request, double deadline);
// Throws EnvironmentError (rank, call, seconds) past the deadline.
void WaitFor(MPI_Request* request, const char* call, const RankInfo& rank,
             double deadline);
// The same for a call that `watch` numbers; the error names who is missing.
void WaitFor(MPI_Request* request, CallWatch* watch, uint64_t call, double deadline);

}  // namespace routecast
