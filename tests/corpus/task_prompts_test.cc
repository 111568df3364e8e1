// Data sets of tasks become the prompts that T5 was trained on.
#include "corpus/task_prompts.h"

#include <gmock/gmock.h>

#include "common/errors.h"
#include "corpus/corpus.h"
#include "tests/corpus/test_folder.h"

namespace routecast {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<std::string> Prompts(const std::string& task, std::string_view bytes,
                                 const std::string& path) {
  std::vector<std::string> prompts;
  ReadGlue(task, bytes, path, [&](const RawRecord& r) { prompts.emplace_back(r.raw); });
  return prompts;
}

std::string Refusal(const std::string& task, std::string_view bytes,
                    const std::string& path) {
  try {
    Prompts(task, bytes, path);
  } catch (const DataError& e) {
    return e.what();
  }
  return "no error";
}

struct GlueCase {
  const char* name;
  const char* path;
  const char* rows;    // a header and one row
  const char* prompt;  // of the row
};
std::ostream& operator<<(std::ostream& out, const GlueCase& c) { return out << c.name; }

class GlueTask : public testing::TestWithParam<GlueCase> {};

TEST_P(GlueTask, RowsAreItsPrompts) {
  const GlueCase& c = GetParam();
  EXPECT_THAT(Prompts("", c.rows, c.path), ElementsAre(c.prompt));
}

// Columns as in the tsv files of gluebenchmark.com; training and development files, and
// test files where their columns differ.
INSTANTIATE_TEST_SUITE_P(
    AllTasks, GlueTask,
    testing::Values(
        GlueCase{"cola", "CoLA/dev.tsv", "gj04\t1\t\tOur friends .\n",
                 "cola sentence: Our friends ."},
        GlueCase{"cola_test", "CoLA/test.tsv", "index\tsentence\n0\tBill whistled .\n",
                 "cola sentence: Bill whistled ."},
        GlueCase{"sst2", "x.tsv", "sentence\tlabel\nfine film\t1\n",
                 "sst2 sentence: fine film"},
        GlueCase{"sst2_test", "SST-2/test.tsv", "index\tsentence\n0\tfine film\n",
                 "sst2 sentence: fine film"},
        GlueCase{"mrpc", "x.tsv",
                 "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tOne .\tTwo .\n",
                 "mrpc sentence1: One . sentence2: Two ."},
        GlueCase{"stsb", "x.tsv",
                 "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\t"
                 "sentence2\tscore\n0\tnews\tf\t2012\t1\tnone\tnone\tA .\tB .\t5.000\n",
                 "stsb sentence1: A . sentence2: B ."},
        GlueCase{"qqp", "x.tsv",
                 "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tHow?\t"
                 "Why?\t0\n",
                 "qqp question1: How? question2: Why?"},
        GlueCase{
            "mnli", "x.tsv",
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\t"
            "sentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\t"
            "sentence2\tlabel1\tgold_label\n0\t1\t1e\tslate\t(p)\t(h)\t(P)\t(H)\tThe "
            "premise.\tThe hypothesis.\tneutral\tneutral\n",
            "mnli hypothesis: The hypothesis. premise: The premise."},
        GlueCase{"qnli", "x.tsv",
                 "index\tquestion\tsentence\tlabel\n0\tWhy?\tBecause.\tentailment\n",
                 "qnli question: Why? sentence: Because."},
        GlueCase{"rte", "RTE/dev.tsv",
                 "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
                 "rte sentence1: A. sentence2: B."},
        GlueCase{"wnli", "WNLI_dev.tsv",
                 "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n",
                 "wnli sentence1: A. sentence2: B."}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(GlueTest, AHeaderOfSeveralTasksNeedsAName) {
  const char* rows = "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n";
  EXPECT_THAT(Refusal("", rows, "dev.tsv"), HasSubstr("glue:PATH#rte"));
  EXPECT_THAT(Prompts("wnli", rows, "dev.tsv"),
              ElementsAre("wnli sentence1: A. sentence2: B."));
}

TEST(GlueTest, ANamedTaskWhoseColumnIsMissingIsRefused) {
  EXPECT_THAT(Refusal("qqp", "sentence\tlabel\nx\t1\n", "a.tsv"), HasSubstr("question1"));
}

TEST(GlueTest, RowsOfOtherLengthAreRefusedByByte) {
  EXPECT_THAT(Refusal("", "sentence\tlabel\nonly one column\n", "a.tsv"),
              HasSubstr("byte 15: 1 columns"));
  EXPECT_THAT(Refusal("", "a\tb\nc\td\n", "a.tsv"), HasSubstr("no header of a GLUE"));
}

class TaskPromptsTest : public TestFolder {};

TEST_F(TaskPromptsTest, TheTaskIsPartOfTheSpecification) {
  const std::string path =
      Write("dev.tsv", "index\tsentence1\tsentence2\n0\tA long one.\tB.\n");
  const Corpus corpus = Corpus::Open({"glue:" + path + "#rte"}, "", 1, true);
  EXPECT_EQ(corpus.Text(0), "rte sentence1: A long one. sentence2: B.");
  EXPECT_THROW(Corpus::Open({"glue:" + path + "#rt"}, "", 1, true), UsageError);
}

TEST_F(TaskPromptsTest, AParagraphIsOneDocumentOfAPromptAQuestion) {
  const auto path = Write("s.json",
                          R"({"data": [{"title": "T", "paragraphs": [
      {"context": "Context one.", "qas": [{"question": "Q1?"}, {"question": "Q2?"}]},
      {"context": "Context two.", "qas": []}]}]})");
  const Corpus corpus = Corpus::Open({"squad:" + path}, "", 1, true);
  ASSERT_EQ(corpus.size(), 2u);
  EXPECT_EQ(corpus.Text(0),
            "question: Q1? context: Context one.\n\x1equestion: Q2? context: Context "
            "one.");
  EXPECT_EQ(corpus.Text(1), "Context two.");
  EXPECT_THROW(
      Corpus::Open({"squad:" + Write("t.json", "{\"data\": [{}]}")}, "", 1, true),
      DataError);
}

// One large context and many questions would become gigabytes.
TEST_F(TaskPromptsTest, PromptsOutOfProportionAreRefused) {
  std::string json = R"({"data":[{"paragraphs":[{"context":")" +
                     std::string(100'000, 'x') + R"(","qas":[{"question":""})";
  for (int q = 0; q < 2000; ++q) json += R"(,{"question":""})";
  json += "]}]}]}";
  EXPECT_THROW(ReadSquad(json, "bomb", [](const RawRecord&) {}), DataError);
}

}  // namespace
}  // namespace routecast
