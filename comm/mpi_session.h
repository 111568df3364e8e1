// MPI for the life of a program.
#pragma once

#include "common/rank.h"

namespace routecast {

// Initialises MPI (SERIALIZED) at construction and finalises it at destruction, unless an
// exception unwinds it: then the peers are not there, and Abort ends the job. Works
// without mpirun as a world of one. One a process.
class MpiSession {
 public:
  // Throws UsageError where Slurm has several tasks that do not know each other, and
  // EnvironmentError for an MPI without threads.
  MpiSession(int* argc, char*** argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  RankInfo rank_info() const { return rank_; }
  // Ends all ranks of the job with this exit code. Safe before and after the session.
  static void Abort(int exit_code);

 private:
  RankInfo rank_;
  int exceptions_at_start_;
};

}  // namespace routecast
