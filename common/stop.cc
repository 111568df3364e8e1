#include "common/stop.h"

#include <csignal>
#include <initializer_list>
#include <string>

#include "common/errors.h"

namespace routecast {
namespace {
volatile std::sig_atomic_t stop_requested = 0;
void OnSignal(int) { stop_requested = 1; }
}  // namespace

void InstallStopHandlers() {
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  for (int signal : {SIGTERM, SIGINT, SIGUSR1}) sigaction(signal, &action, nullptr);
}

bool StopRequested() { return stop_requested != 0; }
void ThrowIfStopped(const char* what) {
  if (!StopRequested()) return;
  throw StoppedError(std::string("stopped ") + what + ": start the same command again");
}
void RequestStop() { stop_requested = 1; }

}  // namespace routecast
