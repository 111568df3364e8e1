#include "report/html_report.h"

#include <algorithm>
#include <stdexcept>

#include "common/run_record.h"
#include "report/svg_chart.h"

namespace routecast {
namespace {

// Series colours after Okabe and Ito (2008), lighter in the dark; one class a series.
constexpr const char* kStyle = R"css(
:root{--bg:#fff;--ink:#1c2126;--soft:#5b6670;--line:#d9dee3;--card:#f5f7f9;
--s0:#0060a0;--s1:#d55e00;--s2:#00855f;--s3:#b5578f;--s4:#8a6d00;--s5:#3a9fd4;--s6:#555;--s7:#a00;}
@media(prefers-color-scheme:dark){:root{--bg:#14181c;--ink:#e6eaee;--soft:#9aa6b1;
--line:#343c44;--card:#1d2329;
--s0:#56b4e9;--s1:#ff8c42;--s2:#2fc79a;--s3:#e08bbd;--s4:#e3c04a;--s5:#9ad0f5;--s6:#b9c0c7;
--s7:#ff7b7b;}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px;overflow-wrap:anywhere}
h1{font-size:26px;margin:0}h2{font-size:19px;margin:38px 0 8px;padding-top:14px;
border-top:1px solid var(--line)}
p{margin:6px 0 12px;max-width:90ch}.sub{color:var(--soft);margin:2px 0 18px}
.key{display:flex;flex-wrap:wrap;gap:12px;margin:14px 0}
.key div{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:10px 16px;min-width:150px}
.key b{display:block;font-size:21px;font-variant-numeric:tabular-nums}
.key span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:18px;
margin:12px 0}
@media(max-width:520px){.charts{grid-template-columns:1fr}}
.chart{width:100%;height:auto;display:block;max-width:640px}
.wide{grid-column:1/-1;max-width:none}
@media(max-width:760px){.charts{overflow-x:auto}.wide{min-width:720px}}
.scroll{overflow-x:auto;position:relative;left:50%;transform:translateX(-50%);
width:max-content;min-width:100%;max-width:calc(100vw - 40px)}
.scroll th:first-child,.scroll td:first-child{position:sticky;left:0;background:var(--bg)}
@media(max-width:520px){.scroll th:first-child,.scroll td:first-child{white-space:normal;
min-width:110px;max-width:38vw}}
table{border-collapse:collapse;font-size:12.5px;font-variant-numeric:tabular-nums;
margin:6px 0}
th,td{padding:4px 6px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600}.left{text-align:left}
figure{margin:14px 0}figcaption,summary{color:var(--soft);font-size:14px}
summary{cursor:pointer;margin:8px 0}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
svg .th{font-size:13.5px;font-weight:600;fill:var(--ink)}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}.err{stroke:var(--ink);stroke-width:1.2}
.l{fill:none;stroke-width:2}
.median{stroke:var(--ink);stroke-width:1.5}.mark{stroke:var(--ink);stroke-dasharray:6 4}
)css";

std::string SeriesStyle() {
  std::string css;
  for (int i = 0; i < kSeriesColours; ++i) {
    const std::string n = std::to_string(i);
    css += ".f.s" + n + "{fill:var(--s" + n + ")}.l.s" + n + "{stroke:var(--s" + n + ")}";
  }
  return css;
}

std::string ChartsHtml(const std::vector<std::string>& svg) {
  std::string html = "<div class=\"charts\">";
  for (const std::string& chart : svg) html += chart + "\n";
  return html + "</div>\n";
}

std::string LeftOut(const std::string& summary) {
  return "<p class=\"sub\">" + EscapeHtml(summary) +
         ": left out, as the page would be larger than 1 MB. The result files beside "
         "it say it.</p>\n";
}

}  // namespace

HtmlReport::HtmlReport(std::string title, std::string subtitle)
    : title_(std::move(title)), subtitle_(std::move(subtitle)) {}

void HtmlReport::Add(const std::string& html) {
  if (parts_.empty() || !parts_.back().summary.empty()) parts_.push_back({});
  parts_.back().html += html;
}

void HtmlReport::AddFolded(const std::string& summary, const std::string& html) {
  parts_.push_back({summary, "<details><summary>" + EscapeHtml(summary) + "</summary>" +
                                 html + "</details>\n"});
}

void HtmlReport::Section(const std::string& heading) {
  Add("<h2>" + EscapeHtml(heading) + "</h2>\n");
}

void HtmlReport::Paragraph(const std::string& text) {
  Add("<p>" + EscapeHtml(text) + "</p>\n");
}

void HtmlReport::KeyFigures(
    const std::vector<std::pair<std::string, std::string>>& label_value) {
  std::string html = "<div class=\"key\">";
  for (const auto& [label, value] : label_value) {
    html += "<div><b>" + EscapeHtml(value) + "</b><span>" + EscapeHtml(label) +
            "</span></div>";
  }
  Add(html + "</div>\n");
}

void HtmlReport::Charts(const std::vector<std::string>& svg) { Add(ChartsHtml(svg)); }

void HtmlReport::FoldedCharts(const std::string& summary,
                              const std::vector<std::string>& svg) {
  if (!svg.empty()) AddFolded(summary, ChartsHtml(svg));
}

void HtmlReport::AddTable(const Table& table, const std::string& caption) {
  Add("<figure><figcaption>" + EscapeHtml(caption) + "</figcaption>" + table.ToHtml() +
      "</figure>\n");
}

void HtmlReport::Details(const std::string& summary, const Table& table) {
  AddFolded(summary, table.ToHtml());
}

std::string HtmlReport::Finish() const {
  const std::string head =
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">"
      "<meta name=\"color-scheme\" content=\"light dark\"><title>" +
      EscapeHtml(title_) + "</title><style>" + kStyle + SeriesStyle() +
      "</style></head>\n<body><main><h1>" + EscapeHtml(title_) +
      "</h1><p class=\"sub\">" + EscapeHtml(subtitle_) + "</p>\n";
  const std::string tail = "<p class=\"sub\">routecast " + std::string(Version()) + " (" +
                           EscapeHtml(GitCommit()) + ")</p></main></body></html>\n";
  std::vector<Part> parts = parts_;
  size_t size = head.size() + tail.size();
  for (const Part& part : parts) size += part.html.size();
  while (size > kMaxBytes) {
    const auto largest =
        std::max_element(parts.rbegin(), parts.rend(), [](const Part& a, const Part& b) {
          return (a.summary.empty() ? 0 : a.html.size()) <
                 (b.summary.empty() ? 0 : b.html.size());
        });
    if (largest == parts.rend() || largest->summary.empty()) {
      throw std::length_error("the report has " + std::to_string(size) +
                              " bytes, at most " + std::to_string(kMaxBytes) +
                              " are allowed");
    }
    size -= largest->html.size();
    *largest = {"", LeftOut(largest->summary)};
    size += largest->html.size();
  }
  std::string page = head;
  for (const Part& part : parts) page += part.html;
  return page + tail;
}

void HtmlReport::Write(const fs::path& path) const { WriteFileAtomic(path, Finish()); }

}  // namespace routecast
