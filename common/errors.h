// Errors by who can mend them, and the exit code each one becomes in launch/ (the one
// place that catches them). A message has at most three lines: what and where; the two
// values that disagree; what to do.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace routecast {

enum ExitCode : int {
  kExitDone = 0,
  kExitDefect = 1,       // a defect of ours
  kExitUsage = 2,        // flags, configuration, an input that does not exist
  kExitBadData = 3,      // corrupt, truncated, hostile or inconsistent input
  kExitEnvironment = 4,  // no such device, disk full, a rank died
  kExitStopped = 75,     // stopped on request, everything saved
};

struct UsageError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct DataError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct EnvironmentError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// Thrown after everything was saved because a stop was requested (common/stop.h).
struct StoppedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// "three lines" helper: joins what happened, the disagreement and the advice; empty ones
// skipped.
std::string ErrorText(const std::string& what, const std::string& values,
                      const std::string& advice);
// Throws EnvironmentError (disk full, I/O) or UsageError (missing, wrong kind,
// permission) for errno `error` of an operation on `path`.
[[noreturn]] void ThrowErrno(int error, const std::string& operation,
                             const std::string& path);

// The nearest valid name by edit distance, for "did you mean"; empty list gives "".
std::string NearestName(const std::string& name, const std::vector<std::string>& valid);
// "did you mean PREFIXname?" of the nearest valid name; "" where none looks like a slip
// of `name`: more than half of the longer one would have to change.
std::string DidYouMean(const std::string& name, const std::vector<std::string>& valid,
                       const std::string& prefix = "");
// Index of `value` in `valid`, or UsageError naming all, and the one that was meant.
int ParseChoice(const std::string& flag, const std::string& value,
                const std::vector<std::string>& valid);

}  // namespace routecast
