"""Golden values of the Switch Transformer from transformers: small seeded models of several
geometries, saved as checkpoints, with their logits, router logits and greedy tokens.

usage: switch_reference.py OUT_FOLDER
Each case is a folder: config.json, model.safetensors (the checkpoint) and golden.safetensors.
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

CASES = {
    # name: (config differences, sequence lengths)
    "plain": (dict(), [20, 13, 7]),
    "capacity": (dict(expert_capacity=3, num_experts=4), [40, 25]),
    "tied_bias": (dict(tie_word_embeddings=True, router_bias=True), [17, 9]),
    "every_block_sparse": (dict(num_sparse_encoder_layers=4, num_sparse_decoder_layers=4), [11]),
    "long": (dict(num_experts=16, expert_capacity=64, relative_attention_max_distance=64), [150, 90]),
    "one_decoder_block_deeper": (dict(num_decoder_layers=6, num_sparse_decoder_layers=3), [12, 30]),
}


def build(differences):
    settings = dict(
        vocab_size=120, d_model=48, d_kv=12, d_ff=64, num_heads=4, num_layers=4,
        num_decoder_layers=4, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
        num_experts=8, expert_capacity=64, dropout_rate=0.0, tie_word_embeddings=False,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    settings.update(differences)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**settings)).eval()
    with torch.no_grad():  # the default initialisation routes almost everything alike
        for name, p in model.named_parameters():
            scale = 1.0 if "shared" in name or "classifier" in name else 0.15  # larger ones amplify rounding from block to block
            if "layer_norm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(scale * torch.randn_like(p))
    return model


def main(out):
    for seed, (name, (differences, lengths)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = build(differences)
        folder = Path(out) / name
        model.save_pretrained(folder)
        width = max(lengths)
        ids = torch.randint(2, 120, (len(lengths), width))
        valid = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
        ids = ids * valid
        decoder_ids = torch.randint(2, 120, (len(lengths), 9))
        decoder_ids[:, 0] = 0
        with torch.no_grad():
            result = model(input_ids=ids, attention_mask=valid.long(),
                           decoder_input_ids=decoder_ids, output_router_logits=True,
                           output_hidden_states=False)
            generated = model.generate(input_ids=ids, attention_mask=valid.long(), num_beams=1,
                                       do_sample=False, max_new_tokens=8, min_new_tokens=8,
                                       # 5.23.0 sizes its cache by the encoder's depth
                                       use_cache=name != "one_decoder_block_deeper")
        tensors = {"ids": ids, "valid": valid.to(torch.uint8), "decoder_ids": decoder_ids,
                   "logits": result.logits, "encoder_hidden": result.encoder_last_hidden_state,
                   "generated": generated}
        for stack in ("encoder", "decoder"):
            for i, logits in enumerate(getattr(result, f"{stack}_router_logits")):
                tensors[f"{stack}_router_{i}"] = logits
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "golden.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
