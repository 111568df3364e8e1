// The readers on real files (shared/data beside the checkout): how many documents they
// find, against counts that were made without them.
#include <gtest/gtest.h>

#include <algorithm>

#include "corpus/corpus.h"
#include "corpus/task_prompts.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

class RealSamples : public testing::Test {
 protected:
  static fs::path Data() {
    return fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) / "../shared/data";
  }
  void SetUp() override {
    if (!fs::exists(Data() / "wikitext2")) {
      GTEST_SKIP() << "no data beside this checkout: " << Data();
    }
  }
  static Corpus Open(const std::string& kind, const std::string& path) {
    return Corpus::Open({kind + ":" + (Data() / path).string()}, "", 2, true);
  }
};

TEST_F(RealSamples, WikitextHasSixtyArticlesAPart) {
  EXPECT_EQ(Open("wikitext", "wikitext2/valid.txt").size(), 60u);
  EXPECT_EQ(Open("wikitext", "wikitext2/test.txt").size(), 60u);
}

TEST_F(RealSamples, XquadHas240ParagraphsAnd1190Questions) {
  const Corpus corpus = Open("squad", "squad/xquad.en.json");
  ASSERT_EQ(corpus.size(), 240u);
  int64_t prompts = 0;
  for (uint64_t i = 0; i < corpus.size(); ++i) {
    const std::string_view text = corpus.Text(i);
    prompts += 1 + std::count(text.begin(), text.end(), kPromptSeparator);
  }
  EXPECT_EQ(prompts, 1190);
  EXPECT_TRUE(corpus.Text(0).starts_with(
      "question: How many points did the Panthers defense surrender? context: The "
      "Panthers defense gave up just 308 points"));
}

TEST_F(RealSamples, QnliHas5463Rows) {
  const Corpus corpus = Open("glue", "glue/QNLI_dev.tsv");
  EXPECT_EQ(corpus.size() + corpus.stats().exact_duplicates, 5463u);
  EXPECT_EQ(corpus.Text(0),
            "qnli question: What came into force after the new constitution was herald? "
            "sentence: As of that day, the new constitution heralding the Second "
            "Republic came into force.");
}

TEST_F(RealSamples, PackedBooksAreDocuments) {
  const Corpus corpus = Open("text", "prose/*.txt.zst");
  EXPECT_EQ(corpus.size(), 10u);
  // The files' sizes without the CR of CR LF and the blanks around a book.
  EXPECT_EQ(corpus.stats().text_bytes, 6'801'853u);
  EXPECT_EQ(corpus.stats().replaced_bytes, 0u);
}

}  // namespace
}  // namespace routecast
