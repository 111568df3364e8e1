#include "storage/drop_shares.h"

#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

class DropShares : public TraceStoreTest {};

TEST_F(DropShares, AreOfAllChoicesWhereAllSequencesAreRead) {
  Fill();
  size_t choices = 0, dropped = 0;
  for (const auto& [id, trace] : All()) {
    for (const uint8_t d : trace.encoder.dropped) dropped += d;
    choices += trace.encoder.dropped.size();
  }
  const TraceReader reader(store());
  const auto shares = SampleDrops(reader);
  EXPECT_EQ(shares.sequences, All().size());
  EXPECT_DOUBLE_EQ(*shares.encoder,
                   static_cast<double>(dropped) / static_cast<double>(choices));
  EXPECT_TRUE(shares.many());  // about a tenth
}

TEST_F(DropShares, OfASampleSaySo) {
  Fill();
  const TraceReader reader(store());
  const auto shares = SampleDrops(reader, 7);
  EXPECT_EQ(shares.sequences, 7u);
  EXPECT_NEAR(*shares.decoder, .1, .05);
  EXPECT_NE(DropsText(shares, All().size()).find("(of 7 sequences)"), std::string::npos);
}

TEST(DropsText, NamesEachStackThatHasThem) {
  EXPECT_EQ(DropsText({5, .351, 0.}, 5),
            "35.1 % of choices in the encoder, 0.0 % in the decoder");
  EXPECT_EQ(DropsText({5, std::nullopt, .02}, 5), "2.0 % of choices in the decoder");
  EXPECT_EQ(DropsText({}, 0), "");
}

}  // namespace
}  // namespace routecast
