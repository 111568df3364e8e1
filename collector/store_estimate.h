// What a store will take on the disk, before anything is computed: for the dry run, and
// for the look at the disk at a job's start. Thread rule: free functions.
#pragma once

#include <cstdint>

#include "collector/chunk_plan.h"
#include "common/files.h"
#include "common/routing.h"
#include "corpus/corpus.h"
#include "corpus/tokenizer.h"
#include "storage/store_config.h"

namespace routecast {

// Tokens of a text before a task makes sequences of them.
struct TextTokens {
  double all = 0;
  double hidden = 0;  // of these, in document groups with router inputs
};
// Of what the plan collects: the documents' lengths by the tokens a byte of its first
// 64 KiB; the groups are those that will be recorded. Reads the plan's documents' entries
// once, and tokenizes only that beginning.
TextTokens EstimatedTokens(const StoreConfig& config, const Corpus& corpus,
                           const ChunkPlan& plan, const Tokenizer& tokenizer);

// What a store takes for so much text, roughly: records of ids, and of the sequences with
// router inputs what is recorded beside them.
uint64_t EstimatedStoreBytes(const StoreConfig& config, const TextTokens& tokens);
// What of the estimate lies beside the ids.
uint64_t EstimatedBytesBesideIds(const StoreConfig& config, const TextTokens& tokens);
// Files that rank 0 of a job of `world` ranks holds open at most, however many chunks it
// collects: of its own shards, and of all where it looks at the whole store.
uint64_t EstimatedOpenFiles(const StoreConfig& config, int world);
// EnvironmentError where these are more than this process may hold open.
void RequireShardFiles(const fs::path& store, const StoreConfig& config, int world);
// Of a sequence with router inputs: bytes a token of `stack` beside its ids (the inputs,
// the decoder's output, attention). 0 where none are recorded, or the stack is not run.
uint64_t BytesBesideIds(const StoreConfig& config, Stack stack);

}  // namespace routecast
