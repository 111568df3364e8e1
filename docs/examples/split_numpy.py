"""The part (0 train, 1 validation, 2 test) of each document group of an exported traces.npz."""
import sys

import numpy as np


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def part(group):
    u = (mix(mix(0x726F757465636173) ^ (group + 0x632BE59BD9B4E019) % 2**64) >> 11) / 2**53
    return 2 if u < 0.30 else 1 if u < 0.475 else 0


traces = np.load(sys.argv[1])
for group in np.unique(traces["group_ids"]):
    print(group, part(int(group)))
