#include "common/exit_code.h"

#include <initializer_list>
#include <new>
#include <string_view>
#include <system_error>

#include "common/errors.h"
#include "common/run_record.h"

namespace routecast {
namespace {

// Missing paths and permissions are the caller's to mend; the rest is the machine's.
int CodeOf(const std::system_error& error) {
  const std::error_condition c = error.code().default_error_condition();
  const bool usage = c == std::errc::no_such_file_or_directory ||
                     c == std::errc::not_a_directory || c == std::errc::is_a_directory ||
                     c == std::errc::permission_denied || c == std::errc::file_exists;
  return usage ? kExitUsage : kExitEnvironment;
}

template <typename Kind>
bool Is(const std::exception& error) {
  return dynamic_cast<const Kind*>(&error) != nullptr;
}

// What is ours says itself what is wrong.
bool IsOurs(const std::exception& error) {
  return Is<UsageError>(error) || Is<DataError>(error) || Is<EnvironmentError>(error) ||
         Is<StoppedError>(error);
}

bool HasAnyOf(const std::exception& error, std::initializer_list<const char*> words) {
  const std::string_view text = error.what();
  for (const char* part : words) {
    if (text.find(part) != std::string_view::npos) return true;
  }
  return false;
}

}  // namespace

// LibTorch throws types of its own, which this room does not know; their words are these,
// on the host and on CUDA devices.
bool IsOutOfMemory(const std::exception& error) {
  if (Is<std::bad_alloc>(error)) return true;
  return !IsOurs(error) &&
         HasAnyOf(error, {"can't allocate memory", "out of memory", "ALLOC_FAILED"});
}

bool IsDeviceTrouble(const std::exception& error) {
  return !IsOurs(error) &&
         HasAnyOf(
             error,
             {"no kernel image is available", "driver version is insufficient",
              "no CUDA-capable device", "busy or unavailable", "uncorrectable ECC error",
              "hardware stack error", "has fallen off the bus", "unsupported toolchain",
              "system not yet initialized", "CUDA error: unknown error"});
}

int ExitCodeOf(const std::exception& error) {
  if (Is<StoppedError>(error)) return kExitStopped;
  if (Is<UsageError>(error)) return kExitUsage;
  if (Is<DataError>(error)) return kExitBadData;
  if (Is<EnvironmentError>(error)) return kExitEnvironment;
  if (Is<Json::exception>(error)) return kExitBadData;  // foreign JSON of another shape
  if (const auto* system = dynamic_cast<const std::system_error*>(&error))
    return CodeOf(*system);
  return IsOutOfMemory(error) || IsDeviceTrouble(error) ? kExitEnvironment : kExitDefect;
}

}  // namespace routecast
