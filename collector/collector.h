// routecast-collect: checkpoint + corpus -> trace store, on all ranks.
#pragma once

#include <string>
#include <vector>

#include "common/files.h"
#include "common/rank.h"
#include "common/routing.h"
#include "common/run_record.h"

namespace routecast {

struct CollectOptions {
  std::string model;              // folder of a checkpoint with its tokenizer
  std::vector<std::string> data;  // kind:path; the store is given those it lacks
  std::string store;              // folder of the trace store
  fs::path cache;                 // of the corpus index; empty: STORE.corpus
  Task task = Task::kDenoise;
  std::vector<std::string> record = {"ids", "probs", "hidden", "output"};
  int top_k = 4;              // stored a token where record has topk; at most the model's
  double hidden_share = 0.1;  // share of document groups with router inputs
  int num_shards = 16;        // fixed at creation
  int64_t max_sequences = 0;  // of the sources that came together; 0 = all
  int max_length = 512;       // tokens a sequence; longer documents are cut
  int batch_size = 32;        // sequences a forward pass
  double noise_density = 0.15;  // share of masked tokens in denoise and generate
  int expert_parallel = 1;      // ranks that share the experts; divides the ranks
  // How tokens are chosen where the task is generate: temperature 0 = greedily.
  double temperature = 0;
  int top_k_sampling = 0;  // draw among the k most probable; 0 = all
  double top_p = 1;        // draw among the most probable that reach this sum; 1 = all
  uint64_t sample_seed = 1;
  // A sequence for which the model's arithmetic gives no numbers: refuse (the job ends)
  // or skip (it is left out, and the store says so). A later run may choose otherwise.
  std::string nonfinite = "refuse";
  double max_hours = 0;      // take no chunk after this time; 0 = no limit
  double hang_seconds = 45;  // a rank without a sign of life for so long ends the job
  std::string device = "auto";
  std::string dtype = "fp32";
  std::string compression = "none";
  int threads = 0;  // per rank; 0 = the store's, or cores / ranks if new
  uint64_t seed = 1;
  bool quiet = false;
  bool dry_run = false;
  // By the user: refused where they do nothing.
  bool noise_given = false, top_k_given = false, sample_seed_given = false;

  // Throws UsageError naming the flag.
  void Validate() const;
};

enum class CollectEnd { kComplete, kStopped };

// Every rank calls it with the same options; MPI is initialised. `configuration`: the
// flags for run.json. The records do not depend on the number of ranks. Throws on this
// rank alone: the caller ends the others.
CollectEnd Collect(const CollectOptions& options, const RankInfo& rank,
                   const Json& configuration);

}  // namespace routecast
