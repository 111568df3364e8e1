// A child process that answers line by line: how a bench interleaves a baseline that is
// not C++ with our own. Linux.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/errors.h"

namespace routecast {

// Thread rule: one thread. The child ends with the object (its input is closed).
class LineProcess {
 public:
  explicit LineProcess(const std::vector<std::string>& command) {
    int in[2], out[2];
    if (pipe(in) != 0 || pipe(out) != 0) throw EnvironmentError("pipe failed");
    pid_ = fork();
    if (pid_ < 0) throw EnvironmentError("fork failed");
    if (pid_ == 0) {
      dup2(in[0], 0);
      dup2(out[1], 1);
      for (int fd : {in[0], in[1], out[0], out[1]}) close(fd);
      unsetenv("THP_MEM_ALLOC_ENABLE");  // our own programs' choice, not the baseline's
      std::vector<char*> argv;
      for (const auto& word : command) argv.push_back(const_cast<char*>(word.c_str()));
      argv.push_back(nullptr);
      execvp(argv[0], argv.data());
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    to_ = fdopen(in[1], "w");
    from_ = fdopen(out[0], "r");
  }
  ~LineProcess() {
    fclose(to_);
    fclose(from_);
    waitpid(pid_, nullptr, 0);
  }
  LineProcess(const LineProcess&) = delete;
  LineProcess& operator=(const LineProcess&) = delete;

  // The next line of the child, without its end. Throws where the child has ended.
  std::string Read() {
    char line[4096];
    if (!fgets(line, sizeof line, from_)) {
      throw EnvironmentError("the baseline's process has ended; its messages are above");
    }
    std::string text(line);
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
  }
  std::string Ask(const std::string& line) {
    fprintf(to_, "%s\n", line.c_str());
    fflush(to_);
    return Read();
  }

 private:
  pid_t pid_ = -1;
  FILE *to_ = nullptr, *from_ = nullptr;
};

}  // namespace routecast
