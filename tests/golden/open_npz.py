"""Opens an exported traces.npz with NumPy alone and prints what test and reference compare:
one line per array: name, dtype, shape, CRC-32 of its bytes."""
import sys
import zlib

import numpy as np

with np.load(sys.argv[1], allow_pickle=False) as arrays:
    with open(sys.argv[2], "w") as out:
        for name in sorted(arrays.files):
            a = arrays[name]
            shape = "x".join(map(str, a.shape))
            out.write(f"{name} {a.dtype.str} {shape} {zlib.crc32(a.tobytes()):08x}\n")
