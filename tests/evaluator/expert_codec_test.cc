// Compressed copies: how near they are, and that the file that holds them is checked.
#include "evaluator/expert_codec.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <mutex>

#include "common/errors.h"
#include "common/random.h"
#include "common/routing.h"
#include "evaluator/decoding_engine.h"
#include "evaluator/disk_transfer_engine.h"
#include "evaluator/expert_copies.h"

namespace routecast {
namespace {

std::vector<float> Weights(uint64_t count, uint64_t seed) {
  std::vector<float> weights;
  for (uint64_t i = 0; i < count; ++i)
    weights.push_back(static_cast<float>(ToNormal(Mix(seed, i))));
  return weights;
}

std::vector<float> RoundTrip(CopyKind kind, const std::vector<float>& weights,
                             uint64_t rows) {
  const uint64_t columns = weights.size() / rows;
  std::vector<std::byte> coded(CodedBytes(kind, rows, columns));
  EncodeMatrix(kind, weights, rows, coded);
  std::vector<float> back(weights.size());
  DecodeMatrix(kind, coded.data(), rows, columns, ExpertDtype::kFloat32,
               reinterpret_cast<std::byte*>(back.data()));
  return back;
}

// No weight is farther off than half a step of its row's, or its group's, scale.
TEST(ExpertCodecTest, NoWeightIsOffByMoreThanHalfAStep) {
  for (const CopyKind kind : {CopyKind::kInt8, CopyKind::kInt4}) {
    for (const uint64_t columns : {1u, 2u, 127u, 128u, 129u, 300u}) {
      const uint64_t rows = 3;
      const auto weights = Weights(rows * columns, columns);
      const auto back = RoundTrip(kind, weights, rows);
      const uint64_t group = kind == CopyKind::kInt4 ? 128 : columns;
      const float codes = kind == CopyKind::kInt4 ? 7 : 127;
      for (uint64_t i = 0; i < weights.size(); ++i) {
        const uint64_t row = i / columns,
                       first = row * columns + i % columns / group * group;
        const uint64_t last = std::min(first + group, (row + 1) * columns);
        float largest = 0;
        for (uint64_t k = first; k < last; ++k)
          largest = std::max(largest, std::fabs(weights[k]));
        EXPECT_LE(std::fabs(weights[i] - back[i]), 0.5001f * largest / codes)
            << CopyName(kind) << " " << columns << " " << i;
      }
    }
  }
}

TEST(ExpertCodecTest, AScaleOfAWholeMatrixIsThatOfItsLargestWeight) {
  const auto weights = Weights(3 * 100, 5);
  const auto back = RoundTrip(CopyKind::kInt8Tensor, weights, 3);
  float largest = 0;
  for (const float w : weights) largest = std::max(largest, std::fabs(w));
  for (uint64_t i = 0; i < weights.size(); ++i) {
    const float codes = back[i] / (largest / 127);
    EXPECT_NEAR(codes, std::round(codes), 1e-3) << i;
    EXPECT_LE(std::fabs(weights[i] - back[i]), 0.5001f * largest / 127) << i;
  }
  EXPECT_EQ(CodedBytes(CopyKind::kInt8Tensor, 3, 100),
            CodedBytes(CopyKind::kInt8, 3, 100));
}

TEST(ExpertCodecTest, TheLargestWeightAndZeroAreExact) {
  for (const CopyKind kind : {CopyKind::kInt8, CopyKind::kInt4, CopyKind::kInt8Tensor}) {
    const auto back = RoundTrip(kind, {0, -2.5f, 1, 0, 0, 0}, 2);
    EXPECT_FLOAT_EQ(back[1], -2.5f);
    EXPECT_EQ(back[0], 0);
    EXPECT_EQ(back[4], 0);  // a row of zeros has the scale 0
  }
}

// Of every 32 neighbours the 16 of the largest magnitudes are there, as bf16.
TEST(ExpertCodecTest, SparseKeepsTheLargerHalfOfEveryGroup) {
  for (const uint64_t columns : {1u, 16u, 31u, 32u, 33u, 300u}) {
    const uint64_t rows = 3;
    const auto weights = Weights(rows * columns, columns);
    const auto back = RoundTrip(CopyKind::kSparse, weights, rows);
    for (uint64_t i = 0; i < weights.size(); ++i) {
      const uint64_t row = i / columns, first = row * columns + i % columns / 32 * 32;
      const uint64_t last = std::min(first + 32, (row + 1) * columns);
      const auto larger =
          std::count_if(weights.begin() + first, weights.begin() + last,
                        [&](float w) { return std::fabs(w) > std::fabs(weights[i]); });
      EXPECT_EQ(back[i], larger < 16 ? Bf16ToFloat(FloatToBf16(weights[i])) : 0)
          << columns << " " << i;
    }
  }
}

TEST(ExpertCodecTest, SparseOfEqualMagnitudesKeepsTheFirst) {
  const auto back = RoundTrip(CopyKind::kSparse, std::vector<float>(32, -1), 1);
  EXPECT_EQ(std::count(back.begin(), back.begin() + 16, -1.F), 16);
  EXPECT_EQ(std::count(back.begin() + 16, back.end(), 0.F), 16);
}

// A mask of all bits reads no more than a group's room.
TEST(ExpertCodecTest, ADamagedMaskReadsNothingBehindItsGroup) {
  std::vector<std::byte> coded(CodedBytes(CopyKind::kSparse, 1, 32), std::byte{0xff});
  std::vector<float> back(32);
  DecodeMatrix(CopyKind::kSparse, coded.data(), 1, 32, ExpertDtype::kFloat32,
               reinterpret_cast<std::byte*>(back.data()));
  EXPECT_EQ(std::count(back.begin() + 16, back.end(), 0.F), 16);
}

TEST(ExpertCodecTest, CopiesTakeAQuarterAndAnEighth) {
  const double whole = 768.0 * 3072 * 4;
  EXPECT_NEAR(static_cast<double>(CodedBytes(CopyKind::kInt8, 768, 3072)) / whole, 0.25,
              0.001);
  EXPECT_NEAR(static_cast<double>(CodedBytes(CopyKind::kInt4, 768, 3072)) / whole, 0.133,
              0.001);
  EXPECT_NEAR(static_cast<double>(CodedBytes(CopyKind::kSparse, 768, 3072)) / whole,
              0.281, 0.001);
}

// 16 bits of every exponent, subnormal and negative ones among them.
TEST(ExpertCodecTest, EveryFp16ComesBack) {
  std::vector<uint16_t> bits, back;
  for (uint32_t b = 0; b < 0x10000; ++b) {
    if ((b & 0x7C00) != 0x7C00) bits.push_back(static_cast<uint16_t>(b));  // finite
  }
  back.resize(bits.size());
  std::vector<float> values(bits.size());
  LoadWeights(reinterpret_cast<const std::byte*>(bits.data()), bits.size(),
              ExpertDtype::kFloat16, values.data());
  EXPECT_EQ(values[0x3C00], 1.F);
  EXPECT_EQ(values[1], 0x1p-24F);
  StoreWeights(values.data(), values.size(), ExpertDtype::kFloat16,
               reinterpret_cast<std::byte*>(back.data()));
  EXPECT_EQ(back, bits);
  const float between[] = {1 + 0x1p-11F, 1 + 3 * 0x1p-11F};  // ties go to the even one
  StoreWeights(between, 2, ExpertDtype::kFloat16,
               reinterpret_cast<std::byte*>(back.data()));
  EXPECT_EQ(back[0], 0x3C00);
  EXPECT_EQ(back[1], 0x3C02);
}

TEST(ExpertCodecTest, Bf16IsTheRoundedWeight) {
  const auto weights = Weights(256, 1);
  std::vector<std::byte> coded(CodedBytes(CopyKind::kInt8, 2, 128));
  EncodeMatrix(CopyKind::kInt8, weights, 2, coded);
  std::vector<uint16_t> bits(256);
  DecodeMatrix(CopyKind::kInt8, coded.data(), 2, 128, ExpertDtype::kBfloat16,
               reinterpret_cast<std::byte*>(bits.data()));
  const auto whole = RoundTrip(CopyKind::kInt8, weights, 2);
  for (size_t i = 0; i < bits.size(); ++i) EXPECT_EQ(bits[i], FloatToBf16(whole[i]));
}

TEST(ExpertCodecTest, AWeightThatIsNotFiniteIsRefused) {
  for (const float bad : {std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_THROW(RoundTrip(CopyKind::kInt8, {1, bad}, 1), DataError);
    EXPECT_THROW(RoundTrip(CopyKind::kInt4, {1, bad}, 1), DataError);
    EXPECT_THROW(RoundTrip(CopyKind::kSparse, {1, bad}, 1), DataError);
  }
}

TEST(ExpertCodecTest, NamesAreParsed) {
  EXPECT_EQ(ParseCopies("int4"), CopyKind::kInt4);
  EXPECT_EQ(ParseCopies("sparse"), CopyKind::kSparse);
  EXPECT_EQ(ParseCopies("int8_tensor"), CopyKind::kInt8Tensor);
  EXPECT_EQ(ParseCopies("lossless"), CopyKind::kLossless);
  EXPECT_THROW(ParseCopies("int5"), UsageError);
}

class ExpertCopiesTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("expert_copies." + std::to_string(::getpid()));
    fs::create_directories(folder_);
    ExpertFileSpec spec;
    spec.geometry = {0, 1, 4, 1, 32};
    spec.d_ff = 160;
    WriteSyntheticExperts(folder_ / "x.experts", spec, {0}, true);
    file_ = std::make_shared<const ExpertFile>(folder_ / "x.experts");
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::vector<std::byte> Blob(const ExpertFile& file, ExpertKey key) {
    const std::string bytes = ReadFile(file.path());
    const auto* from =
        reinterpret_cast<const std::byte*>(bytes.data()) + file.Offset(key);
    return {from, from + file.spec().blob_bytes()};
  }
  fs::path folder_;
  std::shared_ptr<const ExpertFile> file_;
};

TEST_F(ExpertCopiesTest, HoldEveryExpertNearItsOriginal) {
  for (const CopyKind kind :
       {CopyKind::kInt8, CopyKind::kInt4, CopyKind::kSparse, CopyKind::kInt8Tensor}) {
    const auto copy = CompressedCopy(file_, kind, true);
    EXPECT_EQ(copy->count(), 4);
    EXPECT_EQ(copy->spec().copies, kind);
    EXPECT_LT(copy->size_bytes(), file_->size_bytes());
    for (int e = 0; e < 4; ++e) {
      const auto original = Blob(*file_, {0, e}), blob = Blob(*copy, {0, e});
      copy->Check({0, e}, blob.data());
      std::vector<std::byte> decoded(copy->spec().expert_bytes());
      ASSERT_EQ(decoded.size(), original.size());
      DecodeExpert(copy->spec(), blob.data(), decoded.data());
      double off = 0, size = 0;
      for (size_t i = 0; i < decoded.size(); i += 4) {
        float a, b;
        std::memcpy(&a, original.data() + i, 4);
        std::memcpy(&b, decoded.data() + i, 4);
        off += (a - b) * (a - b);
        size += a * a;
      }
      // Uniform weights without their smaller half: the root of an eighth.
      const double bound = IsInt8(kind) ? 0.01 : kind == CopyKind::kInt4 ? 0.12 : 0.38;
      EXPECT_LT(std::sqrt(off / size), bound);
      EXPECT_GT(off, 0);
    }
  }
}

// Against a plain sum over all weights of all experts; a sample of two takes the first
// and the third.
TEST_F(ExpertCopiesTest, FiguresAreThoseOfTheWeights) {
  const auto copy = CompressedCopy(file_, CopyKind::kInt4, true);
  const auto sums = [&](const std::vector<int>& experts) {
    double error = 0, scale = 0, count = 0;
    for (const int e : experts) {
      const auto original = Blob(*file_, {0, e}), blob = Blob(*copy, {0, e});
      std::vector<std::byte> decoded(original.size());
      DecodeExpert(copy->spec(), blob.data(), decoded.data());
      for (size_t i = 0; i < decoded.size(); i += 4, ++count) {
        float a, b;
        std::memcpy(&a, original.data() + i, 4);
        std::memcpy(&b, decoded.data() + i, 4);
        error += std::abs(a - b);
        scale += std::abs(a);
      }
    }
    return std::pair(error / count, scale / count);
  };
  const CopyFigures all = MeasureCopy(*file_, *copy), two = MeasureCopy(*file_, *copy, 2);
  EXPECT_NEAR(all.weight_error, sums({0, 1, 2, 3}).first, 1e-9);
  EXPECT_NEAR(all.weight_scale, sums({0, 1, 2, 3}).second, 1e-7);
  EXPECT_NEAR(two.weight_error, sums({0, 2}).first, 1e-9);
  EXPECT_NE(two.weight_error, all.weight_error);
  EXPECT_DOUBLE_EQ(all.ratio,
                   2 * 32 * 160 * 4.0 / static_cast<double>(copy->spec().blob_bytes()));
}

TEST_F(ExpertCopiesTest, AreWrittenOnceAndAgainWhenDamaged) {
  const fs::path path = CompressedCopy(file_, CopyKind::kInt8, true)->path();
  EXPECT_EQ(path.filename(), "x-int8.experts");
  const auto time = fs::last_write_time(path);
  CompressedCopy(file_, CopyKind::kInt8, true);
  EXPECT_EQ(fs::last_write_time(path), time);
  const std::string whole = ReadFile(path);
  fs::resize_file(path, whole.size() - 1);
  CompressedCopy(file_, CopyKind::kInt8, true);
  EXPECT_EQ(ReadFile(path), whole);
}

TEST_F(ExpertCopiesTest, ADamagedOriginalBecomesNoCopy) {
  {
    std::fstream out(file_->path(), std::ios::in | std::ios::out | std::ios::binary);
    out.seekp(static_cast<std::streamoff>(file_->Offset({0, 2}) + 5));
    out.put('x');
  }
  EXPECT_THROW(CompressedCopy(file_, CopyKind::kInt8, true), DataError);
  EXPECT_FALSE(fs::exists(folder_ / "x-int8.experts"));
}

// Every byte of the header that says what the blobs are, changed: refused, not misread.
TEST_F(ExpertCopiesTest, AChangedHeaderIsRefused) {
  const fs::path path = CompressedCopy(file_, CopyKind::kInt4, true)->path();
  const std::string whole = ReadFile(path);
  for (size_t at = 0; at < 88; ++at) {
    std::string bytes = whole;
    bytes[at] = static_cast<char>(bytes[at] ^ 1);
    WriteFileAtomic(path, bytes);
    EXPECT_THROW(ExpertFile{path}, DataError) << at;
  }
}

// Through few staging slots into many others: each is decoded whole, and reported once.
TEST_F(ExpertCopiesTest, TheDecodingEngineBringsPlainWeights) {
  const auto copy = CompressedCopy(file_, CopyKind::kInt8, true);
  DecodingEngine engine(
      std::make_unique<DiskTransferEngine>(copy, 2, DiskEngineOptions{2, 4096}), 2,
      std::make_unique<SlotArena>(4, copy->spec().expert_bytes()),
      [&](const std::byte* blob, std::byte* to) { DecodeExpert(copy->spec(), blob, to); },
      "int8 copies");
  std::mutex mutex;
  std::condition_variable arrived;
  std::map<uint64_t, TransferOutcome> done;
  engine.SetDone([&](uint64_t id, TransferOutcome outcome, uint64_t) {
    std::lock_guard lock(mutex);
    EXPECT_EQ(done.count(id), 0u);
    done[id] = outcome;
    arrived.notify_all();
  });
  for (uint64_t round = 0; round < 20; ++round) {
    for (int e = 0; e < 4; ++e) {
      const uint64_t id = 4 * round + static_cast<uint64_t>(e);
      engine.Start({id, {0, e}, 3 - e, e % 2 == 0});
      if (round > 0 && e == 3) engine.Cancel(id);
      if (e == 1) engine.Promote(id);
    }
    std::unique_lock lock(mutex);
    arrived.wait(lock, [&] { return done.size() == 4 * (round + 1); });
    for (int e = 0; e < 4; ++e) {
      if (done[4 * round + static_cast<uint64_t>(e)] != TransferOutcome::kArrived) {
        EXPECT_EQ(e, 3);
        continue;
      }
      std::vector<std::byte> expected(copy->spec().expert_bytes());
      DecodeExpert(copy->spec(), Blob(*copy, {0, e}).data(), expected.data());
      EXPECT_EQ(std::memcmp(engine.slot(3 - e), expected.data(), expected.size()), 0);
    }
  }
}

// What the device refuses while it decodes fails the transfer, and says why.
TEST(DecodingEngineTest, ARefusedDecodingFailsTheTransfer) {
  class Instant : public TransferEngine {
   public:
    void SetDone(Done done) override { done_ = std::move(done); }
    void Start(const TransferOrder& order) override { order_ = order; }
    void Promote(uint64_t) override {}
    void Cancel(uint64_t) override {}
    bool can_cancel() const override { return false; }
    std::byte* slot(int) const override { return nullptr; }
    std::string description() const override { return ""; }
    void Arrive() { done_(order_.id, TransferOutcome::kArrived, 7); }

   private:
    Done done_;
    TransferOrder order_;
  };
  auto inner = std::make_unique<Instant>();
  Instant* instant = inner.get();
  DecodingEngine engine(
      std::move(inner), 2, std::make_unique<SlotArena>(1, 4096),
      [](const std::byte*, std::byte*) { throw EnvironmentError("no kernel"); }, "int8");
  TransferOutcome outcome = TransferOutcome::kArrived;
  engine.SetDone([&](uint64_t, TransferOutcome o, uint64_t) { outcome = o; });
  engine.Start({1, {0, 0}, 0, true});
  instant->Arrive();
  EXPECT_EQ(outcome, TransferOutcome::kFailed);
  EXPECT_EQ(engine.last_error(), "no kernel");
}

}  // namespace
}  // namespace routecast
