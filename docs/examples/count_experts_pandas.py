"""Tokens of the train part by decoder layer and chosen expert, from an exported traces.csv."""
import sys

import pandas as pd

rows = pd.read_csv(sys.argv[1])  # a row a token and layer
train = rows[(rows["stack"] == "decoder") & (rows["split"] == "train")]
for (layer, expert), count in train.groupby(["layer", "expert_id"]).size().items():
    print(layer, expert, count)
