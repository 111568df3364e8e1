// Expert parallelism under mpirun (3 ranks): a group's outputs against one rank with all
// experts, bit for bit.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "collector/expert_parallel.h"
#include "comm/communicator.h"
#include "comm/mpi_session.h"
#include "common/errors.h"
#include "models/expert_execution.h"

namespace routecast {

const MpiSession* session = nullptr;

namespace {

constexpr int kExperts = 8, kWidth = 24, kFf = 40;
const MoeGeometry kGeometry{
    .encoder_layers = 1, .decoder_layers = 1, .num_experts = kExperts, .d_model = kWidth};

// The same weights on every rank.
std::vector<ExpertWeights> AllExperts() {
  at::manual_seed(11);
  std::vector<ExpertWeights> weights;
  for (int i = 0; i < kGeometry.num_keys(); ++i) {
    weights.push_back({at::randn({kFf, kWidth}), at::randn({kWidth, kFf})});
  }
  return weights;
}

class ExpertParallelTest : public testing::Test {
 protected:
  ExpertParallelTest()
      : rank_(session->rank_info()),
        whole_source_(kGeometry, AllExperts()),
        whole_(&whole_source_),
        own_source_(kGeometry, OwnExperts()),
        own_(&own_source_),
        group_(rank_, rank_.world, kGeometry, kWidth, at::kFloat, at::kCPU, &own_) {}

  std::vector<ExpertWeights> OwnExperts() const {
    std::vector<ExpertWeights> weights = AllExperts();
    for (int i = 0; i < kGeometry.num_keys(); ++i) {
      const int expert = ExpertKey::FromIndex(i, kGeometry).expert;
      if (OwnerOf(expert, kExperts, rank_.world) != rank_.rank) {
        weights[static_cast<size_t>(i)] = {};
      }
    }
    return weights;
  }
  void ExpectEqual(int layer, const at::Tensor& tokens, const at::Tensor& ids) {
    const at::Tensor out = group_.Run(layer, tokens, ids);
    EXPECT_TRUE(at::equal(out, whole_.Run(layer, tokens, ids)));
  }
  // Joins what the others still begin, until all have come here.
  void Leave() {
    MPI_Request all;
    MPI_Ibarrier(MPI_COMM_WORLD, &all);
    for (int done = 0; !done; MPI_Test(&all, &done, MPI_STATUS_IGNORE)) group_.Serve();
  }

  const c10::NoGradGuard no_grad_;
  RankInfo rank_;
  ResidentExpertSource whole_source_;
  LocalExpertExecutor whole_;
  ResidentExpertSource own_source_;
  LocalExpertExecutor own_;
  ExpertParallelExecutor group_;
};

TEST_F(ExpertParallelTest, OwnersAreEvenRunsOfNeighbours) {
  std::vector<int> held(3);
  for (int e = 0; e < kExperts; ++e) {
    const int owner = OwnerOf(e, kExperts, 3);
    ++held[static_cast<size_t>(owner)];
    EXPECT_GE(owner, OwnerOf(std::max(e - 1, 0), kExperts, 3));
  }
  for (const int n : held) EXPECT_NEAR(n, 8.0 / 3, 0.7);
}

TEST_F(ExpertParallelTest, AllRanksAtOneLayer) {
  at::manual_seed(100 + rank_.rank);
  ExpectEqual(0, at::randn({17, kWidth}), at::randint(0, kExperts, {17}, at::kLong));
  Leave();
}

// Ranks are at different layers, some have no tokens for anybody, and one expert gets
// everything.
TEST_F(ExpertParallelTest, RanksNeedNotAgreeOnLayerOrNumber) {
  at::manual_seed(200 + rank_.rank);
  for (int round = 0; round < 3 + 2 * rank_.rank; ++round) {
    const int n = 1 + (round * 5 + rank_.rank * 3) % 11;
    const at::Tensor ids = round == 1 ? at::full({n}, 7, at::kLong)
                                      : at::randint(0, kExperts, {n}, at::kLong);
    ExpectEqual((round + rank_.rank) % 2, at::randn({n, kWidth}), ids);
  }
  Leave();
}

TEST_F(ExpertParallelTest, ARankWithoutWorkServesTheOthers) {
  at::manual_seed(300 + rank_.rank);
  if (rank_.rank != 1) {
    for (int round = 0; round < 4; ++round) {
      ExpectEqual(round % 2, at::randn({6, kWidth}),
                  at::randint(0, kExperts, {6}, at::kLong));
    }
  }
  Leave();
}

TEST_F(ExpertParallelTest, NoTokensAtAll) {
  const at::Tensor out = group_.Run(0, at::empty({0, kWidth}), at::empty({0}, at::kLong));
  EXPECT_EQ(out.sizes(), (std::vector<int64_t>{0, kWidth}));
  Leave();
}

// Before anything is loaded, and every rank says so.
TEST(ExpertParallelDevices, TwoRanksOfAGroupOnOneAreNamedOnAllRanks) {
  const RankInfo rank = session->rank_info();
  const std::string own = "host GPU-" + std::to_string(rank.rank);
  EXPECT_NO_THROW(RequireGroupDevices(rank, rank.world, own));
  EXPECT_NO_THROW(RequireGroupDevices(rank, 1, "host GPU-0"));
  try {
    RequireGroupDevices(rank, rank.world, rank.rank == 1 ? own : "host GPU-0");
    FAIL() << "nothing was thrown";
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("ranks 0 and 2 have host GPU-0"),
              std::string::npos)
        << e.what();
  }
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const routecast::MpiSession mpi(&argc, &argv);
  routecast::session = &mpi;
  return RUN_ALL_TESTS();
}
