#pragma once

namespace routecast {

// This process' place in the job. A world of one where there is no mpirun.
struct RankInfo {
  int rank = 0;
  int world = 1;
  int local_rank = 0;  // among the ranks of this host
  int local_world = 1;
  bool is_root() const { return rank == 0; }
};

}  // namespace routecast
