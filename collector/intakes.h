// Which sources a command means: those that the store has, further ones, or both.
// Thread rule: pure but for looking whether sources are there.
#pragma once

#include <string>
#include <vector>

#include "storage/store_config.h"

namespace routecast {

struct IntakeList {
  std::vector<std::vector<std::string>> sources;  // by intake, for Corpus::OpenIntakes
  bool adds = false;  // the last intake is not in the store yet
  size_t named = 0;  // the last intake that the command names: its limit is the command's
};

// `stored`: intakes of the store, empty where there is none; `data`: --data. Sources are
// known by the text of their specification; those that the store does not know are a
// further intake. Where a stored source is not there any more (moved, another folder to
// start in), `data` names all of them anew, in their order. Throws UsageError where it
// does not.
IntakeList ListIntakes(const std::vector<StoreIntake>& stored,
                       const std::vector<std::string>& data);

}  // namespace routecast
