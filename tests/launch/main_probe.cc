// Throws what --throw names, so that main_test.sh can look at exit codes and texts.
#include <gflags/gflags.h>
#include <glog/logging.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <new>
#include <stdexcept>

#include "common/errors.h"
#include "common/stop.h"
#include "launch/main.h"

namespace routecast {
namespace {

void Throw(const std::string& what) {
  const std::string text = ErrorText("first", "second", "third") + "\nfourth";
  if (what == "usage") throw UsageError(text);
  if (what == "data") throw DataError(text);
  if (what == "environment") throw EnvironmentError(text);
  if (what == "stopped") throw StoppedError(text);
  if (what == "defect") throw std::logic_error(text);
  if (what == "memory") throw std::bad_alloc();
  if (what == "device-memory") {
    throw std::runtime_error(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1.00 GiB free.\n"
        "frame #0: c10::cuda::malloc");
  }
  if (what == "device-trouble") {
    throw std::runtime_error(
        "CUDA error: no kernel image is available for execution on the device\n"
        "CUDA kernel errors might be asynchronously reported at some other API call.\n"
        "For debugging consider passing CUDA_LAUNCH_BLOCKING=1");
  }
  if (what == "library-memory") {
    throw std::runtime_error(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 115201920008 bytes.\nframe #0: c10");
  }
  if (what == "json") Json::parse("{}").at("absent");
  if (what == "missing") fs::copy_file("/nonexistent/file", "/nonexistent/copy");
  if (what == "full-disk") {
    throw std::filesystem::filesystem_error(
        "cannot copy file", "/from", "/to",
        std::make_error_code(std::errc::no_space_on_device));
  }
  if (what == "check") CHECK_EQ(1, 2) << "a defect";
  if (what == "signal") {
    std::raise(SIGTERM);
    std::raise(SIGUSR1);
    if (StopRequested()) throw StoppedError("stopped, everything saved");
  }
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  return routecast::Main(
      argc, argv, routecast::Program("Usage: main_probe [WHAT]", 1), [] {
        routecast::SetAbortHook(
            [](int code) { std::printf("abort %d\n", code), std::fflush(stdout); });
        const auto& arguments = routecast::Arguments();
        if (!arguments.empty()) routecast::Throw(arguments[0]);
        std::printf("%s\nthreads %d\n", routecast::EffectiveFlags().dump().c_str(),
                    routecast::ThreadsPerRank(1));
      });
}
