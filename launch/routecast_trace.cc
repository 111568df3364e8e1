// routecast-trace VERB: looks into trace stores and writes them in other forms.
#include <gflags/gflags.h>

#include <cstdio>

#include "common/errors.h"
#include "launch/main.h"
#include "storage/export.h"
#include "storage/statistics.h"
#include "storage/verify.h"

DECLARE_bool(quiet);
DECLARE_bool(dry_run);
DEFINE_string(store, "", "Folder of the trace store");
DEFINE_string(format, "npz", "Of export: npz, jsonl, csv or safetensors");
DEFINE_string(out, "", "Folder for what stats and export write");

namespace routecast {
namespace {

constexpr char kUsage[] =
    "routecast-trace VERB --store=FOLDER\n"
    "  info    what the store is made of and how complete it is\n"
    "  verify  reads everything and checks every checksum; exit 3 where damage is found\n"
    "  stats   entropy, load and drops a layer: stats.json and load.csv into --out\n"
    "  export  all traces in --format into --out, readable without this program";

std::string RequireOut() {
  if (FLAGS_out.empty()) {
    throw UsageError(
        ErrorText("--out is missing", "", "give a folder for what is written"));
  }
  return FLAGS_out;
}

void Info() {
  const TraceReader reader(FLAGS_store);
  const Json config = reader.config().ToJson();
  for (const auto& [key, value] : config.items()) {
    std::printf("%-22s %s\n", key.c_str(), value.dump().c_str());
  }
  uint64_t encoder = 0, decoder = 0, hidden = 0, parts[3] = {};
  for (const SequenceInfo& s : reader.sequences()) {
    encoder += s.encoder_tokens;
    decoder += s.decoder_tokens;
    hidden += s.has_hidden;
    ++parts[static_cast<int>(SplitOf(s.group_id))];
  }
  std::printf("%-22s %lld of %lld%s\n", "chunks", (long long)reader.completed_chunks(),
              (long long)reader.config().num_chunks,
              reader.complete() ? "" : ": unfinished");
  std::printf(
      "%-22s %zu: %llu train, %llu validation, %llu test; %llu with router inputs\n",
      "sequences", reader.sequences().size(), (unsigned long long)parts[0],
      (unsigned long long)parts[1], (unsigned long long)parts[2],
      (unsigned long long)hidden);
  std::printf("%-22s %llu encoder, %llu decoder\n", "tokens", (unsigned long long)encoder,
              (unsigned long long)decoder);
}

void Verify() {
  const VerifyReport report = VerifyStore(FLAGS_store);
  for (const std::string& problem : report.problems) std::printf("%s\n", problem.c_str());
  if (!report.sound()) {
    throw DataError(ErrorText(FLAGS_store + " is damaged",
                              std::to_string(report.num_problems) + " problems; sound: " +
                                  std::to_string(report.sequences) + " sequences",
                              "export what is sound, or collect into a new store"));
  }
  std::printf("sound: %lld of %lld chunks, %llu sequences, %llu records\n",
              (long long)report.chunks, (long long)report.num_chunks,
              (unsigned long long)report.sequences, (unsigned long long)report.records);
}

void Stats() {
  const std::string out = RequireOut();
  const StoreStatistics stats = ComputeStatistics(TraceReader(FLAGS_store));
  std::printf("phase    layer  entropy  given previous  dropped  median prob\n");
  for (const LayerStatistics& s : stats.layers) {
    const std::string given =
        s.conditional_entropy_bits < 0
            ? "-"
            : std::to_string(s.conditional_entropy_bits).substr(0, 5);
    std::printf("%-8s %5d  %7.3f  %14s  %6.2f%%  %11.3f\n", StackName(s.stack), s.layer,
                s.entropy_bits, given.c_str(), 100 * s.dropped,
                s.gate_probs.empty() ? 0.0 : s.gate_probs[3]);
  }
  if (FLAGS_dry_run) return;
  RunRecord run(out, "routecast-trace stats", EffectiveFlags());
  run.WriteStart();
  WriteStatistics(stats, out);
  run.Finish(kExitDone, {{"sequences", stats.sequences}});
}

void Export() {
  const std::string out = RequireOut();
  ParseChoice("--format", FLAGS_format, {"npz", "jsonl", "csv", "safetensors"});
  const TraceReader reader(FLAGS_store);
  if (FLAGS_dry_run) {
    std::printf("%zu sequences would be written to %s\n", reader.sequences().size(),
                out.c_str());
    return;
  }
  RunRecord run(out, "routecast-trace export", EffectiveFlags());
  run.WriteStart();
  ExportOptions options;
  options.format = FLAGS_format;
  Json files = Json::array();
  for (const fs::path& file : ExportTraces(reader, out, options)) {
    files.push_back(file.filename().string());
    if (!FLAGS_quiet) std::printf("%s\n", file.c_str());
  }
  run.Finish(kExitDone, {{"sequences", reader.sequences().size()}, {"files", files}});
}

void Run() {
  const std::vector<std::string> verbs = {"info", "verify", "stats", "export"};
  if (Arguments().empty()) {
    throw UsageError(
        ErrorText("a verb is missing", "", "use info, verify, stats or export"));
  }
  const int verb = ParseChoice("verb", Arguments()[0], verbs);
  if (FLAGS_store.empty()) {
    throw UsageError(
        ErrorText("--store is missing", "", "give the trace store's folder"));
  }
  void (*const runs[])() = {Info, Verify, Stats, Export};
  runs[verb]();
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  return routecast::Main(argc, argv, {routecast::kUsage, 1}, routecast::Run);
}
