#include "trainer/gradient_reducer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <cmath>

#include "common/wide_loops.h"

namespace routecast {
namespace {

ROUTECAST_WIDE void AddAndClear(int64_t count, float* from, double* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += from[i];
    from[i] = 0;
  }
}

ROUTECAST_WIDE void Scaled(const double* from, int64_t count, double scale, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i] * scale);
}

class ArrivalHook final : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit ArrivalHook(std::function<void()> arrived) : arrived_(std::move(arrived)) {}
  void operator()(const at::Tensor&) override { arrived_(); }

 private:
  std::function<void()> arrived_;
};

constexpr int64_t kGrain = 1 << 15;

// One pass where sum.add_(gradient) makes a copy in double first. The gradient is then 0.
void MoveInto(const at::Tensor& gradient, const at::Tensor& sum) {
  float* from = gradient.data_ptr<float>();  // contiguous: a part of a bucket
  double* to = sum.data_ptr<double>();
  at::parallel_for(0, sum.numel(), kGrain, [&](int64_t begin, int64_t end) {
    AddAndClear(end - begin, from + begin, to + begin);
  });
}

void Narrow(const at::Tensor& sum, double scale, const at::Tensor& flat) {
  const double* from = sum.data_ptr<double>();
  float* to = flat.data_ptr<float>();
  at::parallel_for(0, sum.numel(), kGrain, [&](int64_t begin, int64_t end) {
    Scaled(from + begin, end - begin, scale, to + begin);
  });
}

}  // namespace

GradientReducer::GradientReducer(std::vector<at::Tensor> parameters, Communicator* comm,
                                 int64_t bucket_bytes)
    : comm_(comm), parameters_(std::move(parameters)) {
  const int64_t capacity = bucket_bytes / static_cast<int64_t>(sizeof(float));
  size_t end = parameters_.size();
  while (end > 0) {
    size_t begin = end;
    int64_t size = 0;
    while (begin > 0 &&
           (size == 0 || size + parameters_[begin - 1].numel() <= capacity)) {
      size += parameters_[--begin].numel();
    }
    Bucket bucket;
    bucket.flat = at::zeros({size}, parameters_[begin].options().requires_grad(false));
    bucket.sum = at::zeros_like(bucket.flat, at::kDouble);
    const size_t index = buckets_.size();
    int64_t offset = 0;
    for (size_t i = begin; i < end; ++i) {
      at::Tensor& p = parameters_[i];
      p.mutable_grad() = bucket.flat.narrow(0, offset, p.numel()).view_as(p);
      ++bucket.parameters;
      torch::autograd::impl::set_post_acc_grad_hooks(
          p,
          std::make_unique<ArrivalHook>([this, index, gradient = p.grad(),
                                         sum = bucket.sum.narrow(0, offset, p.numel())] {
            Arrived(index, gradient, sum);
          }));
      offset += p.numel();
    }
    buckets_.push_back(std::move(bucket));
    end = begin;
  }
}

GradientReducer::~GradientReducer() {
  for (at::Tensor& p : parameters_) {
    torch::autograd::impl::set_post_acc_grad_hooks(p, nullptr);
    p.mutable_grad().reset();
  }
}

void GradientReducer::BeginStep() {
  for (Bucket& b : buckets_) {
    b.flat.zero_();
    b.sum.zero_();
    b.arrived = 0;
  }
  next_ = 0;
  last_backward_ = false;
}

void GradientReducer::LastBackward() { last_backward_ = true; }

void GradientReducer::Arrived(size_t bucket, const at::Tensor& gradient,
                              const at::Tensor& sum) {
  const c10::NoGradGuard no_grad;
  if (gradient.is_cpu()) {
    MoveInto(gradient, sum);
  } else {
    sum.add_(gradient.reshape({-1}));
    gradient.zero_();
  }
  if (!last_backward_) return;
  ++buckets_[bucket].arrived;
  LaunchReady(/*all=*/false);
}

void GradientReducer::LaunchReady(bool all) {
  while (next_ < buckets_.size() &&
         (all || buckets_[next_].arrived == buckets_[next_].parameters)) {
    buckets_[next_].pending = comm_->StartAllReduceSum(buckets_[next_].sum);
    ++next_;
  }
}

void GradientReducer::Finalize(double scale) {
  LaunchReady(/*all=*/true);
  for (Bucket& b : buckets_) {
    b.pending->Wait();
    b.pending.reset();
    if (b.flat.is_cpu()) {
      Narrow(b.sum, scale, b.flat);
    } else {
      b.flat.copy_(b.sum.mul_(scale));
    }
  }
}

at::Tensor GradientReducer::GradientNorm() const {
  std::vector<at::Tensor> norms;
  for (const Bucket& b : buckets_) norms.push_back(b.flat.norm());
  return at::stack(norms).to(at::kDouble).norm();
}

void GradientReducer::Scale(double factor) {
  for (Bucket& b : buckets_) b.flat.mul_(factor);
}

void GradientReducer::Scale(const at::Tensor& factor) {
  for (Bucket& b : buckets_) b.flat.mul_(factor);
}

}  // namespace routecast
