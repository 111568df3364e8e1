// Imports whose input does not say its own sizes (packed), says them otherwise than the
// flags, or lies in another order than export writes.
#include <zstd.h>

#include "storage/npy.h"
#include "storage/npy_reader.h"
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

TEST_F(ImportTest, ASizeThatIsNotTheInputsIsRefused) {
  WriteFileAtomic(At("in.jsonl"), "{\"routing\": [[[0,1],[2,3]]]}\n");
  EXPECT_NE(ErrorOf<UsageError>("in.jsonl", {.format = "jsonl", .layers = 1})
                .find("--layers=1"),
            std::string::npos);
  EXPECT_NE(ErrorOf<UsageError>("in.jsonl", {.format = "jsonl", .experts_per_token = 1})
                .find("--experts_per_token=1"),
            std::string::npos);
  Import("in.jsonl", {.format = "jsonl", .layers = 2, .experts_per_token = 2});
}

TEST_F(ImportTest, AnExportedArraysSizesAreNoFlags) {
  Fill();
  ExportTraces(TraceReader(store()), At("out"), {});
  EXPECT_NE(ErrorOf<UsageError>("out", {.layers = 3}).find("says its own sizes"),
            std::string::npos);
}

TEST_F(ImportTest, RequestsOfMoreLayersThanTokensAreCounted) {
  WriteFileAtomic(At("in.jsonl"),
                  "{\"routing\": [[[0],[2]]]}\n{\"routing\": [[[0],[2]],[[1],[3]]]}\n");
  EXPECT_EQ(Import("in.jsonl", {.format = "jsonl"}).flat_sequences, 1u);
}

// A .npy of bytes in Fortran order: element (i, j, ...) is number(i, j, ...) in C order.
void WriteFortran(const fs::path& path, const std::vector<int64_t>& shape,
                  const std::vector<uint8_t>& in_c_order) {
  std::string dims;
  for (const int64_t dim : shape) dims += std::to_string(dim) + ", ";
  std::string header =
      "{'descr': '|u1', 'fortran_order': True, 'shape': (" + dims + "), }\n";
  std::string file("\x93NUMPY\x01\x00", 8);
  file += static_cast<char>(header.size());
  file += '\0';
  file += header;
  std::vector<int64_t> at(shape.size());
  for (size_t written = 0; written < in_c_order.size(); ++written) {
    int64_t number = 0;
    for (size_t d = 0; d < shape.size(); ++d) number = number * shape[d] + at[d];
    file += static_cast<char>(in_c_order[static_cast<size_t>(number)]);
    for (size_t d = 0; d < shape.size() && ++at[d] == shape[d]; ++d) at[d] = 0;
  }
  WriteFileAtomic(path, file);
}

TEST_F(ImportTest, AnArrayInFortranOrderIsTheSameRequest) {
  WriteFortran(At("in.npy"), {3, 2, 4}, Bytes(3, 2, 4));
  Import("in.npy", {.format = "arrays"});
  ExpectRequest(Read(store()).at(0), 0, 3, 2, 4);
}

TEST_F(ImportTest, AnyRangeOfAnArrayInFortranOrderIsInCOrder) {
  std::vector<uint8_t> items(1200);  // neighbours in C order lie up to 1,198 apart
  for (size_t i = 0; i < items.size(); ++i) items[i] = static_cast<uint8_t>(i * 7 % 251);
  WriteFortran(At("in.npy"), {2, 600}, items);
  const NpyFile file(At("in.npy"));
  for (const auto& [first, count] :
       {std::pair<size_t, size_t>{0, 1200}, {599, 2}, {3, 40}, {700, 500}, {5, 0}}) {
    const auto from = items.begin() + static_cast<std::ptrdiff_t>(first);
    EXPECT_EQ(file.Read<uint8_t>(file.arrays()[0], first, count),
              std::vector<uint8_t>(from, from + static_cast<std::ptrdiff_t>(count)));
  }
}

TEST_F(ImportTest, ACompressedArchiveIsToldTheCallThatWritesAnother) {
  const auto ids = Bytes(3, 2, 4);
  WriteNpz(At("in.npz"), {{"a", "|u1", {3, 2, 4}, ids.data(), ids.size()}});
  std::string bytes = ReadFile(At("in.npz"));
  bytes[bytes.find("PK\x01\x02") + 10] = 8;  // deflate
  WriteFileAtomic(At("in.npz"), bytes);
  EXPECT_NE(ErrorOf("in.npz", {.format = "arrays"}).find("numpy.savez"),
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
