// A store of synthetic traces on disk, for tests of what reads stores.
#pragma once

#include "models/switch_config.h"
#include "storage/trace_store.h"
#include "tests/evaluator/synthetic_traces.h"

namespace routecast {

// 60 sequences of the small model's geometry, router inputs as wide as the model.
inline void WriteSyntheticStore(const fs::path& folder, const SwitchConfig& model) {
  SyntheticTraceOptions traces;
  traces.geometry = model.geometry();
  traces.leads = model.d_model / model.num_experts;
  traces.tokens = 6;
  traces.source_tokens = 9;
  StoreConfig config;
  config.geometry = model.geometry();
  config.record = {"ids", "probs", "hidden"};
  config.hidden_share = 1;
  config.num_shards = 1;
  config.num_chunks = 1;
  config.max_sequences = 60;
  config.batch_size = 4;
  config.model_fingerprint = config.tokenizer_fingerprint = config.corpus_fingerprint =
      "1";
  TraceStore::CreateOrOpen(folder, config);
  ChunkWriter writer(folder, config, 0, "t");
  for (RoutingTrace& trace : SyntheticTraces(traces, 60, 5)) {
    trace.document_id = trace.group_id = trace.sequence_id;
    for (RoutingSpan* span : {&trace.encoder, &trace.decoder}) {
      span->dropped.assign(span->expert_ids.size(), 0);
      span->margins.assign(span->expert_ids.size(), 1.f);
      for (uint32_t& id : span->token_ids) id %= 90;
    }
    const auto states =
        static_cast<uint64_t>(trace.decoder.num_tokens * trace.decoder.hidden_width);
    for (uint64_t i = 0; i < states; ++i) {
      trace.decoder.output.push_back(
          FloatToBf16(static_cast<float>(ToNormal(Mix(trace.sequence_id, 77, i)))));
    }
    writer.Add(trace);
  }
  writer.Finish();
  ShardOwner(folder, config, 0, 1).Ingest(0, "t");
}

}  // namespace routecast
