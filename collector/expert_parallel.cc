#include "collector/expert_parallel.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <exception>
#include <numeric>

#include "comm/mpi_wait.h"

namespace routecast {
namespace {
constexpr int kTag = 23;
}  // namespace

ExpertParallelExecutor::ExpertParallelExecutor(const RankInfo& world, int group_size,
                                               MoeGeometry geometry, int d_model,
                                               at::ScalarType dtype, at::Device device,
                                               ExpertExecutor* local,
                                               double deadline_seconds)
    : world_(world),
      geometry_(geometry),
      rank_(world.rank % group_size),
      size_(group_size),
      none_0D_(at::empty({0, d_model}, at::TensorOptions(device).dtype(dtype))),
      local_(local),
      deadline_(deadline_seconds),
      data_(MakeGroupCommunicator(world, group_size, device, deadline_seconds)) {
  MPI_Comm_split(MPI_COMM_WORLD, world.rank / group_size, world.rank, &calls_);
}

ExpertParallelExecutor::~ExpertParallelExecutor() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  // Unwinding: the others are not there to free it with.
  if (!finalized && std::uncaught_exceptions() == 0) MPI_Comm_free(&calls_);
}

bool ExpertParallelExecutor::Serve() {
  bool served = false;
  for (int called = 1; size_ > 1;) {
    MPI_Iprobe(MPI_ANY_SOURCE, kTag, calls_, &called, MPI_STATUS_IGNORE);
    if (!called) break;
    Round(-1, none_0D_, std::vector<int64_t>(static_cast<size_t>(geometry_.num_experts)));
    served = true;
  }
  return served;
}

at::Tensor ExpertParallelExecutor::Run(int layer, const at::Tensor& tokens_ND,
                                       const at::Tensor& expert_ids_N) {
  const int64_t n = tokens_ND.size(0);
  const at::Tensor ids = expert_ids_N.contiguous();
  // Sorted by expert, stable: a group is the one that a single rank would run.
  const at::Tensor order = std::get<1>(ids.sort(/*stable=*/true, 0, false));
  const at::Tensor counts = at::bincount(ids, {}, geometry_.num_experts);
  const int64_t* count = counts.const_data_ptr<int64_t>();
  const at::Tensor order_device = order.to(tokens_ND.device());
  const at::Tensor out =
      Round(layer, tokens_ND.index_select(0, order_device),
            std::vector<int64_t>(count, count + geometry_.num_experts));
  at::Tensor inverse = at::empty({n}, at::kLong);
  inverse.index_put_({order}, at::arange(n, at::kLong));
  return out.index_select(0, inverse.to(tokens_ND.device()));
}

at::Tensor ExpertParallelExecutor::Round(int layer, const at::Tensor& rows_ND,
                                         const std::vector<int64_t>& tokens_of_expert) {
  const std::vector<Call> calls = Meet(layer, tokens_of_expert);
  std::vector<at::Tensor> send;
  std::vector<int64_t> come, leave(static_cast<size_t>(size_));
  for (int e = 0; e < geometry_.num_experts; ++e) {
    leave[static_cast<size_t>(OwnerOf(e, geometry_.num_experts, size_))] +=
        tokens_of_expert[static_cast<size_t>(e)];
  }
  int64_t at = 0;
  for (size_t r = 0; r < calls.size(); ++r) {
    send.push_back(rows_ND.narrow(0, at, leave[r]).contiguous());
    at += leave[r];
    come.push_back(std::accumulate(calls[r].begin() + 1, calls[r].end(), int64_t{0}));
  }
  const std::vector<at::Tensor> guests = data_->AllToAll(send, come);
  std::vector<at::Tensor> outputs;
  for (size_t r = 0; r < calls.size(); ++r)
    outputs.push_back(RunFor(calls[r], guests[r]));
  return at::cat(data_->AllToAll(outputs, leave), 0);
}

at::Tensor ExpertParallelExecutor::RunFor(const Call& call, const at::Tensor& rows_ND) {
  if (rows_ND.size(0) == 0) return none_0D_;
  std::vector<int64_t> ids;
  for (int e = 0; e < geometry_.num_experts; ++e) {
    ids.insert(ids.end(), static_cast<size_t>(call[static_cast<size_t>(e) + 1]), e);
  }
  return local_->Run(static_cast<int>(call[0]), rows_ND, at::tensor(ids, at::kLong))
      .contiguous();
}

std::vector<ExpertParallelExecutor::Call> ExpertParallelExecutor::Meet(
    int layer, const std::vector<int64_t>& tokens_of_expert) {
  const auto size = static_cast<size_t>(size_);
  std::vector<Call> mine(size, Call(tokens_of_expert.size() + 1)), theirs(mine);
  for (size_t r = 0; r < size; ++r) mine[r][0] = layer;
  for (int e = 0; e < geometry_.num_experts; ++e) {
    const auto at = static_cast<size_t>(e);
    mine[static_cast<size_t>(OwnerOf(e, geometry_.num_experts, size_))][at + 1] =
        tokens_of_expert[at];
  }
  // Each pair's calls keep their order, so the rounds of all ranks fit together.
  std::vector<MPI_Request> requests;
  for (int r = 0; r < size_; ++r) {
    const auto at = static_cast<size_t>(r);
    if (r == rank_) {
      theirs[at] = mine[at];
      continue;
    }
    const int count = static_cast<int>(mine[at].size());
    requests.resize(requests.size() + 2);
    MPI_Irecv(theirs[at].data(), count, MPI_INT64_T, r, kTag, calls_,
              &requests[requests.size() - 2]);
    MPI_Isend(mine[at].data(), count, MPI_INT64_T, r, kTag, calls_, &requests.back());
  }
  for (MPI_Request& request : requests)
    WaitFor(&request, "expert exchange", world_, deadline_);
  return theirs;
}

}  // namespace routecast
