// What this process may use of its machine. Thread rule: any thread.
#pragma once

#include <cstdint>
#include <string>

#include "common/files.h"

namespace routecast {

// All memory, or what the control groups allow that the process is in: a scheduler's
// allocation, a container.
uint64_t MachineMemoryBytes();

// The least of memory.max of `group` ("/a/b", as in /proc/self/cgroup) and of those above
// it, below `root`, where they are mounted; `otherwise` where none says a number.
uint64_t GroupMemoryLimit(const fs::path& root, const std::string& group,
                          uint64_t otherwise);

}  // namespace routecast
