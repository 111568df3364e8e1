// Malicious and malformed indexes of shards, and folders whose shards are not what the
// index says.
#include "common/weight_files.h"
#include "tests/common/hostile_files.h"
#include "tests/common/torch_file_builder.h"

namespace routecast {
namespace {

constexpr char kIndex[] = "model.safetensors.index.json";

std::string Shard(const std::string& tensor) {
  return MakeSafetensors(
      "{\"" + tensor + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1);
}
HostileCase Index(const std::string& name, const std::string& index,
                  const std::string& phrase) {
  return {name, {{kIndex, index}}, phrase};
}
// An index that puts tensor "a" into `shard` (as JSON).
HostileCase InShard(const std::string& name, const std::string& shard,
                    const std::string& phrase) {
  return Index(name, R"({"weight_map":{"a":)" + shard + "}}", phrase);
}

std::vector<HostileCase> WrongIndexes() {
  const std::string deep = "{\"metadata\":" + std::string(50'000, '[');
  std::string many = "{\"weight_map\":{";
  for (int i = 0; i < 10'001; ++i) {
    const std::string n = std::to_string(i);
    many += (i > 0 ? ",\"" : "\"") + n + "\":\"" + n + ".safetensors\"";
  }
  return {
      Index("empty", "", "unexpected end of input"),
      Index("a_list", "[1]", "it must be one object"),
      Index("lfs_pointer", "version https://git-lfs.github.com/spec/v1\n",
            "Git LFS pointer"),
      Index("deep", deep, "nested deeper than 8"),
      Index("no_map", "{}", "it has no weight_map"),
      Index("map_list", R"({"weight_map":[]})", "weight_map is no object"),
      Index("map_empty", R"({"weight_map":{}})", "weight_map is empty"),
      Index("two_maps", R"({"weight_map":{},"weight_map":{}})",
            "key \"weight_map\" stands twice"),
      Index("tensor_twice", R"({"weight_map":{"a":"x.safetensors","a":"y.safetensors"}})",
            "key \"a\" stands twice"),
      Index("no_name", R"({"weight_map":{"":"x.safetensors"}})", "has no name"),
      Index("many_shards", many + "}}", "10001 shards, above the limit"),
      InShard("shard_number", "1", "its shard is no file name"),
      InShard("shard_empty", "\"\"", "shard \"\": the name is empty"),
      InShard("shard_absolute", "\"/etc/passwd.safetensors\"", "an absolute path"),
      InShard("shard_above", "\"../secret.safetensors\"", "'..' leads out of the folder"),
      InShard("shard_in_a_folder", "\"sub/x.safetensors\"",
              "\"sub/x.safetensors\": a path"),
      InShard("shard_backslash", R"("sub\\x.safetensors")",
              "\"sub\\x.safetensors\": a path"),
      InShard("shard_control", R"("x\u0000.safetensors")", "has control characters"),
      InShard("shard_long", "\"" + std::string(300, 'x') + ".safetensors\"",
              "longer than a file's"),
      InShard("shard_bin", "\"x.bin\"", "does not end with .safetensors"),
      InShard("shard_missing", "\"model-00001-of-00002.safetensors\"", "is missing"),
  };
}

std::vector<HostileCase> WrongShards() {
  const std::string both = R"({"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})";
  const auto folder = [&](const std::string& name, const std::string& first,
                          const std::string& second, const std::string& phrase) {
    return HostileCase{
        name,
        {{kIndex, both}, {"1.safetensors", first}, {"2.safetensors", second}},
        phrase};
  };
  return {
      folder("tensor_absent", Shard("a"), Shard("a2"),
             "tensor \"b\" is not in its shard 2.safetensors"),
      folder("tensors_exchanged", Shard("b"), Shard("a"),
             "lies in 1.safetensors, weight_map says 2.safetensors"),
      folder("tensor_in_two", Shard("a"), Shard("a"),
             "lies in two shards: 1.safetensors and 2.safetensors"),
      {"tensor_not_listed",
       {{kIndex, R"({"weight_map":{"a":"1.safetensors"}})"},
        {"1.safetensors",
         MakeSafetensors(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                         R"("extra":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                         2)}},
       "tensor \"extra\" of 1.safetensors is not in weight_map"},
      folder("shard_damaged", Shard("a"), "short", "it has 5 bytes"),
      {"bin_shard_is_safetensors",
       {{"pytorch_model.bin.index.json", R"({"weight_map":{"a":"1.bin"}})"},
        {"1.bin", Shard("a")}},
       "does not begin like a zip archive"},
      {"bin_index_of_safetensors",
       {{"pytorch_model.bin.index.json", R"({"weight_map":{"a":"1.safetensors"}})"}},
       "does not end with .bin"},
  };
}

TEST(HostileIndex, EachIsRefusedWithItsOwnMessage) {
  std::vector<HostileCase> cases = WrongIndexes();
  for (HostileCase& c : WrongShards()) cases.push_back(std::move(c));
  EXPECT_GE(cases.size(), 20u);
  ExpectEachRefused(cases, [](const fs::path& folder) { WeightFiles{folder}; });
}

}  // namespace
}  // namespace routecast
