// Writes a synthetic checkpoint of any geometry (models/synthetic_checkpoint.h), for
// tests of size and speed, and loads it again where asked.
//   make_checkpoint --out=FOLDER --config=config.json --dtype=bf16 --load
#include <gflags/gflags.h>

#include <chrono>
#include <cstdio>

#include "common/errors.h"
#include "models/checkpoint.h"
#include "models/parameters.h"
#include "models/synthetic_checkpoint.h"

DEFINE_string(out, "", "Folder for the checkpoint; made where it is missing");
DEFINE_string(config, "", "A config.json to take the geometry from; the flags below win");
DEFINE_int32(vocab_size, 0, "0: as the configuration has it, or switch-base-8's");
DEFINE_int32(d_model, 0, "as above");
DEFINE_int32(d_ff, 0, "as above");
DEFINE_int32(num_layers, 0, "Encoder and decoder blocks each; as above");
DEFINE_int32(num_experts, 0, "as above");
DEFINE_string(dtype, "bf16", "fp32, bf16 or fp16");
DEFINE_string(max_shard, "5GB", "Largest shard");
DEFINE_uint64(seed, 0, "Seed of the weights");
DEFINE_bool(load, false, "Load it again and say how long that took");

namespace routecast {
namespace {

double Seconds() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

SwitchConfig Config() {
  SwitchConfig c;
  c.num_sparse_encoder_layers = c.num_sparse_decoder_layers = 6;
  if (!FLAGS_config.empty()) {
    c = SwitchConfig::FromJson(ReadJsonFile(FLAGS_config), FLAGS_config);
  }
  const auto set = [](int flag, int* value) {
    if (flag > 0) *value = flag;
  };
  set(FLAGS_vocab_size, &c.vocab_size);
  set(FLAGS_d_model, &c.d_model);
  set(FLAGS_d_ff, &c.d_ff);
  set(FLAGS_num_experts, &c.num_experts);
  if (FLAGS_num_layers > 0) {
    c.num_layers = c.num_decoder_layers = FLAGS_num_layers;
    c.num_sparse_encoder_layers = c.num_sparse_decoder_layers = FLAGS_num_layers / 2;
  }
  return SwitchConfig::FromJson(c.ToJson(), "the flags");  // the same limits
}

void Run() {
  if (FLAGS_out.empty()) {
    throw UsageError(ErrorText("--out is missing", "", "give the checkpoint's folder"));
  }
  MakeFolder(FLAGS_out);
  const at::ScalarType dtype = ParseDtype("--dtype", FLAGS_dtype);
  double start = Seconds();
  const uint64_t bytes = WriteSyntheticCheckpoint(
      FLAGS_out,
      {Config(), dtype, FLAGS_seed, ParseBytes("--max_shard", FLAGS_max_shard)});
  std::printf("wrote %s in %.1f s\n", FormatBytes(bytes).c_str(), Seconds() - start);
  if (!FLAGS_load) return;
  start = Seconds();
  const Checkpoint read = LoadCheckpoint(FLAGS_out, dtype, at::kCPU);
  std::printf("loaded %lld parameters in %.1f s, fingerprint %s\n",
              static_cast<long long>(read.parameters.num_elements()), Seconds() - start,
              read.fingerprint.c_str());
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  gflags::SetUsageMessage("writes a synthetic checkpoint");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  try {
    routecast::Run();
  } catch (const routecast::UsageError& e) {
    std::fprintf(stderr, "make_checkpoint: %s\n", e.what());
    return routecast::kExitUsage;
  } catch (const routecast::DataError& e) {
    std::fprintf(stderr, "make_checkpoint: %s\n", e.what());
    return routecast::kExitBadData;
  } catch (const routecast::EnvironmentError& e) {
    std::fprintf(stderr, "make_checkpoint: %s\n", e.what());
    return routecast::kExitEnvironment;
  }
}
