#include "comm/mpi_session.h"

#include <mpi.h>

#include <cstdlib>
#include <exception>
#include <string>

#include "common/errors.h"

namespace routecast {

MpiSession::MpiSession(int* argc, char*** argv)
    : exceptions_at_start_(std::uncaught_exceptions()) {
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
  const char* tasks = std::getenv("SLURM_STEP_NUM_TASKS");
  if (provided < MPI_THREAD_SERIALIZED ||
      (tasks && rank_.world == 1 && std::atoi(tasks) > 1)) {
    const std::string why =
        provided < MPI_THREAD_SERIALIZED
            ? "this MPI offers no MPI_THREAD_SERIALIZED"
            : std::string(tasks) +
                  " tasks were started by srun, but each is alone in its MPI";
    MPI_Finalize();
    throw EnvironmentError(
        ErrorText("MPI cannot be used", why, "start with mpirun inside the allocation"));
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
