#include "storage/store_builder.h"

#include <algorithm>
#include <stdexcept>

#include "common/errors.h"
#include "common/output_folder.h"
#include "common/stop.h"
#include "common/temporary_file.h"
#include "storage/context_coder.h"

namespace routecast {
namespace {

constexpr const char* kToken = "build";

// Nothing, or what a run that did not come to its end says of itself.
bool HoldsNoStore(const fs::path& out) {
  if (!IsThere(out)) return true;
  if (!fs::is_directory(out)) return false;
  return std::all_of(fs::directory_iterator(out), fs::directory_iterator(),
                     [](const fs::directory_entry& entry) {
                       if (!entry.is_regular_file()) return false;
                       const fs::path name = entry.path().filename();
                       return name == "run.json" || PathOfTemporary(name) == "run.json";
                     });
}

// Checked before SealedFolder makes (and empties) its temporary folder, and again once
// nobody else makes a store there.
const fs::path& NewStore(const fs::path& out) {
  RequireNewStore(out);
  return out;
}

}  // namespace

void RequireNewStore(const fs::path& out) {
  if (HoldsNoStore(out)) return;
  throw UsageError(ErrorText(out.string() + " is there already",
                             "a store is made whole, into a new folder",
                             "name another --out, or remove this one"));
}

void RequireApart(const fs::path& out, const fs::path& input) {
  const fs::path name = out.has_filename() ? out : out.parent_path();
  std::error_code ignored;
  if (!fs::equivalent(name.string() + ".tmp", input, ignored)) return;
  throw UsageError(ErrorText(input.string() + " is where the new store would be built",
                             "it would be emptied", "name another --out"));
}

void RequireComplete(const TraceReader& reader) {
  if (reader.complete()) return;
  throw UsageError(ErrorText(reader.path().string() + " is unfinished",
                             std::to_string(reader.completed_chunks()) + " of " +
                                 std::to_string(reader.config().num_chunks) +
                                 " chunks are in it",
                             "finish it: start its routecast-collect again"));
}

StoreBuilder::StoreBuilder(const fs::path& out, StoreConfig config, StepObserver on_step)
    : config_(std::move(config)),
      on_step_(std::move(on_step)),
      lock_(NewStore(out)),
      folder_(NewStore(out)) {
  RequireCompression(config_.compression, config_.geometry);
  MakeFolder(folder_.path() / "shards");
  MakeFolder(folder_.path() / "staging");
  config_.num_chunks = 0;
  owner_ = std::make_unique<ShardOwner>(folder_.path(), config_, 0, 1, on_step_);
}

StoreBuilder::~StoreBuilder() = default;

void StoreBuilder::Add(const RoutingTrace& trace) {
  if (num_sequences_ > 0 && trace.sequence_id <= last_id_) {
    throw std::logic_error("StoreBuilder: sequence ids must ascend");
  }
  if (StopRequested()) {
    throw StoppedError(
        "stopped; the new store is not there: start the same command again");
  }
  if (!chunk_) StartChunk();
  chunk_->Add(trace);
  last_id_ = trace.sequence_id;
  ++num_sequences_;
  if (chunk_->record_bytes() >= kBuiltChunkBytes) EndChunk();
}

void StoreBuilder::StartChunk() {
  chunk_ = std::make_unique<ChunkWriter>(folder_.path(), config_,
                                         static_cast<uint32_t>(config_.num_chunks),
                                         kToken, on_step_);
}

void StoreBuilder::EndChunk() {
  chunk_->Finish();
  chunk_.reset();
  owner_->Ingest(static_cast<uint32_t>(config_.num_chunks), kToken);
  ++config_.num_chunks;
}

void StoreBuilder::LeaveOut(const SequenceInfo& info) { left_out_.push_back(info); }

void StoreBuilder::CopyRouters(const fs::path& routers) {
  fs::copy_file(routers, folder_.path() / "routers.safetensors");
}

void StoreBuilder::AddLeftOut() {
  if (left_out_.empty() || num_sequences_ == 0) return;
  if (!chunk_) StartChunk();
  for (const SequenceInfo& info : left_out_) {
    RoutingTrace none;
    none.sequence_id = info.sequence_id;
    none.document_id = info.document_id;
    none.group_id = info.group_id;
    chunk_->Add(none);
  }
}

void StoreBuilder::Finish() {
  AddLeftOut();
  if (chunk_) EndChunk();
  if (num_sequences_ == 0) {
    throw UsageError(ErrorText("the new store would be empty",
                               "no sequence is left for it",
                               "take a larger share, or another input"));
  }
  config_.left_out = !left_out_.empty();
  WriteFileAtomic(folder_.path() / "store.json", config_.ToJson().dump(2) + "\n");
  MakeContextModel(folder_.path(), config_, on_step_);
  owner_->Finish();  // seals store.json and the model as well; closes before the folder
                     // moves
  owner_.reset();
  if (on_step_) on_step_("seal");
  folder_.Commit();
}

}  // namespace routecast
