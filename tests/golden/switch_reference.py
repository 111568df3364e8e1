"""Golden values of the Switch Transformer from transformers: small seeded models of many
configurations, saved as checkpoints, with what the reference makes of them.

usage: switch_reference.py OUT_FOLDER SEED [CASE...]
Each case is a folder: config.json and weights (the checkpoint) and golden.safetensors. The
tests keep one run of it in tests/golden/switch (seed 0) and make others as they run.

Weights are rounded to bf16 and stored so; the reference computes in fp32 from them, or in the
case's dtype. golden.safetensors holds, for a batch B of right-padded rows:
  ids, valid [B,S], decoder_ids, labels [B,T]           the inputs
  encoder_hidden [B,S,D], logits [B,T,V]                teacher forcing, decoder_ids
  STACK_router_N [B,T,E], STACK_chosen_N, STACK_dropped_N   of each MoE layer
  losses [6]                                            total, cross entropy, z and auxiliary
                                                        loss of encoder, of decoder (labels)
  greedy, greedy_margins [B,steps]                      tokens, distance of the two best logits
  beams [B*2,steps], beam_scores, beam_margins [B]      4 beams, 2 returned; the smallest gap
                                                        between neighbouring candidates
  beam_settings [3]                                     length penalty, early stopping (0
                                                        false, 1 true, 2 never), min_new_tokens
  dtype                                                 0 fp32, 1 bf16, 2 fp16
  spread [2]                                            largest difference in logits and in
                                                        router logits between a row alone, in
                                                        the batch and in a batch twice as wide,
                                                        and of fp32 from fp64 (rows that are
                                                        routed alike); at least a unit in the
                                                        last place
Beside them OUT_FOLDER/sampling.safetensors: logits, and what the warpers make of them.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.generation import logits_process
from transformers.models.switch_transformers import modeling_switch_transformers as switch
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense
from transformers.utils import logging

STEPS = 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SAMPLING = [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 10, 0.5), (0.5, 200, 0.05), (2.0, 1, 1.0)]
CASES = {
    # name: (differences of the configuration, sequence lengths, extras)
    "plain": (dict(), [20, 13, 7], {}),
    "experts_2": (dict(num_experts=2), [11, 16], {}),
    "experts_3_bias": (dict(num_experts=3, router_bias=True), [19, 6], {}),
    "experts_32": (dict(num_experts=32, d_model=16, d_kv=4, d_ff=16), [24, 10], {}),
    "experts_128": (dict(num_experts=128, d_model=16, d_kv=4, d_ff=8), [30, 17], {}),
    "one_expert": (dict(num_experts=1), [9, 4], {}),
    "capacity_3": (dict(expert_capacity=3, num_experts=4), [40, 25], {}),
    "capacity_1": (dict(expert_capacity=1, num_experts=4), [12, 18], {}),
    "capacity_0": (dict(expert_capacity=0, num_experts=4), [12, 8], {}),
    "capacity_padding": (dict(expert_capacity=4, num_experts=2), [30, 3, 9], {}),
    "tied": (dict(tie_word_embeddings=True), [17, 9], {}),
    "tied_bias": (dict(tie_word_embeddings=True, router_bias=True), [17, 9], {}),
    "every_block_sparse": (dict(num_sparse_encoder_layers=3, num_sparse_decoder_layers=3), [11, 5], {}),
    "step_3": (dict(num_layers=5, num_decoder_layers=5, encoder_sparse_step=3, decoder_sparse_step=3), [15, 8], {}),
    "step_from_5_by_2": (dict(num_layers=5, num_decoder_layers=5, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2), [15, 8], {}),
    "step_0_encoder": (dict(encoder_sparse_step=0, tie_word_embeddings=True), [10, 14], {}),
    "sparse_count_0": (dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0), [10, 14], {}),
    "decoder_deeper": (dict(num_decoder_layers=6, num_sparse_decoder_layers=3), [12, 20], {}),
    "decoder_shallower": (dict(num_layers=4, num_decoder_layers=2, num_sparse_encoder_layers=2, num_sparse_decoder_layers=1), [12, 20], {}),
    "long": (dict(num_experts=8, relative_attention_max_distance=64), [150, 90], {}),
    "few_buckets": (dict(relative_attention_num_buckets=8, relative_attention_max_distance=20), [60, 33], {}),
    "gelu": (dict(dense_act_fn="gelu"), [14, 9], {}),
    "gelu_new": (dict(dense_act_fn="gelu_new"), [14, 9], {}),
    "silu": (dict(dense_act_fn="silu"), [14, 9], {}),
    # The reference's Switch has no gated layer; T5's own, in its place, is what ours must be.
    "gated_gelu": (dict(dense_act_fn="gelu_new", is_gated_act=True), [14, 9], {"gated": True}),
    "gated_silu_tied": (dict(dense_act_fn="silu", is_gated_act=True, tie_word_embeddings=True), [14, 9], {"gated": True}),
    "narrow_heads": (dict(num_heads=3, d_kv=5, layer_norm_epsilon=1e-3), [13, 21], {}),
    "router_bf16": (dict(router_dtype="bfloat16"), [20, 13], {}),
    "router_fp16": (dict(router_dtype="float16"), [20, 13], {}),
    "bf16": (dict(), [20, 13, 7], {"dtype": torch.bfloat16}),
    "bf16_tied_gelu": (dict(tie_word_embeddings=True, dense_act_fn="gelu_new"), [20, 13], {"dtype": torch.bfloat16}),
    "fp16": (dict(), [20, 13], {"dtype": torch.float16}),
    "sharded": (dict(), [16, 9], {"shards": True}),
    "pickled": (dict(), [16, 9], {"pickled": True}),
    # Some, not all, of a dense block's outputs become infinite.
    "fp16_overflow": (dict(), [14, 6], {"dtype": torch.float16, "overflow": 6e4}),
}


def build(differences, extras):
    settings = dict(
        vocab_size=100, d_model=24, d_kv=6, d_ff=24, num_heads=4, num_layers=3,
        num_decoder_layers=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        num_experts=8, expert_capacity=64, dropout_rate=0.0, tie_word_embeddings=False,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        router_z_loss_coef=0.002, router_aux_loss_coef=0.03)
    settings.update(differences)
    config = SwitchTransformersConfig(**settings)
    ungated = switch.SwitchTransformersDenseActDense
    if extras.get("gated"):
        switch.SwitchTransformersDenseActDense = T5DenseGatedActDense
    model = SwitchTransformersForConditionalGeneration(config).eval()
    switch.SwitchTransformersDenseActDense = ungated
    with torch.no_grad():  # the default initialisation routes almost everything alike
        for name, p in model.named_parameters():
            # Larger ones amplify rounding from block to block.
            scale = 1.0 if "shared" in name or "classifier" in name else 0.2
            if "layer_norm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif name == "lm_head.weight":
                p.copy_(0.5 * torch.randn_like(p))
            else:
                p.copy_(scale * torch.randn_like(p))
            if name == "encoder.block.0.layer.1.mlp.wo.weight":
                p.mul_(extras.get("overflow", 1.0))
            p.copy_(p.to(torch.bfloat16).float())
    return model


def save(model, folder, differences, extras):
    model = model.to(torch.bfloat16)
    if extras.get("pickled"):
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="40KB" if extras.get("shards") else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    # The reference writes the step that it derived: readers shall derive it, too.
    config = json.loads((folder / "config.json").read_text())
    for key in ("encoder_sparse_step", "decoder_sparse_step"):
        if key not in differences:
            del config[key]
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


class Routers:
    """What every router said in one forward pass, encoder first."""

    def __init__(self, model):
        self.calls = []
        for module in model.modules():
            if isinstance(module, switch.SwitchTransformersTop1Router):
                module.register_forward_hook(self.hear)

    def hear(self, router, inputs, outputs):
        kept, _, logits = outputs
        probs = torch.softmax(logits, -1, dtype=router.dtype).to(router.input_dtype)
        self.calls.append((logits.float(), probs.argmax(-1), kept.sum(-1) == 0))


def forward(model, routers, ids, valid, decoder_ids):
    routers.calls = []
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=valid.long(), decoder_input_ids=decoder_ids,
                       output_router_logits=True)
    return result, list(routers.calls)


def spread(model, routers, ids, valid, decoder_ids, whole, calls):
    logits, router = 0.0, 0.0
    shapes = [(torch.arange(len(ids)).repeat(2), ids.shape[1])]
    shapes += [(torch.tensor([b]), int(valid[b].sum())) for b in range(len(ids))]
    for rows, width in shapes:
        again, others = forward(model, routers, ids[rows, :width], valid[rows, :width], decoder_ids[rows])
        logits = max(logits, (again.logits - whole.logits[rows]).abs().max().item())
        for (a, _, _), (b, _, _) in zip(others, calls):
            b = b[rows, :a.shape[1]]
            real = valid[rows, :a.shape[1]] if b.shape[1] != decoder_ids.shape[1] else torch.ones(b.shape[:2], dtype=torch.bool)
            router = max(router, ((a - b).abs() * real.unsqueeze(-1)).max().item())
    if model.dtype == torch.float32:  # the weights are bf16's: back and forth changes none
        exact, others = forward(model.double(), routers, ids, valid, decoder_ids)
        model.float()
        alike = torch.ones(len(ids), dtype=torch.bool)
        for (_, a, dropped), (_, b, left) in zip(others, calls):
            alike &= ((a == b) & (dropped == left)).all(-1)
        for (a, _, _), (b, _, _) in zip(others, calls):
            router = max([router] + (a - b)[alike].abs().flatten().tolist())
        logits = max([logits] + (exact.logits - whole.logits)[alike].abs().flatten().tolist())
    types = [whole.logits.dtype, getattr(torch, model.config.router_dtype)]
    step = max(torch.finfo(t).eps for t in types)
    largest = max([1.0] + [c[0].abs().max().item() for c in calls])
    return [max(logits, step * whole.logits.abs().max().item()), max(router, step * largest)]


def greedy(model, ids, valid, use_cache):
    out = model.generate(input_ids=ids, attention_mask=valid.long(), num_beams=1, do_sample=False,
                         max_new_tokens=STEPS, use_cache=use_cache, output_logits=True,
                         return_dict_in_generate=True)
    best = torch.stack([s.float().topk(2, -1).values for s in out.logits], 1)
    return out.sequences[:, 1:], best[..., 0] - best[..., 1]


def beams(model, ids, valid, use_cache, settings):
    gaps = []
    inner = model._get_top_k_continuations

    def listen(accumulated_log_probs, beams_to_keep, **rest):
        best = accumulated_log_probs.topk(beams_to_keep + 1, -1).values
        gaps.append((best[:, :-1] - best[:, 1:]).min(-1).values)
        return inner(accumulated_log_probs=accumulated_log_probs, beams_to_keep=beams_to_keep, **rest)

    model._get_top_k_continuations = listen
    out = model.generate(input_ids=ids, attention_mask=valid.long(), num_beams=4, do_sample=False,
                         num_return_sequences=2, max_new_tokens=STEPS, use_cache=use_cache,
                         output_scores=True, return_dict_in_generate=True, **settings)
    del model._get_top_k_continuations
    return out.sequences[:, 1:], out.sequences_scores, torch.stack(gaps).min(0).values


def end_token(model, ids, valid, use_cache):
    """A token that greedy decoding comes to, late if it can be: so searches end in all ways.
    1 where it says nothing but the start token."""
    rows = model.generate(input_ids=ids, attention_mask=valid.long(), num_beams=1, do_sample=False,
                          max_new_tokens=STEPS, min_new_tokens=STEPS, use_cache=use_cache)[:, 1:].tolist()
    first = [(row.index(token), token) for row in rows for token in row if token > 1]
    late = [token for position, token in first if 2 <= position < STEPS - 2]
    return (late + [token for _, token in first] + [1])[0]


def beam_settings(index):
    """Every case searches in another way."""
    return dict(length_penalty=[1.0, 0.0, 2.0, -0.5][index % 4],
                early_stopping=[False, True, "never"][index % 3], min_new_tokens=[0, 3][index % 2])


def losses(model, ids, valid, labels):
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=valid.long(), labels=labels, output_router_logits=True)
    entropy = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())  # ignores -100
    return torch.tensor([float(x) for x in (out.loss, entropy, out.encoder_z_loss, out.encoder_aux_loss,
                                            out.decoder_z_loss, out.decoder_aux_loss)])


def inputs(lengths):
    width, rows = max(lengths), len(lengths)
    valid = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, 100, (rows, width)) * valid
    decoder_ids = torch.randint(2, 100, (rows, 9))
    decoder_ids[:, 0] = 0
    labels = torch.randint(2, 100, (rows, 7))
    labels[-1, 4:] = -100
    return ids, valid, decoder_ids, labels


def make(index, name, folder):
    differences, lengths, extras = CASES[name]
    model = build(differences, extras)
    ids, valid, decoder_ids, labels = inputs(lengths)
    # 5.23.0 sizes its cache by the encoder's depth.
    use_cache = model.config.num_decoder_layers <= model.config.num_layers
    end = end_token(model, ids, valid, use_cache)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    save(model, folder, differences, extras)
    model = model.to(extras.get("dtype", torch.float32))
    routers = Routers(model)
    whole, calls = forward(model, routers, ids, valid, decoder_ids)
    tokens, margins = greedy(model, ids, valid, use_cache)
    best, scores, beam_margins = beams(model, ids, valid, use_cache, beam_settings(index))
    settings = beam_settings(index)
    tensors = {
        "ids": ids, "valid": valid.to(torch.uint8), "decoder_ids": decoder_ids, "labels": labels,
        "logits": whole.logits.float(), "encoder_hidden": whole.encoder_last_hidden_state.float(),
        "losses": losses(model, ids, valid, labels),
        "greedy": tokens, "greedy_margins": margins, "beams": best, "beam_scores": scores,
        "beam_margins": beam_margins,
        "beam_settings": torch.tensor([settings["length_penalty"], [False, True, "never"].index(settings["early_stopping"]),
                                       settings["min_new_tokens"]], dtype=torch.float32),
        "dtype": torch.tensor([DTYPES.index(model.dtype)]),
        "spread": torch.tensor(spread(model, routers, ids, valid, decoder_ids, whole, calls))}
    sparse = sum(isinstance(m, switch.SwitchTransformersTop1Router) for m in model.encoder.modules())
    for i, (logits, chosen, dropped) in enumerate(calls):
        stack, layer = ("encoder", i) if i < sparse else ("decoder", i - sparse)
        tensors[f"{stack}_router_{layer}"] = logits
        tensors[f"{stack}_chosen_{layer}"] = chosen.to(torch.int32)
        tensors[f"{stack}_dropped_{layer}"] = dropped.to(torch.uint8)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "golden.safetensors")


def warpers(out):
    logits = 3 * torch.randn(4, 60)
    tensors = {"logits": logits, "settings": torch.tensor(SAMPLING)}
    for i, (temperature, top_k, top_p) in enumerate(SAMPLING):
        warped = logits_process.TemperatureLogitsWarper(temperature)(None, logits)
        if top_k > 0:
            warped = logits_process.TopKLogitsWarper(top_k)(None, warped)
        if top_p < 1:
            warped = logits_process.TopPLogitsWarper(top_p)(None, warped)
        tensors[f"warped_{i}"] = warped
    save_file(tensors, Path(out) / "sampling.safetensors")


def main(out, seed, *names):
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    # Every weight is drawn below; the reference's initialisation knows no gated layers.
    switch.SwitchTransformersPreTrainedModel._init_weights = lambda self, module: None
    for index, name in enumerate(CASES):
        if names and name not in names:
            continue
        torch.manual_seed(int(seed) * 1000 + index)
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        make(index, name, folder)
    torch.manual_seed(int(seed))
    warpers(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
