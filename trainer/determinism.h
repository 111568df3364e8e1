// Algorithms whose result may differ from run to run: refused, and what that costs.
#pragma once

#include <functional>
#include <string>

namespace routecast {

// For the process: LibTorch refuses such algorithms, or takes another, while `pinned`.
// Memory that nobody has written yet is left as it is, which LibTorch would fill.
void PinAlgorithms(bool pinned);

// What pinning costs a training pass here: runs `pass` (which waits for its device) both
// ways in turn, and leaves algorithms pinned. A line for people; empty where a stop was
// requested meanwhile (common/stop.h). Passes that take long are few, and announced on
// stderr.
std::string CostOfPinning(const std::function<void()>& pass);

}  // namespace routecast
