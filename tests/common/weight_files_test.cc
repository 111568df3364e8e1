// Every form in which weights lie in a folder, and which one wins.
#include "common/weight_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "common/errors.h"
#include "common/random.h"
#include "common/safetensors.h"
#include "common/torch_file.h"
#include "tests/common/torch_file_builder.h"

namespace routecast {
namespace {

namespace p = pickle;

class WeightFilesTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("weights." + std::to_string(::getpid()));
    fs::remove_all(folder_);
    MakeFolder(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  void Write(const std::string& name, const std::string& bytes) {
    WriteFileAtomic(folder_ / name, bytes);
  }
  // A safetensors file of one byte tensor.
  void WriteByte(const std::string& name, const std::string& tensor, uint8_t value) {
    WriteSafetensors(folder_ / name, {{tensor, "U8", {1}, &value}});
  }
  // A .bin of one byte tensor.
  static std::string Bin(const std::string& tensor, char value) {
    std::vector<ZipPart> parts = TorchParts(p::Dict(
        p::Text(tensor) + p::Tensor(p::Storage("ByteStorage", "0", 1), 0, {1}, {1})));
    parts[2].data = std::string(1, value);
    return MakeZip(parts);
  }
  int ValueOf(const std::string& tensor) {
    const WeightFiles files(folder_);
    const WeightEntry* entry = files.Find(tensor);
    return entry ? files.Open(*entry).Read(entry->offset, 1)[0] : -1;
  }
  std::vector<TensorEntry> ReadTorch(const std::string& bytes) {
    Write("f.bin", bytes);
    return ReadTorchFileIndex(ByteFile(folder_ / "f.bin"));
  }
  fs::path folder_;
};

TEST_F(WeightFilesTest, TransformersOrderDecidesBetweenForms) {
  EXPECT_THROW(WeightFiles{folder_}, UsageError);
  Write("bin-1.bin", Bin("a", 4));
  Write("pytorch_model.bin.index.json", R"({"weight_map":{"a":"bin-1.bin"}})");
  EXPECT_EQ(ValueOf("a"), 4);
  Write("pytorch_model.bin", Bin("a", 3));
  EXPECT_EQ(ValueOf("a"), 3);
  WriteByte("s-1.safetensors", "a", 2);
  Write("model.safetensors.index.json", R"({"weight_map":{"a":"s-1.safetensors"}})");
  EXPECT_EQ(ValueOf("a"), 2);
  WriteByte("model.safetensors", "a", 1);
  EXPECT_EQ(ValueOf("a"), 1);
}

TEST_F(WeightFilesTest, ShardsAreReadAndLinksAreFollowed) {
  WriteByte("blob", "b", 7);
  fs::create_symlink("blob", folder_ / "2.safetensors");  // as snapshots in the cache
  WriteByte("1.safetensors", "a", 6);
  Write("model.safetensors.index.json",
        R"({"metadata":{"total_size":2},)"
        R"("weight_map":{"a":"1.safetensors","b":"2.safetensors"}})");
  EXPECT_EQ(ValueOf("a"), 6);
  EXPECT_EQ(ValueOf("b"), 7);
  EXPECT_EQ(ValueOf("c"), -1);
}

TEST_F(WeightFilesTest, HashIsOfAllBytesInTheOrderOfTheNames) {
  const std::string one = "first file", two(3 << 20, 'x');
  WriteByte("model.safetensors", "a", 1);
  const std::string bytes = ReadFile(folder_ / "model.safetensors");
  EXPECT_EQ(WeightFiles(folder_).Hash(5), Hash64(bytes, 5));
  fs::remove(folder_ / "model.safetensors");
  WriteByte("2.safetensors", "a", 1);
  WriteByte("1.safetensors", "b", 2);
  Write("model.safetensors.index.json",
        R"({"weight_map":{"a":"2.safetensors","b":"1.safetensors"}})");
  EXPECT_EQ(WeightFiles(folder_).Hash(5),
            Hash64(bytes, Hash64(ReadFile(folder_ / "1.safetensors"), 5)));
}

TEST_F(WeightFilesTest, SameBytesComparesValuesNotPlaces) {
  const uint8_t values[6] = {1, 2, 1, 2, 3, 4};
  WriteSafetensors(folder_ / "model.safetensors", {{"a", "U8", {2}, values},
                                                   {"b", "U8", {2}, values + 2},
                                                   {"c", "U8", {2}, values + 4},
                                                   {"d", "I8", {2}, values}});
  const WeightFiles files(folder_);
  EXPECT_TRUE(files.SameBytes(*files.Find("a"), *files.Find("b")));
  EXPECT_FALSE(files.SameBytes(*files.Find("a"), *files.Find("c")));
  EXPECT_FALSE(files.SameBytes(*files.Find("a"), *files.Find("d")));
}

TEST_F(WeightFilesTest, ATorchFileTellsEveryStorageType) {
  const std::pair<const char*, const char*> types[] = {
      {"FloatStorage", "F32"},  {"HalfStorage", "F16"}, {"BFloat16Storage", "BF16"},
      {"DoubleStorage", "F64"}, {"LongStorage", "I64"}, {"IntStorage", "I32"},
      {"ShortStorage", "I16"},  {"CharStorage", "I8"},  {"ByteStorage", "U8"},
      {"BoolStorage", "BOOL"}};
  for (const auto& [storage, dtype] : types) {
    const auto count = static_cast<int64_t>(24 / DtypeBytes(dtype));
    const auto tensors = ReadTorch(MakeZip(TorchParts(p::Dict(
        p::Text("w") + p::Tensor(p::Storage(storage, "0", count), 0, {count}, {1})))));
    ASSERT_EQ(tensors.size(), 1u);
    EXPECT_EQ(tensors[0].dtype, dtype);
    EXPECT_EQ(tensors[0].size_bytes, 24u);
    EXPECT_TRUE(tensors[0].strides.empty());
  }
}

TEST_F(WeightFilesTest, ATorchFileMayHoldAliasesViewsAndParameters) {
  const std::string storage = p::Storage("FloatStorage", "0", 6);
  const auto tensors = ReadTorch(MakeZip(TorchParts(
      p::Dict(p::Text("row") + p::Tensor(storage, 3, {3}, {1}) +                        //
              p::Text("whole") + p::Tensor(storage, 0, {2, 3}, {3, 1}) +                //
              p::Text("alias") + p::Parameter(p::Tensor(storage, 0, {2, 3}, {3, 1})) +  //
              p::Text("turned") + p::Tensor(storage, 0, {3, 2}, {1, 3}) +               //
              p::Text("column") + p::Tensor(storage, 1, {2, 1}, {3, 1}) +               //
              p::Text("scalar") + p::Tensor(storage, 5, {}, {}) +                       //
              p::Text("none") + p::Tensor(storage, 0, {0, 4}, {4, 1})))));
  std::map<std::string, TensorEntry> by_name;
  for (const TensorEntry& t : tensors) by_name[t.name] = t;
  ASSERT_EQ(by_name.size(), 7u);
  const uint64_t base = by_name["whole"].offset;
  EXPECT_EQ(by_name["alias"].offset, base);
  EXPECT_EQ(by_name["row"].offset, base + 12);
  EXPECT_EQ(by_name["row"].size_bytes, 12u);
  EXPECT_EQ(by_name["turned"].strides, (std::vector<int64_t>{1, 3}));
  EXPECT_EQ(by_name["turned"].SpanBytes(), 24u);
  EXPECT_EQ(by_name["column"].SpanBytes(), 16u);
  EXPECT_EQ(by_name["column"].size_bytes, 8u);
  EXPECT_EQ(by_name["scalar"].size_bytes, 4u);
  EXPECT_EQ(by_name["none"].size_bytes, 0u);
}

TEST_F(WeightFilesTest, ATorchFileMayHaveZip64RecordsAndMetadata) {
  const std::string metadata = "}(" + p::Text("_metadata") + p::OrderedDict() + "ub";
  const std::string pickled =
      "\x80\x02" + p::OrderedDict() + "(" + OneTensor() + "u" + metadata + ".";
  std::vector<ZipPart> parts = TorchParts(pickled);
  parts[2].extra =
      Raw<uint16_t>(1) + Raw<uint16_t>(16) + Raw<uint64_t>(24) + Raw<uint64_t>(24);
  parts[2].size_bytes = parts[2].packed_bytes = 0xffffffff;
  const auto tensors = ReadTorch(MakeZip(parts, {.zip64 = true}));
  ASSERT_EQ(tensors.size(), 1u);
  EXPECT_EQ(tensors[0].size_bytes, 24u);
}

TEST(ByteFileTest, StreamedHashEqualsTheHashOfTheWhole) {
  const fs::path path =
      fs::temp_directory_path() / ("hash." + std::to_string(::getpid()));
  for (const size_t size : {0, 1, 1 << 20, (5 << 20) + 3}) {
    std::string bytes(size, '\0');
    for (size_t i = 0; i < size; i += 8) bytes[i] = static_cast<char>(Mix(1, i));
    WriteFileAtomic(path, bytes);
    EXPECT_EQ(HashFile(path, 9), Hash64(bytes, 9)) << size;
  }
  EXPECT_THROW(ByteFile(path).Read(5 << 20, 4), DataError);
  fs::remove(path);
  EXPECT_THROW(ByteFile{path}, UsageError);
  EXPECT_THROW(ByteFile{fs::temp_directory_path()}, UsageError);
}

// The largest file that this process may write: like a disk that is full there.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    handler_ = std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_;
  void (*handler_)(int);
};

TEST_F(WeightFilesTest, AWriteThatFailsLeavesTheOldFileAndNothingElse) {
  WriteByte("model.safetensors", "a", 1);
  const std::string before = ReadFile(folder_ / "model.safetensors");
  const std::string values(10'000, 'v');
  {
    const FileSizeLimit limit(5'000);
    EXPECT_THROW(WriteSafetensors(folder_ / "model.safetensors",
                                  {{"a", "U8", {10'000}, values.data()}}),
                 EnvironmentError);
  }
  EXPECT_THROW(AtomicFileWriter(folder_ / "model.safetensors", uint64_t{1} << 60),
               EnvironmentError);
  EXPECT_EQ(ReadFile(folder_ / "model.safetensors"), before);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1);
}

}  // namespace
}  // namespace routecast
