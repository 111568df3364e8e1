// Foreign routing as traces, one class a format (docs/trace_format.md, "Import"). Foreign
// bytes: every size is held against the file before memory is taken; errors are DataError
// with file and place.
// Thread rule: one thread. Memory: one request (of `npz`: one sequence).
// Shape letters: T tokens, L MoE layers, K experts a token.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/files.h"
#include "common/routing.h"

namespace routecast {

class ImportSource {
 public:
  using Use = std::function<void(RoutingTrace&&)>;
  virtual ~ImportSource() = default;
  // DataError where the input carries checksums and they do not hold.
  virtual void Verify() const {}
  // Every sequence, ids ascending, from the start at each call. Planes have their sizes;
  // expert ids are not held against any number of experts here.
  virtual void Read(const Use& use) const = 0;
  // What the input says of its model; nothing where it is to be seen from the traces.
  virtual std::optional<MoeGeometry> geometry() const { return std::nullopt; }
  // Experts a token, where the input says that without a geometry; else 0.
  virtual int experts_per_token() const { return 0; }
  // Files that the traces come from, for the fingerprint.
  virtual std::vector<fs::path> files() const = 0;
};

// What `export --format=npz` wrote: traces.npz, or a folder with its parts.
std::unique_ptr<ImportSource> OpenExportedArrays(const fs::path& path);
// An integer array [T,L,K] a request: a .npy, a .npz (NAME, and optionally
// NAME_token_ids [T]) or a folder of .npy files. Requests in the order of their names.
std::unique_ptr<ImportSource> OpenRequestArrays(const fs::path& path, Task task);
// A JSON object a line: "routing" [T][L][K], optionally "probs" [T][L][K] and "token_ids"
// [T]. Other keys are not read; a line is a document.
std::unique_ptr<ImportSource> OpenRequestLines(const fs::path& path, Task task);
// index*.csv with columns `row_offset` and `decode_tokens`, and beside it experts*.u8 (or
// .u8.zst): uint8 [rows, num_layers, experts_per_token].
std::unique_ptr<ImportSource> OpenPacked(const fs::path& index, Task task, int num_layers,
                                         int experts_per_token);

// The trace of request number `request`: ids [T,L,K] as serving systems return them, most
// probable first, or in any order where `probs` says it. `probs` has the same shape or is
// empty; `token_ids` [T] or empty.
struct Request {
  uint64_t request = 0, document = 0;
  Task task = Task::kGenerate;
  uint64_t tokens = 0, layers = 0, experts = 0;  // T, L, K
  std::vector<uint16_t> ids;
  std::vector<float> probs;
  std::vector<uint32_t> token_ids;
};
// DataError naming `where` for a shape beyond the format's limits and for an expert that
// a token has twice in a layer (which is how swapped axes show).
RoutingTrace TraceOfRequest(Request request, const std::string& where);
// Checks T, L and K against the format's limits before memory is taken for them.
void CheckRequestShape(uint64_t tokens, uint64_t layers, uint64_t experts,
                       const std::string& where);
// The near-duplicate group of a document that came without one.
uint64_t ImportedGroup(uint64_t document_id);
[[noreturn]] void RefuseImport(const std::string& where, const std::string& rule);

}  // namespace routecast
