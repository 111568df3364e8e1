// One rank's handle on collective operations over tensors.
// Thread rule: one thread at a time. Every rank makes the same calls in the same order.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/files.h"
#include "common/rank.h"

namespace routecast {

// A reduction under way. Wait() returns when the tensor holds the result.
class PendingReduce {
 public:
  virtual ~PendingReduce() = default;
  // CPU: waits; throws EnvironmentError past the deadline (rank, call, seconds).
  // CUDA: the same, and the current stream is behind it.
  virtual void Wait() = 0;
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual RankInfo rank_info() const = 0;

  // Starts replacing `tensor` by its sum over ranks, in place.
  // REQUIRES: contiguous float32 or float64 on this communicator's device, same size on
  // every rank, kept alive and untouched until Wait(). The order of summation is fixed:
  // at equal world the same bits come out of every run.
  virtual std::unique_ptr<PendingReduce> StartAllReduceSum(const at::Tensor& tensor) = 0;
  // Sums of host doubles, in place; for losses and counts. Host-synchronous.
  virtual void AllReduceSum(std::span<double> values) = 0;
  // Everybody's `tensor` becomes root's. REQUIRES contiguous, same dtype and size.
  virtual void Broadcast(const at::Tensor& tensor, int root) = 0;
  // Rows travel: send[r] [N_r, D] goes to rank r; the result holds, by rank, what came,
  // [counts[r], D]. REQUIRES a contiguous tensor for every rank (of 0 rows too), one
  // dtype and width for all, on this communicator's device, and counts[r] = the rows that
  // rank r sends here. CUDA: the result is complete on the current stream.
  virtual std::vector<at::Tensor> AllToAll(const std::vector<at::Tensor>& send,
                                           std::span<const int64_t> counts) = 0;
  // Each rank's bytes, by rank.
  virtual std::vector<std::string> AllGather(const std::string& bytes) = 0;
  virtual void Barrier() = 0;

  bool Any(bool value) {  // true on all ranks where it is on one
    double sum = value ? 1 : 0;
    AllReduceSum({&sum, 1});
    return sum > 0;
  }
};

// A world of one: the identity.
class LocalCommunicator final : public Communicator {
 public:
  RankInfo rank_info() const override { return {}; }
  std::unique_ptr<PendingReduce> StartAllReduceSum(const at::Tensor&) override;
  void AllReduceSum(std::span<double>) override {}
  void Broadcast(const at::Tensor&, int) override {}
  std::vector<at::Tensor> AllToAll(const std::vector<at::Tensor>& send,
                                   std::span<const int64_t>) override {
    return send;
  }
  std::vector<std::string> AllGather(const std::string& bytes) override {
    return {bytes};
  }
  void Barrier() override {}
};

class MpiSession;
// CPU: MPI. CUDA: NCCL, bootstrapped over MPI (EnvironmentError in a build without CUDA).
// A world of one gets a LocalCommunicator. `deadline_seconds` bounds every wait for
// peers; a barrier, which waits for what one rank does alone, may take 20 times as long.
// Ranks that wait longer leave their last calls in `watch_folder` (call_watch.h), by
// which the missing one is named; empty = none.
std::unique_ptr<Communicator> MakeCommunicator(const MpiSession& session,
                                               at::Device device,
                                               double deadline_seconds = 45,
                                               const fs::path& watch_folder = {});
// The same among `group_size` consecutive ranks (rank / group_size names the group).
// Every rank of the job calls it. REQUIRES that group_size divides the world.
std::unique_ptr<Communicator> MakeGroupCommunicator(const RankInfo& world, int group_size,
                                                    at::Device device,
                                                    double deadline_seconds = 45);

// What a group over NCCL asks of its ranks' devices, as DeviceName (nccl_communicator.h)
// has them, to be known before anything is loaded. Every rank of the job calls it.
// UsageError on all of them where two of a group have the same one.
void RequireGroupDevices(const RankInfo& world, int group_size, const std::string& device,
                         double deadline_seconds = 45);

}  // namespace routecast
