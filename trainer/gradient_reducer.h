// Gradients of all parameters in flat buckets, summed over ranks while backward still
// runs. Parameters' gradients are views into the buckets; a hook counts them in, and a
// bucket leaves when its last gradient of the step's last micro-batch arrived, strictly
// in bucket order, so that every rank makes the same calls. Parameters are bucketed in
// reverse: the last layers' gradients come first. Thread rule: the training thread (hooks
// run in backward on the CPU's).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "comm/communicator.h"

namespace routecast {

class GradientReducer {
 public:
  // REQUIRES float32 leaf parameters that require gradients. Borrows `comm`.
  GradientReducer(std::vector<at::Tensor> parameters, Communicator* comm,
                  int64_t bucket_bytes = 1 << 20);
  ~GradientReducer();
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  // Zeroes the gradients; call before the step's first backward.
  void BeginStep();
  // Call before the step's last backward on this rank: buckets may leave from now on, on
  // each rank as many as its micro-batch completes. So no other collective may be called
  // until Finalize: ranks would match it with each other's buckets.
  void LastBackward();
  // Sends what has not left (parameters without a gradient count as zero), waits for all,
  // and multiplies by `scale`. Afterwards every rank holds the same bits.
  void Finalize(double scale);
  // L2 norm of all gradients, a float64 scalar on their device: the host does not wait.
  at::Tensor GradientNorm() const;
  void Scale(double factor);
  void Scale(const at::Tensor& factor);  // a scalar on their device

 private:
  struct Bucket {
    at::Tensor flat;  // float32, what .grad() views
    at::Tensor sum;   // float64, over the step's micro-batches
    int64_t parameters = 0, arrived = 0;
    std::unique_ptr<PendingReduce> pending;
  };
  void Arrived(size_t bucket, const at::Tensor& gradient, const at::Tensor& sum);
  void LaunchReady(bool all);

  Communicator* comm_;
  std::vector<Bucket> buckets_;
  std::vector<at::Tensor> parameters_;
  size_t next_ = 0;  // first bucket that has not left
  bool last_backward_ = false;
};

}  // namespace routecast
