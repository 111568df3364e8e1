// store.json: what a trace store is made of, fixed at creation.
// Thread rule: plain data and pure functions.
#pragma once

#include <string>
#include <vector>

#include "common/routing.h"
#include "common/run_record.h"

namespace routecast {

inline constexpr int kStoreSchema = 1;
// Of stores with a context coder: programs that do not know it refuse them by this.
inline constexpr int kCodedSchema = 2;
// Of stores to which sources were added: programs that know one intake refuse them.
inline constexpr int kIntakesSchema = 3;
// Of stores with the decoder's output (`output` in `record`), with one intake or several.
inline constexpr int kOutputSchema = 4;
// Of stores with attention summaries, with or without all of these.
inline constexpr int kAttentionSchema = 6;
// Of stores whose coder codes top-k ids, too, with or without all of these.
inline constexpr int kCodedTopkSchema = 7;
// Of stores that lack sequences, with or without all of these: other programs take the
// marks of these for sequences of no tokens.
inline constexpr int kLeftOutSchema = 8;
// Attention in one record with the router inputs: never released, not read.
inline constexpr int kDroppedSchema = 5;
inline constexpr int kMaxAttentionHeads = 4096;
// Of a token, layer and head: an entropy and the positions of the strongest keys.
inline constexpr int kAttentionBytesPerHead = 2 + 2 * kStrongestKeys;

// How tokens of Task::kGenerate were chosen. temperature 0 = greedily; such a store's
// configuration does not speak of it.
struct StoreSampling {
  double temperature = 0;
  int top_k = 0;     // 0 = all
  double top_p = 1;  // 1 = all
  uint64_t seed = 0;
};

// Sources that came in together: those of the first command, or those that a later one
// added. Documents and chunks of an intake follow the earlier ones'.
struct StoreIntake {
  std::vector<std::string> sources;  // kind:path as given
  std::string corpus_fingerprint;    // of all documents up to this intake's last
  int64_t num_chunks = 0;
  int64_t max_sequences = 0;  // of this intake; 0 = all

  bool operator==(const StoreIntake&) const = default;
};

struct StoreConfig {
  std::string model;              // as named at collection; for people
  std::string model_fingerprint;  // of configuration and weights
  std::string tokenizer_fingerprint;
  std::string corpus_fingerprint;  // of the documents and their order
  MoeGeometry geometry;
  // ids, probs, topk, hidden, output, attention
  std::vector<std::string> record = {"ids"};
  int top_k = 0;            // K stored a token; 0 without topk
  int attention_heads = 0;  // the model's; 0 without attention
  // False in imported stores whose input had none; store.json says so only then.
  bool token_ids = true;
  std::vector<std::string> data;  // kind:path as given, of all intakes
  Task task = Task::kDenoise;
  int threads = 1;  // per rank; sums depend on it
  std::string dtype = "fp32";
  std::string device_kind = "cpu";  // cpu or cuda
  int expert_parallel = 1;
  int num_shards = 16;
  int64_t num_chunks = 0;
  double hidden_share = 0;    // share of the document groups with router inputs
  int max_length = 512;       // tokens a sequence
  int64_t max_sequences = 0;  // 0 = all; of the last intake
  int batch_size = 0;
  double noise_density = 0;  // share of masked tokens (denoise, generate)
  StoreSampling sampling;
  uint64_t seed = 0;
  // none, zstd (of RocksDB's blocks), context (of expert ids, once the store is complete:
  // context_coder.h) or context+zstd.
  std::string compression = "none";
  // A complete store whose marks name sequences that were left out; store.json says so
  // only then.
  bool left_out = false;
  // Two or more; empty where nothing was added: the fields above are then the only one's.
  std::vector<StoreIntake> intakes;

  Json ToJson() const;
  // Throws DataError naming the key that is missing, of the wrong type or out of range,
  // and UsageError for another schema version (with both versions).
  static StoreConfig FromJson(const Json& json, const std::string& where);
  bool Records(const std::string& what) const;
  // Heads that are summarised in that stack: decoders have self- and cross-attention.
  int AttentionHeads(Stack stack) const {
    return attention_heads * (stack == Stack::kDecoder ? 2 : 1);
  }
  // All intakes: one where nothing was added.
  std::vector<StoreIntake> AllIntakes() const;
  // Makes data, corpus_fingerprint, num_chunks, max_sequences and intakes those of `all`.
  void SetIntakes(const std::vector<StoreIntake>& all);
  bool ContextCoded() const;
  // Whether the coder codes top-k ids as well.
  bool CodesTopk() const { return ContextCoded() && top_k > 1; }
  bool ZstdBlocks() const;
};

// Throws UsageError naming the nearest one where `compression` is none of the above, or
// where a context coder cannot hold so many experts.
void RequireCompression(const std::string& compression, const MoeGeometry& geometry);

// Keys in which two configurations differ, as "key: a, not b"; empty when records made
// under both are the same. `model` and `data` are names, the fingerprints decide: they
// may differ, as may `left_out`, which follows from the records.
std::vector<std::string> Differences(const StoreConfig& stored,
                                     const StoreConfig& wanted);

}  // namespace routecast
