// Bytes of a store flipped one at a time: each flip is found by verify, which names the
// file, or changes nothing; and, where the store is finished, everything but the records
// beside it is still read. ROUTECAST_FLIPS=N takes N flips instead of 400;
// ROUTECAST_FLIP_SEED another seed.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>

#include "common/safetensors.h"
#include "storage/context_coder.h"
#include "storage/export.h"
#include "storage/salvage.h"
#include "storage/store_builder.h"
#include "storage/store_routers.h"
#include "storage/verify.h"
#include "tests/storage/random_trace.h"
#include "tests/storage/temp_folder.h"

namespace routecast {
namespace {

constexpr uint32_t kFlipChunks = 4;
constexpr uint64_t kFlipSequences = 8;       // a chunk
constexpr uint64_t kBesideBytes = 56 << 10;  // a block and its longest record

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

class StoreFlipsTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (GetParam() == "none") shape_.heads = 2;
    if (GetParam() == "context") {  // something to learn
      shape_.num_experts = 8;
      shape_.distinct = true;
    }
    config_ = ConfigOf(shape_, 2, kFlipChunks);
    if (finished()) config_.compression = GetParam();
    TraceStore::CreateOrOpen(store(), config_);
    KeepRouters(store(), [this](const fs::path& file) { WriteRouters(file); });
    {
      ShardOwner owner(store(), config_, 0, 1);
      for (uint32_t c = 0; c < (finished() ? kFlipChunks : kFlipChunks - 1); ++c) {
        StageChunk(store(), config_, c, kFlipSequences, shape_, "t");
        owner.Ingest(c, "t");
      }
      if (finished()) Finish(&owner);
    }
    std::ofstream(store() / "run.json") << "{\"exit_status\": 0}";
    exported_ = Exported();
    for (const auto& entry : fs::recursive_directory_iterator(store())) {
      if (!entry.is_regular_file() || entry.file_size() == 0) continue;
      if (finished() && entry.path().filename() == "routers.hash") continue;
      files_.push_back(entry.path());
    }
    std::sort(files_.begin(), files_.end());
  }
  void Finish(ShardOwner* owner) {
    MakeContextModel(store(), config_);
    if (const auto model = LoadContextModel(store(), config_)) {
      model_ = model->fingerprint();
    }
    owner->Finish();
  }
  static bool finished() { return GetParam() != "unfinished"; }
  void WriteRouters(const fs::path& file) const {
    const std::vector<float> weight(
        static_cast<size_t>(config_.geometry.num_experts * config_.geometry.d_model),
        0.5f);
    std::vector<TensorToWrite> tensors;
    for (int l = 0; l < config_.geometry.num_layers(); ++l) {
      tensors.push_back({"layer." + std::to_string(l) + ".weight",
                         "F32",
                         {config_.geometry.num_experts, config_.geometry.d_model},
                         weight.data()});
    }
    WriteSafetensors(file, tensors);
  }
  fs::path store() const { return folder_.path() / "store"; }
  std::string Exported() {
    ExportOptions options;
    options.format = "safetensors";
    const TraceReader reader(store());
    return ReadFile(ExportTraces(reader, folder_.path() / "export", options).at(0));
  }
  // Sequences with a record that begins within a block of byte `at` of `table`.
  std::set<uint64_t> Beside(const std::string& table, size_t at) {
    std::set<uint64_t> ids;
    ByteWindow all(table);
    FindRecords(&all, model_, [&](std::string_view key, const RecordPlace& place) {
      const uint64_t begin = place.frame_bytes > 0 ? place.frame : place.at;
      const uint64_t end =
          begin + (place.frame_bytes > 0 ? place.frame_bytes : place.bytes);
      RecordKind kind;
      uint64_t id = 0;
      DecodeKey(key, &kind, &id);
      if (kind == RecordKind::kChunkMark) return;
      if (at + kBesideBytes >= begin && at <= end + kBesideBytes) ids.insert(id);
    });
    return ids;
  }
  // Every file first; then, in turns, a byte of any file and any byte of all files.
  std::pair<fs::path, size_t> Place(uint64_t i, uint64_t seed) const {
    const size_t n = files_.size();
    if (i < n || i % 2 == 0) {
      const fs::path& file = files_[i < n ? i : ToRange(Mix(seed, i, 1), n)];
      return {file, Mix(seed, i, 2) % fs::file_size(file)};
    }
    uint64_t total = 0;
    for (const fs::path& file : files_) total += fs::file_size(file);
    uint64_t at = Mix(seed, i, 2) % total;
    size_t f = 0;
    for (; at >= fs::file_size(files_[f]); ++f) at -= fs::file_size(files_[f]);
    return {files_[f], at};
  }
  // Share of the records that lie in compressed blocks.
  double SharePacked() const {
    double packed = 0, all = 0;
    for (const fs::path& file : files_) {
      if (file.extension() != ".sst") continue;
      const ByteFile table(file);
      ByteWindow window(table);
      FindRecords(&window, model_, [&](std::string_view, const RecordPlace& place) {
        packed += place.frame_bytes > 0;
        ++all;
      });
    }
    return packed / all;
  }
  void ExpectRestReadable(const std::set<uint64_t>& may_be_lost) {
    const Salvage salvage(store());
    EXPECT_EQ(salvage.lost_chunks(), 0);
    EXPECT_EQ(salvage.sequences().size(), kFlipChunks * kFlipSequences);
    for (const SequenceInfo& info : salvage.sequences()) {
      const auto trace = salvage.Read(info);
      if (trace) {
        EXPECT_EQ(*trace, RandomTrace(info.sequence_id, shape_));
      } else {
        ++lost_;
        EXPECT_TRUE(may_be_lost.contains(info.sequence_id)) << info.sequence_id;
      }
    }
  }
  VerifyReport Verified() const {
    try {
      return VerifyStore(store());
    } catch (const std::exception& e) {  // store.json that no seal has a copy of
      EXPECT_FALSE(finished()) << e.what();
      VerifyReport report;
      report.num_problems = 1;
      report.problems = {e.what()};
      return report;
    }
  }
  static bool Names(const VerifyReport& report, const fs::path& file) {
    for (const std::string& problem : report.problems) {
      if (problem.find(file.string()) != std::string::npos) return true;
    }
    return false;
  }
  void Flip(const fs::path& file, size_t at, int bit);

  TempFolder folder_;
  // Tables of many blocks.
  TraceShape shape_ = {
      .top_k = 8, .width = 32, .min_tokens = 150, .max_tokens = 200, .hidden_share = 0.2};
  StoreConfig config_;
  std::string exported_;
  uint64_t model_ = 0;  // fingerprint of the context model; 0 = none
  std::vector<fs::path> files_;
  std::map<std::string, std::array<int, 2>> classes_;  // found, harmless; by kind of file
  int lost_ = 0;
};

void StoreFlipsTest::Flip(const fs::path& file, size_t at, int bit) {
  const std::string good = ReadFile(file);
  std::string bad = good;
  bad[at] = static_cast<char>(bad[at] ^ (1 << bit));
  std::ofstream(file, std::ios::binary) << bad;
  const VerifyReport report = Verified();
  std::string kind = file.filename().string();
  kind = kind.substr(0, kind.find('-'));
  if (file.extension() == ".sst" || file.extension() == ".seal") kind = file.extension();
  ++classes_[kind][report.sound()];
  if (report.sound()) {
    EXPECT_NE(file, RoutersPath(store()));  // no export shows them
    EXPECT_EQ(Exported(), exported_);
  } else {
    // Of its own small files RocksDB names the database only.
    const bool by_shard = !finished() && file.parent_path() != store();
    EXPECT_TRUE(Names(report, by_shard ? file.parent_path() : file))
        << report.problems.at(0);
    const bool table = file.extension() == ".sst";
    // Without its model no coded record is read; no seal has an unfinished store's marks.
    if (finished() && file.filename() != "context.model") {
      ExpectRestReadable(table ? Beside(good, at) : std::set<uint64_t>());
    }
  }
  std::ofstream(file, std::ios::binary) << good;
}

TEST_P(StoreFlipsTest, AreFoundOrHarmlessAndCostOnlyWhatIsBeside) {
  // Router inputs are never compressed.
  EXPECT_GE(SharePacked(), GetParam() == "zstd" ? 0.7 : 0);
  EXPECT_LE(SharePacked(), GetParam() == "zstd" ? 0.95 : 0);
  const uint64_t seed = FromEnvironment("ROUTECAST_FLIP_SEED", 1);
  const uint64_t flips = FromEnvironment("ROUTECAST_FLIPS", 400) / 4;  // a kind
  for (uint64_t i = 0; i < flips && !HasFailure(); ++i) {
    const auto [file, at] = Place(i, seed);
    const int bit = static_cast<int>(ToRange(Mix(seed, i, 3), 8));
    SCOPED_TRACE("flip " + std::to_string(i) + ": bit " + std::to_string(bit) +
                 " of byte " + std::to_string(at) + " of " + file.string());
    Flip(file, at, bit);
  }
  for (const auto& [kind, count] : classes_) {
    std::printf("%-16s %6d found, %5d harmless\n", kind.c_str(), count[0], count[1]);
  }
  std::printf("sequences lost beside flips: %d\n", lost_);
  EXPECT_EQ(Exported(), exported_);
}

INSTANTIATE_TEST_SUITE_P(All, StoreFlipsTest,
                         testing::Values("none", "zstd", "context", "unfinished"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace routecast
