#include "models/switch_config.h"

#include <cmath>
#include <iterator>
#include <limits>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr int kMaxSize = 1 << 20;

class Reader {
 public:
  Reader(const Json& json, std::string what) : json_(json), what_(std::move(what)) {}

  void Int(const char* key, int* value, int low, int high = kMaxSize) const {
    if (!json_.contains(key)) {
      Check(key, *value, low, high);
      return;
    }
    if (!json_[key].is_number_integer()) Bad(key, json_[key].dump(), "an integer");
    const auto number = json_[key].get<int64_t>();
    Check(key, number, low, high);
    *value = static_cast<int>(number);
  }
  // The same where null says what no key says.
  void NullableInt(const char* key, int* value, int low, int high = kMaxSize) const {
    if (json_.contains(key) && json_[key].is_null()) return Check(key, *value, low, high);
    Int(key, value, low, high);
  }
  void Number(const char* key, double* value, double high) const {
    if (!json_.contains(key)) return;
    const double number =
        json_[key].is_number() ? json_[key].get<double>() : std::nan("");
    if (!(number >= 0 && number <= high)) {
      Bad(key, json_[key].dump(), "a number from 0 to " + std::to_string(high));
    }
    *value = number;
  }
  void Bool(const char* key, bool* value) const {
    if (!json_.contains(key)) return;
    if (!json_[key].is_boolean()) Bad(key, json_[key].dump(), "true or false");
    *value = json_[key].get<bool>();
  }
  [[noreturn]] void Bad(const std::string& key, const std::string& value,
                        const std::string& expected) const {
    throw DataError(ErrorText(what_ + ": " + key + " is not usable",
                              key + "=" + value + ", expected " + expected,
                              "use the config.json of a Switch Transformer"));
  }

 private:
  void Check(const char* key, int64_t number, int low, int high) const {
    if (number < low || number > high) {
      Bad(key, std::to_string(number), std::to_string(low) + ".." + std::to_string(high));
    }
  }
  const Json& json_;
  std::string what_;
};

constexpr const char* kRouterDtypes[] = {"float32", "float16", "bfloat16"};

void ReadRouterDtype(const Json& json, const Reader& read, RouterDtype* dtype) {
  if (!json.contains("router_dtype")) return;
  for (size_t i = 0; i < std::size(kRouterDtypes); ++i) {
    if (json["router_dtype"] == kRouterDtypes[i]) {
      *dtype = static_cast<RouterDtype>(i);
      return;
    }
  }
  read.Bad("router_dtype", json["router_dtype"].dump(), "float32, float16 or bfloat16");
}

void ReadActivation(const Json& json, const Reader& read, SwitchConfig* c) {
  if (json.contains("dense_act_fn")) {
    const Json& name = json["dense_act_fn"];
    const auto found =
        name.is_string() ? FindActivation(name.get<std::string>()) : std::nullopt;
    if (!found) read.Bad("dense_act_fn", name.dump(), "relu, gelu, gelu_new or silu");
    c->activation = *found;
  }
  read.Bool("is_gated_act", &c->is_gated_act);
  if (!json.contains("feed_forward_proj")) return;
  // T5's one word for both. Two answers to one question are an error, not a choice.
  const std::string act = ActivationName(c->activation);
  const std::string said = (c->is_gated_act ? "gated-" : "") + act;
  const Json& proj = json["feed_forward_proj"];
  const bool t5_name = c->is_gated_act && act == "gelu_new" && proj == "gated-gelu";
  if (proj != said && !t5_name) {
    read.Bad("feed_forward_proj", proj.dump(),
             said + " as dense_act_fn and is_gated_act say");
  }
}

void ReadSparseStep(const Json& json, const Reader& read, const char* key,
                    std::optional<int>* step) {
  if (!json.contains(key)) return;
  int value = 0;
  read.Int(key, &value, 0);
  *step = value;
}

}  // namespace

int SwitchConfig::SparseStep(Stack stack) const {
  const bool encoder = stack == Stack::kEncoder;
  const std::optional<int>& step = encoder ? encoder_sparse_step : decoder_sparse_step;
  if (step) return *step;
  const int sparse = encoder ? num_sparse_encoder_layers : num_sparse_decoder_layers;
  return sparse > 0 ? blocks(stack) / sparse : blocks(stack);
}

bool SwitchConfig::IsSparse(Stack stack, int block) const {
  const int step = SparseStep(stack);
  return step > 0 && (step == 1 || block % step == 1);
}

MoeGeometry SwitchConfig::geometry() const {
  MoeGeometry g;
  for (int i = 0; i < num_layers; ++i) g.encoder_layers += IsSparse(Stack::kEncoder, i);
  for (int i = 0; i < num_decoder_layers; ++i)
    g.decoder_layers += IsSparse(Stack::kDecoder, i);
  g.num_experts = num_experts;
  g.experts_per_token = 1;
  g.d_model = d_model;
  return g;
}

SwitchConfig SwitchConfig::FromJson(const Json& json, const std::string& what) {
  const Reader read(json, what);
  if (!json.is_object()) read.Bad("config", "not an object", "a JSON object");
  if (!json.contains("model_type") || json["model_type"] != "switch_transformers") {
    read.Bad("model_type",
             json.contains("model_type") ? json["model_type"].dump() : "absent",
             "\"switch_transformers\"");
  }
  SwitchConfig c;
  read.Int("vocab_size", &c.vocab_size, 2, 1 << 24);
  read.Int("d_model", &c.d_model, 1);
  read.Int("d_kv", &c.d_kv, 1);
  read.Int("d_ff", &c.d_ff, 1);
  read.Int("num_heads", &c.num_heads, 1, 4096);
  read.Int("num_layers", &c.num_layers, 1, 4096);
  // null, not absence, asks for as many as the encoder has.
  if (json.contains("num_decoder_layers")) c.num_decoder_layers = c.num_layers;
  read.NullableInt("num_decoder_layers", &c.num_decoder_layers, 1, 4096);
  ReadSparseStep(json, read, "encoder_sparse_step", &c.encoder_sparse_step);
  ReadSparseStep(json, read, "decoder_sparse_step", &c.decoder_sparse_step);
  // Where a step is given, nobody divides by the count.
  read.Int("num_sparse_encoder_layers", &c.num_sparse_encoder_layers, 0,
           c.encoder_sparse_step ? kMaxSize : c.num_layers);
  read.Int("num_sparse_decoder_layers", &c.num_sparse_decoder_layers, 0,
           c.decoder_sparse_step ? kMaxSize : c.num_decoder_layers);
  read.Int("num_experts", &c.num_experts, 1, 65535);
  // Any number: people write a huge one for "drop nothing".
  read.Int("expert_capacity", &c.expert_capacity, 0, std::numeric_limits<int>::max());
  read.Bool("router_bias", &c.router_bias);
  ReadRouterDtype(json, read, &c.router_dtype);
  read.Bool("router_ignore_padding_tokens", &c.router_ignore_padding_tokens);
  ReadActivation(json, read, &c);
  read.Number("router_jitter_noise", &c.router_jitter_noise, 1);
  read.Number("router_z_loss_coef", &c.router_z_loss_coef, kMaxSize);
  read.Number("router_aux_loss_coef", &c.router_aux_loss_coef, kMaxSize);
  read.Int("relative_attention_num_buckets", &c.relative_attention_num_buckets, 4, 4096);
  // Half the decoder's buckets are of one distance each; the others lie beyond those.
  read.Int("relative_attention_max_distance", &c.relative_attention_max_distance,
           c.relative_attention_num_buckets / 2 + 1);
  read.Number("layer_norm_epsilon", &c.layer_norm_epsilon, 1);
  read.Bool("tie_word_embeddings", &c.tie_word_embeddings);
  read.NullableInt("pad_token_id", &c.pad_token_id, 0, c.vocab_size - 1);
  read.Int("eos_token_id", &c.eos_token_id, 0, c.vocab_size - 1);
  read.NullableInt("decoder_start_token_id", &c.decoder_start_token_id, 0,
                   c.vocab_size - 1);
  return c;
}

Json SwitchConfig::ToJson() const {
  Json json{
      {"architectures", {"SwitchTransformersForConditionalGeneration"}},
      {"model_type", "switch_transformers"},
      {"vocab_size", vocab_size},
      {"d_model", d_model},
      {"d_kv", d_kv},
      {"d_ff", d_ff},
      {"num_heads", num_heads},
      {"num_layers", num_layers},
      {"num_decoder_layers", num_decoder_layers},
      {"num_sparse_encoder_layers", num_sparse_encoder_layers},
      {"num_sparse_decoder_layers", num_sparse_decoder_layers},
      {"num_experts", num_experts},
      {"expert_capacity", expert_capacity},
      {"router_bias", router_bias},
      {"router_dtype", kRouterDtypes[static_cast<size_t>(router_dtype)]},
      {"router_ignore_padding_tokens", router_ignore_padding_tokens},
      {"router_jitter_noise", router_jitter_noise},
      {"router_z_loss_coef", router_z_loss_coef},
      {"router_aux_loss_coef", router_aux_loss_coef},
      {"relative_attention_num_buckets", relative_attention_num_buckets},
      {"relative_attention_max_distance", relative_attention_max_distance},
      {"dense_act_fn", ActivationName(activation)},
      {"is_gated_act", is_gated_act},
      {"dropout_rate", 0.0},
      {"layer_norm_epsilon", layer_norm_epsilon},
      {"initializer_factor", 1.0},
      {"is_encoder_decoder", true},
      {"tie_word_embeddings", tie_word_embeddings},
      {"pad_token_id", pad_token_id},
      {"eos_token_id", eos_token_id},
      {"decoder_start_token_id", decoder_start_token_id},
      {"use_cache", true},
  };
  if (encoder_sparse_step) json["encoder_sparse_step"] = *encoder_sparse_step;
  if (decoder_sparse_step) json["decoder_sparse_step"] = *decoder_sparse_step;
  return json;
}

}  // namespace routecast
