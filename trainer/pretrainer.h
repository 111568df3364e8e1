// Pre-trains a small Switch Transformer from text, data-parallel.
// Thread rule: one thread a rank; every rank makes the same calls.
#pragma once

#include <string>

#include "comm/communicator.h"
#include "corpus/corpus.h"
#include "trainer/pretrain_options.h"
#include "trainer/switch_losses.h"

namespace routecast {

enum class Resume { kAuto, kLastGood, kNever };

struct PretrainJob {
  PretrainOptions options;
  fs::path out;  // becomes a Hugging Face folder; holds state/ while training
  at::ScalarType save_dtype;
  at::Device device = at::Device("cpu");
  Resume resume = Resume::kAuto;
  int stop_after = 0;  // as if a stop were requested after this step; 0 = never
  bool quiet = false;
};

// Trains the tokenizer (rank 0, once), then the model; writes metrics.jsonl, checkpoints
// in OUT/state, and at the end the model, its tokenizer and pretrain.json with the
// held-out measures of the weights as written. Goes on where an unfinished run of the
// same options stopped; refuses another (UsageError). Throws StoppedError after saving on
// request.
RoutingMeasures Pretrain(const PretrainJob& job, const Corpus& corpus,
                         Communicator* comm);

// EnvironmentError where the disk has no room for the checkpoints that the run keeps: it
// would end at one of them, hours later.
void RequirePretrainingRoom(const PretrainJob& job);

// What --dry_run prints: shapes, parameters, memory, steps, space.
std::string DescribePretraining(const PretrainJob& job, const Corpus& corpus, int world);

}  // namespace routecast
