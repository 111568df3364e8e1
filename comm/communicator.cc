#include "comm/communicator.h"

#include <ATen/ATen.h>
#include <mpi.h>

#include <exception>
#include <map>
#include <string_view>

#include "comm/call_watch.h"
#include "comm/mpi_session.h"
#include "comm/mpi_wait.h"
#include "comm/nccl_communicator.h"
#include "common/errors.h"

namespace routecast {
namespace {

class MpiReduce final : public PendingReduce {
 public:
  MpiReduce(const at::Tensor& tensor, MPI_Comm comm, std::shared_ptr<CallWatch> watch,
            double deadline)
      : tensor_(tensor),
        watch_(std::move(watch)),
        call_(watch_->Begin("all-reduce", tensor.nbytes())),
        deadline_(deadline) {
    MPI_Iallreduce(MPI_IN_PLACE, tensor_.data_ptr(), static_cast<int>(tensor_.numel()),
                   tensor_.scalar_type() == at::kDouble ? MPI_DOUBLE : MPI_FLOAT, MPI_SUM,
                   comm, &request_);
  }
  void Wait() override { WaitFor(&request_, watch_.get(), call_, deadline_); }

 private:
  at::Tensor tensor_;
  std::shared_ptr<CallWatch> watch_;
  uint64_t call_;
  double deadline_;
  MPI_Request request_ = MPI_REQUEST_NULL;
};

// A barrier waits for what one rank does alone (training a tokenizer, saving), which
// takes minutes on a busy machine. A rank that died ends the job without it.
constexpr double kBarrierDeadlines = 20;

class MpiCommunicator final : public Communicator {
 public:
  // `comm` is freed with the object unless it is the world's.
  MpiCommunicator(MPI_Comm comm, RankInfo rank, double deadline,
                  std::shared_ptr<CallWatch> watch)
      : comm_(comm), rank_(rank), deadline_(deadline), watch_(std::move(watch)) {}
  ~MpiCommunicator() override {
    int finalized = 0;
    MPI_Finalized(&finalized);
    // Unwinding: the others are not there to free it with.
    const bool alone = finalized || std::uncaught_exceptions() > 0;
    if (comm_ != MPI_COMM_WORLD && !alone) MPI_Comm_free(&comm_);
  }
  RankInfo rank_info() const override { return rank_; }

  std::unique_ptr<PendingReduce> StartAllReduceSum(const at::Tensor& tensor) override {
    const bool number =
        tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
    if (!number || !tensor.is_contiguous() || !tensor.is_cpu()) {
      throw std::logic_error(
          "all-reduce needs a contiguous float32 or float64 tensor on the CPU");
    }
    return std::make_unique<MpiReduce>(tensor, comm_, watch_, deadline_);
  }
  void AllReduceSum(std::span<double> values) override {
    const uint64_t call = watch_->Begin("all-reduce of doubles", values.size_bytes());
    MPI_Request request;
    MPI_Iallreduce(MPI_IN_PLACE, values.data(), static_cast<int>(values.size()),
                   MPI_DOUBLE, MPI_SUM, comm_, &request);
    WaitFor(&request, watch_.get(), call, deadline_);
  }
  void Broadcast(const at::Tensor& tensor, int root) override {
    const uint64_t call = watch_->Begin("broadcast", tensor.nbytes());
    MPI_Request request;
    MPI_Ibcast(tensor.data_ptr(), static_cast<int>(tensor.nbytes()), MPI_BYTE, root,
               comm_, &request);
    WaitFor(&request, watch_.get(), call, deadline_);
  }
  std::vector<std::string> AllGather(const std::string& bytes) override {
    std::vector<int> sizes(static_cast<size_t>(rank_.world));
    const int size = static_cast<int>(bytes.size());
    uint64_t call = watch_->Begin("all-gather of sizes", sizeof size);
    MPI_Request request;
    MPI_Iallgather(&size, 1, MPI_INT, sizes.data(), 1, MPI_INT, comm_, &request);
    WaitFor(&request, watch_.get(), call, deadline_);
    std::vector<int> offsets(sizes.size());
    int total = 0;
    for (size_t r = 0; r < sizes.size(); ++r) {
      offsets[r] = total;
      total += sizes[r];
    }
    std::string all(static_cast<size_t>(total), '\0');
    call = watch_->Begin("all-gather", bytes.size());
    MPI_Iallgatherv(bytes.data(), size, MPI_BYTE, all.data(), sizes.data(),
                    offsets.data(), MPI_BYTE, comm_, &request);
    WaitFor(&request, watch_.get(), call, deadline_);
    std::vector<std::string> parts;
    for (size_t r = 0; r < sizes.size(); ++r) {
      parts.push_back(
          all.substr(static_cast<size_t>(offsets[r]), static_cast<size_t>(sizes[r])));
    }
    return parts;
  }
  std::vector<at::Tensor> AllToAll(const std::vector<at::Tensor>& send,
                                   std::span<const int64_t> counts) override {
    const auto world = static_cast<size_t>(rank_.world);
    const int64_t width = send[0].size(1);
    // Rows are the unit, so that the counts stay small numbers.
    MPI_Datatype row;
    MPI_Type_contiguous(static_cast<int>(width * send[0].element_size()), MPI_BYTE, &row);
    MPI_Type_commit(&row);
    std::vector<int> to(world), to_at(world), from(world), from_at(world);
    int sent = 0, received = 0;
    for (size_t r = 0; r < world; ++r) {
      to[r] = static_cast<int>(send[r].size(0));
      from[r] = static_cast<int>(counts[r]);
      to_at[r] = sent;
      from_at[r] = received;
      sent += to[r];
      received += from[r];
    }
    const at::Tensor out = at::cat(send, 0);
    const at::Tensor in = at::empty({received, width}, out.options());
    const uint64_t call = watch_->Begin("all-to-all", out.nbytes());
    MPI_Request request;
    MPI_Ialltoallv(out.const_data_ptr(), to.data(), to_at.data(), row,
                   in.mutable_data_ptr(), from.data(), from_at.data(), row, comm_,
                   &request);
    WaitFor(&request, watch_.get(), call, deadline_);
    MPI_Type_free(&row);
    std::vector<at::Tensor> parts;
    for (size_t r = 0; r < world; ++r) {
      parts.push_back(in.narrow(0, from_at[r], from[r]));
    }
    return parts;
  }
  void Barrier() override {
    const uint64_t call = watch_->Begin("barrier", 0);
    MPI_Request request;
    MPI_Ibarrier(comm_, &request);
    WaitFor(&request, watch_.get(), call, kBarrierDeadlines * deadline_);
  }

 private:
  MPI_Comm comm_;
  RankInfo rank_;
  double deadline_;
  std::shared_ptr<CallWatch> watch_;  // reductions under way hold it, too
};

class DoneReduce final : public PendingReduce {
 public:
  void Wait() override {}
};

}  // namespace

void RequireOwnDevices(std::span<const std::string> devices, int group_size) {
  const size_t size = group_size > 0 ? static_cast<size_t>(group_size)
                                     : std::max<size_t>(devices.size(), 1);
  std::map<std::string_view, size_t> owners;
  for (size_t r = 0; r < devices.size(); ++r) {
    if (r % size == 0) owners.clear();
    const auto [first, own] = owners.emplace(devices[r], r);
    if (own) continue;
    throw UsageError(ErrorText(
        "two ranks would share a CUDA device, which NCCL refuses",
        "ranks " + std::to_string(first->second) + " and " + std::to_string(r) +
            " have " + devices[r],
        "start a rank a device with --device=cuda, which deals them out, or use "
        "--device=cpu"));
  }
}

std::unique_ptr<PendingReduce> LocalCommunicator::StartAllReduceSum(const at::Tensor&) {
  return std::make_unique<DoneReduce>();
}

std::unique_ptr<Communicator> MakeCommunicator(const MpiSession& session,
                                               at::Device device, double deadline_seconds,
                                               const fs::path& watch_folder) {
  const RankInfo rank = session.rank_info();
  if (rank.world == 1) return std::make_unique<LocalCommunicator>();
  auto watch = std::make_shared<CallWatch>(rank, watch_folder);
  auto mpi =
      std::make_unique<MpiCommunicator>(MPI_COMM_WORLD, rank, deadline_seconds, watch);
  if (device.is_cpu()) return mpi;
  return MakeNcclCommunicator(std::move(mpi), device, deadline_seconds, watch);
}

void RequireGroupDevices(const RankInfo& world, int group_size, const std::string& device,
                         double deadline_seconds) {
  if (group_size == 1) return;
  const auto watch = std::make_shared<CallWatch>(world, fs::path());
  MpiCommunicator all(MPI_COMM_WORLD, world, deadline_seconds, watch);
  RequireOwnDevices(all.AllGather(device), group_size);
}

std::unique_ptr<Communicator> MakeGroupCommunicator(const RankInfo& world, int group_size,
                                                    at::Device device,
                                                    double deadline_seconds) {
  if (group_size < 1 || world.world % group_size != 0) {
    throw std::logic_error("MakeGroupCommunicator: the size does not divide the world");
  }
  if (group_size == 1) return std::make_unique<LocalCommunicator>();
  RankInfo rank = world;
  rank.rank = world.rank % group_size;
  rank.world = group_size;
  MPI_Comm comm;
  MPI_Comm_split(MPI_COMM_WORLD, world.rank / group_size, world.rank, &comm);
  auto watch = std::make_shared<CallWatch>(rank, fs::path());
  auto mpi = std::make_unique<MpiCommunicator>(comm, rank, deadline_seconds, watch);
  if (device.is_cpu()) return mpi;
  return MakeNcclCommunicator(std::move(mpi), device, deadline_seconds, watch);
}

}  // namespace routecast
