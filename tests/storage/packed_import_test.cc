// Imports whose input does not say its own sizes (packed), or says them twice.
#include <zstd.h>

#include "tests/storage/import_fixture.h"

namespace routecast {
namespace {

TEST_F(ImportTest, PackedRowsAreRequests) {
  WritePacked();
  const ImportReport report = Import("index_x.csv", packed_);
  EXPECT_EQ(report.tokens, 5u);
  EXPECT_EQ(report.config.geometry.experts_per_token, 4);
  const auto traces = Read(store());
  ASSERT_EQ(traces.size(), 2u);
  ExpectRequest(traces[0], 0, 3, 2, 4);
  ExpectRequest(traces[1], 5, 2, 2, 4);
}

TEST_F(ImportTest, PackedRowsMayBeCompressed) {
  WritePacked();
  ImportTraces(At("index_x.csv"), At("plain"), packed_);
  const std::string bytes = ReadFile(At("experts_x.u8"));
  std::string zstd(ZSTD_compressBound(bytes.size()), '\0');
  zstd.resize(ZSTD_compress(zstd.data(), zstd.size(), bytes.data(), bytes.size(), 1));
  fs::remove(At("experts_x.u8"));
  WriteFileAtomic(At("experts_x.u8.zst"), zstd);
  Import("index_x.csv", packed_);
  EXPECT_EQ(Read(store()), Read(At("plain")));
}

TEST_F(ImportTest, RowsBeyondTheFileAreRefused) {
  WritePacked("0,3\n5,3\n");
  const std::string error = ErrorOf("index_x.csv", packed_);
  EXPECT_NE(error.find("ends at byte 56, 64 are needed"), std::string::npos) << error;
}

TEST_F(ImportTest, RowsOfTwoSequencesAreRefused) {
  WritePacked("0,3\n2,2\n");
  const std::string error = ErrorOf("index_x.csv", packed_);
  EXPECT_NE(error.find("line 3"), std::string::npos) << error;
}

TEST_F(ImportTest, AWrongShapeShowsInRepeatedExperts) {
  WritePacked("0,1\n");
  ImportOptions swapped = packed_;
  swapped.layers = 1;
  swapped.experts_per_token = 8;
  const std::string error = ErrorOf("index_x.csv", swapped);
  EXPECT_NE(error.find("twice"), std::string::npos) << error;
}

// Half of the layers, or fewer experts a token, leave rows that look like any other.
TEST_F(ImportTest, BytesThatTheIndexDoesNotUseUpAreRefused) {
  WritePacked();
  for (const auto& [layers, experts] : {std::pair(1, 4), {2, 2}}) {
    ImportOptions half = packed_;
    half.layers = layers;
    half.experts_per_token = experts;
    const std::string error = ErrorOf("index_x.csv", half);
    EXPECT_NE(error.find("= 28 bytes"), std::string::npos) << error;
    EXPECT_NE(error.find("has 56"), std::string::npos) << error;
  }
}

TEST_F(ImportTest, CompressedBytesThatTheIndexDoesNotUseUpAreRefused) {
  WritePacked();
  const std::string bytes = ReadFile(At("experts_x.u8"));
  std::string zstd(ZSTD_compressBound(bytes.size()), '\0');
  zstd.resize(ZSTD_compress(zstd.data(), zstd.size(), bytes.data(), bytes.size(), 1));
  fs::remove(At("experts_x.u8"));
  WriteFileAtomic(At("experts_x.u8.zst"), zstd);
  ImportOptions half = packed_;
  half.layers = 1;
  EXPECT_NE(ErrorOf("index_x.csv", half).find("has 56"), std::string::npos);
}

TEST_F(ImportTest, ASizeThatTheInputSaysItselfIsRefused) {
  WriteFileAtomic(At("in.jsonl"), "{\"routing\": [[[0,1],[2,3]]]}\n");
  EXPECT_NE(ErrorOf<UsageError>("in.jsonl", {.format = "jsonl", .layers = 1})
                .find("--layers=1"),
            std::string::npos);
  EXPECT_NE(ErrorOf<UsageError>("in.jsonl", {.format = "jsonl", .experts_per_token = 1})
                .find("--experts_per_token=1"),
            std::string::npos);
}

TEST_F(ImportTest, APartThatIsMissingAmongOthersIsNamed) {
  Fill();
  const auto parts = ExportTraces(TraceReader(store()), At("out"), {"npz", 200'000});
  ASSERT_GT(parts.size(), 2u);
  fs::remove(parts[1]);
  EXPECT_NE(ErrorOf("out", {}).find("traces-00001.npz"), std::string::npos);
}

TEST_F(ImportTest, PackedBytesNeedTheirShape) {
  WritePacked();
  EXPECT_NE(ErrorOf<UsageError>("index_x.csv", {.format = "packed"}).find("--layers=0"),
            std::string::npos);
}

}  // namespace
}  // namespace routecast
