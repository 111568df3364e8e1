#include "common/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {

fs::path File(const std::string& name) {
  return fs::path(::testing::TempDir()) / ("safetensors_" + name);
}

std::string WithHeader(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file + header + std::string(data_bytes, 'd');
}

TEST(Safetensors, RoundTripOfValuesShapesAndMetadata) {
  const float a[6] = {1, 2, 3, 4, 5, 6};
  const uint16_t b[2] = {7, 8};
  WriteSafetensors(
      File("good"),
      {{"a", "F32", {2, 3}, a}, {"b", "BF16", {2}, b}, {"empty", "I64", {0, 4}, nullptr}},
      {{"format", "pt"}});
  const SafetensorsIndex index = ReadSafetensorsIndex(File("good"));
  ASSERT_EQ(index.tensors.size(), 3u);
  EXPECT_EQ(index.metadata.at("format"), "pt");
  const TensorEntry* entry = index.Find("a");
  ASSERT_NE(entry, nullptr);
  EXPECT_EQ(entry->shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(ReadTensorBytes(File("good"), *entry),
            std::string(reinterpret_cast<const char*>(a), sizeof a));
  EXPECT_EQ(index.Find("b")->size_bytes, 4u);
  EXPECT_EQ(index.Find("absent"), nullptr);
}

struct BadHeader {
  const char* name;
  const char* header;
  size_t data_bytes;
};

class SafetensorsBad : public ::testing::TestWithParam<BadHeader> {};

TEST_P(SafetensorsBad, IsADataError) {
  const fs::path file = File(GetParam().name);
  WriteFileAtomic(file, WithHeader(GetParam().header, GetParam().data_bytes));
  EXPECT_THROW(ReadSafetensorsIndex(file), DataError);
}

INSTANTIATE_TEST_SUITE_P(
    Headers, SafetensorsBad,
    ::testing::Values(
        BadHeader{"no_object", "[]", 0}, BadHeader{"broken_json", "{\"a\":", 0},
        BadHeader{"no_shape", R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4},
        BadHeader{"unknown_dtype",
                  R"({"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}})", 4},
        BadHeader{"size_disagrees",
                  R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4},
        BadHeader{"beyond_the_end",
                  R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4},
        BadHeader{"hole", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8},
        BadHeader{"overlap",
                  R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                  R"("b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
                  6},
        BadHeader{"data_left_over",
                  R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 9},
        BadHeader{"negative_dimension",
                  R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4},
        BadHeader{"overflowing_product",
                  R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],)"
                  R"("data_offsets":[0,0]}})",
                  0}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Safetensors, AHugeHeaderLengthIsRefusedBeforeItIsAllocated) {
  std::string file(8, '\xff');
  WriteFileAtomic(File("huge"), file + "{}");
  EXPECT_THROW(ReadSafetensorsIndex(File("huge")), DataError);
  WriteFileAtomic(File("short"), "abc");
  EXPECT_THROW(ReadSafetensorsIndex(File("short")), DataError);
  EXPECT_THROW(ReadSafetensorsIndex(File("absent")), UsageError);
}

TEST(Safetensors, EveryFlippedHeaderByteIsAnErrorOrAValidIndex) {
  const float a[2] = {1, 2};
  WriteSafetensors(File("flip"), {{"a", "F32", {2}, a}}, {{"k", "v"}});
  const std::string good = ReadFile(File("flip"));
  for (size_t at = 0; at < good.size() - sizeof a; ++at) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ (1 + (Mix(3, at) & 0x7f)));
    WriteFileAtomic(File("flipped"), bad);
    try {
      for (const TensorEntry& t : ReadSafetensorsIndex(File("flipped")).tensors) {
        EXPECT_LE(t.offset + t.size_bytes, bad.size());
      }
    } catch (const DataError&) {
    }
  }
}

}  // namespace
}  // namespace routecast
