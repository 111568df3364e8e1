#include "storage/import_source.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "common/random.h"
#include "storage/npy_reader.h"
#include "storage/trace_format.h"

namespace routecast {
namespace {

constexpr const char* kTokensSuffix = "_token_ids";

// Requests of one .npy or .npz, numbered on from `first`.
uint64_t ReadRequests(const NpyFile& file, Task task, uint64_t first,
                      const ImportSource::Use& use) {
  for (const NpyArray& array : file.arrays()) {
    if (array.name.ends_with(kTokensSuffix)) {
      const std::string of =
          array.name.substr(0, array.name.size() - std::strlen(kTokensSuffix));
      if (file.Find(of) == nullptr) {
        RefuseImport(file.Where(array), "token ids of an array that is not there");
      }
      continue;
    }
    const std::string where = file.Where(array);
    if (array.shape.size() != 3) {
      RefuseImport(where, std::to_string(array.shape.size()) +
                              " dimensions, not [tokens, layers, experts a token]");
    }
    Request request;
    request.request = request.document = first++;
    request.task = task;
    request.tokens = static_cast<uint64_t>(array.shape[0]);
    request.layers = static_cast<uint64_t>(array.shape[1]);
    request.experts = static_cast<uint64_t>(array.shape[2]);
    CheckRequestShape(request.tokens, request.layers, request.experts, where);
    request.ids = file.ReadIntegers<uint16_t>(array, 0, array.num_items);
    if (const NpyArray* tokens = file.Find(array.name + kTokensSuffix)) {
      if (tokens->shape.size() != 1 || tokens->num_items != request.tokens) {
        RefuseImport(file.Where(*tokens), std::to_string(tokens->num_items) +
                                              " token ids for " +
                                              std::to_string(request.tokens) + " tokens");
      }
      request.token_ids = file.ReadIntegers<uint32_t>(*tokens, 0, request.tokens);
    }
    use(TraceOfRequest(std::move(request), where));
  }
  return first;
}

class RequestArrays : public ImportSource {
 public:
  RequestArrays(const fs::path& path, Task task) : task_(task) {
    if (!fs::is_directory(path)) {
      files_ = {path};
      return;
    }
    for (const auto& entry : fs::directory_iterator(path)) {
      const std::string extension = entry.path().extension();
      if (extension == ".npy" || extension == ".npz") files_.push_back(entry.path());
    }
    std::sort(files_.begin(), files_.end());
  }
  void Read(const Use& use) const override {
    uint64_t next = 0;
    for (const fs::path& path : files_) {
      next = ReadRequests(NpyFile(path), task_, next, use);
    }
  }
  void Verify() const override {
    for (const fs::path& path : files_) NpyFile(path).VerifyChecksums();
  }
  std::vector<fs::path> files() const override { return files_; }

 private:
  Task task_;
  std::vector<fs::path> files_;
};

// Some systems return a token's experts in no order; the first is its choice here.
void OrderByProbability(Request* r) {
  const size_t K = r->experts;
  std::vector<size_t> order(K);
  std::vector<uint16_t> ids(K);
  std::vector<float> probs(K);
  for (size_t from = 0; from + K <= r->probs.size(); from += K) {
    const auto likelier = [&](size_t a, size_t b) {
      return r->probs[from + a] > r->probs[from + b];
    };
    std::iota(order.begin(), order.end(), size_t{0});
    if (std::is_sorted(order.begin(), order.end(), likelier)) continue;
    std::stable_sort(order.begin(), order.end(), likelier);
    for (size_t k = 0; k < K; ++k) {
      ids[k] = r->ids[from + order[k]];
      probs[k] = r->probs[from + order[k]];
    }
    std::copy(ids.begin(), ids.end(), r->ids.begin() + static_cast<std::ptrdiff_t>(from));
    std::copy(probs.begin(), probs.end(),
              r->probs.begin() + static_cast<std::ptrdiff_t>(from));
  }
}

}  // namespace

void RefuseImport(const std::string& where, const std::string& rule) {
  throw DataError(ErrorText(where + ": no routing that can be imported", rule,
                            "docs/trace_format.md, \"Import\", says what is read"));
}

uint64_t ImportedGroup(uint64_t document_id) {
  constexpr uint64_t kSalt = 0x696d706f72740001;
  return Mix(kSalt, document_id);
}

void CheckRequestShape(uint64_t tokens, uint64_t layers, uint64_t experts,
                       const std::string& where) {
  if (tokens >= 1 && tokens <= kMaxTokens && layers >= 1 && layers <= kMaxLayers &&
      experts >= 1 && experts <= kMaxTopK) {
    return;
  }
  RefuseImport(where, std::to_string(tokens) + " tokens, " + std::to_string(layers) +
                          " layers, " + std::to_string(experts) +
                          " experts a token; 1 to " + std::to_string(kMaxTokens) + ", " +
                          std::to_string(kMaxLayers) + ", " + std::to_string(kMaxTopK));
}

RoutingTrace TraceOfRequest(Request r, const std::string& where) {
  CheckRequestShape(r.tokens, r.layers, r.experts, where);
  OrderByProbability(&r);
  RoutingTrace trace;
  trace.sequence_id = r.request;
  trace.document_id = r.document;
  trace.group_id = ImportedGroup(r.document);
  trace.task = r.task;
  RoutingSpan& span = trace.decoder;
  const uint64_t T = r.tokens, L = r.layers, K = r.experts;
  span.num_tokens = static_cast<int>(T);
  span.num_layers = static_cast<int>(L);
  span.top_k = K > 1 ? static_cast<int>(K) : 0;
  span.token_ids = r.token_ids;
  span.expert_ids.resize(T * L);
  span.gate_probs.resize(r.probs.empty() ? 0 : T * L);
  span.topk_ids.resize(T * L * span.top_k);
  span.topk_probs.resize(r.probs.empty() ? 0 : T * L * span.top_k);
  for (uint64_t t = 0; t < T; ++t) {
    for (uint64_t l = 0; l < L; ++l) {
      const uint64_t from = (t * L + l) * K, to = l * T + t;
      const auto first = r.ids.begin() + static_cast<std::ptrdiff_t>(from);
      for (uint64_t k = 1; k < K; ++k) {
        const auto end = first + static_cast<std::ptrdiff_t>(k);
        if (std::find(first, end, *end) == end) continue;
        RefuseImport(where, "token " + std::to_string(t) + ", layer " +
                                std::to_string(l) + " has expert " +
                                std::to_string(*end) + " twice; are the axes " +
                                "[tokens, layers, experts a token]?");
      }
      span.expert_ids[to] = *first;
      if (!r.probs.empty()) span.gate_probs[to] = r.probs[from];
      for (int k = 0; k < span.top_k; ++k) {
        span.topk_ids[to * K + k] = r.ids[from + k];
        if (!r.probs.empty()) span.topk_probs[to * K + k] = r.probs[from + k];
      }
    }
  }
  return trace;
}

std::unique_ptr<ImportSource> OpenRequestArrays(const fs::path& path, Task task) {
  return std::make_unique<RequestArrays>(path, task);
}

}  // namespace routecast
