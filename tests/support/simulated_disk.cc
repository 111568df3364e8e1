#include "tests/support/simulated_disk.h"

#include <fstream>

namespace routecast {

SimulatedDisk::SimulatedDisk() : root_(std::make_shared<Node>()) { root_->folder = true; }

SimulatedDisk::NodePtr SimulatedDisk::At(const std::string& path) const {
  NodePtr node = root_;
  for (const auto& part : fs::path(path)) {
    const auto found = node->names.find(part.string());
    if (found == node->names.end()) return nullptr;
    node = found->second;
  }
  return node;
}

SimulatedDisk::NodePtr SimulatedDisk::ParentOf(const std::string& path) const {
  return At(fs::path(path).parent_path().string());
}

void SimulatedDisk::Apply(const FileChange& c) {
  const std::string name = fs::path(c.path).filename().string();
  switch (c.kind) {
    case FileChange::kCreate: {
      NodePtr node = At(c.path);
      if (!node) ParentOf(c.path)->names[name] = node = std::make_shared<Node>();
      open_[c.file] = node;
      break;
    }
    case FileChange::kWrite: {
      std::string& bytes = open_.at(c.file)->bytes;
      if (bytes.size() < c.offset + c.bytes.size()) {
        bytes.resize(c.offset + c.bytes.size());
      }
      bytes.replace(c.offset, c.bytes.size(), c.bytes);
      break;
    }
    case FileChange::kTruncate:
      open_.at(c.file)->bytes.resize(c.offset);
      break;
    case FileChange::kSync: {
      Node& node = *open_.at(c.file);
      node.safe_bytes = node.bytes;
      node.safe_names = node.names;
      break;
    }
    case FileChange::kMakeFolder:
      (ParentOf(c.path)->names[name] = std::make_shared<Node>())->folder = true;
      break;
    case FileChange::kRename:
    case FileChange::kLink: {
      ParentOf(c.other)->names[fs::path(c.other).filename().string()] = At(c.path);
      if (c.kind == FileChange::kRename) ParentOf(c.path)->names.erase(name);
      break;
    }
    case FileChange::kExchange:
      std::swap(ParentOf(c.path)->names.at(name),
                ParentOf(c.other)->names.at(fs::path(c.other).filename().string()));
      break;
    case FileChange::kUnlink:
      ParentOf(c.path)->names.erase(name);
      break;
    case FileChange::kPromise:
      break;
  }
}

void SimulatedDisk::Collect(const Node& node, const std::string& path, Lost lost,
                            DiskState* state) {
  if (!node.folder) {
    state->files[path] = lost == Lost::kNothing ? node.bytes : node.safe_bytes;
    return;
  }
  if (!path.empty()) state->folders.push_back(path);
  for (const auto& [name, child] :
       lost == Lost::kUnsynced ? node.safe_names : node.names) {
    Collect(*child, path.empty() ? name : path + "/" + name, lost, state);
  }
}

DiskState SimulatedDisk::After(Lost lost) const {
  DiskState state;
  Collect(*root_, "", lost, &state);
  return state;
}

void DiskState::WriteTo(const fs::path& folder) const {
  fs::create_directories(folder);
  for (const std::string& path : folders) fs::create_directories(folder / path);
  for (const auto& [path, bytes] : files) {
    std::ofstream(folder / path, std::ios::binary) << bytes;
  }
}

}  // namespace routecast
