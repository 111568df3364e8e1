#include "comm/end_unless_done.h"

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stop_token>
#include <thread>

#include "common/errors.h"

namespace routecast {

void EndUnlessDone(double seconds, const std::string& error,
                   const std::function<void()>& work) {
  const std::jthread watch([&](const std::stop_token& done) {
    std::mutex mutex;
    std::unique_lock lock(mutex);
    std::condition_variable_any over;
    over.wait_for(lock, done, std::chrono::duration<double>(seconds),
                  [] { return false; });
    if (done.stop_requested()) return;
    std::fprintf(stderr, "%s: %s\n", program_invocation_short_name, error.c_str());
    std::fflush(stderr);
    std::_Exit(kExitEnvironment);
  });
  work();
}

}  // namespace routecast
