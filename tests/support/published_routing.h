// Real router output of another system (gpt-oss-20b: 24 layers, top-4 of 32 experts) that
// lies beside this checkout, and parts of it as an input of their own.
#pragma once

#include <zstd.h>

#include <cstdint>
#include <functional>
#include <sstream>
#include <string>

#include "common/files.h"
#include "storage/import.h"
#include "tests/support/reference.h"

namespace routecast {

struct PublishedRouting {
  static constexpr int kLayers = 24, kTopK = 4, kExperts = 32;

  static fs::path Folder() {
    return fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) /
           "../shared/data/routing-gpt-oss-20b";
  }
  static bool Exists() { return fs::exists(Folder() / "reference_stats.json"); }

  // Imports, as `folder`/store, the first `wanted(line of the index, its tokens)` tokens
  // of each sequence; of those with 0 nothing.
  static fs::path Import(
      const fs::path& folder,
      const std::function<uint64_t(const std::string&, uint64_t)>& wanted) {
    const std::string packed = ReadFile(Folder() / "experts_all.u8.zst");
    std::string all(ZSTD_getFrameContentSize(packed.data(), packed.size()), '\0');
    EXPECT_EQ(ZSTD_decompress(all.data(), all.size(), packed.data(), packed.size()),
              all.size());
    std::istringstream lines(ReadFile(Folder() / "index_all.csv"));
    std::string line, index = "row_offset,decode_tokens\n", experts;
    std::getline(lines, line);
    constexpr size_t kRow = kLayers * kTopK;
    while (std::getline(lines, line)) {
      const size_t last = line.rfind(','), before = line.rfind(',', last - 1);
      const uint64_t row = std::stoull(line.substr(last + 1));
      const uint64_t tokens =
          wanted(line, std::stoull(line.substr(before + 1, last - before - 1)));
      if (tokens == 0) continue;
      index +=
          std::to_string(experts.size() / kRow) + "," + std::to_string(tokens) + "\n";
      experts.append(all, row * kRow, tokens * kRow);
    }
    MakeFolder(folder);
    WriteFileAtomic(folder / "index_all.csv", index);
    WriteFileAtomic(folder / "experts_all.u8", experts);
    ImportTraces(folder / "index_all.csv", folder / "store",
                 {.format = "packed",
                  .model = "gpt-oss-20b",
                  .num_experts = kExperts,
                  .layers = kLayers,
                  .experts_per_token = kTopK});
    return folder / "store";
  }
  // The sequences number `first` to `last` - 1 of those that the reference is of.
  static fs::path ImportReference(const fs::path& folder, int first = 0, int last = 201) {
    int number = 0;
    return Import(folder, [&](const std::string& line, uint64_t tokens) -> uint64_t {
      if (line.find(",mmlu_test,") == std::string::npos) return 0;
      const int i = number++;
      return i >= first && i < last ? tokens : 0;
    });
  }
};

}  // namespace routecast
