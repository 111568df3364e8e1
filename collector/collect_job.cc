#include "collector/collect_job.h"

#include <algorithm>
#include <optional>

#include "collector/life_signs.h"
#include "common/stop.h"

namespace routecast {
namespace {
constexpr size_t kMaxRanksListed = 8;  // in a line of progress
}  // namespace

CollectJob::CollectJob(const CollectParts& parts, const RankInfo& rank,
                       const std::deque<uint32_t>& todo)
    : parts_(parts),
      rank_(rank),
      chunks_of_rank_(static_cast<size_t>(rank.world), 0),
      total_(static_cast<uint64_t>(parts.config->num_chunks)),
      num_done_(total_ - todo.size()),
      resumed_(num_done_ > 0),
      progress_("collect", "chunks", total_, parts.options->quiet || !rank.is_root()),
      exchange_(
          rank, parts.config->num_shards, todo,
          {[this](uint32_t c) { Ingest(c); }, [this](const ChunkResult& r) { Done(r); },
           [this] {
             ShowLife();
             if (parts_.idle) parts_.idle();
           }}) {
  for (const Chunk& chunk : parts.plan->chunks) text_bytes_ += chunk.text_bytes;
  bytes_done_ = text_bytes_;
  for (const uint32_t c : todo) bytes_done_ -= parts.plan->chunks[c].text_bytes;
}

void CollectJob::Run() {
  while (Serving()) {
    const std::optional<uint32_t> chunk = exchange_.Next();
    if (!chunk) break;
    Compute(*chunk);
    if (OutOfTime()) break;
  }
  if (StopRequested() || OutOfTime()) exchange_.Close();
  exchange_.Drain();
}

Json CollectJob::Results() const {
  const double seconds = std::max(progress_.seconds(), 1e-9);
  Json results = {{"chunks", num_done_},
                  {"num_chunks", total_},
                  {"sequences", sum_.sequences},
                  {"tokens", sum_.tokens},
                  {"padding_share", PaddingShare()},
                  {"chunks_of_rank", chunks_of_rank_},
                  {"record_bytes", sum_.record_bytes},
                  {"seconds", seconds},
                  {"tokens_per_second", static_cast<double>(sum_.tokens) / seconds}};
  if (sum_.left_out > 0) results["left_out"] = {{"sequences", sum_.left_out}};
  return results;
}

bool CollectJob::OutOfTime() const {
  const double hours = parts_.options->max_hours;
  return hours > 0 && progress_.seconds() > hours * 3600;
}

bool CollectJob::Serving() {
  ShowLife();
  exchange_.Serve();
  return !StopRequested();
}

void CollectJob::Ingest(uint32_t chunk) {
  const auto begin = SpanLog::Clock::now();
  parts_.owner->Ingest(chunk, parts_.token);
  parts_.spans->Write("ingest", begin, {{"chunk", chunk}});
}

void CollectJob::Compute(uint32_t chunk) {
  const auto begin = SpanLog::Clock::now();
  ChunkWriter writer(parts_.options->store, *parts_.config, chunk, parts_.token);
  ChunkResult result;
  result.rank = rank_.rank;
  result.chunk = chunk;
  const int64_t computed = parts_.runner->computed_tokens();
  const bool whole = parts_.runner->Run(
      chunk, [this] { return Serving(); },
      [&](const RoutingTrace& trace) {
        const int tokens = trace.encoder.num_tokens + trace.decoder.num_tokens;
        ++(tokens > 0 ? result.sequences : result.left_out);
        result.tokens += tokens;
        writer.Add(trace);
        if (rank_.is_root()) ShowProgress(result);
      });
  if (!whole) {
    parts_.spans->Write("abandoned", begin, {{"chunk", chunk}});
    exchange_.Abandoned(chunk);
    return;
  }
  result.computed_tokens = parts_.runner->computed_tokens() - computed;
  result.record_bytes = static_cast<int64_t>(writer.record_bytes());
  writer.Finish();
  parts_.spans->Write(
      "chunk", begin,
      {{"chunk", chunk}, {"sequences", result.sequences}, {"tokens", result.tokens}});
  exchange_.Staged(result);
}

void CollectJob::Done(const ChunkResult& r) {
  ++num_done_;
  ++chunks_of_rank_[static_cast<size_t>(r.rank)];
  sum_.sequences += r.sequences;
  sum_.left_out += r.left_out;
  sum_.tokens += r.tokens;
  sum_.computed_tokens += r.computed_tokens;
  sum_.record_bytes += r.record_bytes;
  bytes_done_ += parts_.plan->chunks[static_cast<size_t>(r.chunk)].text_bytes;
  ShowProgress({});
}

void CollectJob::ShowProgress(const ChunkResult& under_way) {
  ChunkResult all = sum_;
  all.sequences += under_way.sequences;
  all.tokens += under_way.tokens;
  all.left_out += under_way.left_out;
  const auto text = static_cast<double>(std::max<uint64_t>(text_bytes_, 1));
  progress_.Update(num_done_, Note(all), static_cast<double>(bytes_done_) / text);
}

double CollectJob::PaddingShare() const {
  if (sum_.computed_tokens == 0) return 0;
  return 1 - static_cast<double>(sum_.tokens) / static_cast<double>(sum_.computed_tokens);
}

void CollectJob::FinishProgress(size_t in_store) {
  progress_.Finish(
      Note(sum_) +
      (resumed_ ? "; the store has " + std::to_string(in_store) + " sequences" : ""));
}

std::string CollectJob::Note(const ChunkResult& all) const {
  const auto rate = static_cast<double>(all.tokens) / std::max(progress_.seconds(), 1e-9);
  return std::to_string(all.sequences) + " sequences" +
         (resumed_ ? " in this run, " : ", ") +
         std::to_string(static_cast<int64_t>(rate)) + " tokens/s" +
         (all.left_out > 0 ? ", " + std::to_string(all.left_out) + " left out" : "") +
         RanksNote();
}

// Chunks of this run by rank; of many ranks the least and the most.
std::string CollectJob::RanksNote() const {
  if (rank_.world == 1) return "";
  if (chunks_of_rank_.size() > kMaxRanksListed) {
    const auto [least, most] =
        std::minmax_element(chunks_of_rank_.begin(), chunks_of_rank_.end());
    return ", chunks a rank " + std::to_string(*least) + " (rank " +
           std::to_string(least - chunks_of_rank_.begin()) + ") to " +
           std::to_string(*most);
  }
  std::string text = ", chunks a rank";
  for (const uint64_t chunks : chunks_of_rank_) text += " " + std::to_string(chunks);
  return text;
}

}  // namespace routecast
