#include "launch/main.h"

#include <gflags/gflags.h>
#include <glog/logging.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "common/errors.h"
#include "common/exit_code.h"
#include "common/open_files.h"
#include "common/process_memory.h"
#include "common/stop.h"

DEFINE_bool(quiet, false, "no progress; only results and errors");
DEFINE_bool(dry_run, false, "check flags and inputs, print the plan, change nothing");
DEFINE_int32(threads, 0, "compute threads per rank; 0 = cores / ranks on this host");
DEFINE_uint64(seed, 1, "seed of everything random");

namespace routecast {
namespace {

constexpr int kMaxErrorLines = 3;

std::string& ProgramName() {
  static std::string name;
  return name;
}
std::vector<std::string>& MutableArguments() {
  static std::vector<std::string> arguments;
  return arguments;
}
std::function<void(int)>& AbortHook() {
  static std::function<void(int)> hook;
  return hook;
}

// "" outside mpirun; known before MPI_Init, so that errors in flags carry it too.
std::string RankText() {
  const char* world = std::getenv("OMPI_COMM_WORLD_SIZE");
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  if (world == nullptr || rank == nullptr || std::string(world) == "1") return "";
  return std::string(" (rank ") + rank + ")";
}

// Every rank finds the same mistake in flags: the first one says it and ends the job
// while the others wait. Where it alone finds nothing wrong, they say it after all. True:
// the job is being ended (mpirun's TERM, which else would only be noted).
bool TheFirstRankSpeaks() {
  if (RankText().empty() || RankText() == " (rank 0)") return false;
  constexpr int kLooks = 250;  // 5 s: mpirun on a busy machine takes more than two
  for (int look = 0; look < kLooks && !StopRequested(); ++look)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  return StopRequested();
}

std::string FirstLines(const std::string& text, int count) {
  size_t end = 0;
  while (count-- > 0 && end != std::string::npos) end = text.find('\n', end + (end > 0));
  return text.substr(0, end);
}

int Report(int code, const std::string& text) {
  const std::string lines = FirstLines(text, kMaxErrorLines);
  std::fprintf(stderr, "%s%s: %s\n", ProgramName().c_str(), RankText().c_str(),
               lines.c_str());
  std::fflush(stderr);
  return code;
}

// An operation on files that nobody looked at more closely: what, where, and what to do.
std::string TextOf(const fs::filesystem_error& error, int code) {
  const std::string to = error.path2().empty() ? "" : " -> " + error.path2().string();
  return ErrorText("a file operation failed: " + error.code().message(),
                   error.path1().string() + to,
                   code == kExitUsage ? "check the path and its permissions"
                                      : "free space there (df), or look at its disk");
}

// What is said of `error` beside its exit code.
std::string TextOf(const std::exception& error, int code) {
  const std::string what = error.what();
  if (IsOutOfMemory(error)) {
    // A library's own words go on with a stack.
    const bool says = dynamic_cast<const std::bad_alloc*>(&error) == nullptr;
    return ErrorText("out of memory", says ? what.substr(0, what.find('\n')) : "",
                     "use a smaller batch or budget, shorter texts, or fewer ranks");
  }
  if (IsDeviceTrouble(error)) {  // its own words go on with advice for programmers
    return ErrorText(
        "the CUDA device cannot be used", what.substr(0, what.find('\n')),
        "nvidia-smi says what it is doing; cards from compute capability 7.5 "
        "on serve, or use --device=cpu");
  }
  if (const auto* files = dynamic_cast<const fs::filesystem_error*>(&error))
    return TextOf(*files, code);
  if (dynamic_cast<const Json::exception*>(&error))
    return "a JSON file has unexpected content\n  " + what;
  return code == kExitDefect ? "internal error: " + what : what;
}

// Runs `body`; returns the exit code of what it throws.
int CodeOfRun(const std::function<void()>& body) {
  try {
    body();
    return kExitDone;
  } catch (const std::exception& e) {
    const int code = ExitCodeOf(e);
    if (code == kExitUsage && dynamic_cast<const UsageError*>(&e) && TheFirstRankSpeaks())
      return code;
    return Report(code, TextOf(e, code));
  }
}

void EndOtherRanks(int code) {
  if (code != kExitDone && code != kExitStopped && AbortHook()) AbortHook()(code);
}

// A failed CHECK is a defect: exit 1, not the core dump of abort().
[[noreturn]] void ExitDefect() {
  EndOtherRanks(kExitDefect);
  std::_Exit(kExitDefect);
}

void StartLogging(const char* argv0) {
  FLAGS_logtostderr = true;
  FLAGS_minloglevel = FLAGS_quiet ? google::GLOG_WARNING : google::GLOG_INFO;
  if (google::IsGoogleLoggingInitialized()) return;
  google::InitGoogleLogging(argv0);
  google::InstallFailureFunction(&ExitDefect);
}

void RequireFewArguments(const CommandLine& line, const Program& program) {
  if (static_cast<int>(line.arguments.size()) <= program.max_arguments) return;
  const std::string& extra = line.arguments[static_cast<size_t>(program.max_arguments)];
  throw UsageError(ErrorText("unexpected argument: " + extra, "flags start with --",
                             "--help shows the usage"));
}

// OpenMP would make as many as are asked for, for minutes, whatever the machine has.
void RequireThreads() {
  constexpr int kMaxThreads = 1024;
  if (FLAGS_threads >= 0 && FLAGS_threads <= kMaxThreads) return;
  throw UsageError(
      ErrorText("--threads=" + std::to_string(FLAGS_threads) + " is out of range",
                "a rank has 1 to " + std::to_string(kMaxThreads) + " threads",
                "use 0 for cores / ranks"));
}

}  // namespace

const std::vector<std::string>& Arguments() { return MutableArguments(); }

void SetAbortHook(std::function<void(int)> hook) { AbortHook() = std::move(hook); }

int ThreadsPerRank(int local_world) {
  if (FLAGS_threads > 0) return FLAGS_threads;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, cores / std::max(1, local_world));
}

int Main(int argc, char** argv, Program program, const std::function<void()>& run) {
  KeepFreedMemory();
  PreferLargePages();
  RaiseOpenFileLimit();
  ProgramName() = fs::path(argc > 0 ? argv[0] : "routecast").filename().string();
  CommandLine line;
  const std::vector<std::string> args(argv + std::min(argc, 1), argv + argc);
  int code = CodeOfRun([&] {
    line = ParseCommandLine(args);
    if (line.help || line.version) return;
    RequireFewArguments(line, program);
    RequireThreads();
  });
  if (code != kExitDone) return code;
  if (line.help) {
    std::printf("%s", HelpText(ProgramName(), program.usage).c_str());
    return kExitDone;
  }
  if (line.version) {
    std::printf("%s %s (%s)\n", ProgramName().c_str(), Version(), GitCommit());
    return kExitDone;
  }
  MutableArguments() = line.arguments;
  InstallStopHandlers();
  StartLogging(argv[0]);
  code = CodeOfRun(run);
  EndOtherRanks(code);
  return code;
}

}  // namespace routecast
