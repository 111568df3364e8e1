// Malformed safetensors files: every rule of the format broken once.
#include "common/safetensors.h"
#include "tests/common/hostile_files.h"
#include "tests/common/torch_file_builder.h"

namespace routecast {
namespace {

HostileCase Header(const std::string& name, const std::string& header, size_t data_bytes,
                   const std::string& phrase) {
  return {name, {{"f.safetensors", MakeSafetensors(header, data_bytes)}}, phrase};
}
// A file of one entry "a" with these fields, and 4 bytes of data.
HostileCase Entry(const std::string& name, const std::string& fields,
                  const std::string& phrase) {
  return Header(name, R"({"a":)" + fields + "}", 4, phrase);
}
HostileCase Bytes(const std::string& name, const std::string& bytes,
                  const std::string& phrase) {
  return {name, {{"f.safetensors", bytes}}, phrase};
}

std::vector<HostileCase> WrongFiles() {
  const std::string good =
      MakeSafetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4);
  return {
      Bytes("empty", "", "it has 0 bytes"),
      Bytes("seven_bytes", "1234567", "it has 7 bytes"),
      Bytes("lfs_pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "Git LFS pointer"),
      Bytes("web_page", "<!DOCTYPE html><html>Not found</html>", "a web page"),
      Bytes("torch_file", GoodTorchFile(), "it is a zip archive"),
      Bytes("header_length_of_2_to_64", std::string(8, '\xff') + "{}",
            "has 18446744073709551615 bytes, above the limit"),
      Bytes("header_length_above_the_limit", Raw<uint64_t>(100'000'001) + "{}",
            "has 100000001 bytes, above the limit"),
      Bytes("header_length_beyond_the_file", Raw<uint64_t>(99) + "{}",
            "99 bytes, and the file ends after 2"),
      Bytes("cut_in_the_header", good.substr(0, 40), "and the file ends after 32"),
      Bytes("cut_in_the_data", good.substr(0, good.size() - 1), "the file holds 3 bytes"),
      Bytes("bytes_after_the_data", good + "x", "the tensors end at byte"),
  };
}

std::vector<HostileCase> WrongJson() {
  const std::string deep = "{\"a\":" + std::string(50'000, '[');
  return {
      Header("no_header", "", 0, "the header is empty"),
      Header("a_list", "[]", 0, "does not start with {"),
      Header("unfinished", "{\"a\":", 0, "unexpected end of input"),
      Header("two_objects", "{}{}", 0, "unexpected '{'"),
      Header("no_colon", "{\"a\" 1}", 0, "expected ':'"),
      Header("no_utf8", "{\"\xff\":1}", 0, "ill-formed UTF-8"),
      Header("bad_escape", R"({"\q":1})", 0, "forbidden character after backslash"),
      Header("nested_deeply", deep, 0, "nested deeper than 4"),
      Header("name_twice",
             R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
             R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
             2, "key \"a\" stands twice"),
      Entry("dtype_twice",
            R"({"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]})",
            "key \"dtype\" stands twice"),
      Header("metadata_list", R"({"__metadata__":[]})", 0, "__metadata__ is no object"),
      Header("metadata_number", R"({"__metadata__":{"k":1}})", 0,
             "metadata \"k\" is no string"),
      Header("no_name", R"({"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1,
             "the name is empty"),
      Header("newline_in_a_name",
             R"({"a\nb":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1,
             "the name has control characters"),
      Header("long_name",
             "{\"" + std::string(5000, 'n') +
                 R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
             1, "the name has 5000 bytes"),
  };
}

std::vector<HostileCase> WrongEntries() {
  return {
      Entry("number", "7", "the entry is no object"),
      Entry("unknown_key",
            R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"packing":"zstd"})",
            "key \"packing\" is unknown"),
      Entry("no_dtype", R"({"shape":[1],"data_offsets":[0,4]})", "dtype is missing"),
      Entry("no_shape", R"({"dtype":"F32","data_offsets":[0,4]})", "shape is missing"),
      Entry("no_offsets", R"({"dtype":"F32","shape":[1]})", "data_offsets is missing"),
      Entry("dtype_number", R"({"dtype":4,"shape":[1],"data_offsets":[0,4]})",
            "dtype is no string"),
      Entry("dtype_unknown", R"({"dtype":"F7","shape":[1],"data_offsets":[0,4]})",
            "dtype \"F7\" is unknown"),
      Entry("dtype_lower_case", R"({"dtype":"f32","shape":[1],"data_offsets":[0,4]})",
            "dtype \"f32\" is unknown"),
      Entry("shape_null", R"({"dtype":"F32","shape":null,"data_offsets":[0,4]})",
            "shape is no list"),
      Entry("dimension_negative", R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})",
            "dimension \"-1\""),
      Entry("dimension_float", R"({"dtype":"F32","shape":[1.5],"data_offsets":[0,4]})",
            "dimension \"1.5\""),
      Entry("dimension_text", R"({"dtype":"F32","shape":["1"],"data_offsets":[0,4]})",
            "dimension \"\"1\"\""),
      Entry("dimension_true", R"({"dtype":"F32","shape":[true],"data_offsets":[0,4]})",
            "dimension \"true\""),
      Entry("dimension_of_2_to_63",
            R"({"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4]})",
            "dimension 9223372036854775808 is above"),
      Entry("dimension_of_2_to_70",
            R"({"dtype":"F32","shape":[1180591620717411303424],"data_offsets":[0,4]})",
            "dimension \"1.18"),
      Entry("product_overflows",
            R"({"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]})",
            "overflows 64 bits"),
      Entry(
          "hundred_dimensions",
          R"({"dtype":"F32","shape":[1)" +
              [] {
                std::string ones;
                for (int i = 1; i < 100; ++i) ones += ",1";
                return ones;
              }() +
              R"(],"data_offsets":[0,4]})",
          "shape has 100 dimensions"),
  };
}

std::vector<HostileCase> WrongOffsets() {
  const auto two = [](const std::string& name, const std::string& a, const std::string& b,
                      size_t bytes, const std::string& phrase) {
    return Header(name,
                  R"({"a":{"dtype":"U8","shape":[2],"data_offsets":)" + a +
                      R"(},"b":{"dtype":"U8","shape":[2],"data_offsets":)" + b + "}}",
                  bytes, phrase);
  };
  return {
      Entry("no_list", R"({"dtype":"F32","shape":[1],"data_offsets":4})",
            "data_offsets is no list"),
      Entry("one", R"({"dtype":"F32","shape":[1],"data_offsets":[4]})", "has 1 numbers"),
      Entry("three", R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,8]})",
            "has 3 numbers"),
      Entry("negative", R"({"dtype":"F32","shape":[1],"data_offsets":[-4,4]})",
            "offset \"-4\""),
      Entry("float", R"({"dtype":"F32","shape":[1],"data_offsets":[0,4.0]})",
            "offset \"4.0\""),
      Entry("text", R"({"dtype":"F32","shape":[1],"data_offsets":["0",4]})",
            "offset \"\"0\"\""),
      Entry("backwards", R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})",
            "data ends at 0, before it begins at 4"),
      Entry(
          "beyond_the_file",
          R"({"dtype":"F32","shape":[4611686018427387],"data_offsets":[0,18446744073709548]})",
          "data ends at 18446744073709548, the file holds 4"),
      Entry("too_few_bytes", R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})",
            "[2] of F32 takes 8 bytes, data_offsets give 4"),
      Entry("too_many_bytes", R"({"dtype":"U8","shape":[1],"data_offsets":[0,4]})",
            "[1] of U8 takes 1 bytes, data_offsets give 4"),
      Header("hole_first", R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", 4,
             "a hole after 0"),
      two("hole_between", "[0,2]", "[3,5]", 5, "data begins at 3, a hole after 2"),
      two("overlap", "[0,2]", "[1,3]", 4, "data begins at 1, an overlap before 2"),
      two("same_bytes", "[0,2]", "[0,2]", 2, "data begins at 0, an overlap before 2"),
  };
}

TEST(HostileSafetensors, EachIsRefusedWithItsOwnMessage) {
  std::vector<HostileCase> cases = WrongFiles();
  for (auto more : {WrongJson(), WrongEntries(), WrongOffsets()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  EXPECT_GE(cases.size(), 40u);
  ExpectEachRefused(cases, [](const fs::path& folder) {
    ReadSafetensorsIndex(folder / "f.safetensors");
  });
}

}  // namespace
}  // namespace routecast
