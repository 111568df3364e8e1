// Damaged input for every reader: each mutation ends in a result or a named error,
// quickly. A fixed number of mutations with fixed seeds; run it under sanitizers to see
// more.
#include <gtest/gtest.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "common/errors.h"
#include "common/random.h"
#include "common/run_record.h"
#include "corpus/index_file.h"
#include "corpus/readers.h"
#include "corpus/tokenizer.h"
#include "tests/corpus/test_folder.h"
#include "tests/support/mutation.h"

namespace routecast {
namespace {

std::string Mutate(const std::string& bytes, uint64_t seed) {
  static const MutationOptions kOptions{8,
                                        16,
                                        {"\t", "\n", "\"", "{", "}", "[", "]", "=", "\\",
                                         " ", "\xFF", std::string(1, '\0')}};
  return Mutate(bytes, seed, kOptions);
}

bool IsValidUtf8(const std::string& text) {
  try {
    Json(text).dump();
    return true;
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

struct ReaderCase {
  const char* name;
  SourceKind kind;
  std::string seed_bytes;
};
std::ostream& operator<<(std::ostream& out, const ReaderCase& c) { return out << c.name; }

// At most so many questions may repeat a context.
size_t MaxRepeats(const std::string& bytes) {
  size_t questions = 0;
  for (size_t at = 0; (at = bytes.find("question", at)) != bytes.npos; ++at) ++questions;
  return questions;
}

class ReaderFuzz : public testing::TestWithParam<ReaderCase> {};

TEST_P(ReaderFuzz, EndsInTextOrNamedError) {
  const bool jsonl = GetParam().kind == SourceKind::kJsonl;
  const SourceSpec spec{
      .kind = GetParam().kind, .path = "", .field = jsonl ? "text" : ""};
  int read = 0;
  for (uint64_t seed = 0; seed < 4000; ++seed) {
    const std::string bytes = Mutate(GetParam().seed_bytes, seed);
    size_t records = 0, out_bytes = 0;
    try {
      ReadRecords(spec, bytes, "fuzz", [&](const RawRecord& record) {
        const std::string text = RecordText(spec, record, "fuzz");
        ASSERT_TRUE(IsValidUtf8(text));
        ASSERT_LE(record.offset, bytes.size());
        ++records;
        out_bytes += text.size();
      });
      ++read;
    } catch (const DataError& e) {
      ASSERT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2)
          << e.what();
    }
    ASSERT_LE(records, bytes.size() + 1);
    // An invalid byte becomes three; a prompt adds keys to each row, and squad repeats a
    // context for each of its questions.
    ASSERT_LE(out_bytes, (3 + records + MaxRepeats(bytes)) * (bytes.size() + 64));
  }
  EXPECT_GT(read, 0);
}

INSTANTIATE_TEST_SUITE_P(
    AllKinds, ReaderFuzz,
    testing::Values(
        ReaderCase{"text", SourceKind::kText,
                   "Some plain text \xC3\xA9\xE2\x82\xAC\r\nmore\n"},
        ReaderCase{"blocks", SourceKind::kTextBlocks,
                   "one\ntwo\n\nthree \xF0\x9F\x98\x80\n\n"},
        ReaderCase{"jsonl", SourceKind::kJsonl,
                   "{\"text\": \"a \\u00e9 b\", \"x\": [1, {\"y\": null}]}\n{\"text\": "
                   "\"c\"}\n"},
        ReaderCase{
            "wikitext", SourceKind::kWikitext,
            " \n = One = \n \n Text \n \n = = Sub = = \n \n = Two = \n \n More \n"},
        ReaderCase{
            "squad", SourceKind::kSquad,
            "{\"data\":[{\"paragraphs\":[{\"context\":\"C\",\"qas\":[{\"question\":"
            "\"Q?\"}]}]}]}"},
        ReaderCase{"glue", SourceKind::kGlue,
                   "sentence\tlabel\nA row .\t1\nAnother row .\t0\n"},
        ReaderCase{"glue_pairs", SourceKind::kGlue,
                   "index\tquestion\tsentence\tlabel\n0\tQ ?\tA row .\t1\n"},
        ReaderCase{"glue_headless", SourceKind::kGlue,
                   "gj04\t1\t\tA row .\ngj04\t0\t*\tAnother row .\n"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(ReaderFuzzTest, DeepJsonIsDataError) {
  const std::string deep = "{\"text\": " + std::string(100000, '[');
  EXPECT_THROW(RecordText({SourceKind::kJsonl, "", "text"}, {deep, 0}, "fuzz"),
               DataError);
  EXPECT_THROW(ReadRecords({SourceKind::kSquad, "", ""}, std::string(100000, '['), "fuzz",
                           [](const RawRecord&) {}),
               DataError);
}

class FileFuzz : public TestFolder {};

TEST_F(FileFuzz, DamagedArchives) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += "line " + std::to_string(i * i) + "\n";
  std::string packed(ZSTD_compressBound(text.size()), '\0');
  packed.resize(ZSTD_compress(packed.data(), packed.size(), text.data(), text.size(), 3));
  const fs::path gz = folder_ / "good.gz";
  gzFile out = gzopen(gz.c_str(), "wb");
  gzwrite(out, text.data(), static_cast<unsigned>(text.size()));
  gzclose(out);
  const std::string seeds[] = {packed, ReadFile(gz)};
  const char* names[] = {"a.zst", "a.gz"};
  for (int kind = 0; kind < 2; ++kind) {
    for (uint64_t seed = 0; seed < 200; ++seed) {
      const fs::path path = folder_ / names[kind];
      std::ofstream(path, std::ios::binary) << Mutate(seeds[kind], seed);
      try {
        const SourceFile file(path);
        ASSERT_LE(file.size(), size_t{17} << 20);
      } catch (const DataError&) {
      }
    }
  }
}

TEST(IndexFuzz, EndsInAnIndexOrDataError) {
  IndexContents contents;
  contents.files = {"a.txt", "folder/b.txt"};
  contents.text_bytes = 100;
  for (uint32_t i = 0; i < 10; ++i) {
    contents.entries.push_back({.content_hash = Mix(i),
                                .group = Mix(i),
                                .text_offset = 10 * i,
                                .source_offset = i,
                                .length_bytes = 10,
                                .file = i % 2});
  }
  const std::string good = SerializeIndex(contents);
  EXPECT_EQ(SerializeIndex(ParseIndex(good, "index")), good);
  const std::string body = good.substr(0, good.size() - 8);
  for (uint64_t seed = 0; seed < 4000; ++seed) {
    std::string bytes = Mutate(body, seed);
    // With a checksum that fits, so that the checks behind it are reached.
    const uint64_t checksum = Hash64(bytes);
    bytes.append(reinterpret_cast<const char*>(&checksum), sizeof checksum);
    try {
      for (const auto& entry : ParseIndex(bytes, "index").entries)
        ASSERT_LT(entry.file, bytes.size());
    } catch (const DataError&) {
    }
    EXPECT_THROW(ParseIndex(Mutate(good, seed) + "x", "index"), DataError);
  }
}

// Version 2 took texts that are called .GZ or .ZST as they were, packed.
TEST(IndexVersion, OfBeforeNamesInCapitalsIsMadeAgain) {
  std::string bytes = SerializeIndex({});
  bytes.resize(bytes.size() - sizeof(uint64_t));
  bytes[sizeof kIndexMagic] = 2;
  const uint64_t checksum = Hash64(bytes);
  bytes.append(reinterpret_cast<const char*>(&checksum), sizeof checksum);
  EXPECT_THROW(ParseIndex(bytes, "index"), DataError);
}

TEST_F(FileFuzz, DamagedTokenizers) {
  std::vector<std::string> texts;
  for (uint64_t i = 0; i < 200; ++i) {
    texts.push_back("the word " + std::to_string(Mix(i)) + " is one of many words here");
  }
  Tokenizer::Train(texts, {.pieces = 60, .extra_ids = 4}, folder_);
  const std::string model = ReadFile(folder_ / "spiece.model");
  for (uint64_t seed = 0; seed < 600; ++seed) {
    try {
      const Tokenizer tokenizer = Tokenizer::FromModel(Mutate(model, seed), 4, "fuzz");
      const auto ids = tokenizer.Encode("the word 12 is <extra_id_0> here");
      for (const int32_t id : ids) ASSERT_LT(id, tokenizer.vocab_size());
      tokenizer.Decode(ids);
    } catch (const DataError&) {
    }
  }
}

}  // namespace
}  // namespace routecast
