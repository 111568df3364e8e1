// Early stopping: the parameters of the best validation, and how long ago that was.
// Thread rule: the training thread; every rank offers the same scores.
#pragma once

#include <cstdint>
#include <string>

#include "common/files.h"
#include "common/run_record.h"
#include "models/parameters.h"

namespace routecast {

class BestParameters {
 public:
  // A validation's score, less is better. Keeps a copy of `parameters` where it is the
  // best so far; else a plateau of `plateau_patience` validations counts as one more.
  void Offer(double score, int64_t step, const Parameters& parameters,
             int plateau_patience);
  int64_t step() const { return step_; }  // of the best; 0 = none yet
  std::string file_name() const;          // that Write gives it
  double score() const { return score_; }
  int worse() const { return worse_; }  // validations since the best
  int plateaus() const { return lowered_; }
  // Copies the best into `parameters`; nothing where there is none yet.
  void CopyTo(const Parameters& parameters) const;

  // Rank 0. Write goes before the state that names the best (ToJson): whatever state is
  // found, its best is there.
  void Write(const fs::path& folder) const;
  Json ToJson() const;
  // From ToJson's values and what Write left.
  void Load(const fs::path& folder, const Json& json);

 private:
  int64_t step_ = 0;
  mutable int64_t written_step_ = 0;  // of what lies in the folder
  double score_ = 0;
  int worse_ = 0, lowered_ = 0, since_lowered_ = 0;
  Parameters best_;
};

}  // namespace routecast
