"""Checkpoints that routecast wrote must load in transformers with no missing and no unexpected
keys and give the logits that routecast computed, to fp32 rounding: the largest difference is
below 1e-4 of the largest logit.

usage: switch_roundtrip.py FOLDER...   (with golden.safetensors: ids, valid, decoder_ids, logits)
"""
import sys

import torch
from safetensors.torch import load_file
from transformers import SwitchTransformersForConditionalGeneration


def check(folder):
    model, info = SwitchTransformersForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    bad = {k: v for k, v in info.items() if v and k in kinds}
    if bad:
        sys.exit(f"{folder}: keys differ: {bad}")
    golden = load_file(f"{folder}/golden.safetensors")
    with torch.no_grad():
        logits = model.eval()(input_ids=golden["ids"], attention_mask=golden["valid"].long(),
                              decoder_input_ids=golden["decoder_ids"]).logits
    relative = ((logits - golden["logits"]).abs().max() / logits.abs().max()).item()
    print(f"{folder}: largest logit difference {relative:.3g} of the largest logit")
    if not relative < 1e-4:
        sys.exit(f"{folder}: logits differ")


for name in sys.argv[1:]:
    check(name)
