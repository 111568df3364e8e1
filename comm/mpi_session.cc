#include "comm/mpi_session.h"

#include <mpi.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <string>

#include "common/errors.h"

namespace routecast {
namespace {

// Tasks that Slurm started beside this one, or would: without PMI between srun and this
// MPI each of them is a job of its own, and all would write the same output. Processes
// that mpirun started know their world, whatever Slurm's variables say.
int SlurmTasks() {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr) return 1;
  int most = 1;
  for (const char* name : {"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"}) {
    const char* tasks = std::getenv(name);
    if (tasks != nullptr) most = std::max(most, std::atoi(tasks));
  }
  return most;
}

[[noreturn]] void RefuseSingletons(int tasks) {
  throw UsageError(ErrorText(
      "every task would be a job of its own",
      "Slurm has " + std::to_string(tasks) + " tasks, MPI knows of 1 (no PMI)",
      "start with mpirun in the allocation (launch/slurm/), mpirun -n 1 for one rank"));
}

}  // namespace

MpiSession::MpiSession(int* argc, char*** argv)
    : exceptions_at_start_(std::uncaught_exceptions()) {
  const int tasks = SlurmTasks();
  // Before MPI_Init, which ends such a process with a page of text and exit code 1.
  if (tasks > 1 && std::getenv("PMIX_RANK") == nullptr) RefuseSingletons(tasks);
  // A process without mpirun would start a daemon for calls that we never make, and a
  // Ctrl-C, which reaches the daemon as well, would end MPI_Init with a page of text.
  ::setenv("OMPI_MCA_ess_singleton_isolated", "1", 0);
  int provided = 0;
  MPI_Init_thread(argc, argv, MPI_THREAD_SERIALIZED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &rank_.world);
  MPI_Comm host;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_.rank, MPI_INFO_NULL,
                      &host);
  MPI_Comm_rank(host, &rank_.local_rank);
  MPI_Comm_size(host, &rank_.local_world);
  MPI_Comm_free(&host);
  if (provided < MPI_THREAD_SERIALIZED) {
    MPI_Finalize();
    throw EnvironmentError(ErrorText("MPI cannot be used",
                                     "it offers no MPI_THREAD_SERIALIZED",
                                     "use an MPI that was built with threads"));
  }
  if (rank_.world == 1 && tasks > 1) {
    MPI_Finalize();
    RefuseSingletons(tasks);
  }
}

MpiSession::~MpiSession() {
  if (std::uncaught_exceptions() > exceptions_at_start_ && rank_.world > 1) return;
  MPI_Finalize();
}

void MpiSession::Abort(int exit_code) {
  int initialised = 0, finalised = 0;
  MPI_Initialized(&initialised);
  MPI_Finalized(&finalised);
  if (initialised && !finalised) MPI_Abort(MPI_COMM_WORLD, exit_code);
}

}  // namespace routecast
