#include "storage/store_config.h"

#include <algorithm>

#include "common/errors.h"
#include "storage/context_model.h"

namespace routecast {
namespace {

const std::vector<std::string> kCompressions = {"none", "zstd", "context",
                                                "context+zstd"};

class Fields {
 public:
  Fields(const Json& json, const std::string& where) : json_(json), where_(where) {
    if (!json.is_object()) Fail("is not an object");
  }
  [[noreturn]] void Fail(const std::string& reason) const {
    throw DataError(ErrorText(where_ + " is not a trace store's configuration", reason,
                              "is it the right folder?"));
  }
  const Json& At(const std::string& key) const {
    if (!json_.contains(key)) Fail("key \"" + key + "\" is missing");
    return json_[key];
  }
  std::string Text(const std::string& key) const {
    if (!At(key).is_string()) Fail("key \"" + key + "\" is not a string");
    return At(key).get<std::string>();
  }
  std::vector<std::string> Texts(const std::string& key) const {
    if (!At(key).is_array()) Fail("key \"" + key + "\" is not a list");
    std::vector<std::string> texts;
    for (const Json& item : At(key)) {
      if (!item.is_string())
        Fail("key \"" + key + "\" holds something else than strings");
      texts.push_back(item.get<std::string>());
    }
    return texts;
  }
  int64_t Number(const std::string& key, int64_t low, int64_t high) const {
    const Json& value = At(key);
    if (!value.is_number_integer()) Fail("key \"" + key + "\" is not an integer");
    const bool fits = value.is_number_unsigned()
                          ? value.get<uint64_t>() <= static_cast<uint64_t>(high)
                          : value.get<int64_t>() <= high;
    const auto number = fits ? value.get<int64_t>() : low - 1;
    if (!fits || number < low) {
      Fail("key \"" + key + "\" is " + value.dump() + ", not in [" + std::to_string(low) +
           ", " + std::to_string(high) + "]");
    }
    return number;
  }
  int Int(const std::string& key, int low, int high) const {
    return static_cast<int>(Number(key, low, high));
  }

 private:
  const Json& json_;
  const std::string& where_;
};

MoeGeometry ReadGeometry(const Json& json, const std::string& where) {
  const Fields in(json, where);
  MoeGeometry g;
  g.encoder_layers = in.Int("encoder_layers", 0, 4096);
  g.decoder_layers = in.Int("decoder_layers", 0, 4096);
  g.num_experts = in.Int("num_experts", 1, 65536);
  g.experts_per_token = in.Int("experts_per_token", 1, 64);
  g.d_model = in.Int("d_model", 0, 65536);  // 0 = not known, of imported traces
  return g;
}

StoreSampling ReadSampling(const Json& json, const std::string& where) {
  const Fields in(json, where);
  const auto number = [&](const char* key) {
    if (!in.At(key).is_number()) in.Fail(std::string(key) + " is not a number");
    return in.At(key).get<double>();
  };
  StoreSampling s;
  s.temperature = number("temperature");
  s.top_k = in.Int("top_k", 0, 1 << 24);
  s.top_p = number("top_p");
  if (!(s.temperature > 0)) in.Fail("temperature is not above 0");
  if (!(s.top_p > 0 && s.top_p <= 1)) in.Fail("top_p is not in (0, 1]");
  if (!in.At("seed").is_number_unsigned()) in.Fail("seed is not a natural number");
  s.seed = in.At("seed").get<uint64_t>();
  return s;
}

std::vector<StoreIntake> ReadIntakes(const Json& json, const std::string& where) {
  std::vector<StoreIntake> intakes;
  for (const Json& item : json) {
    const Fields in(item, where);
    intakes.push_back({in.Texts("sources"), in.Text("corpus_fingerprint"),
                       in.Number("num_chunks", 0, 0xFFFFFFFFu),
                       in.Number("max_sequences", 0, int64_t{1} << 62)});
  }
  return intakes;
}

// The key as it decides: which sources an intake had by name does not.
std::string Deciding(const Json& json, const std::string& key) {
  if (!json.contains(key)) return "none";
  if (key != "intakes") return json.at(key).dump();
  Json intakes = json.at(key);
  for (Json& intake : intakes) intake.erase("sources");
  return intakes.dump();
}

}  // namespace

std::vector<StoreIntake> StoreConfig::AllIntakes() const {
  if (!intakes.empty()) return intakes;
  return {{data, corpus_fingerprint, num_chunks, max_sequences}};
}

void StoreConfig::SetIntakes(const std::vector<StoreIntake>& all) {
  data.clear();
  num_chunks = 0;
  for (const StoreIntake& intake : all) {
    data.insert(data.end(), intake.sources.begin(), intake.sources.end());
    num_chunks += intake.num_chunks;
  }
  corpus_fingerprint = all.back().corpus_fingerprint;
  max_sequences = all.back().max_sequences;
  intakes = all.size() > 1 ? all : std::vector<StoreIntake>();
}

bool StoreConfig::Records(const std::string& what) const {
  return std::find(record.begin(), record.end(), what) != record.end();
}

bool StoreConfig::ContextCoded() const { return compression.starts_with("context"); }

bool StoreConfig::ZstdBlocks() const { return compression.ends_with("zstd"); }

void RequireCompression(const std::string& compression, const MoeGeometry& geometry) {
  ParseChoice("--compression", compression, kCompressions);
  if (!compression.starts_with("context") || geometry.num_experts <= kMaxCodedExperts) {
    return;
  }
  throw UsageError(ErrorText("--compression=" + compression + ": too many experts",
                             std::to_string(geometry.num_experts) + ", at most " +
                                 std::to_string(kMaxCodedExperts),
                             "use --compression=none or zstd"));
}

namespace {

// The newest thing in a store decides. Coders of older programs left top-k ids packed.
int SchemaOf(const StoreConfig& c, bool codes_topk) {
  return c.left_out               ? kLeftOutSchema
         : codes_topk             ? kCodedTopkSchema
         : c.Records("attention") ? kAttentionSchema
         : c.Records("output")    ? kOutputSchema
         : !c.intakes.empty()     ? kIntakesSchema
         : c.ContextCoded()       ? kCodedSchema
                                  : kStoreSchema;
}

}  // namespace

Json StoreConfig::ToJson() const {
  Json json;
  json["schema"] = SchemaOf(*this, CodesTopk());
  json["model"] = model;
  json["model_fingerprint"] = model_fingerprint;
  json["tokenizer_fingerprint"] = tokenizer_fingerprint;
  json["corpus_fingerprint"] = corpus_fingerprint;
  json["geometry"] = {{"encoder_layers", geometry.encoder_layers},
                      {"decoder_layers", geometry.decoder_layers},
                      {"num_experts", geometry.num_experts},
                      {"experts_per_token", geometry.experts_per_token},
                      {"d_model", geometry.d_model}};
  json["experts_per_token"] = geometry.experts_per_token;
  json["record"] = record;
  json["top_k"] = top_k;
  if (attention_heads > 0) json["attention_heads"] = attention_heads;
  if (!token_ids) json["token_ids"] = false;
  json["data"] = data;
  json["task"] = TaskName(task);
  json["threads"] = threads;
  json["dtype"] = dtype;
  json["device_kind"] = device_kind;
  json["expert_parallel"] = expert_parallel;
  json["num_shards"] = num_shards;
  json["num_chunks"] = num_chunks;
  json["hidden_share"] = hidden_share;
  json["max_length"] = max_length;
  json["max_sequences"] = max_sequences;
  json["batch_size"] = batch_size;
  json["noise_density"] = noise_density;
  if (sampling.temperature > 0) {
    json["sampling"] = {{"temperature", sampling.temperature},
                        {"top_k", sampling.top_k},
                        {"top_p", sampling.top_p},
                        {"seed", sampling.seed}};
  }
  json["seed"] = seed;
  json["compression"] = compression;
  if (left_out) json["left_out"] = true;
  for (const StoreIntake& intake : intakes) {
    json["intakes"].push_back({{"sources", intake.sources},
                               {"corpus_fingerprint", intake.corpus_fingerprint},
                               {"num_chunks", intake.num_chunks},
                               {"max_sequences", intake.max_sequences}});
  }
  return json;
}

StoreConfig StoreConfig::FromJson(const Json& json, const std::string& where) {
  const Fields in(json, where);
  const int64_t schema = in.Number("schema", 0, int64_t{1} << 32);
  if (schema < kStoreSchema || schema > kLeftOutSchema || schema == kDroppedSchema) {
    throw UsageError(ErrorText(
        where + ": store of another schema",
        "schema " + std::to_string(schema) + ", this program reads " +
            std::to_string(kStoreSchema) + " to " + std::to_string(kLeftOutSchema) +
            " but for " + std::to_string(kDroppedSchema),
        "use the routecast that wrote it, or collect again"));
  }
  StoreConfig c;
  c.model = in.Text("model");
  c.model_fingerprint = in.Text("model_fingerprint");
  c.tokenizer_fingerprint = in.Text("tokenizer_fingerprint");
  c.corpus_fingerprint = in.Text("corpus_fingerprint");
  c.geometry = ReadGeometry(in.At("geometry"), where + " (geometry)");
  c.record = in.Texts("record");
  c.top_k = in.Int("top_k", 0, 64);
  if (json.contains("attention_heads")) {
    c.attention_heads = in.Int("attention_heads", 1, kMaxAttentionHeads);
  }
  if (json.contains("token_ids")) {
    if (!json["token_ids"].is_boolean()) in.Fail("token_ids is not true or false");
    c.token_ids = json["token_ids"].get<bool>();
  }
  if (json.contains("left_out")) {
    if (!json["left_out"].is_boolean()) in.Fail("left_out is not true or false");
    c.left_out = json["left_out"].get<bool>();
  }
  c.data = in.Texts("data");
  try {
    c.task = ParseTask(in.Text("task"));
  } catch (const UsageError&) {
    in.Fail("unknown task " + in.Text("task"));
  }
  c.threads = in.Int("threads", 1, 65536);
  c.dtype = in.Text("dtype");
  c.device_kind = in.Text("device_kind");
  c.expert_parallel = in.Int("expert_parallel", 1, 65536);
  c.num_shards = in.Int("num_shards", 1, 4096);
  c.num_chunks = in.Number("num_chunks", 0, 0xFFFFFFFFu);
  if (!in.At("hidden_share").is_number()) in.Fail("hidden_share is not a number");
  if (!in.At("noise_density").is_number()) in.Fail("noise_density is not a number");
  c.hidden_share = in.At("hidden_share").get<double>();
  c.noise_density = in.At("noise_density").get<double>();
  if (json.contains("sampling")) {
    c.sampling = ReadSampling(json["sampling"], where + " (sampling)");
  }
  c.max_length = in.Int("max_length", 1, 1 << 24);
  c.max_sequences = in.Number("max_sequences", 0, int64_t{1} << 62);
  c.batch_size = in.Int("batch_size", 0, 1 << 24);
  if (!in.At("seed").is_number_unsigned()) in.Fail("seed is not a natural number");
  c.seed = in.At("seed").get<uint64_t>();
  c.compression = in.Text("compression");
  if (std::find(kCompressions.begin(), kCompressions.end(), c.compression) ==
      kCompressions.end()) {
    in.Fail("unknown compression");
  }
  if (c.ContextCoded() && c.geometry.num_experts > kMaxCodedExperts) {
    in.Fail("compression \"" + c.compression + "\" does not go with its experts");
  }
  if (json.contains("intakes")) {
    if (!json["intakes"].is_array()) in.Fail("intakes is not a list");
    c.intakes = ReadIntakes(json["intakes"], where + " (intakes)");
  }
  if (c.Records("attention") != (c.attention_heads > 0)) {
    in.Fail("what it records does not go with its attention_heads");
  }
  if (schema != SchemaOf(c, c.CodesTopk()) && schema != SchemaOf(c, false)) {
    in.Fail("schema " + std::to_string(schema) + " does not go with what is in it: " +
            std::to_string(SchemaOf(c, c.CodesTopk())));
  }
  if (c.intakes.size() == 1 ||
      (c.intakes.size() > 1 &&
       c.intakes.back().corpus_fingerprint != c.corpus_fingerprint)) {
    in.Fail("its intakes do not go with its corpus");
  }
  return c;
}

std::vector<std::string> Differences(const StoreConfig& stored,
                                     const StoreConfig& wanted) {
  StoreConfig same = wanted;
  same.left_out = stored.left_out;
  const Json a = stored.ToJson(), b = same.ToJson();
  std::vector<std::string> differences;
  Json keys = a;  // a key that one of the two lacks differs, too
  keys.update(b);
  const auto compare = [&](const std::string& key) {
    if (Deciding(a, key) == Deciding(b, key)) return;
    differences.push_back(key + ": " + Deciding(a, key) + " in the store, not " +
                          Deciding(b, key));
  };
  for (const auto& [key, value] : keys.items()) {
    if (key != "model" && key != "data" && key != "schema") compare(key);
  }
  if (differences.empty()) compare("schema");  // it follows from the others
  return differences;
}

}  // namespace routecast
