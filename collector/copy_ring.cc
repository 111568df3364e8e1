#include "collector/copy_ring.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

namespace routecast {
namespace {

// Of each tensor in the ring: more than any element, and a whole vector of the copy.
constexpr int64_t kAlignment = 256;

int64_t PlaceOf(const at::Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.nbytes());
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

CopyRing::CopyRing(int64_t bytes, HostCopier* copier) : bytes_(bytes), copier_(copier) {}

CopyRing::~CopyRing() {
  for (const Set& set : under_way_) {
    try {
      set.flight->Wait();
    } catch (const std::exception&) {  // it is over, and was said where it was waited for
    }
  }
}

void CopyRing::Add(std::vector<at::Tensor> tensors, Use use) {
  for (at::Tensor& tensor : tensors) tensor = tensor.contiguous();
  if (!Copies(tensors.front())) {
    Finish();
    return use(tensors);
  }
  int64_t size = kAlignment;  // so that no set is empty
  for (const at::Tensor& tensor : tensors) size += PlaceOf(tensor);
  const int64_t begin = Reserve(size);
  Set set{begin, begin + size, {}, nullptr, std::move(use)};
  int64_t at = begin;
  for (const at::Tensor& tensor : tensors) {
    set.on_host.push_back(ring_.narrow(0, at, static_cast<int64_t>(tensor.nbytes()))
                              .view(tensor.scalar_type())
                              .view(tensor.sizes()));
    at += PlaceOf(tensor);
  }
  set.flight = copier_->Start(tensors, set.on_host);
  under_way_.push_back(std::move(set));
}

int64_t CopyRing::Reserve(int64_t size) {
  while (!under_way_.empty() && under_way_.front().flight->Arrived()) UseOldest();
  if (!ring_.defined() || ring_.numel() < size) {
    Finish();
    ring_.reset();  // before the larger one is there
    ring_ = copier_->Pinned(std::max(bytes_, size));
  }
  int64_t place = PlaceFor(size);
  for (; place < 0; place = PlaceFor(size)) UseOldest();
  return place;
}

int64_t CopyRing::PlaceFor(int64_t size) const {
  if (under_way_.empty()) return 0;
  const int64_t oldest = under_way_.front().begin, newest = under_way_.back().end;
  if (newest <= oldest) return newest + size <= oldest ? newest : -1;  // gone round
  if (newest + size <= ring_.numel()) return newest;
  return size <= oldest ? 0 : -1;
}

void CopyRing::UseOldest() {
  under_way_.front().flight->Wait();
  const Set set = std::move(under_way_.front());
  under_way_.pop_front();
  set.use(set.on_host);
}

void CopyRing::HoldStream() {
  // They end in their order.
  if (!under_way_.empty()) under_way_.back().flight->HoldStream();
}

void CopyRing::Finish() {
  while (!under_way_.empty()) UseOldest();
}

}  // namespace routecast
