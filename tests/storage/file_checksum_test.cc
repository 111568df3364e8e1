// Checksums over whole table files: what is asked for by name is what one gets.
#include "storage/file_checksum.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

namespace routecast {
namespace {

// In pieces of `piece` bytes.
std::string SumOf(const std::string& asked, const std::string& bytes, size_t piece) {
  const auto sum = FileChecksums()->CreateFileChecksumGenerator({"f.sst", asked});
  for (size_t i = 0; i < bytes.size(); i += piece) {
    sum->Update(bytes.data() + i, std::min(piece, bytes.size() - i));
  }
  sum->Finalize();
  return sum->GetChecksum();
}

TEST(FileChecksum, DoesNotDependOnThePieces) {
  const std::string bytes(100'000, 'x');
  EXPECT_EQ(SumOf("", bytes, 7), SumOf("", bytes, bytes.size()));
  EXPECT_EQ(SumOf("", bytes, 7).size(), 16u);
}

TEST(FileChecksum, EveryByteCounts) {
  const std::string bytes(5000, 'x');
  const std::string sum = SumOf("", bytes, bytes.size());
  for (const size_t at : {size_t{0}, size_t{2500}, size_t{4999}}) {
    std::string other = bytes;
    other[at] = 'y';
    EXPECT_NE(SumOf("", other, other.size()), sum) << at;
  }
  EXPECT_NE(SumOf("", bytes + 'x', 5001), sum);
}

// The name stands in the manifests of stores: they are checked by what they were made
// with. The sum of "123456789" is CRC-32C's published check value.
TEST(FileChecksum, FilesOfOlderStoresKeepTheirs) {
  const auto make = [](const char* name) {
    return FileChecksums()->CreateFileChecksumGenerator({"f.sst", name});
  };
  EXPECT_EQ(SumOf("FileChecksumCrc32c", "123456789", 4), "\xE3\x06\x92\x83");
  EXPECT_STREQ(make("RoutecastXxh3_128")->Name(), "RoutecastXxh3_128");
  EXPECT_STREQ(make("")->Name(), "RoutecastXxh3_128");
  EXPECT_EQ(make("Another"), nullptr);
}

}  // namespace
}  // namespace routecast
