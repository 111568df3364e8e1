// ContextModel's bytes; docs/trace_format.md has the grammar.
#include <zstd.h>

#include <cstring>
#include <stdexcept>

#include "common/errors.h"
#include "common/files.h"
#include "storage/byte_codec.h"
#include "storage/context_model.h"

namespace routecast {
namespace {

constexpr std::string_view kMagic = "RCCONTXT";
constexpr uint8_t kVersion = 1, kTopkVersion = 2;
constexpr int kZstdLevel = 9;
// In which layers experts have rows of their own: those behind an expert of the layer
// before, or of the same token's first one.
enum class Rows { kBehindLayers, kInAllLayers };
constexpr uint64_t kMaxLayersCoded = 4096;
// What the body may unpack to: a small file cannot claim much memory.
constexpr uint64_t kMaxRatio = 64, kFreeBytes = uint64_t{1} << 20;

// Numbers, experts and factors lie apart: like values side by side shrink better.
struct Streams {
  std::string numbers, experts, factors;
};

void WriteRow(const Row& row, Streams* out) {
  ByteWriter(&out->numbers).Varint(row.size());
  int next = 0;
  for (const RowEntry& entry : row) {
    ByteWriter(&out->experts).Varint(static_cast<uint64_t>(entry.expert - next));
    ByteWriter(&out->factors).U8(static_cast<uint8_t>(entry.factor));
    next = entry.expert + 1;
  }
}

void WriteTables(const StackTables& tables, Rows rows, Streams* out) {
  ByteWriter numbers(&out->numbers);
  for (size_t l = 0; l < tables.marginal.size(); ++l) {
    for (const uint32_t weight : tables.marginal[l]) numbers.Varint(weight);
    if (l == 0 && rows == Rows::kBehindLayers) continue;
    for (const Row& row : tables.previous[l]) WriteRow(row, out);
  }
  numbers.Varint(tables.contexts.size());
  uint32_t outer = 0, inner = 0;
  for (const auto& context : tables.contexts) {
    numbers.Varint(context.outer - outer);
    numbers.Varint(context.outer == outer ? context.inner - inner : context.inner);
    outer = context.outer;
    inner = context.inner;
    for (const Row& row : context.rows) WriteRow(row, out);
  }
}

class Body {
 public:
  Body(std::string_view numbers, std::string_view experts, std::string_view factors,
       int num_experts, const std::string& where)
      : numbers_(numbers, where),
        experts_(experts, where),
        factors_(factors, where),
        num_experts_(num_experts) {}

  StackTables ReadTables(int layers, Rows rows) {
    StackTables tables;
    for (int l = 0; l < layers; ++l) {
      tables.marginal.push_back(ReadMarginal());
      tables.previous.emplace_back();
      if (l == 0 && rows == Rows::kBehindLayers) continue;
      for (int e = 0; e < num_experts_; ++e) tables.previous.back().push_back(ReadRow());
    }
    ReadContexts(layers, &tables);
    return tables;
  }
  void End() const {
    if (numbers_.left() + experts_.left() + factors_.left() != 0) {
      numbers_.Fail("bytes are left over");
    }
  }

 private:
  std::vector<uint32_t> ReadMarginal() {
    std::vector<uint32_t> weights;
    uint64_t sum = 0;
    for (int e = 0; e < num_experts_; ++e) {
      weights.push_back(static_cast<uint32_t>(numbers_.Varint("weight", kBaseScale)));
      if (weights.back() == 0) numbers_.Fail("an expert's weight is 0");
      sum += weights.back();
    }
    if (sum != kBaseScale) {
      numbers_.Fail("weights sum to " + std::to_string(sum) + ", not " +
                    std::to_string(kBaseScale));
    }
    return weights;
  }
  Row ReadRow() {
    // An entry is a byte at least, so the row is bounded by what is there.
    const uint64_t count = numbers_.Varint("entries", factors_.left());
    Row row;
    uint64_t next = 0;
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t expert = next + experts_.Varint("expert", kMaxCodedExperts);
      if (expert >= static_cast<uint64_t>(num_experts_)) experts_.Fail("no such expert");
      const auto factor = static_cast<int8_t>(factors_.U8());
      if (factor > kMaxFactor || factor < -kMaxFactor) factors_.Fail("factor too large");
      row.push_back({static_cast<uint16_t>(expert), factor});
      next = expert + 1;
    }
    return row;
  }
  void ReadContexts(int layers, StackTables* tables) {
    // Two numbers and a row a layer: bounded by what is there.
    const uint64_t count = numbers_.Varint(
        "contexts", numbers_.left() / (2 + static_cast<uint64_t>(layers)));
    uint64_t outer = 0, inner = 0;
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t step = numbers_.Varint("outer context", kAnyContext);
      const uint64_t number = numbers_.Varint("inner context", kNoContext);
      if (i > 0 && step == 0 && number == 0) numbers_.Fail("contexts do not ascend");
      inner = step == 0 ? inner + number : number;
      outer += step;
      if (outer > kAnyContext || inner > kNoContext) numbers_.Fail("no such context");
      auto& context = tables->contexts.emplace_back();
      context.outer = static_cast<uint32_t>(outer);
      context.inner = static_cast<uint32_t>(inner);
      for (int l = 0; l < layers; ++l) context.rows.push_back(ReadRow());
    }
  }

  ByteReader numbers_, experts_, factors_;
  int num_experts_;
};

std::string Unpack(std::string_view frame, uint64_t size, const ByteReader& in) {
  if (ZSTD_getFrameContentSize(frame.data(), frame.size()) != size ||
      size > kMaxRatio * frame.size() + kFreeBytes) {
    in.Fail("the body claims " + std::to_string(size) + " bytes");
  }
  std::string body(size, '\0');
  if (ZSTD_decompress(body.data(), size, frame.data(), frame.size()) != size) {
    in.Fail("the body does not unpack");
  }
  return body;
}

}  // namespace

std::string ContextModel::Serialize() const {
  Streams streams;
  for (const StackTables& tables : tables_) {
    WriteTables(tables, Rows::kBehindLayers, &streams);
  }
  for (const Stack s : {Stack::kEncoder, Stack::kDecoder}) {
    if (topk_) WriteTables(topk_->tables(s), Rows::kInAllLayers, &streams);
  }
  const std::string body = streams.numbers + streams.experts + streams.factors;
  std::string frame(ZSTD_compressBound(body.size()), '\0');
  const size_t size =
      ZSTD_compress(frame.data(), frame.size(), body.data(), body.size(), kZstdLevel);
  if (ZSTD_isError(size)) throw std::logic_error("ContextModel: zstd failed");
  frame.resize(size);
  std::string bytes(kMagic);
  ByteWriter out(&bytes);
  out.U8(topk_ ? kTopkVersion : kVersion);
  out.U8(static_cast<uint8_t>(kind_));
  out.Varint(static_cast<uint64_t>(num_experts_));
  for (const StackTables& tables : tables_) out.Varint(tables.marginal.size());
  out.Varint(streams.numbers.size());
  out.Varint(streams.experts.size());
  out.Varint(streams.factors.size());
  out.Raw(frame.data(), frame.size());
  out.U64(Hash64(bytes));
  return bytes;
}

ContextModel ContextModel::Parse(std::string_view bytes, const std::string& where) {
  ByteReader file(bytes, where);
  const std::string_view rest = file.Raw(bytes.size() < 8 ? 0 : bytes.size() - 8);
  uint64_t sum = file.left() == 8 ? file.U64() : 0;
  if (rest.substr(0, kMagic.size()) != kMagic) file.Fail("is not a context model");
  if (sum != Hash64(rest)) file.Fail("the context model's checksum does not hold");
  ByteReader in(rest.substr(kMagic.size()), where);
  const uint8_t version = in.U8();
  if (version != kVersion && version != kTopkVersion) {
    in.Fail("context model version " + std::to_string(version) + ", this program reads " +
            std::to_string(kVersion) + " and " + std::to_string(kTopkVersion));
  }
  const uint8_t kind = in.U8();
  if (kind > static_cast<uint8_t>(ContextKind::kPair)) in.Fail("unknown context");
  const auto experts = static_cast<int>(in.Varint("expert count", kMaxCodedExperts));
  if (experts == 0) in.Fail("expert count 0");
  int layers[2];
  for (int& l : layers) l = static_cast<int>(in.Varint("layer count", kMaxLayersCoded));
  uint64_t sizes[3];
  for (uint64_t& size : sizes) size = in.Varint("stream size", uint64_t{1} << 32);
  const std::string body = Unpack(in.Raw(in.left()), sizes[0] + sizes[1] + sizes[2], in);
  const std::string_view all = body;
  Body reader(all.substr(0, sizes[0]), all.substr(sizes[0], sizes[1]),
              all.substr(sizes[0] + sizes[1]), experts, where);
  StackTables encoder = reader.ReadTables(layers[0], Rows::kBehindLayers);
  StackTables decoder = reader.ReadTables(layers[1], Rows::kBehindLayers);
  ContextModel model(experts, static_cast<ContextKind>(kind), std::move(encoder),
                     std::move(decoder), where);
  if (version == kTopkVersion) {
    StackTables behind = reader.ReadTables(layers[0], Rows::kInAllLayers);
    model.topk_.emplace(experts, std::move(behind),
                        reader.ReadTables(layers[1], Rows::kInAllLayers), where);
  }
  reader.End();
  // What a model says of itself is what its records are sealed with.
  model.fingerprint_ = Hash64(bytes);
  return model;
}

}  // namespace routecast
