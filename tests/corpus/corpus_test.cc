#include "corpus/corpus.h"

#include <gmock/gmock.h>
#include <sys/resource.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>

#include "common/errors.h"
#include "common/random.h"
#include "tests/corpus/test_folder.h"

namespace routecast {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

using CorpusTest = TestFolder;

std::vector<std::string> Texts(const Corpus& corpus) {
  std::vector<std::string> texts;
  for (uint64_t i = 0; i < corpus.size(); ++i) texts.emplace_back(corpus.Text(i));
  return texts;
}

Corpus OpenInMemory(const std::string& spec) { return Corpus::Open({spec}, "", 2, true); }

// `words` pseudo-random words.
std::string Prose(uint64_t seed, int words) {
  std::string text;
  for (int w = 0; w < words; ++w) {
    text +=
        "w" + std::to_string(ToRange(Mix(seed, static_cast<uint64_t>(w)), 100000)) + " ";
  }
  return text;
}

std::string Message(const std::string& spec) {
  try {
    OpenInMemory(spec);
  } catch (const std::exception& e) {
    return e.what();
  }
  return "no error";
}

TEST_F(CorpusTest, TextFileIsOneDocument) {
  EXPECT_THAT(
      Texts(OpenInMemory("text:" + Write("a.txt", "\xEF\xBB\xBF one\r\n\r\ntwo \n"))),
      ElementsAre("one\n\ntwo"));
}

TEST_F(CorpusTest, BlocksAreDocuments) {
  const auto path = Write("a.txt", "\n\none\nmore\n  \ntwo\r\n\r\nthree");
  const Corpus corpus = OpenInMemory("text:" + path + "#blocks");
  EXPECT_THAT(Texts(corpus), ElementsAre("one\nmore", "two", "three"));
  EXPECT_EQ(corpus.document(1).source_offset, 14u);
  EXPECT_EQ(corpus.document(1).source, path);
}

TEST_F(CorpusTest, FolderIsReadInOrderOfPaths) {
  Write("f/b.txt", "second");
  Write("f/a.txt", "first");
  Write("f/sub/c.txt", "third");
  Write("f/.hidden", "not seen");
  EXPECT_THAT(Texts(OpenInMemory("text:" + (folder_ / "f").string())),
              ElementsAre("first", "second", "third"));
  EXPECT_THAT(Texts(OpenInMemory("text:" + (folder_ / "f" / "[ab].txt").string())),
              ElementsAre("first", "second"));
}

TEST_F(CorpusTest, WhatLiesBesideDataOfAKindIsNoTextOfIt) {
  Write("f/README.md", "about the data");
  Write("f/LICENSE.txt", "a licence");
  Write("f/sub/train.jsonl", "{\"text\": \"one\"}\n");
  Write("f/QNLI/dev.tsv", "index\tquestion\tsentence\tlabel\n0\tq\ts\tentailment\n");
  Write("f/dev.json", R"({"data": [{"paragraphs": [{"context": "c", "qas": []}]}]})");
  Write("w/README.md", "about the data");
  Write("w/wiki.test.tokens", " = Title = \n\n text\n");
  const std::string folder = (folder_ / "f").string();
  EXPECT_THAT(Texts(OpenInMemory("jsonl:" + folder + "/sub")), ElementsAre("one"));
  EXPECT_THAT(Texts(OpenInMemory("glue:" + folder)),
              ElementsAre("qnli question: q sentence: s"));
  EXPECT_THAT(Texts(OpenInMemory("squad:" + folder)), ElementsAre("c"));
  EXPECT_EQ(OpenInMemory("wikitext:" + (folder_ / "w").string()).size(), 1u);
  EXPECT_EQ(OpenInMemory("text:" + (folder_ / "w").string()).size(), 2u);
  EXPECT_THAT(Message("glue:" + (folder_ / "w").string()),
              HasSubstr(".tsv (or these with .gz, .zst)"));
}

TEST_F(CorpusTest, FilesOfOtherNamesAreCountedAndTheFirstIsNamed) {
  Write("f/a.jsonl", "{\"text\": \"one\"}\n");
  Write("f/part-0002", "{\"text\": \"two\"}\n");
  Write("f/part-0001", "{\"text\": \"three\"}\n");
  Write("f/.hidden", "not seen");
  const std::string spec = "jsonl:" + (folder_ / "f").string();
  testing::internal::CaptureStderr();
  const Corpus corpus = Corpus::Open({spec}, "", 1, false);
  EXPECT_THAT(testing::internal::GetCapturedStderr(),
              HasSubstr("2 files of other names were skipped, the first is " +
                        (folder_ / "f" / "part-0001").string()));
  EXPECT_EQ(corpus.stats().skipped.count, 2u);
  EXPECT_EQ(OpenInMemory(spec + "/*").stats().skipped.count, 0u);
}

TEST_F(CorpusTest, NamesMayHaveCapitalLetters) {
  Write("f/A.JSONL", "{\"text\": \"one\"}\n");
  EXPECT_THAT(Texts(OpenInMemory("jsonl:" + (folder_ / "f").string())),
              ElementsAre("one"));
}

TEST_F(CorpusTest, ALinkInACircleIsNoText) {
  Write("f/a.txt", "first");
  fs::create_symlink("loop", folder_ / "f" / "loop");
  fs::create_directory_symlink(".", folder_ / "f" / "self");
  EXPECT_THAT(Texts(OpenInMemory("text:" + (folder_ / "f").string())),
              ElementsAre("first"));
  EXPECT_THROW(OpenInMemory("text:" + (folder_ / "f" / "loop").string()), UsageError);
}

TEST_F(CorpusTest, PackedFilesAreUnpacked) {
  const std::string text = Prose(1, 2000) + "end";
  std::string packed(ZSTD_compressBound(text.size()), '\0');
  packed.resize(ZSTD_compress(packed.data(), packed.size(), text.data(), text.size(), 3));
  EXPECT_THAT(Texts(OpenInMemory("text:" + Write("a.txt.zst", packed))),
              ElementsAre(text));
  const auto path = folder_ / "a.txt.gz";
  gzFile out = gzopen(path.c_str(), "wb");
  gzwrite(out, text.data(), static_cast<unsigned>(text.size()));
  gzclose(out);
  EXPECT_THAT(Texts(OpenInMemory("text:" + path.string())), ElementsAre(text));
  // Two members one after the other are one file.
  const std::string once = ReadFile(path);
  EXPECT_EQ(OpenInMemory("text:" + Write("b.gz", once + once)).Text(0), text + text);
}

TEST_F(CorpusTest, CutArchivesAreDataErrors) {
  const std::string text = Prose(1, 2000);
  std::string packed(ZSTD_compressBound(text.size()), '\0');
  packed.resize(ZSTD_compress(packed.data(), packed.size(), text.data(), text.size(), 3));
  EXPECT_THROW(
      OpenInMemory("text:" + Write("a.zst", packed.substr(0, packed.size() - 9))),
      DataError);
  EXPECT_THROW(OpenInMemory("text:" + Write("b.zst", "")), DataError);
  EXPECT_THROW(OpenInMemory("text:" + Write("c.gz", "plain text")), DataError);
}

TEST_F(CorpusTest, ArchiveBombIsDataError) {
  const std::string zeros(size_t{64} << 20, ' ');
  std::string packed(ZSTD_compressBound(zeros.size()), '\0');
  packed.resize(
      ZSTD_compress(packed.data(), packed.size(), zeros.data(), zeros.size(), 3));
  ASSERT_LT(packed.size(), 100'000u);
  EXPECT_THAT(Message("text:" + Write("a.zst", packed)),
              HasSubstr("unpacks to more than"));
}

TEST_F(CorpusTest, JsonlTakesTheField) {
  const auto path =
      Write("a.jsonl",
            "{\"text\": \"one\", \"body\": \"eins\"}\n\n{\"text\": \"t\\u00e9\", "
            "\"body\": \"zwei\"}");
  EXPECT_THAT(Texts(OpenInMemory("jsonl:" + path)), ElementsAre("one", "t\xC3\xA9"));
  EXPECT_THAT(Texts(OpenInMemory("jsonl:" + path + "#body")),
              ElementsAre("eins", "zwei"));
  EXPECT_THAT(Message("jsonl:" + path + "#bodi"), HasSubstr("did you mean \"body\""));
}

TEST_F(CorpusTest, JsonlErrorsNameTheByte) {
  const auto path = Write("a.jsonl", "{\"text\": \"one\"}\n{\"text\": \n");
  EXPECT_THROW(OpenInMemory("jsonl:" + path), DataError);
  EXPECT_THAT(Message("jsonl:" + path),
              testing::AllOf(HasSubstr(path), HasSubstr("byte 16")));
}

TEST_F(CorpusTest, JsonlErrorsNameTheLinesAndCountTheRest) {
  std::string lines = "{\"text\": \"one\"}\n\n{\"text\": \n{\"text\": \"two\"}\n";
  EXPECT_THAT(Message("jsonl:" + Write("a.jsonl", lines)),
              HasSubstr("line 3, at byte 17"));
  lines += "{\"body\": 1}\n";
  EXPECT_THAT(Message("jsonl:" + Write("b.jsonl", lines)),
              testing::AllOf(HasSubstr("line 3, at byte 17"),
                             HasSubstr("; nor do these read: line 5\n")));
  for (int i = 0; i < 10; ++i) lines += "[]\n";
  const std::string message = Message("jsonl:" + Write("c.jsonl", lines));
  EXPECT_THAT(message, HasSubstr("; nor do these read: lines 5, 6, 7, 8 and 7 more\n"));
  EXPECT_EQ(std::count(message.begin(), message.end(), '\n'), 2);
}

TEST_F(CorpusTest, WikitextArticlesStartAtTitles) {
  const auto path =
      Write("w.txt",
            " \n = First = \n \n Text of it . \n \n = = Section = = \n \n a = b "
            "= c \n \n = Second = \n \n More . \n");
  EXPECT_THAT(
      Texts(OpenInMemory("wikitext:" + path)),
      ElementsAre("= First = \n \n Text of it . \n \n = = Section = = \n \n a = b = c",
                  "= Second = \n \n More ."));
}

TEST_F(CorpusTest, InvalidUtf8IsReplaced) {
  const auto path = Write("a.txt", std::string("a\xFFz \xC0\x80 \xED\xA0\x80 \xE2\x82") +
                                       '\0' + "\xE2\x82\xAC");
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_THAT(Texts(OpenInMemory("text:" + path)),
              ElementsAre("a" + r + "z " + r + r + " " + r + r + r + " " + r + r +
                          " \xE2\x82\xAC"));
}

TEST_F(CorpusTest, ReplacedBytesAreCounted) {
  EXPECT_EQ(OpenInMemory("text:" + Write("a.txt", "caf\xE9 au lait\xFF"))
                .stats()
                .replaced_bytes,
            2u);
}

// An image among texts, a text in UTF-16.
TEST_F(CorpusTest, BinaryDocumentsAreDroppedAndCounted) {
  std::string image = "\x89PNG\r\n", wide;
  for (uint64_t i = 0; i < 500; ++i) image += static_cast<char>(Mix(i) & 0xFF);
  for (const char c : Prose(1, 30)) wide += {c, '\0'};
  Write("f/a.png", image);
  Write("f/b.txt", wide);
  Write("f/c.txt", Prose(2, 30) + "end");
  const Corpus corpus = OpenInMemory("text:" + (folder_ / "f").string());
  EXPECT_THAT(Texts(corpus), ElementsAre(Prose(2, 30) + "end"));
  EXPECT_EQ(corpus.stats().binary_documents, 2u);
  EXPECT_THAT(corpus.Summary(), HasSubstr("2 binary ones dropped"));
}

TEST_F(CorpusTest, OfBinaryOnesAloneTheErrorSaysSo) {
  const std::string spec = "text:" + Write("a.bin", std::string(500, '\0'));
  for (const fs::path& cache : {fs::path(), folder_ / "cache"}) {
    try {
      Corpus::Open({spec}, cache, 1, true);
      ADD_FAILURE() << "opened";
    } catch (const UsageError& e) {
      EXPECT_THAT(e.what(), HasSubstr("holds no document; 1 binary ones were dropped"));
    }
  }
}

TEST_F(CorpusTest, ErrorsShowNoControlBytes) {
  for (const char* line : {"{\"text\": \x1b[31m\x7f}", "{\"te\\u001bt\": 1}"}) {
    try {
      OpenInMemory("jsonl:" + Write("a.jsonl", line));
      ADD_FAILURE() << "opened";
    } catch (const DataError& e) {
      const std::string text = e.what();
      EXPECT_EQ(text.find_first_of("\x1b\x7f"), std::string::npos) << text;
    }
  }
}

TEST_F(CorpusTest, BinaryLinesOfJsonlAreDroppedAndBrokenOnesRefused) {
  std::string junk;
  for (uint64_t i = 0; i < 500; ++i) junk += static_cast<char>(0x80 | (Mix(i) & 0x3F));
  const auto path = Write("a.jsonl", "{\"text\": \"one\"}\n" + junk + "\n");
  EXPECT_EQ(OpenInMemory("jsonl:" + path).stats().binary_documents, 1u);
  EXPECT_THROW(OpenInMemory("jsonl:" + Write("b.jsonl", "no json\n")), DataError);
}

TEST_F(CorpusTest, ExactDuplicatesAreDroppedAndCounted) {
  const Corpus corpus = OpenInMemory(
      "text:" + Write("a.txt", "same\n\nother\n\nsame \n\nsame") + "#blocks");
  EXPECT_THAT(Texts(corpus), ElementsAre("same", "other"));
  EXPECT_EQ(corpus.stats().exact_duplicates, 2u);
}

TEST_F(CorpusTest, NearDuplicatesShareGroupAndPart) {
  std::string text;
  for (uint64_t i = 0; i < 40; ++i) {
    const std::string prose = Prose(i, 120);
    text += prose + "\n\n" + prose + "and one more end\n\nPrefix here " + prose + "\n\n";
  }
  const Corpus corpus = OpenInMemory("text:" + Write("a.txt", text) + "#blocks");
  ASSERT_EQ(corpus.size(), 120u);
  EXPECT_EQ(corpus.stats().groups, 40u);
  for (uint64_t i = 0; i < 120; i += 3) {
    const uint64_t smallest =
        std::min({corpus.document(i).content_hash, corpus.document(i + 1).content_hash,
                  corpus.document(i + 2).content_hash});
    for (uint64_t k = i; k < i + 3; ++k) {
      EXPECT_EQ(corpus.document(k).group, smallest);
      EXPECT_EQ(corpus.document(k).part, SplitOf(smallest));
    }
  }
}

TEST_F(CorpusTest, ShortTextsAreGroupsOfTheirOwn) {
  const Corpus corpus = OpenInMemory(
      "text:" + Write("a.txt", "one two three four\n\none two three five") + "#blocks");
  EXPECT_EQ(corpus.stats().groups, 2u);
}

TEST_F(CorpusTest, ThreadsChangeNothing) {
  std::string text;
  for (uint64_t i = 0; i < 3000; ++i) text += Prose(i % 2500, 30 + i % 7) + "\n\n";
  const auto spec = "text:" + Write("a.txt", text) + "#blocks";
  const Corpus one = Corpus::Open({spec}, "", 1, true);
  const Corpus four = Corpus::Open({spec}, "", 4, true);
  EXPECT_EQ(one.fingerprint(), four.fingerprint());
  EXPECT_EQ(Texts(one), Texts(four));
}

TEST_F(CorpusTest, GroupsDoNotDependOnTheOrder) {
  const std::string a = Prose(1, 90), b = a + "tail of it", c = Prose(2, 50);
  const Corpus forth =
      OpenInMemory("text:" + Write("a.txt", a + "\n\n" + b + "\n\n" + c) + "#blocks");
  const Corpus back =
      OpenInMemory("text:" + Write("b.txt", c + "\n\n" + b + "\n\n" + a) + "#blocks");
  EXPECT_EQ(forth.document(0).group, back.document(2).group);
  EXPECT_EQ(forth.document(1).group, back.document(1).group);
  EXPECT_EQ(forth.document(2).group, back.document(0).group);
}

TEST_F(CorpusTest, PartsCoverTheCorpus) {
  std::string text;
  for (uint64_t i = 0; i < 2000; ++i) text += Prose(i, 8) + "\n\n";
  const Corpus corpus = OpenInMemory("text:" + Write("a.txt", text) + "#blocks");
  std::set<uint64_t> all;
  for (const auto part : {SplitPart::kTrain, SplitPart::kValidation, SplitPart::kTest}) {
    const auto ids = corpus.DocumentsOf(part);
    EXPECT_EQ(ids.size(), corpus.stats().part_documents[static_cast<size_t>(part)]);
    all.insert(ids.begin(), ids.end());
  }
  EXPECT_EQ(all.size(), corpus.size());
  EXPECT_NEAR(corpus.stats().part_documents[2], 600,
              5 * 20.5);  // five standard deviations
}

TEST_F(CorpusTest, CacheGivesTheSameCorpus) {
  const auto spec = "text:" + Write("a.txt", "one\n\ntwo\n\nthree") + "#blocks";
  const Corpus made = Corpus::Open({spec}, folder_ / "cache", 1, true);
  const Corpus read = Corpus::Open({spec}, folder_ / "cache", 1, true);
  EXPECT_FALSE(made.stats().from_cache);
  EXPECT_TRUE(read.stats().from_cache);
  EXPECT_EQ(made.fingerprint(), read.fingerprint());
  EXPECT_EQ(Texts(made), Texts(read));
  EXPECT_EQ(OpenInMemory(spec).fingerprint(), read.fingerprint());
}

TEST_F(CorpusTest, ChangedSourceIsIndexedAgain) {
  const auto spec = "text:" + Write("a.txt", "one\n\ntwo") + "#blocks";
  Corpus::Open({spec}, folder_ / "cache", 1, true);
  Write("a.txt", "one\n\ntwo\n\nthree");
  const Corpus again = Corpus::Open({spec}, folder_ / "cache", 1, true);
  EXPECT_FALSE(again.stats().from_cache);
  EXPECT_EQ(again.size(), 3u);
}

TEST_F(CorpusTest, DamagedCacheIsMadeAgain) {
  const auto spec = "text:" + Write("a.txt", Prose(1, 50) + "\n\ntwo") + "#blocks";
  const Corpus made = Corpus::Open({spec}, folder_ / "cache", 1, true);
  const std::string good = made.fingerprint();
  fs::path cache;
  for (const auto& entry : fs::directory_iterator(folder_ / "cache")) {
    if (entry.is_directory()) cache = entry.path();
  }
  for (const char* name : {"index.bin", "text.bin"}) {
    std::string bytes = ReadFile(cache / name);
    for (const size_t cut : {size_t{0}, bytes.size() / 2, bytes.size() - 1}) {
      fs::remove(cache / name);  // the mapped file of `made` stays whole
      WriteFileAtomic(cache / name, bytes.substr(0, cut));
      EXPECT_EQ(Corpus::Open({spec}, folder_ / "cache", 1, true).fingerprint(), good);
    }
    std::string flipped = bytes;
    flipped[flipped.size() / 2] ^= 1;
    WriteFileAtomic(cache / name, flipped);
    const Corpus again = Corpus::Open({spec}, folder_ / "cache", 1, true);
    EXPECT_FALSE(again.stats().from_cache) << name;
    EXPECT_EQ(again.fingerprint(), good);
  }
}

TEST_F(CorpusTest, ManyOpenersShareOneIndexPass) {
  std::string text;
  for (uint64_t i = 0; i < 500; ++i) text += Prose(i, 30) + "\n\n";
  const auto spec = "text:" + Write("a.txt", text) + "#blocks";
  std::atomic<int> made{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      const Corpus corpus = Corpus::Open({spec}, folder_ / "cache", 1, true);
      made += corpus.stats().from_cache ? 0 : 1;
      EXPECT_EQ(corpus.size(), 500u);
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(made, 1);
}

TEST_F(CorpusTest, WrongUseIsUsageError) {
  const auto path = Write("a.txt", "text");
  EXPECT_THROW(Corpus::Open({}, "", 1, true), UsageError);
  EXPECT_THROW(OpenInMemory("text:" + (folder_ / "missing").string()), UsageError);
  EXPECT_THROW(OpenInMemory(path), UsageError);
  EXPECT_THROW(OpenInMemory("text:"), UsageError);
  EXPECT_THROW(OpenInMemory("text:" + path + "#block"), UsageError);
  EXPECT_THAT(Message("wikitxt:" + path), HasSubstr("wikitext"));
}

TEST_F(CorpusTest, EmptyCorpusIsUsageError) {
  const auto spec = "text:" + Write("a.txt", " \n\n ") + "#blocks";
  EXPECT_THROW(OpenInMemory(spec), UsageError);
  EXPECT_THROW(Corpus::Open({spec}, folder_ / "cache", 1, true), UsageError);
}

// Of two bytes and a line each: what is kept of a record is larger than its text.
TEST_F(CorpusTest, ManyTinyRecordsNeedLittleMemory) {
  std::string text;
  for (int i = 0; i < 1'500'000; ++i) text += "a\n\n";
  const std::string file = Write("tiny.txt", text + "b");
  const auto peak_mib = [] {
    struct rusage usage;
    ::getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss >> 10;
  };
  const auto before = peak_mib();
  const Corpus corpus = OpenInMemory("text:" + file + "#blocks");
  EXPECT_EQ(corpus.size(), 2u);
  EXPECT_LT(peak_mib() - before, 256);
}

}  // namespace
}  // namespace routecast
