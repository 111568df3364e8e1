// Whether two stores hold the routing of one model.
#pragma once

#include <string>

#include "common/routing.h"

namespace routecast {

// A store's geometry, and what errors call it.
struct StoreModel {
  std::string name;
  MoeGeometry geometry;
};
// Throws UsageError with both geometries where they differ.
void RequireOneModel(const StoreModel& a, const StoreModel& b);

}  // namespace routecast
