"""Writes six requests [T, 2, 4] of expert ids as .npy files of six integer types."""
import os
import sys

import numpy as np

for i, dtype in enumerate(["<u1", "<i2", "<u4", "<i4", "<i8", "<u8"]):
    t, l, k = np.ogrid[: i + 1, :2, :4]
    np.save(os.path.join(sys.argv[1], f"request-{i}.npy"), ((5 * t + 2 * l + k) % 30).astype(dtype))
