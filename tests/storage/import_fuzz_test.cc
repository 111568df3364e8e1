// Damaged input for every import: each mutation ends in a store or a named error,
// quickly. A fixed number of mutations with fixed seeds; run it under sanitizers to see
// more.
#include <gtest/gtest.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "common/errors.h"
#include "common/random.h"
#include "storage/export.h"
#include "storage/import_source.h"
#include "storage/npy.h"
#include "storage/npy_reader.h"
#include "tests/storage/store_fixture.h"
#include "tests/support/mutation.h"

namespace routecast {
namespace {

std::string Mutate(const std::string& bytes, uint64_t seed) {
  static const MutationOptions kOptions{
      4, 8, {"0", "1", "2", "9", ",", "[", "]", "{", "}", "(", ")", "'", "\"", "\xFF"}};
  return Mutate(bytes, seed, kOptions);
}

class ImportFuzz : public TraceStoreTest {
 protected:
  fs::path At(const std::string& name) const { return folder_.path() / name; }
  void Write(const std::string& name, const std::string& bytes) {
    std::ofstream(At(name), std::ios::binary | std::ios::trunc) << bytes;
  }
  // Reads what `open` gives for each of `count` mutations of the file's bytes.
  template <typename Open>
  void Run(const std::string& name, uint64_t count, const Open& open) {
    const std::string good = ReadFile(At(name));
    int read = 0, refused = 0;
    for (uint64_t seed = 0; seed < count; ++seed) {
      Write(name, Mutate(good, seed));
      try {
        open()->Read([](RoutingTrace&& trace) {
          for (const RoutingSpan* s : {&trace.encoder, &trace.decoder}) {
            const size_t n = static_cast<size_t>(s->num_tokens) * s->num_layers;
            ASSERT_EQ(s->expert_ids.size(), n);
            ASSERT_EQ(s->topk_ids.size(), n * s->top_k);
          }
        });
        ++read;
      } catch (const DataError& e) {
        ++refused;
        ASSERT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2)
            << e.what();
      }
    }
    EXPECT_GT(read, 0);
    EXPECT_GT(refused, 0);
  }
};

TEST_F(ImportFuzz, Lines) {
  Write("in.jsonl",
        "{\"routing\": [[[0,1],[2,3]],[[5,6],[7,8]]], \"token_ids\": [9,10], "
        "\"probs\": [[[0.5,0.1],[0.5,0.1]],[[0.5,0.1],[0.5,0.1]]]}\n{\"routing\": "
        "[[[0,1],[2,3]]]}\n");
  Run("in.jsonl", 4000,
      [&] { return OpenRequestLines(At("in.jsonl"), Task::kGenerate); });
}

TEST_F(ImportFuzz, Arrays) {
  const std::vector<uint8_t> ids = {0, 1, 2, 3, 4, 5, 6, 7};
  const std::vector<uint32_t> tokens = {1, 2};
  WriteNpz(At("in.npz"), {{"a", "|u1", {2, 2, 2}, ids.data(), 8},
                          {"a_token_ids", "<u4", {2}, tokens.data(), 8}});
  Run("in.npz", 3000, [&] { return OpenRequestArrays(At("in.npz"), Task::kGenerate); });
}

TEST_F(ImportFuzz, ExportedArrays) {
  shape_ = {.num_experts = 8, .layers = 2, .top_k = 2, .width = 2, .max_tokens = 3};
  config_ = ConfigOf(shape_, 1, kChunks);
  Fill();
  ExportTraces(TraceReader(store()), At("."), {});
  Run("traces.npz", 1500, [&] { return OpenExportedArrays(At("traces.npz")); });
}

TEST_F(ImportFuzz, PackedIndex) {
  Write("experts_x.u8", std::string("\0\1\2\3\4\5\6\7", 8));
  Write("index_x.csv", "seq,decode_tokens,row_offset\n0,1,0\n1,1,1\n");
  Run("index_x.csv", 4000,
      [&] { return OpenPacked(At("index_x.csv"), Task::kGenerate, 2, 2); });
}

TEST_F(ImportFuzz, PackedBytes) {
  std::string bytes;
  for (int i = 0; i < 40; ++i) bytes += std::string("\0\1\2\3", 4);
  std::string zstd(ZSTD_compressBound(bytes.size()), '\0');
  zstd.resize(ZSTD_compress(zstd.data(), zstd.size(), bytes.data(), bytes.size(), 1));
  Write("experts_x.u8.zst", zstd);
  Write("index_x.csv", "seq,decode_tokens,row_offset\n0,20,0\n1,19,21\n");
  Run("experts_x.u8.zst", 2000,
      [&] { return OpenPacked(At("index_x.csv"), Task::kGenerate, 2, 2); });
}

TEST(NpyHeaderFuzz, EndsInAHeaderOrDataError) {
  const std::string good =
      "{'descr': '<u2', 'fortran_order': False, 'shape': (3, 4), }  \n";
  EXPECT_EQ(ParseNpyHeader(good, "x").shape, (std::vector<int64_t>{3, 4}));
  int read = 0;
  for (uint64_t seed = 0; seed < 8000; ++seed) {
    try {
      ASSERT_LE(ParseNpyHeader(Mutate(good, seed), "x").shape.size(), 8u);
      ++read;
    } catch (const DataError&) {
    }
  }
  EXPECT_GT(read, 0);
}

// A shape whose product wraps around 64 bits to what the file holds.
TEST_F(ImportFuzz, ShapesThatOverflowAreRefused) {
  const std::vector<uint8_t> ids(8);
  const int64_t half = int64_t{1} << 32;
  WriteNpz(At("in.npz"), {{"a", "|u1", {half, half, 8}, ids.data(), 8}});
  EXPECT_THROW(OpenRequestArrays(At("in.npz"), Task::kGenerate)->Read([](auto&&) {}),
               DataError);
}

}  // namespace
}  // namespace routecast
