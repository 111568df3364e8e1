#include "collector/collected_model.h"

#include <ATen/ATen.h>
#include <sys/stat.h>

#include "comm/nccl_communicator.h"
#include "common/errors.h"
#include "common/machine.h"
#include "common/weight_files.h"

namespace routecast {

void RequireWholeGroups(int expert_parallel, int world) {
  if (world % expert_parallel == 0) return;
  const std::string group = std::to_string(expert_parallel);
  throw UsageError(ErrorText("--expert_parallel=" + group + " does not divide the job",
                             std::to_string(world) + (world == 1 ? " rank" : " ranks"),
                             "start a multiple of " + group + " ranks"));
}

namespace {

// Two ranks of a group on one card: refused before any weight is read.
void RequireGroupsOwnDevices(at::Device device, const RankInfo& rank, int group) {
  if (group == 1) return;
  RequireGroupDevices(rank, group,
                      device.is_cuda() ? DeviceName(device)
                                       : "the CPU of rank " + std::to_string(rank.rank));
}

void CheckExperts(int group, int num_experts) {
  if (group <= num_experts) return;
  throw UsageError(ErrorText(
      "--expert_parallel=" + std::to_string(group) + " is more than the model's experts",
      std::to_string(num_experts) + " experts a layer", "use at most as many"));
}

// The experts that rank `member` of a group owns; the others' entries stay undefined.
std::vector<ExpertWeights> OwnExperts(const fs::path& folder, int group, int member,
                                      at::ScalarType dtype, at::Device device) {
  const CheckpointReader reader(folder);
  const MoeGeometry g = reader.config().geometry();
  std::vector<ExpertWeights> weights(static_cast<size_t>(g.num_keys()));
  for (int i = 0; i < g.num_keys(); ++i) {
    const ExpertKey key = ExpertKey::FromIndex(i, g);
    if (OwnerOf(key.expert, g.num_experts, group) != member) continue;
    ExpertWeights& own = weights[static_cast<size_t>(i)];
    own = reader.ReadExpert(key, dtype);
    for (at::Tensor* tensor : {&own.wi_FD, &own.wo_DF, &own.gate_FD}) {
      if (tensor->defined()) *tensor = tensor->to(device);
    }
  }
  return weights;
}

}  // namespace

void RequireMemoryFor(uint64_t bytes, int local_ranks, uint64_t total) {
  if (bytes <= total) return;
  throw EnvironmentError(ErrorText(
      "the model does not fit this machine's memory",
      FormatBytes(bytes) + " of weights in " + std::to_string(local_ranks) +
          (local_ranks == 1 ? " rank" : " ranks") + ", " + FormatBytes(total) + " in all",
      "use --dtype=bf16, fewer ranks a machine, or --expert_parallel over machines"));
}

Json CheckpointFiles(const fs::path& folder) {
  const auto nanoseconds = [](const timespec& t) {
    return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
  };
  try {
    std::vector<fs::path> paths = WeightFiles(folder).files();
    paths.push_back(folder / "config.json");
    Json files = Json::object();
    for (const fs::path& path : paths) {
      struct stat info;
      if (::stat(path.c_str(), &info) != 0) return {};
      files[fs::absolute(path).lexically_normal().string()] = {info.st_size, info.st_ino,
                                                               nanoseconds(info.st_mtim),
                                                               nanoseconds(info.st_ctim)};
    }
    return files;
  } catch (const std::exception&) {
    return {};  // reading the checkpoint says it, where it is read at all
  }
}

Json CheckpointRecord(const fs::path& folder, const std::string& fingerprint,
                      const Json& before) {
  if (before.is_null() || CheckpointFiles(folder) != before) return {};
  return {{"fingerprint", fingerprint}, {"files", before}};
}

namespace {

// Of the store's last run with these files; empty where it had others or says nothing.
std::string KnownFingerprint(const fs::path& store, const fs::path& folder) {
  try {
    const Json known = ReadJsonFile(store / "run.json").value("checkpoint", Json());
    const std::string fingerprint = known.value("fingerprint", "");
    const Json files = known.value("files", Json());
    return CheckpointRecord(folder, fingerprint, files) == known ? fingerprint : "";
  } catch (const std::exception&) {
    return "";  // no run.json, or a damaged one: the bytes tell
  }
}

}  // namespace

Checkpoint PlannedModel(const fs::path& folder, at::Device device, const RankInfo& rank,
                        int expert_parallel, const fs::path& store) {
  RequireWholeGroups(expert_parallel, rank.world);
  RequireGroupsOwnDevices(device, rank, expert_parallel);
  const CheckpointReader reader(folder);
  CheckExperts(expert_parallel, reader.config().num_experts);
  if (!fs::exists(store / "store.json")) return {reader.config(), {}, ""};
  const std::string known = KnownFingerprint(store, folder);
  return {reader.config(), {}, known.empty() ? reader.Fingerprint() : known};
}

SwitchConfig CollectedConfig(const fs::path& folder, at::ScalarType dtype,
                             at::Device device, const RankInfo& rank,
                             int expert_parallel) {
  RequireWholeGroups(expert_parallel, rank.world);
  RequireGroupsOwnDevices(device, rank, expert_parallel);
  const SwitchConfig config = CheckpointReader(folder).config();
  CheckExperts(expert_parallel, config.num_experts);
  CollectedModel::RequireMemory(config, dtype, device, rank, expert_parallel);
  return config;
}

void RequireVocabulary(const std::string& model, const Tokenizer& tokenizer,
                       const SwitchConfig& config) {
  if (tokenizer.vocab_size() <= config.vocab_size) return;
  throw DataError(ErrorText(model + ": tokenizer and model do not fit",
                            "tokenizer has " + std::to_string(tokenizer.vocab_size()) +
                                " ids, the model " + std::to_string(config.vocab_size),
                            "use the tokenizer that the model was trained with"));
}

void RequireRouting(const std::string& model, const MoeGeometry& geometry, Task task) {
  const bool encoder_alone = task == Task::kEncode;
  if (geometry.encoder_layers + (encoder_alone ? 0 : geometry.decoder_layers) > 0) return;
  const bool elsewhere = geometry.num_layers() > 0;
  throw UsageError(ErrorText(
      model + (elsewhere ? ": its encoder" : "") + " has no MoE layer: nothing is routed",
      elsewhere ? "--task=encode runs the encoder alone"
                : "its config.json places experts in no block",
      elsewhere ? "use --task=denoise or generate" : "use a Switch Transformer"));
}

uint64_t CollectedModel::WeightBytes(const SwitchConfig& config, at::ScalarType dtype,
                                     const RankInfo& rank, int expert_parallel) {
  const int experts = config.num_experts;
  uint64_t own = 0;
  for (int e = 0; e < experts; ++e) {
    own += OwnerOf(e, experts, expert_parallel) == rank.rank % expert_parallel ? 1 : 0;
  }
  const WeightSizes sizes = SizesOfWeights(config, dtype);
  return sizes.dense + sizes.experts / static_cast<uint64_t>(experts) * own;
}

void CollectedModel::RequireMemory(const SwitchConfig& config, at::ScalarType dtype,
                                   at::Device device, const RankInfo& rank,
                                   int expert_parallel) {
  if (!device.is_cpu()) return;
  uint64_t bytes = 0;  // the ranks of a machine follow one another
  for (int r = 0; r < rank.local_world; ++r) {
    RankInfo local = rank;
    local.rank = rank.rank - rank.local_rank + r;
    bytes += WeightBytes(config, dtype, local, expert_parallel);
  }
  RequireMemoryFor(bytes, rank.local_world, MachineMemoryBytes());
}

CollectedModel::CollectedModel(const fs::path& folder, at::ScalarType dtype,
                               at::Device device, const RankInfo& rank,
                               int expert_parallel) {
  CollectedConfig(folder, dtype, device, rank, expert_parallel);
  if (expert_parallel == 1) {
    whole_ = std::make_unique<ResidentModel>(LoadCheckpoint(folder, dtype, device));
    return;
  }
  checkpoint_ = LoadCheckpoint(folder, dtype, device, ExpertLoading::kLeaveOut);
  const SwitchConfig& config = checkpoint_.config;
  const MoeGeometry g = config.geometry();
  source_ = std::make_unique<ResidentExpertSource>(
      g, OwnExperts(folder, expert_parallel, rank.rank % expert_parallel, dtype, device));
  local_ = std::make_unique<LocalExpertExecutor>(source_.get(), config.activation);
  group_ = std::make_unique<ExpertParallelExecutor>(
      rank, expert_parallel, g, config.d_model, dtype, device, local_.get());
  model_ = std::make_unique<SwitchModel>(config, checkpoint_.parameters, group_.get());
}

}  // namespace routecast
