#include "report/evaluation_report.h"

#include <gtest/gtest.h>

#include <fstream>

#include "common/errors.h"
#include "report/html_report.h"
#include "report/result_values.h"

namespace routecast {
namespace {

Json Entry(const std::string& phase, int layer, int lead, double top1) {
  return {{"phase", phase},         {"layer", layer}, {"lead", lead},
          {"target", layer + lead}, {"top1", top1},   {"top2", top1 + 0.05},
          {"top4", top1 + 0.1},     {"ci95", 0.01},   {"samples", 1000}};
}

Json Row(const std::string& policy, const std::string& predictor,
         const std::string& eviction, double speed) {
  return {{"policy", policy},
          {"predictor", predictor},
          {"eviction", eviction},
          {"phase", "decode"},
          {"batch", 1},
          {"tokens_per_second", speed},
          {"speed_up", speed / 100},
          {"hit_rate", 0.5},
          {"bound", 1.8},
          {"output_sha256", "0123456789abcdef"},
          {"budget_bytes", 1 << 20}};
}

RunFolder Training(const std::string& kind, double accuracy) {
  RunFolder f{"run", {}, {}, {}, {}};
  f.results = {{"kind", kind}, {"scores", Json::array()}, {"baselines", Json::object()}};
  for (const char* phase : {"encoder", "decoder"}) {
    for (int lead : {1, 2}) {
      for (int layer : {0, 1, 2}) {
        f.results["scores"].push_back(Entry(phase, layer, lead, accuracy - 0.1 * lead));
        f.results["baselines"]["markov"].push_back(Entry(phase, layer, lead, 0.2));
        f.results["baselines"]["token_table"].push_back(Entry(phase, layer, lead, 0.4));
      }
    }
  }
  for (int step = 0; step < 50; ++step) {
    f.metrics.push_back({{"step", step}, {"train_loss", 3.0 / (1 + step * 0.1)}});
    if (step % 10 == 0)
      f.metrics.push_back({{"step", step}, {"valid_loss", 2.5 - step * 0.02}});
  }
  return f;
}

RunFolder Evaluation() {
  RunFolder f{"evaluate", {}, {}, {}, {}};
  f.results["rows"] = {
      Row("on_demand", "none", "none", 50), Row("on_demand", "none", "lru", 100),
      Row("top_k", "runs/hidden", "lru", 165), Row("top_k", "oracle", "lru", 178),
      Row("resident", "none", "lru", 240)};
  f.results["device"] = "cpu";
  return f;
}

RunFolder Statistics() {
  RunFolder f{"store", {}, {}, {}, {}};
  for (int layer = 0; layer < 4; ++layer) {
    Json load = Json::array();
    for (int e = 0; e < 16; ++e) load.push_back(100 + 17 * ((e * 7 + layer * 5) % 16));
    f.stats["layers"].push_back({{"phase", layer < 2 ? "encoder" : "decoder"},
                                 {"layer", layer},
                                 {"entropy_bits", 3.9},
                                 {"conditional_entropy_bits", 2.8},
                                 {"dropped", 0.01},
                                 {"load", load}});
  }
  return f;
}

bool Has(const std::string& page, const std::string& text) {
  return page.find(text) != std::string::npos;
}

TEST(EvaluationReport, HasEverySectionAndNothingFromOutside) {
  const std::string page = EvaluationReportHtml(
      {Training("interlayer", 0.6), Training("hidden", 0.8), Statistics(), Evaluation()});
  // For a look in a browser.
  std::ofstream(fs::path(::testing::TempDir()) / "report_test.html") << page;
  for (const char* text :
       {"Generation under a budget", "Prediction accuracy", "Expert load", "Loss curves",
        "1.65x", "equal, bit for bit", "token_table"}) {
    EXPECT_TRUE(Has(page, text)) << text;
  }
  for (const char* text : {"<script", "http", "src=", "@import", "url("}) {
    EXPECT_FALSE(Has(page, text)) << text;
  }
  EXPECT_LT(page.size(), 200'000u);
}

TEST(EvaluationReport, NamesRowsAndSpeedUpOfTheBestLearnedRowOnly) {
  const std::string page = EvaluationReportHtml({Evaluation()});
  EXPECT_TRUE(Has(page, "on_demand lru"));
  EXPECT_FALSE(Has(page, "resident lru"));
  EXPECT_TRUE(Has(page, "hidden over on-demand LRU (bound 1.80)"));
  EXPECT_FALSE(Has(page, "oracle over"));
}

// A row that prefetched nothing is on-demand LRU's twin: what it is ahead by is noise.
TEST(EvaluationReport, ARowThatFetchedNothingAheadIsNotTheBest) {
  RunFolder f = Evaluation();
  f.results["rows"].push_back(Row("auto", "frequency", "lru", 190));
  EXPECT_TRUE(Has(EvaluationReportHtml({f}), "frequency over on-demand LRU"));
  f.results["rows"].back()["prefetch_recall"] = 0.0;
  f.results["rows"][2]["prefetch_recall"] = 0.4;
  EXPECT_TRUE(Has(EvaluationReportHtml({f}), "hidden over on-demand LRU"));
}

TEST(EvaluationReport, SaysWhatWasRunOnWhat) {
  RunFolder f = Evaluation();
  f.results["device"] = "cpu";
  EXPECT_TRUE(Has(EvaluationReportHtml({f}), "device cpu<"));
  f.run = {{"configuration",
            {{"model", "here/small"}, {"store", ""}, {"dtype", "bf16"}, {"rounds", 20}}}};
  EXPECT_TRUE(Has(EvaluationReportHtml({f}),
                  "device cpu, model here/small, dtype bf16, 20 rounds<"));
}

// What a quarter of the rounds do not show is no winner.
TEST(EvaluationReport, ABestRowThatIsNotToldApartIsSaidSo) {
  RunFolder f = Evaluation();
  f.results["rows"][2]["speed_up_spread"] = {0.9, 1.3, 1.65, 1.8, 2.0};
  EXPECT_TRUE(Has(EvaluationReportHtml({f}), "quartiles 1.30 to 1.80<"));
  f.results["rows"][2]["speed_up_spread"] = {0.8, 0.97, 1.65, 1.8, 2.0};
  EXPECT_TRUE(Has(EvaluationReportHtml({f}), "quartiles 0.97 to 1.80: not told apart"));
}

// A baseline that speaks of one layer only must not be compared by its own mean.
TEST(EvaluationReport, ComparesWithTheBestBaselineOfEachLayer) {
  RunFolder f = Training("hidden", 0.9);  // lead 1: markov .2, token_table .4 everywhere
  f.results["baselines"]["stale_gate"].push_back(Entry("decoder", 2, 1, 0.7));
  EXPECT_TRUE(Has(EvaluationReportHtml({f}), "<b>45.0 %</b><span>the best baseline of"));
}

TEST(EvaluationReport, ShowsWhatRandomRoutingCosts) {
  RunFolder f{"small", {}, {}, {}, {}};
  f.pretrain = {{"test",
                 {{"masked_loss", 3.1},
                  {"span_loss", 3.2},
                  {"encoder", {{"random_routing_costs_nats", 0.512}}},
                  {"decoder", {{"random_routing_costs_nats", 0.448}}}}}};
  const std::string page = EvaluationReportHtml({f});
  EXPECT_TRUE(Has(page, "0.512"));
  EXPECT_TRUE(Has(page, "0.448"));
  f.pretrain = {{"test", "all"}};
  EXPECT_FALSE(Has(EvaluationReportHtml({f}), "random routing"));
}

Json Lead(int lead, double threshold, int used, int unused) {
  return {{"lead", lead},     {"open", threshold <= 1},  {"threshold", threshold},
          {"trust", 0.9},     {"judged", 321},           {"used", used},
          {"unused", unused}, {"wasted_bytes", 3 << 20}, {"saved_seconds", 1.25}};
}

TEST(EvaluationReport, SaysWhatEachLeadWasWorth) {
  RunFolder f = Evaluation();
  EXPECT_FALSE(Has(EvaluationReportHtml({f}), "by lead"));
  f.results["rows"][3]["speculation"] = {Lead(1, 0.25, 70, 1)};  // the oracle's
  EXPECT_FALSE(Has(EvaluationReportHtml({f}), "by lead"));
  f.results["rows"][2]["speculation"] = {Lead(1, 0.25, 30, 10), Lead(4, 1.5, 0, 0)};
  const std::string page = EvaluationReportHtml({f});
  EXPECT_TRUE(Has(page, "What speculation was worth by lead"));
  for (const char* cell :
       {">0.25<", ">321<", ">40<", ">75.0<", ">3.0<", ">1.25<", ">shut<"})
    EXPECT_TRUE(Has(page, cell)) << cell;
  EXPECT_FALSE(Has(page, ">1.50<")) << "a threshold above 1 is shut";
  EXPECT_FALSE(Has(page, "<details><summary>What speculation")) << "two lines are shown";
  for (int i = 0; i < 30; ++i)
    f.results["rows"][2]["speculation"].push_back(Lead(1, 0.25, 1, 1));
  EXPECT_TRUE(Has(EvaluationReportHtml({f}), "<summary>What speculation was worth"));
}

TEST(EvaluationReport, SaysWhereOutputsDiffer) {
  RunFolder f = Evaluation();
  f.results["rows"][2]["output_sha256"] = "fedcba9876543210";
  EXPECT_FALSE(Has(EvaluationReportHtml({f}), "equal, bit for bit"));
}

TEST(EvaluationReport, RoundsPrefetchesAndTheLinkAreDrawnWhereTheyAreThere) {
  RunFolder f = Evaluation();
  EXPECT_FALSE(Has(EvaluationReportHtml({f}), "Rate over on-demand LRU by round"));
  for (Json& row : f.results["rows"]) {
    row["speed_up_spread"] = {1.0, 1.1, 1.2, 1.3, 1.4};
    row["stall_ms_spread"] = {0, 1, 2, 3, 4};
    row["compute_ms_spread"] = {5, 6, 7, 8, 9};
    row["prefetch_precision"] = 0.5;
    row["link_share"] = 0.7;
  }
  const std::string page = EvaluationReportHtml({f});
  for (const char* title :
       {"Rate over on-demand LRU by round", "Computing and waiting by round",
        "What became of requests and prefetches", "Use of the link"}) {
    EXPECT_TRUE(Has(page, title)) << title;
  }
  f.results["rows"][0]["speed_up_spread"] = {1.0, "two"};  // foreign values draw nothing
  EXPECT_FALSE(Has(EvaluationReportHtml({f}), "nan"));
}

TEST(EvaluationReport, SeveralBatchSizesAreDrawnAgainstEachOther) {
  RunFolder f = Evaluation();
  EXPECT_FALSE(Has(EvaluationReportHtml({f}), "by batch"));
  Json more = f.results["rows"][1];
  more["batch"] = 16;
  f.results["rows"].push_back(more);
  std::string page = EvaluationReportHtml({f});
  EXPECT_TRUE(Has(page, "Speed by batch, decode"));
  EXPECT_TRUE(Has(page, "Hits by batch, decode"));
  EXPECT_TRUE(Has(page, "Rate over on-demand LRU by batch, decode"));
  EXPECT_FALSE(Has(page, "Tail of a step by batch")) << "no row says it";
  for (Json& row : f.results["rows"]) {
    for (const char* key : {"p50_ms", "p99_ms", "held_bytes_peak", "effect_size"})
      row[key] = 1 << 20;
  }
  page = EvaluationReportHtml({f});
  for (const char* title : {"Step by batch", "Tail of a step by batch", "Memory by batch",
                            "Effect size by batch"})
    EXPECT_TRUE(Has(page, std::string(title) + ", decode")) << title;
}

TEST(EvaluationReport, SeveralBudgetsShowSpeedAgainstMemory) {
  RunFolder small = Evaluation(), large = Evaluation();
  for (Json& row : large.results["rows"]) row["budget_bytes"] = 4 << 20;
  EXPECT_FALSE(Has(EvaluationReportHtml({small, small}), "Speed against memory"));
  const std::string page = EvaluationReportHtml({small, large});
  EXPECT_TRUE(Has(page, "Speed against memory"));
  EXPECT_TRUE(Has(page, "best of all"));
}

TEST(EvaluationReport, BudgetsOfOneRunAreGroupsOfTheirOwn) {
  RunFolder f = Evaluation();
  const RunFolder more = Evaluation();
  for (Json row : more.results["rows"]) {
    row["budget"] = "50%";
    row["budget_bytes"] = 2 << 20;
    f.results["rows"].push_back(row);
  }
  const std::string page = EvaluationReportHtml({f});
  EXPECT_TRUE(Has(page, "decode, batch 1, 50%, budget 2.0 MiB"));
  EXPECT_TRUE(Has(page, "Speed by memory, generation, decode, batch 1"));
}

TEST(EvaluationReport, SpeedStandsAgainstWhatAskingTakes) {
  const std::string title = "Speed against what asking takes, decode";
  RunFolder f = Evaluation();
  EXPECT_FALSE(Has(EvaluationReportHtml({f}), title)) << "no row says it";
  for (Json& row : f.results["rows"]) row["predictor_share"] = 0.02;
  const std::string page = EvaluationReportHtml({f});
  const size_t from = page.find(title), to = page.find("</svg>", from);
  ASSERT_NE(from, page.npos);
  const std::string chart = page.substr(from, to - from);
  EXPECT_TRUE(Has(chart, "hidden"));
  EXPECT_TRUE(Has(chart, "best of all"));
  EXPECT_FALSE(Has(chart, "oracle"));
}

TEST(EvaluationReport, LossyRowsAreNamedAndLeaveTheOthersEqual) {
  RunFolder f = Evaluation();
  Json lossy = f.results["rows"][2];
  lossy["output_sha256"] = "fedcba9876543210";
  lossy["copies"] = "int4";
  lossy["speed_up"] = 9.0;
  lossy["exact_match"] = 0.75;
  lossy["logit_kl"] = 0.0123;
  lossy["compression_ratio"] = 7.53;
  lossy["weight_error"] = 0.0042;
  lossy["weight_scale"] = 0.1;
  f.results["rows"].push_back(lossy);
  const std::string page = EvaluationReportHtml({f});
  EXPECT_TRUE(Has(page, "LOSSY int4"));
  EXPECT_TRUE(Has(page, "all lossless rows are equal, bit for bit"));
  EXPECT_TRUE(Has(page, "0.0123"));
  EXPECT_TRUE(Has(page, ">7.5<"));
  EXPECT_TRUE(Has(page, ">4.2<"));
  EXPECT_FALSE(Has(page, "9.00x"));  // no key figure
}

TEST(EvaluationReport, RowsOfOtherPromptsAreNotMixed) {
  RunFolder f = Evaluation();
  for (Json& row : f.results["rows"]) row["prompts"] = "store";
  Json other = f.results["rows"][2];
  other["prompts"] = "squad:dev.json";
  other["schedule"] = "by_route";
  other["output_sha256"] = "fedcba9876543210";
  f.results["rows"].push_back(other);
  const std::string page = EvaluationReportHtml({f});
  EXPECT_TRUE(Has(page, "squad:dev.json, by_route"));
  EXPECT_FALSE(Has(page, "Outputs differ"));
}

TEST(EvaluationReport, LabelsReplayAndEmulatedRows) {
  RunFolder f = Evaluation();
  EXPECT_FALSE(Has(EvaluationReportHtml({f}), "Emulated"));
  for (Json& row : f.results["rows"])
    row["synthetic_weights"] = true, row["emulated"] = true;
  const std::string page = EvaluationReportHtml({f});
  EXPECT_TRUE(Has(page, "Replay at full-size geometry"));
  EXPECT_TRUE(Has(page, "Emulated"));
}

TEST(EvaluationReport, EscapesNamesOfFilesAndKinds) {
  EXPECT_FALSE(Has(EvaluationReportHtml({Training("<img>", 0.5)}), "<img>"));
}

TEST(EvaluationReport, ForeignAndMissingValuesAreNoErrors) {
  RunFolder f{"x", {}, {}, {}, {}};
  f.results = {{"rows", {{{"policy", 3}, {"tokens_per_second", "fast"}}}},
               {"scores", {{{"top1", nullptr}}}},
               {"baselines", 7}};
  f.stats = {{"layers", {{{"load", "none"}}}}};
  f.metrics = {Json::array(), {{"step", "x"}}};
  EXPECT_TRUE(Has(EvaluationReportHtml({f}), "</html>"));
  EXPECT_TRUE(Has(EvaluationReportHtml({}), "</html>"));
}

TEST(EvaluationReport, LoadsAFolderAndSkipsALineBeingWritten) {
  const fs::path folder = fs::path(::testing::TempDir()) / "report_folder";
  fs::remove_all(folder);
  fs::create_directories(folder);
  WriteFileAtomic(folder / "results.json", Evaluation().results.dump());
  WriteFileAtomic(folder / "metrics.jsonl",
                  "{\"step\":1,\"train_loss\":2}\n{\"step\":2,\"tr");
  const RunFolder loaded = LoadRunFolder(folder);
  EXPECT_EQ(loaded.name, "report_folder");
  EXPECT_EQ(loaded.metrics.size(), 1u);
  WriteEvaluationReport(folder / "report.html", {folder, folder / "absent"});
  EXPECT_TRUE(Has(ReadFile(folder / "report.html"), "on_demand lru"));
  EXPECT_THROW(LoadRunFolder(folder / "absent"), UsageError);
  WriteFileAtomic(folder / "results.json", "{\"rows\": [");
  EXPECT_THROW(LoadRunFolder(folder), DataError);
}

TEST(EvaluationReport, ADamagedLineIsNamed) {
  const fs::path folder = fs::path(::testing::TempDir()) / "report_damaged";
  fs::remove_all(folder);
  fs::create_directories(folder);
  WriteFileAtomic(folder / "metrics.jsonl", "{\"step\":1}\n\n{\"st\n{\"step\":2}\n");
  try {
    LoadRunFolder(folder);
    ADD_FAILURE() << "nothing was refused";
  } catch (const DataError& error) {
    EXPECT_TRUE(Has(error.what(), "metrics.jsonl, line 3 is not valid JSON"))
        << error.what();
  }
}

// DeepSeek's and Kimi's sizes, with every baseline at every place.
TEST(EvaluationReport, OfManyLayersAndExpertsStaysSmall) {
  RunFolder f = Training("hidden", 0.5);
  f.stats = {{"layers", Json::array()}};
  Json scores = Json::array();
  for (int l = 0; l < 61; ++l) {
    f.stats["layers"].push_back({{"phase", "decoder"},
                                 {"layer", l},
                                 {"load", std::vector<double>(384, 1. / 384)}});
    for (int lead = 1; lead <= 61; ++lead) {
      scores.push_back({{"phase", "decoder"},
                        {"layer", l - 1},
                        {"target", (l - 1 + lead) % 61},
                        {"lead", lead},
                        {"top1", .5},
                        {"top2", .6},
                        {"top4", .7},
                        {"ci95", {.4, .6}}});
    }
  }
  f.results["scores"] = scores;
  for (const char* name : {"frequency", "token_table", "markov", "pattern"}) {
    f.results["baselines"][name] = scores;
  }
  const std::string page = EvaluationReportHtml({f});
  EXPECT_LE(page.size(), HtmlReport::kMaxBytes);
  EXPECT_TRUE(Has(page, "expert, 6 a column"));
  EXPECT_TRUE(Has(page, "All scores: left out, as the page would be larger"));
}

TEST(HtmlReport, LeavesOutTheLargestOfWhatIsFoldedWhereThePageIsTooLarge) {
  const auto table = [](size_t bytes) {
    Table t({"x"});
    t.AddRow({std::string(bytes, 'x')});
    return t;
  };
  HtmlReport page("t", "");
  page.Paragraph("first");
  page.Details("small", table(100'000));
  page.Details("en lar<e", table(500'000));
  page.Section("between");
  page.Details("as lar<e", table(500'000));
  const std::string html = page.Finish();
  EXPECT_LE(html.size(), HtmlReport::kMaxBytes);
  EXPECT_TRUE(Has(html, "<summary>small"));
  EXPECT_TRUE(Has(html, "<summary>en lar&lt;e"));
  EXPECT_FALSE(Has(html, "<summary>as lar"));
  EXPECT_LT(html.find("<h2>between"), html.find("as lar&lt;e: left out"));
}

TEST(HtmlReport, RefusesAPageThatIsTooLarge) {
  HtmlReport page("t", "s");
  page.Paragraph(std::string(HtmlReport::kMaxBytes, 'x'));
  EXPECT_THROW(page.Finish(), std::length_error);
}

TEST(ResultValues, WhatIsNotKnownIsAnEmptyCell) {
  const Json rows = {{{"a", nullptr}, {"b", {1, nullptr, 3, 4, 5}}}, {{"a", "x"}}};
  EXPECT_EQ(RowsCsv(rows), "a,b_min,b_q1,b_median,b_q3,b_max\r\n,1,,3,4,5\r\nx,,,,,\r\n");
}

TEST(ResultValues, IntervalsInBothForms) {
  EXPECT_DOUBLE_EQ(HalfWidthOf({{"ci95", 0.02}}, "ci95"), 0.02);
  const Json ends = {{"ci95", {0.4, 0.5}}};
  EXPECT_NEAR(HalfWidthOf(ends, "ci95"), 0.05, 1e-12);
}

}  // namespace
}  // namespace routecast
