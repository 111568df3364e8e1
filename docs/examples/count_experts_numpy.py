"""Tokens of the train part by decoder layer and chosen expert, from an exported traces.npz."""
import sys

import numpy as np

traces = np.load(sys.argv[1])
tokens = np.diff(traces["decoder_offsets"])      # [N], of each sequence
part = np.repeat(traces["split"], tokens)        # [T], 0 train, 1 validation, 2 test
ids = traces["decoder_expert_ids"][:, part == 0]  # [L, T], layer first
for layer, chosen in enumerate(ids):
    for expert, count in zip(*np.unique(chosen, return_counts=True)):
        print(layer, expert, count)
