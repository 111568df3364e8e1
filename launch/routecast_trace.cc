// routecast-trace VERB: looks into trace stores and writes them in other forms.
#include <gflags/gflags.h>

#include <cstdio>
#include <optional>

#include "common/errors.h"
#include "common/output_folder.h"
#include "common/progress.h"
#include "common/recorded_run.h"
#include "launch/flags.h"
#include "launch/main.h"
#include "report/routing_report.h"
#include "report/table.h"
#include "storage/drop_shares.h"
#include "storage/export.h"
#include "storage/held_out_entropy.h"
#include "storage/import.h"
#include "storage/merge.h"
#include "storage/salvage.h"
#include "storage/statistics.h"
#include "storage/statistics_routing.h"
#include "storage/store_builder.h"
#include "storage/subset.h"
#include "storage/verify.h"

DECLARE_bool(quiet);
DECLARE_bool(dry_run);
DECLARE_uint64(seed);
DEFINE_string(store, "", "Folder of the trace store; repeatable for merge");
DEFINE_string(
    format, "npz",
    "Of export: npz, jsonl, csv or safetensors; of import: npz, arrays, jsonl or "
    "packed");
DEFINE_string(in, "", "Of import: the file or folder with foreign routing");
DEFINE_string(model, "imported", "Of import: name of the model that was traced");
DEFINE_string(task, "generate",
              "Of import: encode, denoise or generate, where the input does not say it");
DEFINE_int32(num_experts, 0, "Of import: experts a MoE layer; 0 = the largest id + 1");
DEFINE_int32(layers, 0,
             "Of import: MoE layers; needed by packed, a check of arrays and jsonl (0 = "
             "none)");
DEFINE_int32(experts_per_token, 0,
             "Of import: experts a token uses; needed by packed, a check of arrays and "
             "jsonl (0 = none)");
DEFINE_string(out, "",
              "Folder for what stats and export write; the new store of merge, subset "
              "and import");
DEFINE_double(share, 0.1, "Of subset: share of the document groups, drawn by --seed");
DEFINE_string(compression, "",
              "Of merge, subset and import: none, zstd, context or context+zstd; empty: "
              "the first store's, none of an import");
DEFINE_bool(renumber, false,
            "Of merge: documents of further corpora get new ids above the first's");

namespace routecast {
namespace {

constexpr char kUsage[] =
    "routecast-trace VERB --store=FOLDER\n"
    "  info    what the store is made of and how complete it is\n"
    "  verify  reads everything and checks every checksum; exit 3 where damage is found\n"
    "  stats   load, information and journeys: stats.json, csv files, report.html into "
    "--out\n"
    "  export  all traces in --format into --out, readable without this program\n"
    "  merge   stores of one model (--store more than once) into the new store --out\n"
    "  subset  a --share of the documents, drawn by --seed, into the new store --out\n"
    "  import  routing of other systems (--in, --format) into the new store --out\n"
    "  salvage what is sound of a damaged store, into the new store --out";

constexpr uint64_t kPageBytes = uint64_t{1} << 20;  // the report's limit

std::string RequireOut() {
  if (FLAGS_out.empty()) {
    throw UsageError(
        ErrorText("--out is missing", "", "give a folder for what is written"));
  }
  return FLAGS_out;
}

uint64_t StoreBytes(const fs::path& store) {
  if (!fs::is_directory(store / "shards")) {
    throw UsageError(ErrorText(store.string() + " is not a trace store",
                               "no shards in it", "check --store"));
  }
  uint64_t bytes = 0;
  std::error_code error, gone;  // gone: a writer of the store removes files meanwhile
  fs::recursive_directory_iterator it(store / "shards", error), end;
  for (; !error && it != end; it.increment(error)) {
    const uint64_t size = it->is_regular_file(gone) ? it->file_size(gone) : 0;
    if (!gone) bytes += size;
  }
  return bytes;
}

// Of a dry run: refused where this user may not write. How much it would be is a guess,
// so lack of room is only said.
void WouldWrite(const std::string& what, uint64_t bytes) {
  const std::string out = RequireOut();
  RequireWritable(out);
  const uint64_t free_bytes = FreeBytes(out);
  std::printf("%s would be written to %s: about %s; %s free\n", what.c_str(), out.c_str(),
              FormatBytes(bytes).c_str(), FormatBytes(free_bytes).c_str());
  if (bytes > free_bytes) {
    std::fprintf(stderr, "there may be no room for %s: free some space first\n",
                 out.c_str());
  }
}

std::string Sequences(uint64_t count) { return std::to_string(count) + " sequences"; }

// Collected with --nonfinite=skip: by name, as an export does not show what it lacks.
void PrintLeftOut(const std::vector<SequenceInfo>& left_out) {
  constexpr size_t kMaxNamed = 20;
  if (left_out.empty()) return;
  std::printf("%-22s %zu sequences, for which the model gave no numbers:", "left out",
              left_out.size());
  for (size_t i = 0; i < std::min(left_out.size(), kMaxNamed); ++i) {
    std::printf(" %llu", (unsigned long long)left_out[i].sequence_id);
  }
  std::printf("%s\n", left_out.size() > kMaxNamed ? " ..." : "");
}

void PrintDrops(const TraceReader& reader) {
  const DropShares shares = SampleDrops(reader);
  const std::string text = DropsText(shares, reader.sequences().size());
  if (text.empty()) return;
  std::printf("%-22s %s\n", "dropped by capacity", text.c_str());
  if (shares.many()) std::printf("%-22s %s\n", "", DropsHint().c_str());
}

void Info() {
  const TraceReader reader(FLAGS_store, NeedTokens::kNo);
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
  PrintDrops(reader);
  PrintLeftOut(reader.left_out());
}

void Verify() {
  if (FLAGS_dry_run) {
    std::printf("%s would be read and checked\n",
                FormatBytes(StoreBytes(FLAGS_store)).c_str());
    return;
  }
  const VerifyReport report = VerifyStore(FLAGS_store);
  for (const std::string& problem : report.problems) std::printf("%s\n", problem.c_str());
  if (!report.sound()) {
    throw DataError(ErrorText(FLAGS_store + " is damaged",
                              std::to_string(report.num_problems) + " problems; sound: " +
                                  std::to_string(report.sequences) + " sequences",
                              "routecast-trace salvage makes a store of what is sound"));
  }
  std::printf(
      "sound: %lld of %lld chunks, %llu sequences, %llu records, %s%s\n",
      (long long)report.chunks, (long long)report.num_chunks,
      (unsigned long long)report.sequences, (unsigned long long)report.records,
      report.left_out == 0
          ? ""
          : (std::to_string(report.left_out) + " sequences left out, ").c_str(),
      report.sealed ? "sealed" : "not sealed (unfinished, or of an older version)");
}

std::string PageOf(const StoreStatistics& stats, const RoutingStatistics& routing) {
  RoutingPage page{FLAGS_store, AllStatistics(stats.ToJson(), routing), {}};
  for (size_t l = 0; l < routing.layers.size(); ++l) {
    if (routing.layers[l].transitions.empty()) continue;
    page.transitions.push_back({StackName(stats.layers[l].stack), stats.layers[l].layer,
                                routing.layers[l].transitions});
  }
  return RoutingReportHtml(page);
}

// What is there is read; that more is to come should be heard.
void SayUnfinished(const TraceReader& reader) {
  if (reader.complete()) return;
  std::fprintf(stderr,
               "%s is unfinished: %lld of %lld chunks are in it, they are what is read\n",
               FLAGS_store.c_str(), (long long)reader.completed_chunks(),
               (long long)reader.config().num_chunks);
}

Json StatsInto(const std::string& out) {
  const TraceReader reader(FLAGS_store, NeedTokens::kNo);
  SayUnfinished(reader);
  const uint64_t sequences = reader.sequences().size();
  if (FLAGS_dry_run) {
    WouldWrite("statistics of " + Sequences(sequences), kPageBytes);
    return {};
  }
  Progress counting("stats, pass 1 of 2", "sequences", sequences, FLAGS_quiet);
  std::optional<Progress> folds;  // from the end of the counting
  const StoreStatistics stats = ComputeStatistics(
      reader, [&](uint64_t done) { counting.Update(done); },
      [&](double share) {
        constexpr int kFolds = HeldOutEntropy::kFolds;
        counting.Finish();
        if (!folds)
          folds.emplace("stats, held-out entropy", "folds", kFolds, FLAGS_quiet);
        folds->Update(static_cast<uint64_t>(kFolds * share), "", share);
      });
  counting.Finish();
  if (folds) folds->Finish();
  std::printf(
      "phase    layer  entropy  given previous  given token  held out  dropped  "
      "median prob\n");
  for (const LayerStatistics& s : stats.layers) {
    const auto known = [](double v) { return v < 0 ? "-" : Fixed(v, 3); };
    const std::string prob = s.gate_probs.empty() ? "-" : Fixed(s.gate_probs[3], 3);
    char dropped[16] = "-";
    if (s.dropped >= 0) std::snprintf(dropped, sizeof dropped, "%.2f%%", 100 * s.dropped);
    std::printf("%-8s %5d  %7s  %14s  %11s  %8s  %7s  %11s\n", StackName(s.stack),
                s.layer, known(s.entropy_bits).c_str(),
                known(s.conditional_entropy_bits).c_str(),
                known(s.token_entropy_bits).c_str(),
                known(s.held_out_entropy_bits).c_str(), dropped, prob.c_str());
  }
  Progress relating("stats, pass 2 of 2", "sequences", sequences, FLAGS_quiet);
  const RoutingStatistics routing =
      ComputeRoutingStatistics(reader, [&](uint64_t done) { relating.Update(done); });
  relating.Finish();
  WriteAllStatistics(stats, routing, out);
  WriteFileAtomic(fs::path(out) / "report.html", PageOf(stats, routing));
  if (!FLAGS_quiet) std::printf("%s\n", (fs::path(out) / "report.html").c_str());
  return {{"sequences", stats.sequences}};
}

Json ExportInto(const std::string& out) {
  const TraceReader reader(FLAGS_store, NeedTokens::kNo);
  SayUnfinished(reader);
  if (FLAGS_dry_run) {
    WouldWrite(Sequences(reader.sequences().size()), ExportedBytes(reader, FLAGS_format));
    return {};
  }
  const std::string left_out = LeftOutOfText(reader.config());
  if ((FLAGS_format == "jsonl" || FLAGS_format == "csv") && !left_out.empty()) {
    std::fprintf(stderr, "%s leaves out %s: npz and safetensors hold them\n",
                 FLAGS_format.c_str(), left_out.c_str());
  }
  ExportOptions options;
  options.format = FLAGS_format;
  Json files = Json::array();
  for (const fs::path& file : ExportTraces(reader, out, options)) {
    files.push_back(file.filename().string());
    if (!FLAGS_quiet) std::printf("%s\n", file.c_str());
  }
  return {{"sequences", reader.sequences().size()}, {"files", files}};
}

// A folder of results says in run.json how it came about, however that ends.
void Into(const char* verb, Json (*work)(const std::string& out)) {
  const std::string out = RequireOut();
  RecordedRun run(out, std::string("routecast-trace ") + verb, EffectiveFlags());
  Recorded(FLAGS_dry_run ? nullptr : &run, [&] { return work(out); });
}

// A store's folder is its own: results in it would replace what it says of its run.
void IntoFolder(const char* verb, Json (*work)(const std::string& out)) {
  const std::string out = RequireOut();
  if (IsThere(fs::path(out) / "store.json")) {
    throw UsageError(ErrorText(out + " is a trace store",
                               "its run.json would be replaced", "name another --out"));
  }
  Into(verb, work);
}

void Stats() { IntoFolder("stats", StatsInto); }

void Export() {
  ParseChoice("--format", FLAGS_format, {"npz", "jsonl", "csv", "safetensors"});
  IntoFolder("export", ExportInto);
}

// A store appears when it is whole: before that, and where that fails, its folder holds
// run.json alone.
void IntoNewStore(const char* verb, Json (*work)(const std::string& out)) {
  if (!FLAGS_dry_run) RequireNewStore(RequireOut());
  Into(verb, work);
}

Json MergeInto(const std::string& out) {
  const std::vector<std::string> given = FlagValues("store");
  const std::vector<fs::path> stores(given.begin(), given.end());
  const MergeOptions options{.compression = FLAGS_compression,
                             .renumber = FLAGS_renumber};
  if (FLAGS_dry_run) {
    const MergeReport report = CheckMerge(stores, out, options);
    double bytes = 0;
    for (const fs::path& store : stores) bytes += static_cast<double>(StoreBytes(store));
    const auto all = static_cast<double>(report.sequences + report.repeated);
    WouldWrite(
        Sequences(report.sequences) + " of " + std::to_string(stores.size()) + " stores",
        static_cast<uint64_t>(bytes * static_cast<double>(report.sequences) /
                              std::max(all, 1.0)));
    return {};
  }
  const MergeReport report = MergeStores(stores, out, options);
  if (!FLAGS_quiet) {
    std::printf("%llu sequences; %llu were in several stores\n",
                (unsigned long long)report.sequences,
                (unsigned long long)report.repeated);
  }
  return {{"sequences", report.sequences}, {"repeated", report.repeated}};
}

Json SubsetInto(const std::string& out) {
  const SubsetOptions options{
      .compression = FLAGS_compression, .share = FLAGS_share, .seed = FLAGS_seed};
  if (FLAGS_dry_run) {
    const TraceReader reader(FLAGS_store, NeedTokens::kNo);
    const uint64_t drawn = DrawSubset(reader, out, options).size();
    const double share =
        static_cast<double>(drawn) / static_cast<double>(reader.sequences().size());
    WouldWrite(
        Sequences(drawn),
        static_cast<uint64_t>(share * static_cast<double>(StoreBytes(FLAGS_store))));
    return {};
  }
  const uint64_t sequences = SubsetStore(FLAGS_store, out, options);
  if (!FLAGS_quiet) std::printf("%llu sequences\n", (unsigned long long)sequences);
  return {{"sequences", sequences}};
}

Json SalvageInto(const std::string& out) {
  if (FLAGS_dry_run) {
    RequireNewStore(out);
    WouldWrite("what is sound of " + FLAGS_store, StoreBytes(FLAGS_store));
    return {};
  }
  const SalvageReport report = SalvageStore(FLAGS_store, out);
  std::printf("%llu sequences; lost: %llu sequences, %lld chunks\n",
              (unsigned long long)report.sequences, (unsigned long long)report.lost,
              (long long)report.lost_chunks);
  return {{"sequences", report.sequences},
          {"lost", report.lost},
          {"lost_ids", report.lost_ids},
          {"lost_chunks", report.lost_chunks}};
}

void PrintImported(const ImportReport& report) {
  std::printf("%llu sequences, %llu tokens, %d layers of %d experts, %d a token\n",
              (unsigned long long)report.sequences, (unsigned long long)report.tokens,
              report.config.geometry.num_layers(), report.config.geometry.num_experts,
              report.config.geometry.experts_per_token);
}

// About, rather more than less: every plane in every layer of both stacks, packed.
uint64_t ImportedBytes(const ImportReport& report) {
  const StoreConfig& c = report.config;
  uint64_t attention = 0;
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    attention += static_cast<uint64_t>(c.geometry.layers(stack)) *
                 static_cast<uint64_t>(c.AttentionHeads(stack)) * kAttentionBytesPerHead;
  }
  const uint64_t width =
      c.Records("hidden") ? 2u * static_cast<unsigned>(c.geometry.d_model) : 0;
  const uint64_t layer =
      2 + (c.Records("probs") ? 5 : 0) + 4u * static_cast<unsigned>(c.top_k) + width;
  return report.tokens *
         (4 + width + attention + layer * static_cast<unsigned>(c.geometry.num_layers()));
}

Json ImportInto(const std::string& out) {
  const ImportOptions options{
      .format = FLAGS_format,
      .model = FLAGS_model,
      .task = ParseTask(FLAGS_task),
      .num_experts = FLAGS_num_experts,
      .layers = FLAGS_layers,
      .experts_per_token = FLAGS_experts_per_token,
      .compression = FLAGS_compression.empty() ? "none" : FLAGS_compression};
  if (FLAGS_dry_run) {
    const ImportReport report = CheckImport(FLAGS_in, out, options);
    PrintImported(report);
    WouldWrite(Sequences(report.sequences), ImportedBytes(report));
    return {};
  }
  const ImportReport report = ImportTraces(FLAGS_in, out, options);
  const bool own = FLAGS_format == "arrays" || FLAGS_format == "jsonl";
  if (report.flat_sequences > 0 && own && FLAGS_layers == 0) {
    std::fprintf(stderr,
                 "%llu of %llu requests have more layers than tokens: are the axes "
                 "[tokens, layers, experts a token]? --layers=N checks it\n",
                 (unsigned long long)report.flat_sequences,
                 (unsigned long long)report.sequences);
  }
  if (!FLAGS_quiet) PrintImported(report);
  return {{"sequences", report.sequences}, {"tokens", report.tokens}};
}

void Merge() { IntoNewStore("merge", MergeInto); }

void Subset() {
  RequireShare(FLAGS_share);
  IntoNewStore("subset", SubsetInto);
}

void SalvageVerb() { IntoNewStore("salvage", SalvageInto); }

void Import() {
  if (FLAGS_in.empty()) {
    throw UsageError(ErrorText("--in is missing", "", "give what is to be imported"));
  }
  IntoNewStore("import", ImportInto);
}

enum class Stores { kNone, kOne, kSeveral };
struct Verb {
  const char* name;
  void (*run)();
  Stores stores = Stores::kOne;
};
constexpr Verb kVerbs[] = {
    {"info", Info},
    {"verify", Verify},
    {"stats", Stats},
    {"export", Export},
    {"merge", Merge, Stores::kSeveral},
    {"subset", Subset},
    {"import", Import, Stores::kNone},
    {"salvage", SalvageVerb},
};

// What a verb does not heed would pass unseen. Flags of all programs are not named.
const HeededFlags kHeeded = {
    {"info", {"store"}},
    {"verify", {"store"}},
    {"stats", {"store", "out"}},
    {"export", {"store", "out", "format"}},
    {"merge", {"store", "out", "compression", "renumber"}},
    {"subset", {"store", "out", "compression", "share"}},
    {"import",
     {"in", "out", "format", "model", "task", "num_experts", "layers",
      "experts_per_token", "compression"}},
    {"salvage", {"store", "out"}},
};

void Run() {
  std::vector<std::string> names;
  for (const Verb& verb : kVerbs) names.push_back(verb.name);
  if (Arguments().empty()) {
    std::string all;
    for (const auto& name : names) all += (all.empty() ? "" : ", ") + name;
    throw UsageError(ErrorText("a verb is missing", "", "use one of " + all));
  }
  const Verb& verb = kVerbs[ParseChoice("verb", Arguments()[0], names)];
  const size_t stores = FlagValues("store").size();
  if (FLAGS_store.empty() && verb.stores != Stores::kNone) {
    throw UsageError(
        ErrorText("--store is missing", "", "give the trace store's folder"));
  }
  if (stores > 1 && verb.stores == Stores::kOne) {
    throw UsageError(ErrorText(std::string(verb.name) + " takes one store",
                               std::to_string(stores) + " were given",
                               "merge them first, or look at each"));
  }
  RefuseUnheeded(kHeeded, "routecast-trace ", verb.name);
  verb.run();
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  return routecast::Main(argc, argv, {routecast::kUsage, 1}, routecast::Run);
}
