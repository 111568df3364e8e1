// A small store whose ids are to be coded.
#pragma once

#include "storage/context_coder.h"
#include "storage/shard_db.h"
#include "tests/storage/store_fixture.h"

namespace routecast {

class ContextStore : public TraceStoreTest {
 protected:
  ContextStore() {
    // Few experts, so that random traces repeat enough for a model to have rows.
    shape_ = {.num_experts = 4, .top_k = 0, .max_tokens = 80, .hidden_share = 0.3};
    config_ = ConfigOf(shape_, 3, kChunks);
    config_.record = {"ids", "probs", "hidden"};
    config_.compression = "context";
  }
  void Code(const StepObserver& on_step = {}) {
    MakeContextModel(store(), config_, on_step);
    ShardOwner(store(), config_, 0, 1, on_step).Compact();
  }
  fs::path At(const std::string& name) const { return folder_.path() / name; }
  int CodedShards(const fs::path& path) const {
    int coded = 0;
    for (int shard = 0; shard < config_.num_shards; ++shard) {
      const ShardDb db(path, shard, config_, ShardDb::Mode::kRead);
      CoderMark mark;
      coded += ReadCoderMark(db, &mark);
    }
    return coded;
  }
};

}  // namespace routecast
