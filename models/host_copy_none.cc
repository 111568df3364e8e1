// In a build without CUDA every tensor is there already.
#include <stdexcept>

#include "models/host_copy.h"

namespace routecast {
namespace {

class NoCopier final : public HostCopier {
 public:
  bool Copies(const at::Tensor&) const override { return false; }
  at::Tensor Pinned(int64_t) override {
    throw std::logic_error("no device to copy from");
  }
  std::unique_ptr<CopyFlight> Start(const std::vector<at::Tensor>&,
                                    const std::vector<at::Tensor>&) override {
    throw std::logic_error("no device to copy from");
  }
};

}  // namespace

HostCopier* DeviceCopier() {
  static NoCopier copier;
  return &copier;
}

}  // namespace routecast
