#include "trainer/speculation_size.h"

#include <cstdio>

#include "common/files.h"
#include "models/joint_model.h"
#include "trainer/model_setup.h"
#include "trainer/training_checks.h"

namespace routecast {

SpeculationSize SizeOf(const SpeculationOptions& o, TraceDataset* dataset,
                       const std::vector<FurtherStore>& also) {
  const std::vector<TraceDataset*> stores = StoresOf(dataset, also);
  const auto configs = ConfigsOf(o, stores);
  const WindowSampler sampler(
      GroupsOfAll(stores, SplitPart::kTrain, HiddenOf(configs[0])),
      {o.seed, o.micro_batch, o.global_batch});
  SpeculationSize size;
  size.parameters = JointModel(configs, o.seed).parameters().num_elements();
  size.steps_per_epoch = static_cast<int64_t>(sampler.steps_per_epoch());
  size.windows_per_epoch = sampler.samples_per_epoch();
  size.steps = o.steps > 0 ? o.steps : o.epochs * size.steps_per_epoch;
  // Weights, gradients, two moments, the best weights so far.
  size.bytes = static_cast<uint64_t>(size.parameters) * sizeof(float) * 5;
  for (TraceDataset* store : stores) {
    size.record_bytes += store->EstimateBytes(SplitPart::kTrain, HiddenOf(configs[0]));
    size.records_kept =
        size.records_kept && store->FitsInCache(SplitPart::kTrain, HiddenOf(configs[0]));
  }
  return size;
}

std::string DescribeSpeculation(const SpeculationJob& job, TraceDataset* dataset,
                                int world) {
  const SpeculationOptions& o = job.options;
  RequireWork(o, world);
  const SpeculationSize size = SizeOf(o, dataset, job.also);
  std::string further;
  for (const FurtherStore& store : job.also) {
    further += "also: " + store.dataset->SplitJson().dump() + "\n";
  }
  char text[2048];
  std::snprintf(text, sizeof text,
                "traces: %s\n%smodel: %s, %lld parameters\nrun: %lld steps of %d windows "
                "on %d ranks; "
                "%lld steps an epoch of %llu windows\nmemory: %s a rank before "
                "activations\nrecords to train on: %s a rank, %s\n",
                dataset->SplitJson().dump().c_str(), further.c_str(), o.kind.c_str(),
                static_cast<long long>(size.parameters),
                static_cast<long long>(size.steps), o.global_batch, world,
                static_cast<long long>(size.steps_per_epoch),
                static_cast<unsigned long long>(size.windows_per_epoch),
                FormatBytes(size.bytes).c_str(), FormatBytes(size.record_bytes).c_str(),
                size.records_kept ? "read into memory before the first step"
                                  : "more than --cache holds: read when they are needed");
  return text;
}

}  // namespace routecast
