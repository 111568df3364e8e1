#include "comm/mpi_wait.h"

#include <chrono>
#include <string>
#include <thread>

#include "common/errors.h"

namespace routecast {

bool DoneWithin(MPI_Request* request, double deadline) {
  const auto start = std::chrono::steady_clock::now();
  int done = 0;
  for (int polls = 0;; ++polls) {
    MPI_Test(request, &done, MPI_STATUS_IGNORE);
    if (done) return true;
    if (polls < 2000) continue;
    std::this_thread::yield();
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
    if (waited.count() > deadline) return false;
  }
}

void WaitFor(MPI_Request* request, const char* call, const RankInfo& rank,
             double deadline) {
  if (DoneWithin(request, deadline)) return;
  throw EnvironmentError(
      ErrorText("rank " + std::to_string(rank.rank) + " of " +
                    std::to_string(rank.world) + ": " + call + " did not end",
                "waited " + std::to_string(static_cast<int>(deadline)) + " s for a peer",
                "a rank hangs or died; start the same command again, it goes on"));
}

void WaitFor(MPI_Request* request, CallWatch* watch, uint64_t call, double deadline) {
  if (!DoneWithin(request, deadline)) throw watch->Overdue(call, deadline);
  watch->End(call);
}

}  // namespace routecast
