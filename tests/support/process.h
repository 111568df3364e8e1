// Programs as people run them, from a test: under mpirun, interrupted, killed.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/reference.h"

namespace routecast {

inline std::string Bin(const std::string& program) {
  return EnvOr("ROUTECAST_BIN_DIR", "build/bin") + "/" + program;
}

inline std::vector<std::string> UnderMpirun(int ranks, std::vector<std::string> command) {
  const std::vector<std::string> launch = {
      "mpirun", "--quiet", "--bind-to",  "none", "--oversubscribe",
      "--mca",  "btl",     "self,vader", "-n",   std::to_string(ranks)};
  command.insert(command.begin(), launch.begin(), launch.end());
  return command;
}

// stderr goes to `errors` where that is given.
inline pid_t Start(const std::vector<std::string>& command, const fs::path& errors = {}) {
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);  // for WaitForOrphans
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGINT, SIG_DFL);  // a shell's background jobs ignore it
    if (!errors.empty()) {
      ::dup2(::open(errors.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644), STDERR_FILENO);
    }
    std::vector<char*> argv;
    for (const std::string& a : command) argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  return child;
}

// The processes that `parent` started, oldest first: the ranks of an mpirun.
inline std::vector<pid_t> ChildrenOf(pid_t parent) {
  std::vector<pid_t> children;
  std::error_code gone;
  const fs::path tasks = "/proc/" + std::to_string(parent) + "/task";
  for (const auto& task : fs::directory_iterator(tasks, gone)) {
    std::ifstream in(task.path() / "children");
    for (pid_t child = 0; in >> child;) children.push_back(child);
  }
  std::sort(children.begin(), children.end());
  return children;
}

// Exit code; 128 + signal where one ended it.
inline int Wait(pid_t child) {
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Ranks outlive a killed launcher for a moment: until they are gone, too.
inline void WaitForOrphans() {
  while (::waitpid(-1, nullptr, 0) > 0) {
  }
}

inline int RunProgram(const std::vector<std::string>& command) {
  return Wait(Start(command));
}

// Sends `signal` to a run of `command` once `begun` exists, and returns how the run
// ended. A run may end before the signal reaches it: then again from the start, which
// `reset` makes.
template <typename Reset>
int Interrupt(const std::vector<std::string>& command, const fs::path& begun, int signal,
              int wanted, Reset reset) {
  int code = 0;
  for (int attempt = 0; attempt < 5 && code != wanted; ++attempt) {
    reset();
    const pid_t job = Start(command);
    for (int ms = 0; ms < 60000 && !fs::exists(begun); ++ms) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ::kill(job, signal);
    code = Wait(job);
    WaitForOrphans();
  }
  return code;
}

}  // namespace routecast
