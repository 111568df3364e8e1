// Files that are read in windows: the same records as of the whole, and an error where
// the file is cut meanwhile.
#include "corpus/readers.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/stat.h>

#include <atomic>

#include "common/errors.h"
#include "common/random.h"
#include "corpus/mapped_file.h"
#include "corpus/parallel.h"
#include "tests/corpus/test_folder.h"

namespace routecast {
namespace {

using Records = std::vector<std::pair<std::string, uint64_t>>;

class ReadersTest : public TestFolder {};

// Lines such as the readers cut at, in random order, the last one sometimes without its
// end.
std::string RandomLines(uint64_t seed) {
  const std::vector<std::string> kLines = {
      "",       " ", "\t\r",          " = Title = ",           "= Other =",
      " text ", "x", " = = Sub = = ", "a longer line of words"};
  std::string text;
  for (uint64_t i = 0; i < 40; ++i) {
    text += kLines[ToRange(Mix(seed, i), kLines.size())] + "\n";
  }
  if (seed % 2 == 1) text.pop_back();
  return text;
}

TEST_F(ReadersTest, WindowsChangeNoRecord) {
  for (const SourceKind kind :
       {SourceKind::kTextBlocks, SourceKind::kWikitext, SourceKind::kJsonl}) {
    const SourceSpec spec{.kind = kind, .path = "", .field = ""};
    for (uint64_t seed = 0; seed < 60; ++seed) {
      const std::string text = RandomLines(seed);
      const fs::path path = folder_ / "lines";
      WriteFileAtomic(path, text);
      Records whole;
      ReadRecords(spec, text, "lines",
                  [&](const RawRecord& r) { whole.emplace_back(r.raw, r.offset); });
      const SourceFile file(path);
      for (const size_t window : {1, 7, 30, 64, 1000}) {
        Records records;
        ReadFileRecords(
            spec, file, "lines",
            [&](const RawRecord& r) { records.emplace_back(r.raw, r.offset); }, window);
        ASSERT_EQ(records, whole)
            << "kind " << int(kind) << ", seed " << seed << ", window " << window;
      }
    }
  }
}

TEST_F(ReadersTest, LinesAreCountedOverWindows) {
  const fs::path path = folder_ / "many.jsonl";
  std::string text;
  for (int i = 1; i <= 300; ++i) {
    text += i % 3 == 0 ? "\n" : "{\"text\": \"" + std::to_string(i) + "\"}\n";
  }
  WriteFileAtomic(path, text);
  const SourceSpec spec{SourceKind::kJsonl, "", "text"};
  int records = 0;
  ReadFileRecords(
      spec, SourceFile(path), "many.jsonl",
      [&](const RawRecord& record) {
        EXPECT_EQ(RecordText(spec, record, ""), std::to_string(record.line));
        ++records;
      },
      50);
  EXPECT_EQ(records, 200);
}

// Nothing above the limit is read to see that: 256 MiB of a (sparse) file of a terabyte.
TEST_F(ReadersTest, AGiantLineIsRefusedByItsByte) {
  const fs::path path = folder_ / "giant.jsonl";
  WriteFileAtomic(path, "{\"text\": \"x\"}\n");
  fs::resize_file(path, uint64_t{1} << 40);
  const SourceFile file(path);
  int records = 0;
  try {
    ReadFileRecords({SourceKind::kJsonl, "", "text"}, file, "giant.jsonl",
                    [&](const RawRecord&) { ++records; });
    FAIL() << "a line of a terabyte was taken";
  } catch (const DataError& e) {
    EXPECT_NE(std::string(e.what()).find("line 2, at byte 14: a line above 256 MiB"),
              std::string::npos)
        << e.what();
  }
  EXPECT_EQ(records, 1);
}

TEST_F(ReadersTest, AFileReadWholeHasALimit) {
  const fs::path path = folder_ / "giant.txt";
  WriteFileAtomic(path, "x");
  fs::resize_file(path, uint64_t{1} << 40);
  const SourceFile file(path);
  EXPECT_THROW(ReadFileRecords({SourceKind::kText, "", ""}, file, "giant.txt",
                               [](const RawRecord&) {}),
               DataError);
}

TEST_F(ReadersTest, AFileThatIsCutWhileItIsReadIsDataErrorByName) {
  const fs::path path = folder_ / "cut.jsonl";
  std::string lines;
  for (int i = 0; i < 1000; ++i) lines += "{\"text\": \"a line of it\"}\n";
  WriteFileAtomic(path, lines);
  const SourceFile file(path);
  int records = 0;
  try {
    ReadFileRecords(
        {SourceKind::kJsonl, "", "text"}, file, path.string(),
        [&](const RawRecord&) {
          if (++records == 1) fs::resize_file(path, 100);
        },
        4096);
    FAIL() << "the cut was not seen";
  } catch (const DataError& e) {
    EXPECT_NE(std::string(e.what()).find("cut.jsonl ended while it was read"),
              std::string::npos)
        << e.what();
  }
  EXPECT_GT(records, 100);  // of the first window
  EXPECT_LT(records, 1000);
}

// Nobody writes into it: an open that waits would wait for ever.
TEST_F(ReadersTest, ANamedPipeIsNotMapped) {
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_THROW(MappedFile(folder_ / "pipe"), UsageError);
}

// An object that is searched for each of its keys takes minutes here.
std::string ManyKeys() {
  std::string json = "{";
  for (int k = 0; k < 200'000; ++k) json += "\"" + std::to_string(k) + "\":0,";
  return json;
}

TEST_F(ReadersTest, ARecordOfManyKeysIsRead) {
  const std::string record = ManyKeys() + "\"text\": \"x\"}";
  EXPECT_EQ(RecordText({SourceKind::kJsonl, "", "text"}, {record, 0}, "keys"), "x");
}

// "meta" is nearer to "text" than "content" is, but holds no text.
TEST_F(ReadersTest, AFieldThatHoldsTextIsProposed) {
  const std::string record = R"({"meta": {}, "content": "x"})";
  try {
    RecordText({SourceKind::kJsonl, "", "text"}, {record, 0}, "a.jsonl");
    FAIL() << "a record without the field was taken";
  } catch (const DataError& e) {
    EXPECT_NE(std::string(e.what()).find("#content"), std::string::npos) << e.what();
  }
}

TEST_F(ReadersTest, SquadOfManyKeysIsRead) {
  const std::string json =
      ManyKeys() + R"("data":[{"paragraphs":[{"context":"c","qas":[]}]}]})";
  std::vector<std::string> texts;
  ReadRecords({SourceKind::kSquad, "", ""}, json, "keys",
              [&](const RawRecord& r) { texts.emplace_back(r.raw); });
  EXPECT_EQ(texts, std::vector<std::string>{"c"});
}

TEST_F(ReadersTest, ARecordThatSaysAKeyTwiceIsRefused) {
  const std::string record = R"({"text": "one", "text": "two"})";
  EXPECT_THROW(RecordText({SourceKind::kJsonl, "", "text"}, {record, 0}, "keys"),
               DataError);
}

// The system gives no thread a stack as large as its address space.
TEST(ParallelForTest, WorksWithTheThreadsThatItGets) {
  pthread_attr_t before, huge;
  ASSERT_EQ(::pthread_getattr_default_np(&before), 0);
  ASSERT_EQ(::pthread_getattr_default_np(&huge), 0);
  ASSERT_EQ(::pthread_attr_setstacksize(&huge, size_t{1} << 47), 0);
  ASSERT_EQ(::pthread_setattr_default_np(&huge), 0);
  std::atomic<int> sum{0};
  ParallelFor(100, 4, [&](size_t i) { sum += static_cast<int>(i); });
  ASSERT_EQ(::pthread_setattr_default_np(&before), 0);
  ::pthread_attr_destroy(&before);
  ::pthread_attr_destroy(&huge);
  EXPECT_EQ(sum, 4950);
}

}  // namespace
}  // namespace routecast
