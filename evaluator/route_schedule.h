// Which requests go into one batch? Those whose predicted routes overlap: an expert that
// several of them need is then loaded once. Torch-free. Thread rule: a pure function.
#pragma once

#include <cstddef>
#include <vector>

namespace routecast {

// routes[request][expert of any layer]: the probability that the request needs it; all
// of one length. Returns the order of all requests in which each `batch` neighbours form
// a batch: it starts with the oldest request that is left (so none waits for ever), and
// each next one is the one that adds the fewest experts to the expected union, the oldest
// of equals. REQUIRES batch >= 1.
std::vector<size_t> ScheduleByRoute(const std::vector<std::vector<float>>& routes,
                                    size_t batch);

// The expected number of distinct experts that `members` need together: the sum over
// experts of 1 - prod (1 - p).
double ExpectedUnion(const std::vector<std::vector<float>>& routes,
                     const std::vector<size_t>& members);

}  // namespace routecast
