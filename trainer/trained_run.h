// The end of a training: the model is calibrated and scored on test documents beside its
// baselines, and the files of its folder are written.
// Thread rule: one thread a rank; every rank makes the same calls.
#pragma once

#include <memory>
#include <vector>

#include "models/joint_model.h"
#include "trainer/speculation_trainer.h"

namespace routecast {

// What the training leaves; all borrowed for the call.
struct TrainedRun {
  const SpeculationJob* job = nullptr;
  JointModel* joint = nullptr;                   // holds the best parameters
  std::vector<EvaluationData> validation;        // by store
  EvaluationData test;                           // of the first store
  std::shared_ptr<const BaselineTables> tables;  // of its train part
  const std::vector<RouterWeights>* routers = nullptr;
  StaleControl control;
  int64_t steps = 0, best_step = 0;
  double seconds = 0;        // of the whole training, over all processes
  bool out_of_time = false;  // it ended by the job's limit
};

// The folder of a store's model, by the number of the store.
fs::path FolderOfStore(const SpeculationJob& job, size_t store);

// Rank 0 writes; a rank that returns may not see the files yet. `losses` are left empty.
SpeculationResult ScoreAndWrite(const TrainedRun& run, Communicator* comm);

}  // namespace routecast
