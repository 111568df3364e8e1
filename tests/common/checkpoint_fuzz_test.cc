// Damaged checkpoints for every reader: a mutation ends in an index that fits its file,
// or in a named error. Fixed seeds; run it under the sanitizers to see more. With
// ROUTECAST_FUZZ_ROUNDS=N it runs N mutations a reader instead of the few of a test.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <functional>

#include "common/errors.h"
#include "common/pickle.h"
#include "common/random.h"
#include "common/safetensors.h"
#include "common/torch_file.h"
#include "common/weight_files.h"
#include "models/switch_config.h"
#include "tests/common/torch_file_builder.h"
#include "tests/support/mutation.h"

namespace routecast {
namespace {

namespace p = pickle;

uint64_t Rounds(uint64_t few) {
  const char* more = std::getenv("ROUTECAST_FUZZ_ROUNDS");
  return more ? std::strtoull(more, nullptr, 10) : few;
}

// Words: what is at the border of something.
std::string Mutate(const std::string& bytes, uint64_t seed) {
  static const MutationOptions kOptions{
      6,
      24,
      {Raw<uint32_t>(0xffffffff), Raw<uint64_t>(0), Raw<uint32_t>(0x7fffffff),
       Raw<uint16_t>(0xffff), "[", "{", "\"", "-1", "1e99", "(", ".", "R", "\x8a"}};
  return Mutate(bytes, seed, kOptions);
}

// Runs `read` over mutations of `good`; it may throw only a DataError of three lines.
// Both ends must be reached: a mutation that is read, and one that is refused.
void Fuzz(const std::string& good, uint64_t rounds,
          const std::function<void(const std::string&)>& read) {
  read(good);
  uint64_t refused = 0;
  for (uint64_t seed = 0; seed < rounds; ++seed) {
    try {
      read(Mutate(good, seed));
    } catch (const DataError& e) {
      const std::string message = e.what();
      ASSERT_LE(std::count(message.begin(), message.end(), '\n'), 2) << message;
      ++refused;
    }
  }
  EXPECT_GT(refused, 0u);
  EXPECT_LT(refused, rounds);
}

void ExpectInside(const TensorEntry& tensor, uint64_t file_size) {
  ASSERT_LE(tensor.SpanBytes(), file_size);
  ASSERT_LE(tensor.offset, file_size - tensor.SpanBytes());
  ASSERT_LE(tensor.size_bytes, tensor.SpanBytes());
}

class CheckpointFuzz : public testing::Test {
 protected:
  void SetUp() override {
    file_ = fs::temp_directory_path() / ("fuzz." + std::to_string(::getpid()) + ".bin");
  }
  void TearDown() override { fs::remove(file_); }
  // Not WriteFileAtomic: thousands of syncs would be the test's time.
  void WriteUnsynced(const std::string& bytes) {
    std::ofstream(file_, std::ios::binary | std::ios::trunc) << bytes;
  }
  fs::path file_;
};

TEST_F(CheckpointFuzz, Safetensors) {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},)"
      R"("a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
      R"("b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]},)"
      R"("none":{"dtype":"I64","shape":[0,4],"data_offsets":[28,28]}})";
  Fuzz(MakeSafetensors(header, 28), Rounds(4000), [](const std::string& bytes) {
    if (bytes.size() < 8) throw DataError("no header");
    uint64_t length = 0;
    std::copy_n(bytes.data(), 8, reinterpret_cast<char*>(&length));
    const std::string text =
        bytes.substr(8, std::min<uint64_t>(length, bytes.size() - 8));
    for (const TensorEntry& t : ParseSafetensorsHeader(text, bytes.size(), "f").tensors) {
      ExpectInside(t, bytes.size());
    }
  });
}

std::string GoodPickle() {
  const std::string storage = p::Storage("FloatStorage", "0", 6);
  return p::Dict(OneTensor() + p::Text("turned") +
                 p::Parameter(p::Tensor(storage, 0, {3, 2}, {1, 3})) + p::Text("row") +
                 p::Tensor(storage, 3, {3}, {1}));
}

TEST_F(CheckpointFuzz, Pickles) {
  const std::vector<std::string> globals = {
      "collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_parameter",
      "torch._utils _rebuild_tensor_v2"};
  Fuzz(GoodPickle(), Rounds(20000), [&](const std::string& bytes) {
    const Pickle read(bytes, globals, "f");
    for (const Pickle::Id id : read[read.result()].items) (void)read[id];
  });
}

// The archive around a mutated pickle is whole, so that the tensors' checks are reached.
TEST_F(CheckpointFuzz, TorchFilesWithADamagedPickle) {
  Fuzz(GoodPickle(), Rounds(1000), [&](const std::string& bytes) {
    const std::string archive = MakeZip(TorchParts(bytes));
    WriteUnsynced(archive);
    for (const TensorEntry& t : ReadTorchFileIndex(ByteFile(file_))) {
      ExpectInside(t, archive.size());
    }
  });
}

TEST_F(CheckpointFuzz, TorchFilesWithADamagedArchive) {
  Fuzz(MakeZip(TorchParts(GoodPickle()), {.zip64 = true}), Rounds(1000),
       [&](const std::string& bytes) {
         WriteUnsynced(bytes);
         for (const TensorEntry& t : ReadTorchFileIndex(ByteFile(file_))) {
           ExpectInside(t, bytes.size());
         }
       });
}

TEST_F(CheckpointFuzz, IndexesOfShards) {
  const std::string index =
      R"({"metadata":{"total_size":28},"weight_map":{)"
      R"("a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}})";
  Fuzz(index, Rounds(4000), [](const std::string& bytes) {
    for (const auto& [tensor, shard] : ParseShardIndex(bytes, ".safetensors", "f")) {
      ASSERT_EQ(shard.find('/'), std::string::npos);
      ASSERT_EQ(shard.find(".."), std::string::npos);
    }
  });
}

TEST_F(CheckpointFuzz, Configurations) {
  Fuzz(SwitchConfig{}.ToJson().dump(2), Rounds(4000), [](const std::string& bytes) {
    const SwitchConfig config = SwitchConfig::FromJson(ParseJson(bytes, "f"), "f");
    ASSERT_GE(config.num_experts, 1);
    ASSERT_LE(config.geometry().num_layers(),
              config.num_layers + config.num_decoder_layers);
  });
}

}  // namespace
}  // namespace routecast
