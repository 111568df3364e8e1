#include "comm/mpi_wait.h"

#include <chrono>
#include <string>
#include <thread>

#include "common/errors.h"

namespace routecast {

void WaitFor(MPI_Request* request, const char* call, const RankInfo& rank,
             double deadline) {
  const auto start = std::chrono::steady_clock::now();
  int done = 0;
  for (int polls = 0;; ++polls) {
    MPI_Test(request, &done, MPI_STATUS_IGNORE);
    if (done) return;
    if (polls < 2000) continue;
    std::this_thread::yield();
    const double waited =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (waited > deadline) {
      throw EnvironmentError(ErrorText(
          "rank " + std::to_string(rank.rank) + " of " + std::to_string(rank.world) +
              ": " + call + " did not end",
          "waited " + std::to_string(static_cast<int>(waited)) + " s for a peer",
          "a rank hangs or died; start the same command again, it goes on"));
    }
  }
}

}  // namespace routecast
