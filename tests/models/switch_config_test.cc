// config.json of a Switch Transformer: what is read, refused, written, and where experts
// go.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <tuple>

#include "common/errors.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

SwitchConfig Read(const Json& differences) {
  Json json = SmallConfig().ToJson();
  json.update(differences);
  return SwitchConfig::FromJson(json, "config.json");
}

std::string SparseBlocks(const SwitchConfig& c, Stack stack) {
  std::string blocks;
  for (int i = 0; i < c.blocks(stack); ++i) blocks += c.IsSparse(stack, i) ? 'S' : '.';
  return blocks;
}

TEST(SwitchConfig, RefusesWhatItCannotRun) {
  EXPECT_EQ(Read(Json::object()).geometry(), SmallConfig().geometry());
  const std::pair<const char*, Json> bad[] = {{"model_type", "t5"},
                                              {"dense_act_fn", "relu6"},
                                              {"dense_act_fn", 3},
                                              {"is_gated_act", "yes"},
                                              {"router_dtype", "float64"},
                                              {"router_ignore_padding_tokens", 1},
                                              {"feed_forward_proj", "gated-gelu"},
                                              {"encoder_sparse_step", -1},
                                              {"decoder_sparse_step", "2"},
                                              {"num_experts", -1},
                                              {"d_model", 1e300},
                                              {"num_layers", "four"},
                                              {"num_heads", 0},
                                              {"vocab_size", 1},
                                              {"expert_capacity", -1},
                                              // Each would be taken for its default else.
                                              {"eos_token_id", nullptr},
                                              {"eos_token_id", {1, 2}},
                                              {"d_ff", nullptr},
                                              // The buckets have no order then.
                                              {"relative_attention_max_distance", 16},
                                              {"layer_norm_epsilon", -1},
                                              {"layer_norm_epsilon", 1e308},
                                              {"layer_norm_epsilon", nullptr},
                                              {"router_z_loss_coef", "x"},
                                              {"num_sparse_encoder_layers", 9}};
  for (const auto& [key, value] : bad) {
    try {
      Read({{key, value}});
      ADD_FAILURE() << key << "=" << value << " was accepted";
    } catch (const DataError& e) {
      EXPECT_NE(std::string(e.what()).find(key), std::string::npos) << e.what();
    }
  }
}

// The reference's defaults: a key that is absent is not a key that is null.
TEST(SwitchConfig, AbsentDecoderLayersAreTwelveAndNullOnesTheEncoders) {
  Json json = SmallConfig().ToJson();
  json["num_decoder_layers"] = nullptr;
  EXPECT_EQ(SwitchConfig::FromJson(json, "config.json").num_decoder_layers, 4);
  json.erase("num_decoder_layers");
  EXPECT_EQ(SwitchConfig::FromJson(json, "config.json").num_decoder_layers, 12);
}

TEST(SwitchConfig, TheSparseStepWinsOverTheCountOfSparseLayers) {
  const Json six = {{"num_layers", 6}, {"num_decoder_layers", 6}};
  const auto encoder = [&](Json differences) {
    differences.update(six);
    return SparseBlocks(Read(differences), Stack::kEncoder);
  };
  EXPECT_EQ(encoder({{"num_sparse_encoder_layers", 3}}), ".S.S.S");
  EXPECT_EQ(encoder({{"num_sparse_encoder_layers", 2}}), ".S..S.");
  EXPECT_EQ(encoder({{"num_sparse_encoder_layers", 6}}), "SSSSSS");
  EXPECT_EQ(encoder({{"num_sparse_encoder_layers", 4}}), "SSSSSS");  // 6 / 4 = 1
  EXPECT_EQ(encoder({{"num_sparse_encoder_layers", 0}}), ".S....");  // the reference's
  EXPECT_EQ(encoder({{"encoder_sparse_step", 4}}), ".S...S");
  EXPECT_EQ(encoder({{"encoder_sparse_step", 0}}), "......");
  EXPECT_EQ(encoder({{"encoder_sparse_step", 1}, {"num_sparse_encoder_layers", 1}}),
            "SSSSSS");
}

// transformers takes both: a count that a step makes idle, absent or not, and a capacity
// that nothing reaches.
TEST(SwitchConfig, ACountBeyondTheBlocksIsRefusedOnlyWhereItCounts) {
  Json json = SmallConfig().ToJson();
  json.update({{"num_layers", 2}, {"num_decoder_layers", 2}, {"decoder_sparse_step", 2}});
  for (const char* key : {"num_sparse_encoder_layers", "num_sparse_decoder_layers"})
    json.erase(key);  // the reference's default is 3
  EXPECT_THROW(SwitchConfig::FromJson(json, "config.json"), DataError);
  json["encoder_sparse_step"] = 1;
  const SwitchConfig c = SwitchConfig::FromJson(json, "config.json");
  EXPECT_EQ(SparseBlocks(c, Stack::kEncoder), "SS");
  EXPECT_EQ(SparseBlocks(c, Stack::kDecoder), ".S");
}

TEST(SwitchConfig, ACapacityThatNothingReachesIsTaken) {
  EXPECT_EQ(Read({{"expert_capacity", 1000000000}}).expert_capacity, 1000000000);
}

TEST(SwitchConfig, StepsOfTheTwoStacksAreApart) {
  const SwitchConfig c = Read({{"encoder_sparse_step", 1}, {"decoder_sparse_step", 3}});
  EXPECT_EQ(SparseBlocks(c, Stack::kEncoder), "SSSS");
  EXPECT_EQ(SparseBlocks(c, Stack::kDecoder), ".S..");
  EXPECT_EQ(c.geometry().encoder_layers, 4);
  EXPECT_EQ(c.geometry().decoder_layers, 1);
}

TEST(SwitchConfig, FeedForwardProjMayOnlyAgree) {
  EXPECT_EQ(Read({{"feed_forward_proj", "relu"}}).activation, Activation::kRelu);
  const SwitchConfig gated = Read({{"feed_forward_proj", "gated-gelu"},
                                   {"dense_act_fn", "gelu_new"},
                                   {"is_gated_act", true}});
  EXPECT_EQ(gated.activation, Activation::kGeluNew);
  EXPECT_TRUE(gated.is_gated_act);
  EXPECT_THROW(Read({{"feed_forward_proj", "silu"}}), DataError);
  EXPECT_THROW(Read({{"feed_forward_proj", "relu"}, {"is_gated_act", true}}), DataError);
}

// The published models, as their configurations say them (of the largest: Fedus et al.,
// table 9, gated): what is sparse, and as many parameters as they are known by.
TEST(SwitchConfig, PublishedModelsHaveTheirSizes) {
  const Json base = {{"vocab_size", 32128},
                     {"d_model", 768},
                     {"d_kv", 64},
                     {"d_ff", 3072},
                     {"num_heads", 12},
                     {"num_layers", 12},
                     {"num_decoder_layers", 12},
                     {"num_sparse_encoder_layers", 6},
                     {"num_sparse_decoder_layers", 6},
                     {"expert_capacity", 64},
                     {"tie_word_embeddings", true}};
  const auto with = [](Json json, const Json& more) {
    json.update(more);
    return json;
  };
  const Json deep = {{"num_layers", 24},
                     {"num_decoder_layers", 24},
                     {"num_sparse_encoder_layers", 12},
                     {"num_sparse_decoder_layers", 12},
                     {"num_experts", 128}};
  const Json large =
      with(with(base, deep), {{"d_model", 1024}, {"d_ff", 4096}, {"num_heads", 16}});
  const Json xxl = with(with(base, deep), {{"d_model", 4096},
                                           {"d_ff", 10240},
                                           {"num_heads", 64},
                                           {"dense_act_fn", "gelu_new"},
                                           {"is_gated_act", true}});
  const std::tuple<const char*, Json, double> models[] = {
      {"base-8", with(base, {{"num_experts", 8}}), .619},
      {"base-16", with(base, {{"num_experts", 16}}), 1.07},
      {"base-32", with(base, {{"num_experts", 32}}), 1.98},
      {"base-64", with(base, {{"num_experts", 64}}), 3.79},
      {"base-128", with(base, {{"num_experts", 128}}), 7.42},
      {"base-256", with(base, {{"num_experts", 256}}), 14.7},
      {"large-128", large, 26.3},
      {"xxl-128", xxl, 395}};
  for (const auto& [name, json, billions] : models) {
    const SwitchConfig c = Read(json);
    EXPECT_EQ(c.geometry().num_layers(), c.num_layers) << name;  // half of both stacks
    EXPECT_EQ(SparseBlocks(c, Stack::kDecoder).substr(0, 4), ".S.S") << name;
    double numbers = 0;
    for (const auto& [tensor, shape] : ParameterShapes(c)) {
      double count = 1;
      for (const int64_t size : shape) count *= static_cast<double>(size);
      numbers += count;
    }
    EXPECT_NEAR(numbers / 1e9, billions, .005 * billions) << name;
  }
}

TEST(SwitchConfig, WhatItWritesItReads) {
  const Json differences[] = {{{"dense_act_fn", "silu"}, {"is_gated_act", true}},
                              {{"router_dtype", "bfloat16"}, {"router_bias", true}},
                              {{"router_ignore_padding_tokens", true}},
                              {{"encoder_sparse_step", 0}, {"decoder_sparse_step", 3}},
                              {{"expert_capacity", 0}}};
  for (const Json& d : differences) {
    const Json written = Read(d).ToJson();
    EXPECT_EQ(SwitchConfig::FromJson(written, "x").ToJson(), written);
    for (const auto& [key, value] : d.items()) EXPECT_EQ(written[key], value) << key;
  }
}

TEST(Activation, EachNameIsItsFunction) {
  const at::Tensor x = at::tensor({-2.0, -0.5, 0.0, 1.0, 3.0}, at::kDouble);
  const auto reference = [&](const std::function<double(double)>& f) {
    at::Tensor y = at::empty_like(x);
    for (int64_t i = 0; i < x.size(0); ++i) y[i] = f(x[i].item<double>());
    return y;
  };
  const std::pair<const char*, std::function<double(double)>> expected[] = {
      {"relu", [](double v) { return v > 0 ? v : 0; }},
      {"gelu", [](double v) { return v / 2 * (1 + std::erf(v / std::sqrt(2.0))); }},
      {"gelu_new",
       [](double v) {
         return v / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
       }},
      {"silu", [](double v) { return v / (1 + std::exp(-v)); }}};
  for (const auto& [name, f] : expected) {
    ASSERT_TRUE(FindActivation(name).has_value()) << name;
    EXPECT_EQ(ActivationName(*FindActivation(name)), name);
    EXPECT_TRUE(
        at::allclose(Activate(*FindActivation(name), x), reference(f), 1e-9, 1e-12))
        << name;
  }
  EXPECT_FALSE(FindActivation("swiglu").has_value());
}

}  // namespace
}  // namespace routecast
