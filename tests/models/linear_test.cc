// The engine's matrix product against LibTorch's in double precision.
#include "models/linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <set>
#include <utility>

#include "models/onednn_linear.h"

namespace routecast {
namespace {

struct Shape {
  int64_t rows, depth, columns;
};

class LinearTest : public testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    at::manual_seed(4);
    const Shape s = GetParam();
    x_ = at::randn({s.rows, s.depth});
    weight_ = at::randn({s.columns, s.depth});
  }
  at::Tensor x_, weight_;
};

double LargestError(const at::Tensor& got, const at::Tensor& x, const at::Tensor& w) {
  const at::Tensor want = at::linear(x.to(at::kDouble), w.to(at::kDouble));
  return ((got.to(at::kDouble) - want).abs() / (1 + want.abs())).max().item<double>();
}

TEST_P(LinearTest, Float32EqualsTheReference) {
  EXPECT_LT(LargestError(OwnLinear(x_, weight_), x_, weight_), 1e-4);
}

TEST_P(LinearTest, Bfloat16IsTheRoundedReference) {
  const at::Tensor x = x_.to(at::kBFloat16), w = weight_.to(at::kBFloat16);
  const at::Tensor got = OwnLinear(x, w);
  EXPECT_EQ(got.scalar_type(), at::kBFloat16);
  EXPECT_LT(LargestError(got, x, w),
            1.0 / 128);  // half a unit of the last place, and a tie
}

TEST_P(LinearTest, ARowDependsOnNoOther) {
  const at::Tensor all = OwnLinear(x_, weight_);
  for (int64_t r : {int64_t{0}, x_.size(0) / 2, x_.size(0) - 1}) {
    const at::Tensor alone = OwnLinear(x_.narrow(0, r, 1).contiguous(), weight_);
    EXPECT_TRUE(at::equal(alone[0], all[r])) << "row " << r;
  }
}

TEST_P(LinearTest, ThreadsChangeNoBit) {
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor one = OwnLinear(x_, weight_);
  at::set_num_threads(3);
  const at::Tensor three = OwnLinear(x_, weight_);
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(one, three));
}

// One, fewer and more rows than a tile, depths of no whole vector and of several blocks,
// columns of no whole tile.
INSTANTIATE_TEST_SUITE_P(Shapes, LinearTest,
                         testing::Values(Shape{1, 8, 4}, Shape{2, 7, 3}, Shape{3, 16, 5},
                                         Shape{5, 100, 9}, Shape{7, 1030, 6},
                                         Shape{20, 2053, 33}, Shape{97, 768, 50},
                                         Shape{1, 768, 3073}),
                         [](const auto& info) {
                           return std::to_string(info.param.rows) + "x" +
                                  std::to_string(info.param.depth) + "x" +
                                  std::to_string(info.param.columns);
                         });

// Rows that oneDNN takes in one, in several and in blocks with a rest.
TEST(LinearDispatch, ManyRowsEqualTheReference) {
  at::manual_seed(5);
  const at::Tensor w = at::randn({24, 40});
  for (const int64_t rows : {96, 97, 128, 1000, 1024, 1100, 9300}) {
    const at::Tensor x = at::randn({rows, 40});
    EXPECT_LT(LargestError(Linear(x, w), x, w), 1e-4) << rows;
    EXPECT_TRUE(at::equal(Linear(x, w), Linear(x, w))) << rows;
  }
}

TEST(LinearDispatch, OneDnnEqualsTheReferenceAlsoTransposed) {
  if (!at::hasMKLDNN()) return;  // LibTorch of another machine
  at::manual_seed(6);
  const at::Tensor x = at::randn({128, 40}), w = at::randn({24, 40});
  EXPECT_LT(LargestError(OneDnnLinear(x, w), x, w), 1e-4);
  const at::Tensor turned = at::randn({40, 24}).t();
  EXPECT_LT(LargestError(OneDnnLinear(x, turned), x, turned), 1e-4);
}

size_t NumThreads() {
  namespace fs = std::filesystem;
  return static_cast<size_t>(
      std::distance(fs::directory_iterator("/proc/self/task"), fs::directory_iterator()));
}

// Compiled without OpenMP at::parallel_for compiles as well, and runs on one thread.
TEST(LinearDispatch, OwnLoopsRunOnAsManyThreadsAsTheyAreGiven) {
  const int given = at::get_num_threads();
  at::set_num_threads(given + 2);  // more than any test before has started
  at::Tensor x = at::empty({64, 512}), w = at::empty({512, 512});
  std::fill_n(x.data_ptr<float>(), x.numel(), 1.F);  // the library would start them
  std::fill_n(w.data_ptr<float>(), w.numel(), 1.F);
  const size_t before = NumThreads();
  OwnLinear(x, w);
  EXPECT_EQ(NumThreads(), before + 2);
  at::set_num_threads(given);
}

// Experts have any number of rows; code is made for few of them.
TEST(LinearDispatch, FewNumbersOfRowsReachOneDnn) {
  std::set<int64_t> asked;
  for (int64_t rows = 1; rows < 20000; ++rows) {
    const int64_t taken = OneDnnRows(rows);
    EXPECT_GT(taken, rows / 2 < 4096 ? rows / 2 : 4096);
    EXPECT_LT(taken, rows + (rows <= 256 ? 16 : 64));
    asked.insert(taken);
  }
  EXPECT_EQ(asked.size(), 35u);
}

TEST(LinearDispatch, ReluOfAProductIsTheSameInOne) {
  at::manual_seed(7);
  const at::Tensor w = at::randn({24, 40});
  for (const int64_t rows : {3, 97, 1000, 1100}) {
    const at::Tensor x = at::randn({rows, 40});
    EXPECT_TRUE(at::equal(LinearRelu(x, w), at::relu(Linear(x, w)))) << rows;
    const at::Tensor narrow = x.to(at::kBFloat16), weight = w.to(at::kBFloat16);
    EXPECT_TRUE(at::equal(LinearRelu(narrow, weight), at::relu(Linear(narrow, weight))));
  }
  const at::Tensor x = at::randn({200, 40}).requires_grad_(true);
  LinearRelu(x, w).sum().backward();
  EXPECT_TRUE(x.grad().defined());
}

// Blocks with and without a rest, with a bias, x of more than two dimensions.
TEST(TrainedLinearTest, GradientsEqualTheReference) {
  for (const int64_t tokens : {20, 32, 90, 600}) {
    at::manual_seed(7);
    const at::Tensor x = at::randn({4, tokens, 40}).requires_grad_(true);
    const at::Tensor w = at::randn({24, 40}).requires_grad_(true);
    const at::Tensor b = at::randn({24}).requires_grad_(true);
    const at::Tensor to = at::randn({4, tokens, 24});
    (TrainedLinear(x, w, b) * to).sum().backward();
    const at::Tensor x64 = x.detach().to(at::kDouble).requires_grad_(true);
    const at::Tensor w64 = w.detach().to(at::kDouble).requires_grad_(true);
    const at::Tensor b64 = b.detach().to(at::kDouble).requires_grad_(true);
    (at::linear(x64, w64, b64) * to).sum().backward();
    for (const auto& [got, want] : {std::pair{x, x64}, {w, w64}, {b, b64}}) {
      EXPECT_TRUE(at::allclose(got.grad().to(at::kDouble), want.grad(), 1e-4, 1e-3))
          << tokens;
    }
  }
}

// Three members, with and without a bias: each is what it is alone.
TEST(TrainedLinearTest, MembersSideBySideAreEachTheirOwn) {
  for (const int64_t rows : {20, 128, 300}) {
    at::manual_seed(9);
    const at::Tensor x = at::randn({3, rows, 40}).requires_grad_(true);
    const at::Tensor w = at::randn({3, 24, 40}).requires_grad_(true);
    const at::Tensor b = at::randn({3, 24}).requires_grad_(true);
    const at::Tensor to = at::randn({3, rows, 24});
    const at::Tensor out = TrainedLinear(x, w, b);
    (out * to).sum().backward();
    EXPECT_TRUE(at::allclose(TrainedLinear(x, w) + b.unsqueeze(1), out, 1e-4, 1e-4));
    for (int64_t m = 0; m < 3; ++m) {
      const at::Tensor x1 = x.detach()[m].clone().requires_grad_(true);
      const at::Tensor w1 = w.detach()[m].clone().requires_grad_(true);
      const at::Tensor b1 = b.detach()[m].clone().requires_grad_(true);
      const at::Tensor alone = at::linear(x1, w1, b1);
      EXPECT_TRUE(at::allclose(out[m], alone, 1e-4, 1e-4)) << rows;
      (alone * to[m]).sum().backward();
      EXPECT_TRUE(at::allclose(x.grad()[m], x1.grad(), 1e-4, 1e-4)) << rows;
      EXPECT_TRUE(at::allclose(w.grad()[m], w1.grad(), 1e-4, 1e-3)) << rows;
      EXPECT_TRUE(at::allclose(b.grad()[m], b1.grad(), 1e-4, 1e-3)) << rows;
    }
  }
}

TEST(TrainedLinearTest, WithoutBiasOrWithOneGradientAlone) {
  at::manual_seed(8);
  const at::Tensor x = at::randn({256, 40}), w = at::randn({24, 40});
  const at::Tensor x2 = x.clone().requires_grad_(true);
  const at::Tensor w2 = w.clone().requires_grad_(true);
  TrainedLinear(x2, w2).sum().backward();
  const at::Tensor x3 = x.clone().requires_grad_(true);
  TrainedLinear(x3, w).sum().backward();
  const at::Tensor w3 = w.clone().requires_grad_(true);
  TrainedLinear(x, w3).sum().backward();
  EXPECT_TRUE(at::allclose(x2.grad(), w.sum(0).expand({256, 40}), 1e-4, 1e-4));
  EXPECT_TRUE(at::allclose(w2.grad(), x.sum(0).expand({24, 40}), 1e-4, 1e-3));
  EXPECT_TRUE(at::equal(x2.grad(), x3.grad()));
  EXPECT_TRUE(at::equal(w2.grad(), w3.grad()));
}

TEST(TrainedLinearTest, MakesNoGraphWhereNoneIsWanted) {
  const at::Tensor x = at::randn({256, 40});
  const at::Tensor w = at::randn({24, 40}).requires_grad_(true);
  {
    const c10::AutoGradMode no_gradient(false);
    EXPECT_FALSE(TrainedLinear(x, w).requires_grad());
  }
  EXPECT_TRUE(TrainedLinear(x, w).requires_grad());
}

TEST(LinearDispatch, GradientsFlow) {
  const at::Tensor x = at::randn({4, 16}).requires_grad_(true);
  const at::Tensor w = at::randn({6, 16}).requires_grad_(true);
  Linear(x, w).sum().backward();
  EXPECT_TRUE(x.grad().defined());
  EXPECT_TRUE(w.grad().defined());
}

TEST(LinearDispatch, LeadingDimensionsStay) {
  const at::Tensor x = at::randn({2, 3, 16}), w = at::randn({5, 16});
  const at::Tensor got = Linear(x, w);
  EXPECT_EQ(got.sizes(), (std::vector<int64_t>{2, 3, 5}));
  EXPECT_TRUE(at::allclose(got, at::linear(x, w), 1e-5, 1e-5));
}

// A view whose rows do not lie one behind the other, as a gather's result may be.
TEST(LinearDispatch, StridedInputIsNotMisread) {
  const at::Tensor x = at::randn({16, 4}).t(), w = at::randn({5, 16});
  EXPECT_TRUE(at::allclose(Linear(x, w), at::linear(x, w), 1e-5, 1e-5));
}

}  // namespace
}  // namespace routecast
