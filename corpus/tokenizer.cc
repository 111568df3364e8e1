#include "corpus/tokenizer.h"

#include <sentencepiece_processor.h>

#include <charconv>
#include <optional>
#include <utility>

#include "common/errors.h"
#include "common/run_record.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxModelBytes = uint64_t{64} << 20;
constexpr int kDefaultExtraIds = 100;
constexpr int kMaxExtraIds = 10'000;
constexpr std::string_view kExtraIdPrefix = "<extra_id_";

[[noreturn]] void ThrowCorrupt(const std::string& what, const std::string& reason) {
  throw DataError(ErrorText(what + " is not a usable SentencePiece model", reason,
                            "copy or train the tokenizer again"));
}

int ReadExtraIds(const fs::path& config) {
  if (!fs::exists(config)) return kDefaultExtraIds;
  const Json json = ReadJsonFile(config);
  if (!json.is_object()) throw DataError(config.string() + " is not a JSON object");
  if (!json.contains("extra_ids")) return kDefaultExtraIds;
  const Json& value = json["extra_ids"];
  if (!value.is_number_integer() || value < 0 || value > kMaxExtraIds) {
    throw DataError(ErrorText(config.string() + ": extra_ids is out of range",
                              value.dump(), "write a whole number from 0 to 10000"));
  }
  return value.get<int>();
}

struct Special {
  int32_t id;
  size_t length;
};

// The special token that starts at text[0], if one does.
std::optional<Special> SpecialAt(std::string_view text, int extra_ids, int vocab_size) {
  constexpr std::pair<std::string_view, int32_t> kFixed[] = {
      {"<pad>", Tokenizer::kPad}, {"</s>", Tokenizer::kEos}, {"<unk>", Tokenizer::kUnk}};
  for (const auto& [name, id] : kFixed) {
    if (text.starts_with(name)) return Special{id, name.size()};
  }
  if (!text.starts_with(kExtraIdPrefix)) return std::nullopt;
  const char* first = text.data() + kExtraIdPrefix.size();
  const char* last = text.data() + text.size();
  int k = -1;
  const auto [end, error] = std::from_chars(first, last, k);
  const bool canonical =
      error == std::errc() && k >= 0 && (*first != '0' || end == first + 1);
  if (!canonical || k >= extra_ids || end == last || *end != '>') return std::nullopt;
  return Special{vocab_size - 1 - k, static_cast<size_t>(end + 1 - text.data())};
}

}  // namespace

Tokenizer::Tokenizer()
    : processor_(std::make_unique<sentencepiece::SentencePieceProcessor>()) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::Load(const fs::path& folder) {
  const int extra_ids = ReadExtraIds(folder / "tokenizer_config.json");
  const fs::path model = folder / "spiece.model";
  if (!fs::exists(model)) {
    throw UsageError(ErrorText(folder.string() + " has no tokenizer",
                               "spiece.model is missing; tokenizer.json is not read",
                               "copy spiece.model from the model's repository"));
  }
  return FromModel(ReadFile(model, kMaxModelBytes), extra_ids, model.string());
}

Tokenizer Tokenizer::FromModel(const std::string& model_bytes, int extra_ids,
                               const std::string& what) {
  Tokenizer tokenizer;
  if (model_bytes.empty()) ThrowCorrupt(what, "the file is empty");
  const auto status = tokenizer.processor_->LoadFromSerializedProto(model_bytes);
  if (!status.ok()) ThrowCorrupt(what, status.ToString());
  const auto& processor = *tokenizer.processor_;
  if (processor.pad_id() != kPad || processor.eos_id() != kEos ||
      processor.unk_id() != kUnk) {
    ThrowCorrupt(what, "pad, eos, unk are " + std::to_string(processor.pad_id()) + ", " +
                           std::to_string(processor.eos_id()) + ", " +
                           std::to_string(processor.unk_id()) + ", not 0, 1, 2 as in T5");
  }
  tokenizer.model_bytes_ = model_bytes;
  tokenizer.num_pieces_ = processor.GetPieceSize();
  tokenizer.extra_ids_ = extra_ids;
  tokenizer.fingerprint_ = Hex64(Hash64(model_bytes, static_cast<uint64_t>(extra_ids)));
  return tokenizer;
}

void Tokenizer::AppendPlain(std::string_view text, std::vector<int32_t>* ids) const {
  std::vector<int> pieces;
  const auto status =
      processor_->Encode(absl::string_view(text.data(), text.size()), &pieces);
  if (!status.ok()) {
    throw DataError(ErrorText("the text could not be tokenised", status.ToString(), ""));
  }
  ids->insert(ids->end(), pieces.begin(), pieces.end());
}

std::vector<int32_t> Tokenizer::EncodePlain(std::string_view text) const {
  std::vector<int32_t> ids;
  AppendPlain(text, &ids);
  return ids;
}

std::vector<int32_t> Tokenizer::Encode(std::string_view text) const {
  std::vector<int32_t> ids;
  size_t start = 0;  // of the plain stretch not yet encoded
  for (size_t at = text.find('<'); at != text.npos; at = text.find('<', at)) {
    const auto special = SpecialAt(text.substr(at), extra_ids_, vocab_size());
    if (!special) {
      ++at;
      continue;
    }
    if (at > start) AppendPlain(text.substr(start, at - start), &ids);
    ids.push_back(special->id);
    at += special->length;
    start = at;
  }
  if (start < text.size()) AppendPlain(text.substr(start), &ids);
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids) const {
  std::string text;
  std::vector<int> plain;
  const auto append = [&text](const std::string& part) {
    if (!text.empty() && !part.empty()) text += ' ';
    text += part;
  };
  const auto flush = [&] {
    if (plain.empty()) return;
    std::string part;
    const auto status = processor_->Decode(plain, &part);
    if (!status.ok()) {
      throw DataError(ErrorText("the ids could not be decoded", status.ToString(), ""));
    }
    append(part);
    plain.clear();
  };
  for (const int32_t id : ids) {
    if (id < 0) throw UsageError("a negative token id: " + std::to_string(id));
    if (id == kPad || id == kEos || id >= vocab_size()) continue;
    if (!IsSentinel(id)) {
      plain.push_back(id);
      continue;
    }
    flush();
    append(std::string(kExtraIdPrefix) + std::to_string(vocab_size() - 1 - id) + ">");
  }
  flush();
  return text;
}

int32_t Tokenizer::Sentinel(int k) const {
  if (k < 0 || k >= extra_ids_) {
    throw UsageError(ErrorText("no such sentinel: <extra_id_" + std::to_string(k) + ">",
                               "the tokenizer has " + std::to_string(extra_ids_), ""));
  }
  return vocab_size() - 1 - k;
}

}  // namespace routecast
