"""Checkpoints in every form that people have, each with what transformers makes of it.

usage: checkpoint_forms.py OUT_FOLDER
Each case is a folder: config.json and the weights; beside them loaded.safetensors (the state
dict after from_pretrained) and golden.safetensors (ids, decoder_ids, logits). The folder
"legacy" holds a file of the kind before PyTorch 1.6, and nothing else to compare.
"""
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
              "lm_head.weight")


def model_of(tied, seed):
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(
        vocab_size=90, d_model=24, d_kv=6, d_ff=32, num_heads=4, num_layers=2,
        num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        num_experts=4, dropout_rate=0.0, tie_word_embeddings=tied,
        decoder_start_token_id=0)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (1.0 if "shared" in name else 0.3))
    return model


def without(state, *kept):
    return {k: v.clone() for k, v in state.items() if k not in EMBEDDINGS or k in kept}


def write_bin_shards(state, folder):
    names = list(state)
    parts = [names[0::3], names[1::3], names[2::3]]  # tied names land in several files
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"pytorch_model-{i + 1:05}-of-{len(parts):05}.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def views(state):
    """Parameters over one storage, matrices of experts transposed in memory."""
    flat = torch.cat([v.reshape(-1) for v in state.values()])
    result, at = {}, 0
    for name, v in state.items():
        if "experts" in name:
            result[name] = torch.nn.Parameter(v.t().contiguous().t())
        else:
            result[name] = flat[at:at + v.numel()].view(v.shape)
        at += v.numel()
    return result


def mixed(state):
    """As google/switch-base-8: bf16, the encoder's routers fp32."""
    keep = [n for n in state if n.startswith("encoder") and "router" in n]
    return {n: v.clone() if n in keep else v.to(torch.bfloat16) for n, v in state.items()}


def write_cases(out):
    tied, untied = model_of(True, 1), model_of(False, 2)
    state = tied.state_dict()

    def folder(name, model=tied):
        path = out / name
        path.mkdir()
        model.config.save_pretrained(path)
        return path

    def safetensors(name, tensors, model=tied):
        save_file(tensors, folder(name, model) / "model.safetensors", {"format": "pt"})

    def single_bin(name, tensors, model=tied, **options):
        torch.save(tensors, folder(name, model) / "pytorch_model.bin", **options)

    tied.save_pretrained(out / "sharded", max_shard_size="40KB")
    safetensors("only_shared", without(state, "shared.weight"))
    safetensors("only_head", without(state, "lm_head.weight"))
    safetensors("only_decoder", without(state, "decoder.embed_tokens.weight"))
    safetensors("all_four", without(state, *EMBEDDINGS))
    safetensors("untied", without(untied.state_dict(), *EMBEDDINGS), untied)
    safetensors("half", {n: v.half() for n, v in without(state, "shared.weight").items()})
    single_bin("bin", state)
    single_bin("bin_untied", untied.state_dict(), untied)
    single_bin("bin_views", views(without(state, "shared.weight")))
    single_bin("bin_mixed", mixed(without(state, "shared.weight")))
    write_bin_shards(state, folder("bin_sharded"))
    single_bin("legacy", state, _use_new_zipfile_serialization=False)


def write_golden(path):
    model, info = SwitchTransformersForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32)
    model.eval()
    if info["missing_keys"] or info["unexpected_keys"]:
        sys.exit(f"{path}: {info}")
    ids, decoder_ids = torch.arange(2, 32).view(2, 15), torch.arange(40, 52).view(2, 6)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids),
                       decoder_input_ids=decoder_ids).logits
    save_file({"ids": ids, "decoder_ids": decoder_ids, "logits": logits},
              path / "golden.safetensors")
    save_file({n: v.clone().contiguous() for n, v in model.state_dict().items()},
              path / "loaded.safetensors")


def main(out):
    write_cases(out)
    for path in sorted(out.iterdir()):
        if path.name != "legacy":
            write_golden(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
