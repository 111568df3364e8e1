// Routing of other systems as a trace store (docs/trace_format.md, "Import").
// Thread rule: one thread. Memory: one request and one chunk. Reads the input twice: to
// learn its shape, and to write.
#pragma once

#include <string>

#include "storage/trace_store.h"

namespace routecast {

struct ImportOptions {
  std::string format = "npz";      // npz, arrays, jsonl or packed
  std::string model = "imported";  // the name of the model, of which its fingerprint is
                                   // made: imports of one model merge
  Task task = Task::kGenerate;     // of what does not say its own
  int num_experts = 0;             // a layer; 0 = of the input, or its largest id + 1
  // Of packed, which does not say them; of arrays and jsonl a check, 0 = none.
  int layers = 0;  // MoE layers
  int experts_per_token = 0;
  std::string compression = "none";
};

struct ImportReport {
  uint64_t sequences = 0, tokens = 0;
  uint64_t flat_sequences = 0;  // of fewer tokens than layers, as swapped axes make them
  StoreConfig config;           // of the new store
};

// Makes the store `out` of what is at `path`. UsageError: unknown format, missing input,
// a number of experts below an id, sizes that are not the input's, `out` is there,
// nothing to import. DataError: damage, sequences of different shapes, ids that do not
// ascend.
ImportReport ImportTraces(const fs::path& path, const fs::path& out,
                          const ImportOptions& options, StepObserver on_step = {});

// The first of its two readings: what ImportTraces would refuse, and what it would make.
// Writes nothing.
ImportReport CheckImport(const fs::path& path, const fs::path& out,
                         const ImportOptions& options);

}  // namespace routecast
