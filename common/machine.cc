#include "common/machine.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

namespace routecast {
namespace {

// Of version 2 ("0::/a/b"); else the root.
std::string OwnGroup() {
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    if (line.starts_with("0::")) return line.substr(3);
  }
  return "/";
}

}  // namespace

uint64_t GroupMemoryLimit(const fs::path& root, const std::string& group,
                          uint64_t otherwise) {
  uint64_t least = otherwise;
  fs::path at = root / fs::path(group).relative_path();
  for (;;) {
    std::ifstream limit(at / "memory.max");
    uint64_t bytes = 0;
    if (limit >> bytes) least = std::min(least, bytes);  // "max" is no number
    if (at == root || !at.has_relative_path()) return least;
    at = at.parent_path();
  }
}

uint64_t MachineMemoryBytes() {
  const auto all = static_cast<uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
                   static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  return GroupMemoryLimit("/sys/fs/cgroup", OwnGroup(), all);
}

}  // namespace routecast
