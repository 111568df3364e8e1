// Expert parallelism: a group of ranks shares the experts of a model that no single one
// holds. Every rank runs its own chunks; at each MoE layer its tokens travel to the ranks
// that hold their experts and come back.
//
// A round: a rank that reaches an MoE layer calls the others, everybody says which layer
// it is at and how many tokens it sends where, the tokens travel (MPI, or NCCL on GPUs),
// each rank runs its experts, the outputs travel back. Ranks may be at different layers,
// and a rank with nothing to run joins with no tokens (Serve). An expert runs the tokens
// of one rank at a time, so a token's output does not depend on the other ranks: records
// are the same to the bit as without the group.
#pragma once

#include <mpi.h>

#include <memory>
#include <vector>

#include "comm/communicator.h"
#include "models/expert_source.h"

namespace routecast {

// Which expert of every layer lives on which rank of a group of `size`: runs of
// neighbours, as even as they go.
inline int OwnerOf(int expert, int num_experts, int size) {
  return static_cast<int>(int64_t{expert} * size / num_experts);
}

// Thread rule: the forward thread, which is the one that initialised MPI.
class ExpertParallelExecutor final : public ExpertExecutor {
 public:
  // Every rank of the job makes one, with the same `group_size` (it divides the world).
  // `local` runs the experts that this rank owns; borrowed. The deadline catches ranks
  // that hang: between its rounds a rank may tokenize a large document or write a chunk.
  ExpertParallelExecutor(const RankInfo& world, int group_size, MoeGeometry geometry,
                         int d_model, at::ScalarType dtype, at::Device device,
                         ExpertExecutor* local, double deadline_seconds = 900);
  ~ExpertParallelExecutor() override;

  Activation activation() const override { return local_->activation(); }
  // Throws EnvironmentError where a rank of the group does not come within the deadline.
  at::Tensor Run(int layer, const at::Tensor& tokens_ND,
                 const at::Tensor& expert_ids_N) override;
  // Joins, without tokens, the rounds that others have begun. A rank that waits for
  // anything else calls it again and again: the others wait for it. Returns whether there
  // was one.
  bool Serve();

 private:
  // What a rank says to another at the start of a round.
  using Call = std::vector<int64_t>;  // layer or -1, then the tokens an expert
  std::vector<Call> Meet(int layer, const std::vector<int64_t>& tokens_of_expert);
  // Sends rows (sorted by expert), runs what comes, returns the outputs in the same
  // order.
  at::Tensor Round(int layer, const at::Tensor& rows_ND,
                   const std::vector<int64_t>& tokens_of_expert);
  at::Tensor RunFor(const Call& call, const at::Tensor& rows_ND);

  RankInfo world_;
  MoeGeometry geometry_;
  int rank_, size_;
  at::Tensor none_0D_;  // no rows
  ExpertExecutor* local_;
  double deadline_;
  MPI_Comm calls_;
  std::unique_ptr<Communicator> data_;
};

}  // namespace routecast
