// Trains a speculation model on recorded routing, data-parallel, and scores it on test
// documents beside its baselines. Thread rule: one thread a rank; every rank makes the
// same calls.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "models/checkpoint.h"
#include "trainer/speculation_evaluation.h"
#include "trainer/speculation_options.h"

namespace routecast {

// A store of another traced model whose routing is learnt, too.
struct FurtherStore {
  std::string name;
  TraceDataset* dataset = nullptr;  // borrowed
};

struct SpeculationJob {
  SpeculationOptions options;
  std::string store;  // what reports call the traces
  // Pre-training: models of these traces share the trunk (joint_model.h). Steps hold
  // windows of all stores, validation is the mean over them, and each one's model goes to
  // out/also-N; scores are of `store`.
  std::vector<FurtherStore> also;
  // Another store of the traced model, whose test documents are asked about, too: a
  // change of domain. No dataset = none.
  FurtherStore shift;
  // Becomes a speculation model's folder (config.json, model.safetensors) with
  // baselines.safetensors, documents.safetensors, results.json and metrics.jsonl; holds
  // state/ while training.
  fs::path out;
  at::Device device = at::Device("cpu");
  // auto: go on with an unfinished run of the same configuration in `out`, refuse
  // another; last_good: the same, without checkpoints that are damaged; never: start
  // anew; else the folder of an unfinished run that one in `out` begins from.
  std::string resume = "auto";
  int64_t bucket_bytes = 1 << 20;  // of gradients that are reduced together
  bool deterministic = true;       // refuse operations whose result may differ by run
  int64_t stop_after = 0;  // as if a stop were requested after this step; 0 = never
  // Seconds of steps and validations, over all processes of the run; after the step that
  // exceeds them the best so far is the result, as if it were the last. 0 = no limit.
  double time_limit = 0;
  int keep_checkpoints = 2;  // newest ones that stay while it trains; >= 1
  bool onnx = false;  // writes out/onnx beside the model; kinds that cannot are refused
  bool quiet = false;
};

// The job's data sets, by the number that groups and windows have.
inline std::vector<TraceDataset*> StoresOf(TraceDataset* dataset,
                                           const std::vector<FurtherStore>& also) {
  std::vector<TraceDataset*> all = {dataset};
  for (const FurtherStore& store : also) all.push_back(store.dataset);
  return all;
}

struct SpeculationResult {
  Json results;       // what results.json holds
  std::string table;  // for people
  // Mean training loss of each step of this process, with the confidence's part.
  std::vector<double> losses;
};

// `routers` (of the traced model) serve the stale gate; empty = none. Throws UsageError
// (nothing to learn from, another run in `out`), DataError (the stale gate's control
// fails) and StoppedError after saving on request.
SpeculationResult TrainSpeculation(const SpeculationJob& job, TraceDataset* dataset,
                                   const std::vector<RouterWeights>& routers,
                                   Communicator* comm);

}  // namespace routecast
