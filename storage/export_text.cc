#include "storage/export_text.h"

#include <sstream>

#include "common/byte_file.h"
#include "common/stop.h"
#include "storage/export.h"

namespace routecast {
namespace {

// [L][T], or with `each` values a token [L][T][shown], the first ones of those.
template <typename T>
Json Layers(const std::vector<T>& plane, const RoutingSpan& span, int each = 0,
            int shown = 0) {
  Json rows = Json::array();
  for (int l = 0; l < span.num_layers; ++l) {
    Json row = Json::array();
    for (int t = 0; t < span.num_tokens; ++t) {
      const size_t i = static_cast<size_t>(l) * span.num_tokens + t;
      if (each == 0) {
        row.push_back(plane[i]);
        continue;
      }
      Json values = Json::array();
      for (int k = 0; k < shown; ++k) values.push_back(plane[i * each + k]);
      row.push_back(std::move(values));
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

Json SpanJson(const RoutingSpan& span, int active) {
  Json json = {{"expert_ids", Layers(span.expert_ids, span)}};
  if (span.token_ids.size() == static_cast<size_t>(span.num_tokens)) {
    json["token_ids"] = span.token_ids;
  }
  if (!span.gate_probs.empty()) json["gate_probs"] = Layers(span.gate_probs, span);
  if (!span.dropped.empty()) json["dropped"] = Layers(span.dropped, span);
  if (!span.margins.empty()) json["margins"] = Layers(span.margins, span);
  const int K = span.top_k;
  if (!span.topk_ids.empty()) {
    if (active > 0) json["active_ids"] = Layers(span.topk_ids, span, K, active);
    json["topk_ids"] = Layers(span.topk_ids, span, K, K);
  }
  if (!span.topk_probs.empty()) json["topk_probs"] = Layers(span.topk_probs, span, K, K);
  return json;
}

// A group's id is a hash of 64 bits: as a number, readers that keep doubles change it.
void WriteJsonLine(const RoutingTrace& trace, int active, std::ostream* out) {
  Json json = {{"sequence_id", trace.sequence_id},
               {"document_id", trace.document_id},
               {"group_id", std::to_string(trace.group_id)},
               {"split", SplitPartName(SplitOf(trace.group_id))},
               {"task", TaskName(trace.task)},
               {"encoder", SpanJson(trace.encoder, active)},
               {"decoder", SpanJson(trace.decoder, active)}};
  *out << json.dump() << '\n';
}

// A column of the first `shown` of `each` values of element `i`; nothing where there are
// none.
template <typename T>
void WriteCsvList(const std::vector<T>& plane, size_t i, int each, int shown,
                  std::ostream* out) {
  *out << ',';
  if (plane.empty()) return;
  for (int k = 0; k < shown; ++k) *out << (k > 0 ? " " : "") << plane[i * each + k];
}

void WriteCsvRows(const RoutingTrace& trace, int active, std::ostream* out) {
  const char* const part = SplitPartName(SplitOf(trace.group_id));
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const RoutingSpan& s = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
    for (int l = 0; l < s.num_layers; ++l) {
      for (int t = 0; t < s.num_tokens; ++t) {
        const size_t i = static_cast<size_t>(l) * s.num_tokens + t;
        *out << trace.sequence_id << ',' << trace.document_id << ',' << StackName(stack)
             << ',' << l << ',' << t << ',';
        if (!s.token_ids.empty()) *out << s.token_ids[t];
        *out << ',' << s.expert_ids[i] << ',';
        if (!s.gate_probs.empty()) *out << s.gate_probs[i];
        *out << ',';
        if (!s.dropped.empty()) *out << int{s.dropped[i]};
        *out << ',';
        if (!s.margins.empty()) *out << s.margins[i];
        WriteCsvList(s.topk_ids, i, s.top_k, active, out);
        WriteCsvList(s.topk_ids, i, s.top_k, s.top_k, out);
        WriteCsvList(s.topk_probs, i, s.top_k, s.top_k, out);
        *out << ',' << trace.group_id << ',' << part << '\n';
      }
    }
  }
}

}  // namespace

int ActiveExperts(const StoreConfig& config) {
  const int k = config.geometry.experts_per_token;
  return k > 1 && config.top_k >= k ? k : 0;
}

std::string LeftOutOfText(const StoreConfig& config) {
  std::string names;
  for (const auto& [part, name] : {std::pair("hidden", "router inputs"),
                                   {"output", "decoder outputs"},
                                   {"attention", "attention summaries"}}) {
    if (config.Records(part)) names += (names.empty() ? "" : ", ") + std::string(name);
  }
  return names;
}

std::vector<fs::path> ExportText(const TraceReader& reader, const fs::path& folder,
                                 const std::string& format) {
  const fs::path path = folder / ("traces." + format);
  AtomicFileWriter file(path, /*expected_bytes=*/0);
  std::ostringstream text;  // of one sequence
  text.precision(9);
  const auto flush = [&] {
    file.Append(text.view().data(), text.view().size());
    text.str("");
  };
  if (format == "csv") {
    text << "sequence_id,document_id,stack,layer,position,token_id,expert_id,gate_prob,"
            "dropped,margin,active_ids,topk_ids,topk_probs,group_id,split\n";
  }
  const int active = ActiveExperts(reader.config());
  reader.Scan(
      [&](RoutingTrace&& trace) {
        ThrowIfStopped("while exporting");
        format == "csv" ? WriteCsvRows(trace, active, &text)
                        : WriteJsonLine(trace, active, &text);
        flush();
      },
      WithHidden::kNo);
  flush();
  file.Commit();
  return {path};
}

}  // namespace routecast
