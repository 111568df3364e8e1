"""How often the likeliest expert was used, by predictor and lead, from answers.npz of --mode=quality."""
import sys

import numpy as np

said = dict(np.load(sys.argv[1]))  # else each use reads the file again
first = (said["rank"] == 1) & (said["used"] >= 0) & (said["stack"] == 1)  # a decoder's, labelled
for predictor in np.unique(said["predictor"]):
    for lead in np.unique(said["lead"]):
        at = first & (said["predictor"] == predictor) & (said["lead"] == lead)
        if at.any():
            print(predictor, lead, at.sum(), said["used"][at].sum())
