// The leaderboard for people: text, CSV and HTML.
#include <algorithm>

#include "report/html_report.h"
#include "report/table.h"
#include "trainer/leaderboard.h"

namespace routecast {
namespace {

std::string Number(const Json& value, int digits) {
  return value.is_number() ? Fixed(value.get<double>(), digits) : "-";
}
std::string Share(const Json& value) {
  return value.is_number() ? Fixed(100 * value.get<double>(), 1) : "-";
}

// Of models of several experts a token the scores are of the set of all K.
bool Sets(const Json& board) { return board.value("experts_per_token", 1) > 1; }

std::string Millions(const Json& value) {
  return Number(value.is_number() ? Json(value.get<double>() / 1e6) : Json(), 2);
}

std::string NameOf(const Json& row) {
  const char* what = row.contains("estimate")          ? " (estimate)"
                     : row.contains("baseline")        ? " (baseline)"
                     : row.contains("stopped_by_time") ? " (stopped by time)"
                                                       : "";
  return row.at("kind").get<std::string>() + what;
}

const char* const kRates[] = {"train s", "points/s", "points/M"};
std::vector<std::string> RatesOf(const Json& row) {
  return {Number(row.value("training_seconds", Json()), 1),
          Number(row.value("points_per_second", Json()), 3),
          Number(row.value("points_per_million_parameters", Json()), 1)};
}

bool Compared(const Json& board) {
  const Json& all = board.at("rows");
  return std::any_of(all.begin(), all.end(), [](const Json& r) {
    return r.value("to_best", Json()).is_object();
  });
}
// The difference to the best row in points, and its interval's ends.
const char* const kToBest[] = {"to best", "2.5 %", "97.5 %"};
std::vector<std::string> ToBestOf(const Json& row) {
  const Json to_best = row.value("to_best", Json());
  if (!to_best.is_object()) return {"-", "-", "-"};
  return {Share(to_best.at("mean")), Share(to_best.at("ci95").at(0)),
          Share(to_best.at("ci95").at(1))};
}

// Whose scores of another domain are shown: the decoder's, where there is one.
std::string ShiftStack(const Json& rows) {
  for (const Json& r : rows) {
    if (r.at("decoder_top1").is_number() || r.at("decoder_recall").is_number()) {
      return "decoder";
    }
  }
  return "encoder";
}

// Over how many places a row's means are, where some answer fewer than others.
bool PlacesDiffer(const Json& board) {
  if (!board.contains("places")) return false;  // of single rows
  const Json& all = board.at("rows");
  return std::any_of(all.begin(), all.end(),
                     [&](const Json& r) { return r.at("places") != board.at("places"); });
}
std::string PlacesOf(const Json& row, const Json& board) {
  const auto sum = [](const Json& places) {
    return places.at("encoder").get<int>() + places.at("decoder").get<int>();
  };
  return std::to_string(sum(row.at("places"))) + " of " +
         std::to_string(sum(board.at("places")));
}

// What people are to know of such rows; empty = there are none.
std::string FewerPlaces(const Json& board) {
  if (!PlacesDiffer(board)) return "";
  return "places: how many (phase, layer, lead) a row's means are over; rows that answer "
         "fewer that rank stand last, without x chance and rates, and \"to best\" "
         "compares them where both answer";
}
// Kinds that "all" left out, and why; empty = none.
std::string KindsLeftOut(const Json& board) {
  return board.contains("left_out") ? LeftOutText(board.at("left_out")) : "";
}

// `rates`: with them, which people get as a table of its own.
Table TableOf(const Json& board, bool rates) {
  const bool sets = Sets(board);
  const std::string first = sets ? "recall at K" : "top-1",
                    one = sets ? "recall" : "top1";
  const std::string wide = sets ? "recall_at_2k" : "top4";
  std::vector<std::string> columns = {
      "<kind",
      "parameters",
      "seeds",
      "valid. loss",
      "dec next " + first,
      std::string("dec next ") + (sets ? "at 2K" : "top-4"),
      "dec all " + first,
      "enc next " + first,
      "enc all " + first,
      "x chance",
      "us",
      "MFLOP",
      "<serve"};
  const Json& all = board.at("rows");
  const bool backups = std::any_of(
      all.begin(), all.end(), [](const Json& r) { return r.contains("backup_recall"); });
  if (backups) columns.insert(columns.end(), {"choices 2+", "by head 1"});
  const bool places = PlacesDiffer(board);
  if (places) columns.push_back("places");
  const bool shift = board.contains("shift_store");
  const std::string stack = ShiftStack(all);
  if (shift) {
    const std::string next = (stack == "decoder" ? "dec next " : "enc next ");
    columns.insert(columns.end(), {"shifted: " + next + first,
                                   std::string("shifted: ") + (sets ? "at 2K" : "top-4"),
                                   "points lost"});
  }
  const bool compared = rates && Compared(board);
  if (compared) columns.insert(columns.end(), std::begin(kToBest), std::end(kToBest));
  if (rates) columns.insert(columns.end(), std::begin(kRates), std::end(kRates));
  Table table(columns);
  for (const Json& r : board.at("rows")) {
    const bool baseline = r.contains("baseline");
    const Json& offline = r.at("offline_only");
    std::vector<std::string> row = {
        NameOf(r),
        r.at("parameters").is_number() ? std::to_string(r.at("parameters").get<int64_t>())
                                       : "-",
        baseline ? "-" : std::to_string(r.at("seeds").size()),
        Number(r.at("validation_loss"), 3),
        Share(r.at("decoder_next_" + one)),
        Share(r.at("decoder_next_" + wide)),
        Share(r.at("decoder_" + one)),
        Share(r.at("encoder_next_" + one)),
        Share(r.at("encoder_" + one)),
        Number(r.value("times_chance", Json()), 2),
        Number(r.at("predict_us"), 0),
        Millions(r.value("predict_flops", Json())),
        offline.is_boolean() ? (offline.get<bool>() ? "no" : "yes") : "-"};
    if (backups) {
      row.push_back(Share(r.value("backup_recall", Json())));
      row.push_back(Share(r.value("backup_recall_primary", Json())));
    }
    if (places) row.push_back(PlacesOf(r, board));
    if (shift) {
      const std::string next = stack + "_next_";
      for (const std::string& key :
           {next + one + "_after_shift", next + wide + "_after_shift",
            next + one + "_lost"}) {
        row.push_back(Share(r.value(key, Json())));
      }
    }
    if (compared) {
      const auto values = ToBestOf(r);
      row.insert(row.end(), values.begin(), values.end());
    }
    if (rates) {
      const auto values = RatesOf(r);
      row.insert(row.end(), values.begin(), values.end());
    }
    table.AddRow(row);
  }
  return table;
}

// Each row against the best one, on what both were asked.
Table DifferenceTable(const Json& board) {
  std::vector<std::string> columns = {"<kind"};
  columns.insert(columns.end(), std::begin(kToBest), std::end(kToBest));
  columns.insert(columns.end(), {"seeds", "documents"});
  Table table(columns);
  for (const Json& r : board.at("rows")) {
    const Json to_best = r.value("to_best", Json());
    if (!to_best.is_object()) continue;
    std::vector<std::string> row = {NameOf(r)};
    const auto values = ToBestOf(r);
    row.insert(row.end(), values.begin(), values.end());
    row.push_back(std::to_string(to_best.at("seeds").size()));
    row.push_back(std::to_string(to_best.at("documents").get<int64_t>()));
    table.AddRow(row);
  }
  return table;
}

// Whose rows could not be compared; empty = none.
std::string NotCompared(const Json& board) {
  std::string names;
  for (const Json& name : board.value("without_document_scores", Json::array())) {
    names += (names.empty() ? "" : ", ") + name.get<std::string>();
  }
  if (names.empty()) return "";
  return "no scores by document (runs of an older version): " + names;
}

// Of what was trained: what the score costs.
Table RateTable(const Json& board) {
  std::vector<std::string> columns = {"<kind", "parameters"};
  columns.insert(columns.end(), std::begin(kRates), std::end(kRates));
  Table table(columns);
  for (const Json& r : board.at("rows")) {
    if (r.contains("baseline")) continue;
    std::vector<std::string> row = {NameOf(r),
                                    std::to_string(r.at("parameters").get<int64_t>())};
    const auto values = RatesOf(r);
    row.insert(row.end(), values.begin(), values.end());
    table.AddRow(row);
  }
  return table;
}

}  // namespace

std::string LeaderboardText(const Json& board) {
  std::string text = TableOf(board, false).ToText() + "\n" + RateTable(board).ToText();
  if (Compared(board)) text += "\n" + DifferenceTable(board).ToText();
  for (const std::string& note :
       {FewerPlaces(board), NotCompared(board), KindsLeftOut(board)}) {
    if (!note.empty()) text += note + "\n";
  }
  return text;
}
std::string LeaderboardCsv(const Json& board) { return TableOf(board, true).ToCsv(); }

std::string LeaderboardHtml(const Json& board) {
  HtmlReport page("Speculation models", board.at("store").get<std::string>());
  page.Section("All kinds");
  page.Paragraph(
      "Test documents, %; means over layers, leads and seeds. us: one question for one "
      "decoder token on the machine that made this table; MFLOP: a prediction's matrix "
      "products, millions of operations; serve: within 5 % of a pass; "
      "x chance: the score that ranks the rows over that of guessing.");
  if (board.contains("pass_us")) {
    page.Paragraph(
        "A pass of one decoder token: " + Fixed(board.at("pass_us").get<double>(), 0) +
        (board.contains("pass_model") ? " us, timed beside the questions."
                                      : " us, as given."));
  }
  if (board.contains("shift_store")) {
    page.Paragraph("shifted: the same models on the test documents of " +
                   board.at("shift_store").get<std::string>() +
                   ", and how many points of " + (Sets(board) ? "recall" : "top-1") +
                   " they lose there.");
  }
  for (const std::string& note : {FewerPlaces(board), KindsLeftOut(board)}) {
    if (!note.empty()) page.Paragraph(note + ".");
  }
  page.AddTable(TableOf(board, false), "best first");
  page.Paragraph(
      "What was trained: the ranking score in points a second of training (train s, mean "
      "over seeds) and a million parameters; stopped by time: the best of a training "
      "that --kind_seconds ended.");
  page.AddTable(RateTable(board), "best first");
  const std::string note = NotCompared(board);
  if (Compared(board) || !note.empty()) page.Section("Differences");
  if (Compared(board)) {
    page.Paragraph(
        "to best: points of the ranking score between a row and " +
        board.at("best").get<std::string>() +
        ", on the same test documents, places and seeds; 2.5 and 97.5 % of 1,000 "
        "bootstrap resamples of documents, drawn for both alike. An interval that "
        "holds 0 does not tell the two apart.");
    page.AddTable(DifferenceTable(board), "best first");
  }
  if (!note.empty()) page.Paragraph(note + ".");
  page.Section("Single places");
  page.Paragraph(
      "95 %: from the lowest to the highest end of the seeds' intervals over documents.");
  for (const Json& r : board.at("rows")) {
    const bool sets = Sets(board);
    Table places({"<phase", "layer", "lead", sets ? "recall at K" : "top-1", "95 %",
                  "over seeds", sets ? "at 2K" : "top-4", "nats", "ECE"});
    for (const Json& s : r.at("scores")) {
      places.AddRow({s.at("phase"), std::to_string(s.at("layer").get<int>()),
                     std::to_string(s.at("lead").get<int>()),
                     Share(s.at(sets ? "recall" : "top1")),
                     Share(s.at("ci95")[0]) + "-" + Share(s.at("ci95")[1]),
                     Share(s.at("seed_range")[0]) + "-" + Share(s.at("seed_range")[1]),
                     Share(s.at(sets ? "recall_at_2k" : "top4")),
                     Fixed(s.at("cross_entropy").get<double>(), 3),
                     Fixed(100 * s.at("ece").get<double>(), 1)});
    }
    page.Details(r.at("kind"), places);
  }
  return page.Finish();
}

}  // namespace routecast
