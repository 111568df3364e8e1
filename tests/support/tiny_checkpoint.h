// A small checkpoint with random weights and a corpus, made in a second: routing is real,
// only untrained.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "common/random.h"
#include "common/run_record.h"
#include "corpus/tokenizer.h"
#include "models/checkpoint.h"

namespace routecast {

inline std::string RandomText(uint64_t key, int words) {
  std::string text;
  for (int w = 0; w < words; ++w) {
    const uint64_t word = ToRange(Mix(key, w), 300);
    for (uint64_t c = 0; c < 2 + word % 5; ++c) {
      text += static_cast<char>('a' + ToRange(Mix(7, word, c), 26));
    }
    text += ' ';
  }
  return text;
}

// corpus.jsonl: `documents` of 5 to 60 words, and one long one that is cut into
// sequences.
inline fs::path WriteCorpus(const fs::path& folder, int documents) {
  std::string lines;
  for (int d = 0; d < documents; ++d) {
    const int words = d == 3 ? 1500 : 5 + static_cast<int>(ToRange(Mix(3, d), 56));
    lines += Json{{"text", RandomText(Mix(1, d), words)}}.dump() + "\n";
  }
  WriteFileAtomic(folder / "corpus.jsonl", lines);
  return folder / "corpus.jsonl";
}

inline SwitchConfig TinyConfig() {
  SwitchConfig c;
  c.vocab_size = 160;
  c.d_model = 32;
  c.d_kv = 8;
  c.d_ff = 32;
  c.num_heads = 4;
  c.num_layers = c.num_decoder_layers = 4;
  c.num_sparse_encoder_layers = c.num_sparse_decoder_layers = 2;
  c.num_experts = 8;
  c.expert_capacity = 12;
  c.tie_word_embeddings = false;
  return c;
}

inline Parameters RandomParameters(const SwitchConfig& config, uint64_t key) {
  Parameters parameters;
  uint64_t number = 0;
  for (const auto& [name, shape] : ParameterShapes(config)) {
    at::Tensor tensor = at::empty(shape, at::kFloat);
    const bool norm = name.find("layer_norm") != std::string::npos;
    auto* to = tensor.mutable_data_ptr<float>();
    for (int64_t i = 0; i < tensor.numel(); ++i) {
      to[i] = norm ? 1.0f : 0.3f * static_cast<float>(ToNormal(Mix(key, number, i)));
    }
    ++number;
    parameters.Add(name, tensor);
  }
  return parameters;
}

inline fs::path WriteCheckpoint(const fs::path& folder, uint64_t key) {
  MakeFolder(folder);
  std::vector<std::string> texts;
  for (int i = 0; i < 200; ++i) texts.push_back(RandomText(Mix(2, i), 40));
  TokenizerTrainingOptions options;
  options.pieces = 120;
  Tokenizer::Train(texts, options, folder);
  SaveCheckpoint(folder, TinyConfig(), RandomParameters(TinyConfig(), key), at::kFloat);
  return folder;
}

}  // namespace routecast
