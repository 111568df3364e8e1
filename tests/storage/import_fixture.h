// What the tests of imports share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "common/errors.h"
#include "storage/export.h"
#include "storage/import.h"
#include "tests/storage/store_fixture.h"

namespace routecast {

// ids [T,L,K] of the requests that these tests import.
inline uint16_t IdAt(uint64_t t, uint64_t l, uint64_t k) {
  return static_cast<uint16_t>((5 * t + 2 * l + k) % 30);
}
inline std::vector<uint8_t> Bytes(uint64_t tokens, uint64_t layers, uint64_t experts) {
  std::vector<uint8_t> ids;
  for (uint64_t t = 0; t < tokens; ++t) {
    for (uint64_t l = 0; l < layers; ++l) {
      for (uint64_t k = 0; k < experts; ++k)
        ids.push_back(static_cast<uint8_t>(IdAt(t, l, k)));
    }
  }
  return ids;
}

class ImportTest : public TraceStoreTest {
 protected:
  fs::path At(const std::string& name) const { return folder_.path() / name; }
  ImportReport Import(const std::string& in, ImportOptions options) {
    return ImportTraces(At(in), At("store"), options);
  }
  static std::vector<RoutingTrace> Read(const fs::path& store) {
    std::vector<RoutingTrace> traces;
    TraceReader(store, NeedTokens::kNo)
        .Scan([&](RoutingTrace&& t) { traces.push_back(std::move(t)); },
              WithHidden::kYes);
    return traces;
  }
  std::string Exported(const fs::path& store, const std::string& format = "npz") {
    const auto files =
        ExportTraces(TraceReader(store, NeedTokens::kNo), At("export"), {format});
    return ReadFile(files.at(0));
  }
  // The error of an import, whose kind is checked; nothing of a store may be left.
  template <typename Error = DataError>
  std::string ErrorOf(const std::string& in, const ImportOptions& options) {
    try {
      ImportTraces(At(in), At("refused"), options);
    } catch (const Error& e) {
      EXPECT_FALSE(fs::exists(At("refused")) || fs::exists(At("refused.tmp")));
      EXPECT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2);
      return e.what();
    }
    return "no error";
  }
  // Two requests of 3 and 2 tokens, 2 layers and 4 experts a token, with rows between.
  void WritePacked(const std::string& rows = "0,3\n5,2\n", uint64_t there = 7) {
    const auto ids = Bytes(there, 2, 4);
    WriteFileAtomic(At("index_x.csv"), "row_offset,decode_tokens\n" + rows);
    WriteFileAtomic(At("experts_x.u8"), std::string(ids.begin(), ids.end()));
  }
  const ImportOptions packed_{.format = "packed", .layers = 2, .experts_per_token = 4};
};

inline void ExpectRequest(const RoutingTrace& trace, int first, int tokens, int layers,
                          int experts) {
  const RoutingSpan& s = trace.decoder;
  ASSERT_EQ(s.num_tokens, tokens);
  ASSERT_EQ(s.num_layers, layers);
  ASSERT_EQ(s.top_k, experts > 1 ? experts : 0);
  for (int t = 0; t < tokens; ++t) {
    for (int l = 0; l < layers; ++l) {
      ASSERT_EQ(s.expert_ids[l * tokens + t], IdAt(first + t, l, 0));
      for (int k = 0; k < s.top_k; ++k) {
        ASSERT_EQ(s.topk_ids[(l * tokens + t) * experts + k], IdAt(first + t, l, k));
      }
    }
  }
}

}  // namespace routecast
