// N ranks against one: the reduced gradient of dealt micro-batches equals the whole
// batch's.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <chrono>
#include <cstring>

#include "comm/mpi_session.h"
#include "common/errors.h"
#include "trainer/gradient_reducer.h"

namespace routecast {
namespace {

const MpiSession* session = nullptr;

TEST(ReducerRanks, DealtMicroBatchesSumToTheWholeBatch) {
  const auto comm = MakeCommunicator(*session, at::kCPU);
  const RankInfo rank = comm->rank_info();
  at::manual_seed(1);  // the same on every rank
  const at::Tensor weight = at::randn({6, 3}).requires_grad_();
  const at::Tensor bias = at::randn({3}).requires_grad_();
  const at::Tensor data = at::randn({8, 2, 6});
  const auto loss = [&](int64_t m) {
    return at::relu(at::matmul(data[m], weight) + bias).pow(2).sum();
  };
  at::Tensor whole = at::zeros({6, 3});
  for (int64_t m = 0; m < 8; ++m) loss(m).backward();
  whole = weight.grad().clone();
  weight.mutable_grad().reset();
  bias.mutable_grad().reset();

  GradientReducer reducer({weight, bias}, comm.get(), /*bucket_bytes=*/8);
  reducer.BeginStep();
  for (int64_t m = rank.rank; m < 8; m += rank.world) {
    if (m + rank.world >= 8) reducer.LastBackward();
    loss(m).backward();
  }
  reducer.Finalize(1);
  EXPECT_TRUE(at::allclose(weight.grad(), whole, 1e-5, 1e-5));
  // Every rank holds the same bits.
  const at::Tensor mine = weight.grad().contiguous();
  for (const std::string& other : comm->AllGather(
           std::string(static_cast<const char*>(mine.data_ptr()), mine.nbytes()))) {
    EXPECT_EQ(0, std::memcmp(other.data(), mine.data_ptr(), other.size()));
  }
}

TEST(CommunicatorRanks, CollectivesAgree) {
  const auto comm = MakeCommunicator(*session, at::kCPU);
  const RankInfo rank = comm->rank_info();
  double values[2] = {1, double(rank.rank)};
  comm->AllReduceSum(values);
  EXPECT_EQ(values[0], rank.world);
  EXPECT_EQ(values[1], rank.world * (rank.world - 1) / 2);
  at::Tensor t = at::full({3}, rank.rank, at::kLong);
  comm->Broadcast(t, rank.world - 1);
  EXPECT_EQ(t[0].item<int64_t>(), rank.world - 1);
  EXPECT_TRUE(comm->Any(rank.rank == 1 || rank.world == 1));
  EXPECT_FALSE(comm->Any(false));
}

TEST(CommunicatorRanks, AMissingPeerIsNamedWithinTheDeadline) {
  const auto comm = MakeCommunicator(*session, at::kCPU, /*deadline_seconds=*/0.3);
  const RankInfo rank = comm->rank_info();
  if (rank.world == 1) return;
  const at::Tensor t = at::ones({4});
  int go = 1;
  if (rank.rank != 0) {  // call only after rank 0 has lost its patience
    MPI_Recv(&go, 1, MPI_INT, 0, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    MakeCommunicator(*session, at::kCPU)->StartAllReduceSum(t)->Wait();
  } else {
    const auto pending = comm->StartAllReduceSum(t);
    try {
      pending->Wait();
      ADD_FAILURE() << "the others have not called yet";
    } catch (const EnvironmentError& e) {
      EXPECT_NE(std::string(e.what()).find("rank 0"), std::string::npos);
    }
    for (int r = 1; r < rank.world; ++r) MPI_Send(&go, 1, MPI_INT, r, 0, MPI_COMM_WORLD);
    for (bool done = false; !done;) {  // ends when the peers come; CTest bounds it
      try {
        pending->Wait();
        done = true;
      } catch (const EnvironmentError&) {
      }
    }
  }
  EXPECT_EQ(t[0].item<float>(), rank.world);
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const routecast::MpiSession mpi(&argc, &argv);
  routecast::session = &mpi;
  return RUN_ALL_TESTS();
}
