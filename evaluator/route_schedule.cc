#include "evaluator/route_schedule.h"

#include <limits>

namespace routecast {

double ExpectedUnion(const std::vector<std::vector<float>>& routes,
                     const std::vector<size_t>& members) {
  if (members.empty()) return 0;
  double sum = 0;
  for (size_t e = 0; e < routes[members.front()].size(); ++e) {
    double nobody = 1;
    for (size_t member : members) nobody *= 1 - routes[member][e];
    sum += 1 - nobody;
  }
  return sum;
}

std::vector<size_t> ScheduleByRoute(const std::vector<std::vector<float>>& routes,
                                    size_t batch) {
  std::vector<size_t> order;
  std::vector<bool> taken(routes.size(), false);
  std::vector<double> nobody;  // by expert: that no member of the batch needs it
  while (order.size() < routes.size()) {
    const bool first = order.size() % batch == 0;
    size_t best = routes.size();
    double least = std::numeric_limits<double>::infinity();
    for (size_t r = 0; r < routes.size(); ++r) {
      if (taken[r]) continue;
      double added = 0;
      if (!first) {
        for (size_t e = 0; e < nobody.size(); ++e) added += nobody[e] * routes[r][e];
      }
      if (added < least) {
        least = added;
        best = r;
      }
      if (first) break;
    }
    if (first) nobody.assign(routes[best].size(), 1.0);
    for (size_t e = 0; e < nobody.size(); ++e) nobody[e] *= 1 - routes[best][e];
    taken[best] = true;
    order.push_back(best);
  }
  return order;
}

}  // namespace routecast
