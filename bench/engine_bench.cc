// The Switch Transformer engine against transformers' (eager, same weights, inputs and
// threads, or device) and against its own matrix products alone, interleaved in one run:
// a forward pass of both stacks, and greedy decoding at batch 1. Weights are seeded
// random numbers. The reference runs in --python (torch and transformers; launch/test.sh
// sets it up).
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gflags/gflags.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <optional>

#include "bench/child_process.h"
#include "bench/machine_peaks.h"
#include "common/process_memory.h"
#include "models/checkpoint.h"
#include "models/linear.h"
#include "models/static_decoder.h"

DEFINE_string(folder, "", "Folder for the checkpoint; made where absent");
DEFINE_string(python, "python3",
              "Python with torch and transformers; empty: no baseline");
DEFINE_string(script, "bench/reference_engine.py", "The reference's side");
DEFINE_string(dtype, "fp32", "fp32, bf16 or, with --device=cuda, fp16");
DEFINE_string(device, "cpu", "cpu, cuda or cuda:N; of both sides");
DEFINE_int32(threads, 2, "Threads of each side");
DEFINE_int32(rounds, 7, "Rounds; all sides once a round");
DEFINE_int32(batch, 8, "Sequences");
DEFINE_int32(tokens, 128, "Tokens a sequence, encoder");
DEFINE_int32(decoder_tokens, 128, "Tokens a sequence, decoder");
DEFINE_int32(new_tokens, 32, "Tokens of a decoding run");
DEFINE_int32(experts, 8, "Experts a layer");
DEFINE_int32(blocks, 12, "Blocks a stack; every second is sparse");
DEFINE_int32(d_model, 768, "Model width");
DEFINE_int32(d_ff, 3072, "Expert width");
DEFINE_int32(heads, 12, "Attention heads of 64");
DEFINE_int32(vocabulary, 32128, "Pieces");

namespace routecast {
namespace {

SwitchConfig Geometry() {
  SwitchConfig c;
  c.vocab_size = FLAGS_vocabulary;
  c.d_model = FLAGS_d_model;
  c.d_ff = FLAGS_d_ff;
  c.d_kv = 64;
  c.num_heads = FLAGS_heads;
  c.num_layers = c.num_decoder_layers = FLAGS_blocks;
  c.num_sparse_encoder_layers = c.num_sparse_decoder_layers = FLAGS_blocks / 2;
  c.num_experts = FLAGS_experts;
  c.expert_capacity = 64;
  c.decoder_start_token_id = c.pad_token_id = 0;
  c.eos_token_id = 1;
  return c;
}

// Weights in proportions that keep the hidden state and the router alive.
Parameters RandomWeights(const SwitchConfig& config) {
  at::manual_seed(1);
  Parameters parameters;
  for (const auto& [name, shape] : ParameterShapes(config)) {
    if (name.find("layer_norm") != std::string::npos) {
      parameters.Add(name, at::ones(shape));
    } else {
      const double width = static_cast<double>(shape.back());
      const bool wide = name == "shared.weight" ||
                        name.find("relative_attention_bias") != std::string::npos;
      parameters.Add(name, at::randn(shape) * (wide ? 1.0 : 1 / std::sqrt(width)));
    }
  }
  return parameters;
}

struct Inputs {
  at::Tensor ids_BS, valid_BS, decoder_ids_BT;
};

Inputs Prepare(const fs::path& folder, const SwitchConfig& config) {
  if (!fs::exists(folder / "config.json")) {
    fs::create_directories(folder);
    SaveCheckpoint(folder, config, RandomWeights(config),
                   ParseDtype("--dtype", FLAGS_dtype));
  }
  at::manual_seed(2);
  Inputs in;
  in.ids_BS = at::randint(2, config.vocab_size, {FLAGS_batch, FLAGS_tokens}, at::kLong);
  in.valid_BS = at::ones_like(in.ids_BS, at::kBool);
  in.decoder_ids_BT =
      at::randint(2, config.vocab_size, {FLAGS_batch, FLAGS_decoder_tokens}, at::kLong);
  in.decoder_ids_BT.select(1, 0).zero_();
  Parameters file;
  file.Add("ids", in.ids_BS);
  file.Add("valid", in.valid_BS.to(at::kByte));
  file.Add("decoder_ids", in.decoder_ids_BT);
  WriteParameters(folder / "inputs.safetensors", file, at::ScalarType::Undefined);
  return in;
}

// Which experts a pass chose, [layers], each [N]; dropped tokens are -1.
class ChoiceLog final : public RoutingObserver {
 public:
  void OnPassBegin(const PassInfo&) override {}
  void OnPassEnd(const PassInfo&) override {}
  void OnRouting(const LayerRouting& r) override {
    choices.push_back(
        r.expert_ids_BT.masked_fill(r.dropped_BT, -1).reshape({-1}).clone());
  }
  std::vector<at::Tensor> choices;
};

// Both stacks up to the decoder's last hidden state: all that routing needs.
at::Tensor Trace(SwitchModel* model, const Inputs& in, RoutingObserver* observer) {
  const c10::NoGradGuard no_grad;
  ForwardOptions options;
  options.observer = observer;
  const at::Tensor hidden = model->Encode(in.ids_BS, in.valid_BS, options);
  return model->Decode(in.decoder_ids_BT, at::ones_like(in.decoder_ids_BT, at::kBool),
                       hidden, in.valid_BS, nullptr, options);
}

at::Tensor Forward(SwitchModel* model, const Inputs& in) {
  const c10::NoGradGuard no_grad;
  return model->Logits(Trace(model, in, nullptr));
}

// As collection decodes on a GPU: in fixed memory, one graph a step. Making it and
// recording it count.
void DecodeOneInGraph(SwitchModel* model, const Inputs& in, const at::Tensor& encoded) {
  const at::Tensor one = at::ones({1, 1}, at::kBool);
  at::Tensor current = at::zeros({1, 1}, at::kLong);
  StaticDecoder decoder(model, encoded, in.valid_BS.narrow(0, 0, 1), FLAGS_new_tokens,
                        {});
  for (int step = 0; step < FLAGS_new_tokens; ++step) {
    current = decoder.Step(current, one).argmax(-1).unsqueeze(1).to(at::kCPU);
  }
}

// Greedy tokens of the first sequence, its encoder output given; goes on behind
// end-of-sequence, as the reference is told to.
void DecodeOne(SwitchModel* model, const Inputs& in, const at::Tensor& encoded) {
  const c10::NoGradGuard no_grad;
  if (model->device().is_cuda() && StaticDecoder::Serves(*model, {}, 1)) {
    return DecodeOneInGraph(model, in, encoded);
  }
  const at::Tensor valid = in.valid_BS.narrow(0, 0, 1);
  const at::Tensor one = at::ones({1, 1}, at::kBool);
  at::Tensor current = at::zeros({1, 1}, at::kLong);
  DecoderCache cache;
  cache.most = FLAGS_new_tokens;  // as collection has it
  for (int step = 0; step < FLAGS_new_tokens; ++step) {
    current = model->Logits(model->Decode(current, one, encoded, valid, &cache))
                  .argmax(-1)
                  .to(at::kCPU);
  }
}

// The pass' matrix products and nothing else: the same weights, the same numbers of rows.
class ProductsAlone {
 public:
  ProductsAlone(const Checkpoint& checkpoint, const ChoiceLog& log)
      : config_(checkpoint.config), parameters_(checkpoint.parameters) {
    const auto rows = [&](Stack stack) {
      return int64_t{FLAGS_batch} *
             (stack == Stack::kEncoder ? FLAGS_tokens : FLAGS_decoder_tokens);
    };
    int layer = 0;
    for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
      for (int i = 0; i < config_.blocks(stack); ++i) {
        const std::string base =
            std::string(StackName(stack)) + ".block." + std::to_string(i) + ".layer.";
        AddAttention(base + "0.SelfAttention.", rows(stack), rows(stack));
        if (stack == Stack::kDecoder) {
          AddAttention(base + "1.EncDecAttention.", rows(stack), rows(Stack::kEncoder));
        }
        const std::string ff = base + (stack == Stack::kEncoder ? "1" : "2") + ".mlp.";
        if (!config_.IsSparse(stack, i)) {
          AddPair(ff, rows(stack));
          continue;
        }
        const at::Tensor counts = at::bincount(
            log.choices[size_t(layer)].to(at::kCPU) + 1, {}, config_.num_experts + 1);
        for (int e = 0; e < config_.num_experts; ++e) {
          const auto n = counts[e + 1].item<int64_t>();
          if (n > 0) AddPair(ff + "experts.expert_" + std::to_string(e) + ".", n);
        }
        ++layer;
      }
    }
    Add(config_.tie_word_embeddings ? "shared.weight" : "lm_head.weight",
        rows(Stack::kDecoder));
  }

  void Run() const {
    const c10::NoGradGuard no_grad;
    for (const auto& [input, weight] : products_) Linear(input, weight);
  }
  // What a machine of these peaks needs, whose caches hold all but the weights.
  double LeastSeconds(const MachinePeaks& machine) const {
    double seconds = 0;
    for (const auto& [input, weight] : products_) {
      const auto numbers = static_cast<double>(weight.numel());
      seconds += machine.Least(2 * numbers * static_cast<double>(input.size(0)),
                               static_cast<double>(weight.nbytes()));
    }
    return seconds;
  }

 private:
  void Add(const std::string& weight, int64_t rows) {
    const at::Tensor& w = parameters_.Get(weight);
    at::Tensor& input = inputs_[{rows, w.size(1)}];
    if (!input.defined()) input = at::randn({rows, w.size(1)}).to(w.options());
    products_.emplace_back(input, w);
  }
  void AddPair(const std::string& base, int64_t rows) {
    Add(base + "wi.weight", rows);
    Add(base + "wo.weight", rows);
  }
  void AddAttention(const std::string& base, int64_t queries, int64_t keys) {
    Add(base + "q.weight", queries);
    Add(base + "k.weight", keys);
    Add(base + "v.weight", keys);
    Add(base + "o.weight", queries);
  }

  const SwitchConfig& config_;
  const Parameters& parameters_;
  std::map<std::pair<int64_t, int64_t>, at::Tensor> inputs_;
  std::vector<std::pair<at::Tensor, at::Tensor>> products_;
};

// Weights that decoding a token reads: one expert a layer, and of the attention over the
// encoder what is not computed once.
double DecodingBytes(const Checkpoint& checkpoint) {
  double bytes = 0;
  for (const auto& [name, tensor] : checkpoint.parameters.items()) {
    const auto has = [&name](const char* part) {
      return name.find(part) != std::string::npos;
    };
    const bool head = name == (checkpoint.config.tie_word_embeddings ? "shared.weight"
                                                                     : "lm_head.weight");
    if (!head && !name.starts_with("decoder.block.")) continue;
    if (has("experts.expert_") && !has("experts.expert_0.")) continue;
    if (has("EncDecAttention.k.") || has("EncDecAttention.v.")) continue;
    bytes += static_cast<double>(tensor.nbytes());
  }
  return bytes;
}

// Until the device has done it.
double Seconds(at::Device device, const std::function<void()>& work) {
  const auto wait = [device] {
    if (device.is_cuda()) at::detail::getCUDAHooks().deviceSynchronize(device.index());
  };
  wait();
  const auto start = std::chrono::steady_clock::now();
  work();
  wait();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Side {
  std::string name;
  std::function<double()> run;
  std::vector<double> seconds;
};

double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

// Every side once a round; then medians, spread and the paired ratio to the first.
// `least`: seconds that no side can go below; 0 = not known.
void Compare(const char* title, double tokens, std::vector<Side> sides, double least) {
  for (Side& side : sides) side.run();  // warm
  for (int round = 0; round < FLAGS_rounds; ++round) {
    for (Side& side : sides) side.seconds.push_back(side.run());
  }
  std::printf("%s\n", title);
  for (const Side& side : sides) {
    std::vector<double> ratios;
    for (size_t i = 0; i < side.seconds.size(); ++i) {
      ratios.push_back(side.seconds[i] / sides[0].seconds[i]);
    }
    const double median = Quantile(side.seconds, .5);
    std::printf(
        "  %-24s %9.1f ms [%.1f-%.1f]  %9.0f tokens/s  takes %.2fx ours [%.2f-%.2f]\n",
        side.name.c_str(), 1e3 * median, 1e3 * Quantile(side.seconds, .25),
        1e3 * Quantile(side.seconds, .75), tokens / median, Quantile(ratios, .5),
        Quantile(ratios, .25), Quantile(ratios, .75));
  }
  if (least <= 0) return;
  std::printf("  %-24s %9.1f ms  ours takes %.2fx that\n", "the machine's roofline",
              1e3 * least, Quantile(sides[0].seconds, .5) / least);
}

// A near tie between experts that falls the other way moves its token, and what attends
// to it: random weights have some. So both sides are held against double precision.
void PrintDifference(const char* what, const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor rows = (a - b).abs().amax(-1).flatten();
  std::printf("logits, %s: largest difference %.2g, median of the tokens' %.2g\n", what,
              rows.max().item<double>(), rows.median().item<double>());
}

int Main() {
  if (FLAGS_folder.empty()) throw UsageError("--folder is needed");
  SetComputeThreads(FLAGS_threads);
  const fs::path folder = FLAGS_folder;
  const Inputs in = Prepare(folder, Geometry());
  const at::ScalarType dtype = ParseDtype("--dtype", FLAGS_dtype);
  const at::Device device = ParseDevice(FLAGS_device, /*local_rank=*/0);
  ResidentModel resident(LoadCheckpoint(folder, dtype, device));
  SwitchModel& model = resident.model();
  ChoiceLog log;
  Trace(&model, in, &log);
  const at::Tensor logits = Forward(&model, in).to(at::kCPU, at::kFloat);
  std::printf("%d + %d blocks, %d experts, d_model %d, d_ff %d, %s, %s, %d threads\n",
              FLAGS_blocks, FLAGS_blocks, model.config().num_experts,
              model.config().d_model, model.config().d_ff, FLAGS_dtype.c_str(),
              device.str().c_str(), FLAGS_threads);
  const ProductsAlone products(resident.checkpoint(), log);
  std::unique_ptr<LineProcess> reference;
  if (!FLAGS_python.empty()) {
    reference = std::make_unique<LineProcess>(std::vector<std::string>{
        FLAGS_python, FLAGS_script, folder.string(), std::to_string(FLAGS_threads),
        FLAGS_dtype, device.str()});
    if (reference->Read() != "ready")
      throw EnvironmentError("the baseline did not start");
    reference->Ask("logits");
    const Parameters out =
        ReadParameters(folder / "outputs.safetensors", at::ScalarType::Undefined);
    PrintDifference("ours and transformers'", logits, out.Get("logits"));
    if (out.Has("double")) {
      PrintDifference("ours and double precision", logits, out.Get("double"));
      PrintDifference("transformers' and double precision", out.Get("logits"),
                      out.Get("double"));
    }
  }
  std::optional<MachinePeaks> machine;
  if (device.is_cpu() && dtype == at::kFloat) {
    machine = PeaksOfCpu();
    std::printf("this machine: %.0f GFLOP/s of multiply-adds, reads %.1f GB/s\n",
                machine->flops / 1e9, machine->bytes_per_second / 1e9);
  }
  const auto ask = [&](const std::string& line) {
    return [&reference, line] { return std::stod(reference->Ask(line)); };
  };
  std::vector<Side> forward = {
      {"routecast", [&] { return Seconds(device, [&] { Forward(&model, in); }); }, {}},
      {"routecast, routing only",
       [&] {
         return Seconds(device, [&] {
           ChoiceLog routing;
           Trace(&model, in, &routing);
         });
       },
       {}},
      {"products alone", [&] { return Seconds(device, [&] { products.Run(); }); }, {}}};
  if (reference) {
    forward.push_back({"transformers, eager", ask("forward"), {}});
    forward.push_back({"the same, routing only", ask("stacks"), {}});
  }
  Compare("forward, both stacks",
          double(FLAGS_batch) * (FLAGS_tokens + FLAGS_decoder_tokens), forward,
          machine ? products.LeastSeconds(*machine) : 0);

  const at::Tensor encoded = [&] {
    const c10::NoGradGuard no_grad;
    return model.Encode(in.ids_BS.narrow(0, 0, 1), in.valid_BS.narrow(0, 0, 1));
  }();
  const auto decode = [&] {
    return Seconds(device, [&] { DecodeOne(&model, in, encoded); });
  };
  std::vector<Side> decoding = {{"routecast", decode, {}}};
  if (reference) {
    decoding.push_back(
        {"transformers, eager", ask("decode " + std::to_string(FLAGS_new_tokens)), {}});
  }
  Compare("greedy decoding with cache, batch 1, encoder output given", FLAGS_new_tokens,
          decoding,
          machine
              ? FLAGS_new_tokens * machine->Least(0, DecodingBytes(resident.checkpoint()))
              : 0);
  return 0;
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  routecast::KeepFreedMemory();
  routecast::PreferLargePages();
  gflags::SetUsageMessage("times the Switch Transformer engine beside its reference");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  try {
    return routecast::Main();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "engine_bench: %s\n", e.what());
    return 1;
  }
}
