// The guess is the head's own best row, wherever its preview keeps it in sight.
#include "models/next_token_guess.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "common/errors.h"

namespace routecast {
namespace {

// Rows of a few directions and some noise, as a trained head's.
at::Tensor Head(int64_t vocab, int64_t width, int64_t directions) {
  at::manual_seed(7);
  return at::matmul(at::randn({vocab, directions}), at::randn({directions, width})) +
         0.05 * at::randn({vocab, width}) + 3;  // all rows share a large part
}

double Agreement(const at::Tensor& head, const NextTokenGuess& guess) {
  const at::Tensor outputs = at::randn({200, head.size(1)});
  const at::Tensor exact = at::matmul(outputs, head.t()).argmax(1);
  return guess(outputs).eq(exact).to(at::kFloat).mean().item<double>();
}

TEST(NextTokenGuessTest, ANarrowHeadIsSeenWhole) {
  const at::Tensor head = Head(500, 48, 48);
  EXPECT_GE(Agreement(head, NextTokenGuess(head)), 0.99);
}

TEST(NextTokenGuessTest, OfAWideHeadTheLargestDirectionsSuffice) {
  const at::Tensor head = Head(3000, 256, 40);
  EXPECT_GE(Agreement(head, NextTokenGuess(head)), 0.99);
}

TEST(NextTokenGuessTest, RowsOfALargerVocabularyAreNeverChosen) {
  const at::Tensor head = Head(130, 32, 32);  // its last block is not full
  const NextTokenGuess plain(head), charged(head, 5000);
  const at::Tensor outputs = at::randn({100, 32});
  EXPECT_TRUE(at::equal(plain(outputs), charged(outputs)));
  EXPECT_LT(charged(outputs).max().item<int64_t>(), 130);
}

TEST(NextTokenGuessTest, OfAShortlistTheBestIdIsNamed) {
  const at::Tensor head = Head(400, 32, 32);
  const std::vector<int64_t> ids = {399, 7, 128, 64, 200};
  const at::Tensor of_rows = at::tensor(ids, at::kLong);
  const at::Tensor outputs = at::randn({100, 3, 32});
  const at::Tensor best =
      at::matmul(outputs, head.index_select(0, of_rows).t()).argmax(-1);
  const at::Tensor named = NextTokenGuess(head, 1000, ids)(outputs);
  ASSERT_EQ(named.sizes(), best.sizes());
  const at::Tensor expected = of_rows.index_select(0, best.flatten()).view({100, 3});
  EXPECT_GE(named.eq(expected).to(at::kFloat).mean().item<double>(), 0.98);
  EXPECT_TRUE(at::isin(named, of_rows).all().item<bool>());
}

TEST(NextTokenGuessTest, NotANumberIsAnIdAllTheSame) {
  const NextTokenGuess guess(Head(100, 16, 16));
  const int64_t id =
      guess(at::full({1, 16}, std::numeric_limits<float>::quiet_NaN())).item<int64_t>();
  EXPECT_GE(id, 0);
  EXPECT_LT(id, 100);
}

TEST(NextTokenGuessTest, AHeadThatIsNotFiniteIsBadData) {
  at::Tensor head = Head(100, 16, 16);
  head[3][5] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(NextTokenGuess{head}, DataError);
}

TEST(NextTokenGuessTest, AnOutputOfAnotherWidthIsADefect) {
  const NextTokenGuess guess(Head(100, 16, 16));
  EXPECT_THROW(guess(at::zeros({1, 15})), std::logic_error);
}

}  // namespace
}  // namespace routecast
