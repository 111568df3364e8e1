// Stores that earlier programs wrote (tests/golden/stores) are read to the bit.
#include <gtest/gtest.h>

#include "common/errors.h"
#include "storage/store_config.h"
#include "storage/trace_reader.h"
#include "storage/verify.h"
#include "tests/storage/temp_folder.h"
#include "xxhash.h"

namespace routecast {
namespace {

struct Written {
  int schema;
  size_t sequences;
  uint64_t digest;  // of all that the reader gives
};

// Not changed with the code: what was in these files when they were written.
const Written kWritten[] = {
    {1, 4, 0xc414477d1acd6364u}, {2, 102, 0x190550fc1e044382u},
    {3, 9, 0x3ea44e20f8176664u}, {4, 4, 0xbf0342b094b3d695u},
    {6, 4, 0x2f7900be52943154u}, {7, 102, 0x9d683cbd69a14318u},
    {8, 5, 0x75bc26eb55fdcf33u},
};

class Digest {
 public:
  void Number(uint64_t value) { sum_ = XXH3_64bits_withSeed(&value, sizeof value, sum_); }
  template <typename T>
  void Plane(const std::vector<T>& plane) {
    Number(plane.size());
    sum_ = XXH3_64bits_withSeed(plane.data(), plane.size() * sizeof(T), sum_);
  }
  void Span(const RoutingSpan& s) {
    for (const int n :
         {s.num_tokens, s.num_layers, s.top_k, s.hidden_width, s.attention_heads}) {
      Number(static_cast<uint64_t>(n));
    }
    Plane(s.token_ids);
    Plane(s.expert_ids);
    Plane(s.gate_probs);
    Plane(s.dropped);
    Plane(s.margins);
    Plane(s.topk_ids);
    Plane(s.topk_probs);
    Plane(s.hidden);
    Plane(s.output);
    Plane(s.attention_entropy);
    Plane(s.attention_keys);
  }
  uint64_t sum() const { return sum_; }

 private:
  uint64_t sum_ = 0;
};

class WrittenStores : public testing::TestWithParam<Written> {};

TEST_P(WrittenStores, AreReadToTheBit) {
  const Written& written = GetParam();
  const char* source = std::getenv("ROUTECAST_SOURCE_DIR");
  const fs::path golden = fs::path(source ? source : ".") / "tests/golden/stores" /
                          ("schema-" + std::to_string(written.schema));
  const TempFolder folder;
  const fs::path store = folder.path() / "store";
  fs::copy(golden, store, fs::copy_options::recursive);
  EXPECT_EQ(ReadJsonFile(store / "store.json")["schema"], written.schema);
  const VerifyReport report = VerifyStore(store);
  EXPECT_TRUE(report.sound() && report.sealed) << testing::PrintToString(report.problems);
  EXPECT_EQ(report.sequences, written.sequences);
  EXPECT_EQ(report.left_out, written.schema == kLeftOutSchema ? 4u : 0u);
  Digest digest;
  const TraceReader reader(store);
  EXPECT_TRUE(reader.complete());
  reader.Scan(
      [&](RoutingTrace&& t) {
        for (const uint64_t id : {t.sequence_id, t.document_id, t.group_id}) {
          digest.Number(id);
        }
        digest.Number(static_cast<uint64_t>(t.task));
        digest.Span(t.encoder);
        digest.Span(t.decoder);
      },
      WithHidden::kAttended);
  EXPECT_EQ(digest.sum(), written.digest);
}

INSTANTIATE_TEST_SUITE_P(Schemas, WrittenStores, testing::ValuesIn(kWritten),
                         [](const auto& test) {
                           return "Schema" + std::to_string(test.param.schema);
                         });

}  // namespace
}  // namespace routecast
