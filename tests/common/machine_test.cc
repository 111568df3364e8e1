#include "common/machine.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include "tests/support/reference.h"

namespace routecast {
namespace {

TEST(Machine, TheLeastLimitOfAGroupAndThoseAboveItCounts) {
  const fs::path root = TestFolder("machine-groups");
  fs::create_directories(root / "job" / "step");
  WriteFileAtomic(root / "memory.max", "9000\n");
  WriteFileAtomic(root / "job" / "memory.max", "5000\n");
  WriteFileAtomic(root / "job" / "step" / "memory.max", "max\n");
  EXPECT_EQ(GroupMemoryLimit(root, "/job/step", 7000), 5000u);
  EXPECT_EQ(GroupMemoryLimit(root, "/job/step", 3000), 3000u);
  EXPECT_EQ(GroupMemoryLimit(root, "/", 10000), 9000u);
  EXPECT_EQ(GroupMemoryLimit(root, "/gone", 10000), 9000u);
  EXPECT_EQ(GroupMemoryLimit(root / "nowhere", "/job", 7000), 7000u);
}

TEST(Machine, MemoryIsAtMostWhatIsThere) {
  const auto all = static_cast<uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
                   static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  EXPECT_GT(MachineMemoryBytes(), 0u);
  EXPECT_LE(MachineMemoryBytes(), all);
}

}  // namespace
}  // namespace routecast
