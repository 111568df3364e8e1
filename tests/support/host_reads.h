// Where a training waits for its device: numbers of tensors that the host asks for.
#pragma once

#include <functional>

namespace routecast {

// Tensor::item() and its like that `work` calls on this thread. Those inside LibTorch's
// fused AdamW are not counted: its CPU form reads the step counts, which lie on the host.
int HostReads(const std::function<void()>& work);

}  // namespace routecast
