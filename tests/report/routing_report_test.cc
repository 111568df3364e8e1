#include "report/routing_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <cmath>

#include "report/heat_image.h"
#include "report/html_report.h"

namespace routecast {
namespace {

using testing::HasSubstr;
using testing::Not;

uint32_t Word(const std::string& bytes, size_t at) {
  uint32_t word = 0;
  for (size_t i = 0; i < 4; ++i)
    word = word << 8 | static_cast<uint8_t>(bytes.at(at + i));
  return word;
}

// The data of the chunks of a PNG by type; checks each one's length and CRC with zlib.
std::map<std::string, std::string> Chunks(const std::string& png) {
  std::map<std::string, std::string> chunks;
  EXPECT_EQ(png.substr(0, 8), "\x89PNG\r\n\x1a\n");
  for (size_t at = 8; at < png.size();) {
    const size_t n = Word(png, at);
    const std::string body = png.substr(at + 4, n + 4);
    EXPECT_EQ(crc32(0, reinterpret_cast<const Bytef*>(body.data()),
                    static_cast<uInt>(body.size())),
              Word(png, at + 8 + n));
    chunks[body.substr(0, 4)] = body.substr(4);
    at += 12 + n;
  }
  return chunks;
}

std::string Inflated(const std::string& data, size_t size) {
  std::string out(size + 1, '\0');
  uLongf n = out.size();
  EXPECT_EQ(uncompress(reinterpret_cast<Bytef*>(out.data()), &n,
                       reinterpret_cast<const Bytef*>(data.data()), data.size()),
            Z_OK);
  out.resize(n);
  return out;
}

TEST(HeatImageTest, PngsHoldThePixels) {
  // More than one stored block of 65,535 bytes.
  for (const size_t side : {size_t{1}, size_t{3}, size_t{300}}) {
    std::vector<std::vector<uint8_t>> pixels(side);
    std::string expected;
    for (size_t r = 0; r < side; ++r) {
      expected += '\0';
      for (size_t c = 0; c < side; ++c) {
        pixels[r].push_back(static_cast<uint8_t>(r * 7 + c * 13));
        expected += static_cast<char>(pixels[r].back());
      }
    }
    const std::vector<std::string> palette(256, "#0a80ff");
    const auto chunks = Chunks(PalettePng(pixels, palette));
    EXPECT_EQ(Word(chunks.at("IHDR"), 0), side);
    EXPECT_EQ(Word(chunks.at("IHDR"), 4), side);
    EXPECT_EQ(chunks.at("PLTE").substr(0, 3), "\x0a\x80\xff");
    EXPECT_EQ(chunks.at("PLTE").size(), 768u);
    EXPECT_EQ(Inflated(chunks.at("IDAT"), expected.size()), expected);
  }
}

TEST(HeatImageTest, CoarseMapsAreMeans) {
  const std::vector<std::vector<double>> values = {{1, 3, NAN}, {5, 7, 4}, {NAN, NAN, 9}};
  const auto coarse = Coarsened(values, 2);
  ASSERT_EQ(coarse.size(), 2u);
  EXPECT_EQ(coarse[0], (std::vector<double>{4, 4}));
  EXPECT_TRUE(std::isnan(coarse[1][0]));
  EXPECT_EQ(coarse[1][1], 9);
  EXPECT_EQ(Coarsened(values, 3)[1], values[1]);
}

Json Layer(const std::string& phase, int layer, size_t experts) {
  Json spread = {{"mean", 10.5}, {"cv", 0.25}, {"active", experts}};
  std::vector<double> previous(static_cast<size_t>(layer), 0.5);
  return {{"phase", phase},
          {"layer", layer},
          {"entropy_bits", 3.0},
          {"load", std::vector<double>(experts, 1.0 / static_cast<double>(experts))},
          {"spread", spread},
          {"nmi_previous", previous},
          {"nmi_token", 0.125},
          {"percentiles", {{"gate_probs", {{"p90", 0.875}}}}}};
}

RoutingPage PageOf(int layers, size_t experts) {
  RoutingPage page{"store", {{"sequences", 3}, {"layers", Json::array()}}, {}};
  for (int l = 0; l < layers; ++l) {
    page.stats["layers"].push_back(Layer("decoder", l, experts));
    if (l == 0) continue;
    std::vector<uint64_t> counts(experts * experts);
    for (size_t i = 0; i < counts.size(); ++i) counts[i] = i * 7919 % 101;
    page.transitions.push_back({"decoder", l, std::move(counts)});
  }
  Json paths = Json::array();
  for (int i = 0; i < 20; ++i) {
    const std::vector<int> experts_of_path(static_cast<size_t>(layers), i);
    paths.push_back({{"experts", experts_of_path}, {"count", 5}, {"share", 0.01}});
  }
  page.stats["journeys"] = {
      {"decoder", {{"tokens", 500}, {"distinct", 400}, {"paths", paths}}}};
  return page;
}

size_t Count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1))
    ++n;
  return n;
}

TEST(RoutingReportTest, HasEverySection) {
  const std::string html = RoutingReportHtml(PageOf(4, 16));
  for (const char* heading :
       {"<h2>Load", "<h2>Spread of load", "<h2>What layers and tokens tell",
        "<h2>Transitions", "<h2>Journeys", "<h2>The router&#39;s certainty"}) {
    EXPECT_THAT(html, HasSubstr(heading));
  }
  // Three transitions and one map of information.
  EXPECT_EQ(Count(html, "data:image/png;base64,"), 4u);
  EXPECT_THAT(html, HasSubstr("0.875"));
  EXPECT_THAT(html, HasSubstr("3 &gt; 3 &gt; 3 &gt; 3"));
  EXPECT_THAT(html, Not(HasSubstr("http://")));
  EXPECT_THAT(html, Not(HasSubstr("https://")));
  EXPECT_THAT(html, Not(HasSubstr("<script")));
}

TEST(RoutingReportTest, OfSeveralExpertsATokenTheLoadIsOfAll) {
  RoutingPage page = PageOf(2, 16);
  page.stats.update({{"model", "some model"},
                     {"experts_per_token", 4},
                     {"split", {{"train", 7}, {"validation", 2}, {"test", 3}}}});
  EXPECT_THAT(RoutingReportHtml(page), HasSubstr("1 = even share, most 1.0"));
  for (Json& layer : page.stats["layers"]) {
    std::vector<double> slots(16, .5 / 15);
    slots[3] = .5;  // eight even shares
    layer["slot_load"] = slots;
    layer["previous_token_recall"] = .4;
    layer["held_out_entropy_bits"] = 2.5;
  }
  const std::string html = RoutingReportHtml(page);
  for (const char* text :
       {"Model some model", "7 train, 2 validation, 3 test", "A token uses 4 experts",
        "Uses of an expert", "1 = even share, most 8.0", "the token before used too",
        "held out"}) {
    EXPECT_THAT(html, HasSubstr(text));
  }
}

TEST(RoutingReportTest, HeldOutEntropyNamesWhatIsGiven) {
  RoutingPage page = PageOf(2, 16);
  for (Json& layer : page.stats["layers"]) {
    layer["held_out_entropy_bits"] = 2.5;
    layer["token_entropy_bits"] = 2.7;
  }
  EXPECT_THAT(RoutingReportHtml(page), HasSubstr("given the token id and"));
  for (Json& layer : page.stats["layers"]) layer["token_entropy_bits"] = nullptr;
  const std::string without = RoutingReportHtml(page);
  EXPECT_THAT(without, Not(HasSubstr("given the token id")));
  EXPECT_THAT(without, HasSubstr("given token before and layer before, held out"));
}

TEST(RoutingReportTest, WhatIsNotRecordedIsADash) {
  RoutingPage page = PageOf(2, 16);
  for (Json& layer : page.stats["layers"]) layer["dropped"] = nullptr;
  EXPECT_THAT(RoutingReportHtml(page), Not(HasSubstr("0.00")));
}

// Of a stack that was not run nothing is known: no entropy of 0 bits, no even load.
TEST(RoutingReportTest, LayersWithoutTokensAreNamedAndNotShown) {
  RoutingPage page = PageOf(2, 16);
  for (int l = 0; l < 2; ++l) {
    Json layer = Layer("encoder", l, 16);
    layer["tokens"] = 0;
    layer["entropy_bits"] = nullptr;
    layer["load"] = std::vector<double>(16, 0);
    page.stats["layers"].push_back(layer);
  }
  page.transitions.push_back({"encoder", 1, std::vector<uint64_t>(256, 0)});
  const std::string html = RoutingReportHtml(page);
  EXPECT_THAT(html, HasSubstr("Layers without tokens, not shown: encoder 0, encoder 1."));
  EXPECT_THAT(html, HasSubstr("<b>3.00</b><span>mean entropy of 4.00 bits"));
  EXPECT_EQ(Count(html, "encoder"), 3u);  // the key figure's, and these two
}

TEST(RoutingReportTest, TwoLayersWithoutTokenIdsHaveTheirTableOfInformation) {
  RoutingPage page = PageOf(2, 16);
  for (Json& layer : page.stats["layers"]) layer["nmi_token"] = nullptr;
  EXPECT_THAT(RoutingReportHtml(page), HasSubstr("<td>0.500</td>"));
}

TEST(RoutingReportTest, JourneysThatWereNotToldApartAreSaid) {
  RoutingPage page = PageOf(2, 16);
  EXPECT_THAT(RoutingReportHtml(page), HasSubstr("decoder took 400 different"));
  page.stats["journeys"]["decoder"]["uncounted"] = 7;
  EXPECT_THAT(RoutingReportHtml(page), HasSubstr("took more than 400 different"));
}

TEST(RoutingReportTest, LargeModelsFit) {
  const std::string html = RoutingReportHtml(PageOf(58, 256));
  EXPECT_LT(html.size(), HtmlReport::kMaxBytes);
  EXPECT_EQ(Count(html, "data:image/png;base64,"), kMapsShown + 1);
  EXPECT_THAT(html, HasSubstr("12 of 57 maps are shown"));
}

TEST(RoutingReportTest, LeavesOutWhatIsNotThere) {
  RoutingPage page{"<store & co>", {{"sequences", 1}}, {}};
  page.stats["layers"] =
      Json::array({{{"load", {0.5, 0.5}}, {"phase", "encoder"}, {"layer", 0}}});
  const std::string html = RoutingReportHtml(page);
  EXPECT_THAT(html, HasSubstr("&lt;store &amp; co&gt;"));
  for (const char* heading :
       {"<h2>Transitions", "<h2>Journeys", "<h2>The router", "<h2>What layers"}) {
    EXPECT_THAT(html, Not(HasSubstr(heading)));
  }
  EXPECT_THAT(RoutingReportHtml({"empty", Json::object(), {}}), HasSubstr("empty"));
}

}  // namespace
}  // namespace routecast
