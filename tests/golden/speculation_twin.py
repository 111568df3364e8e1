"""Speculation models of routecast-train in PyTorch: `interlayer`, `hidden` and `multiscale`.

    twin = SpeculationTwin("OUT")                     # config.json, model.safetensors
    logits, confidence = twin("decoder", 1, window)   # tensors by name, as in docs/speculation.md

B sequences, T tokens, L MoE layers of the stack, R rows a token, H leads, E experts, D width.
"""
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

MASKED = -1e9
GUESSES = 16  # likeliest next tokens whose counts are mixed
BRANCHES = ((2, 8, 3), (3, 12, 4), (4, 16, 5))  # of multiscale: context, heads, layers


def shifted(ids, offset, fill):
    """Row t holds row t + offset of dimension 1; `fill` beyond the ends."""
    out = torch.full_like(ids, fill)
    for t in range(ids.shape[1]):
        if 0 <= t + offset < ids.shape[1]:
            out[:, t] = ids[:, t + offset]
    return out


def additive(may_attend):
    return torch.zeros(may_attend.shape).masked_fill(~may_attend, MASKED)


def sinusoid(rows, width):
    angle = torch.arange(rows).float()[:, None] * torch.exp(
        torch.arange(0, width, 2).float() * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], 2).reshape(rows, -1)[:, :width]


def heads_for(width, wanted):
    return next(h for h in range(wanted, 0, -1) if width % h == 0)


def position_row(place):
    return place if place < 16 else min(31, 16 + int(4 * math.log2(place / 16)))


class SpeculationTwin:
    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.config = json.loads((folder / "config.json").read_text())["config"]
        for option in ("token_inputs", "router_inputs", "topk_inputs", "attention_heads"):
            if self.config.get(option):
                raise ValueError(f"{folder}: {option} has no twin here; train without it")
        self.w = load_file(folder / "model.safetensors")
        geometry = self.config["geometry"]
        self.layers = {s: geometry[s + "_layers"] for s in ("encoder", "decoder")}
        self.base = {"encoder": 0, "decoder": self.layers["encoder"]}
        self.experts = geometry["num_experts"]
        self.compute = {"interlayer": self.interlayer, "hidden": self.hidden,
                        "multiscale": self.multiscale}[self.config["kind"]]

    @torch.no_grad()
    def __call__(self, stack, source, window):
        self.stack, self.source, self.window = stack, source, window
        self.decoder = stack == "decoder"
        count = self.layers[stack]
        self.same_token = count - 1 - source  # leads whose targets belong to the same token
        self.leads = count if self.decoder else self.same_token
        self.targets = [self.base[stack] + (source + h) % count
                        for h in range(1, self.leads + 1)]
        self.source_row = source + 1 + (self.layers["encoder"] + 1 if self.decoder else 0)
        logits, confidence = self.compute()
        return logits, torch.sigmoid(confidence.squeeze(-1))

    # Layers.
    def linear(self, x, name):
        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"],
                            self.w[name + ".bias"], 1e-5)

    def attention(self, query, memory, mask, name, heads):
        def split(x):
            return x.unflatten(-1, (heads, -1)).transpose(-3, -2)
        q = split(self.linear(query, name + ".q"))
        k, v = (split(self.linear(memory, name + part)) for part in (".k", ".v"))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        mixed = torch.softmax(scores if mask is None else scores + mask, -1) @ v
        return self.linear(mixed.transpose(-3, -2).flatten(-2), name + ".out")

    def encoder_layer(self, x, mask, name, heads):
        x = self.norm(x + self.attention(x, x, mask, name + ".attention", heads),
                      name + ".attention_norm")
        inner = F.gelu(self.linear(x, name + ".in"))
        return self.norm(x + self.linear(inner, name + ".out"), name + ".out_norm")

    # What a token knows of experts: ids and which of them count, both [B,T,R].
    def slots(self, context):
        ids = self.window["experts_BTL"]

        def last(known):
            padding = torch.full((*ids.shape[:2], context), self.experts)
            return torch.cat([padding, ids[:, :, :known]], 2)[:, :, known:]
        own = last(self.source + 1)
        valid = own != self.experts
        valid[:, :, -1] = True  # before the first layer its padding says just that
        if self.decoder:
            before = shifted(last(ids.shape[2]), -1, self.experts)
            own = torch.cat([before, own], 2)
            valid = torch.cat([before != self.experts, valid], 2)
        return own, valid & self.window["valid_BT"][:, :, None]

    def slot_mask(self, valid, one_row_a_token=False):
        tokens, rows = valid.shape[1:]
        may = valid.flatten(1)[:, None, None, :]
        key = torch.arange(tokens * rows) // rows
        query = torch.arange(tokens) if one_row_a_token else key
        return additive(may & (key[None] <= query[:, None]) if self.decoder else may)

    def markov(self, table):
        """Counts from the expert at the source layer; `table` [E + 1,H,E]."""
        return table[self.window["experts_BTL"][:, :, self.source]]

    def interlayer(self):
        c, w, E = self.config, self.w, self.experts
        D, W, heads = c["width"], c["context"], c["heads"]
        ids, valid = self.slots(W)
        B, T, R = ids.shape
        slot = w["slot.embedding"][:W]
        if self.decoder:
            slot = torch.cat([w["slot.embedding"][W:2 * W], slot])
        x = w["expert.embedding"][ids] + slot + w["stack.embedding"][int(self.decoder)]
        x = (x + w["source.embedding"][self.source + 1]).reshape(B, T * R, D)
        x, mask = x + sinusoid(T * R, D), self.slot_mask(valid)
        for i in range(c["layers"]):
            x = self.encoder_layer(x, mask, f"layer.{i}", heads)
        rows, count = x.view(B, T, R, D), valid[..., None].float()
        query = (rows * count).sum(2, True) / count.sum(2, True).clamp(min=1)
        seen = self.attention(query, rows, additive(valid[:, :, None, None]), "context",
                              heads).squeeze(2)
        known = self.attention(seen, w["pattern.memory"][None], None, "pattern", heads)
        h = self.norm(seen + known, "norm")[:, :, None] + w["lead.embedding"][:self.leads]
        inner = F.gelu(self.linear(F.gelu(self.linear(h, "head.in")), "head.mid"))
        logits = self.linear(inner, "head.out")
        if "prior.markov" in w and self.source >= 0:
            layer = self.base[self.stack] + self.source
            table = w["prior.markov"].view(-1, E + 1, w["lead.embedding"].shape[0], E)
            logits += self.markov(table[layer])[:, :, :self.leads] * w["prior.gain"][layer]
        return logits, self.linear(F.gelu(self.linear(h, "confidence.in")), "confidence.out")

    def multiscale(self):
        D = self.config["width"]
        views = torch.stack([self.view(i, *shape) for i, shape in enumerate(BRANCHES)], 2)
        weights = torch.softmax(self.w["fusion.weights"], 0)[:, None]
        fused = self.attention(views, views, None, "fusion.attention", heads_for(D, 8))
        h = self.norm((fused * weights).sum(2) + (views * weights).sum(2), "fusion.norm")
        logits = torch.einsum("btd,hed->bthe", h, self.w["head.weight"][self.targets])
        by_lead = h[:, :, None] + self.w["ours.lead"][:self.leads]
        return (logits + self.w["head.bias"][self.targets],
                self.linear(by_lead, "confidence"))

    def view(self, number, context, wanted, layers):
        w, D, name = self.w, self.config["width"], f"branch.{number}"
        heads = heads_for(D, wanted)
        ids, valid = self.slots(context)
        embedded = torch.cat([w["expert.embedding"], w["ours.unknown_expert"]])[ids]
        slot = w[name + ".slot"]
        if self.decoder:
            slot = torch.cat([w[f"ours.{name}.slot_before"], slot])
        x = (embedded + slot).flatten(1, 2)
        x, mask = x + sinusoid(x.shape[1], D), self.slot_mask(valid)
        for i in range(layers):
            x = self.encoder_layer(x, mask, f"{name}.layer.{i}", heads)
        query = embedded[:, :, -1] + w["ours.source"][self.source_row]
        read = self.attention(query, x, self.slot_mask(valid, one_row_a_token=True),
                              name + ".read", heads)
        inner = F.gelu(self.linear(self.norm(query + read, name + ".norm"),
                                   f"adapter.{number}.in"))
        return self.linear(inner, f"adapter.{number}.out")

    def hidden(self):
        w = self.w
        x = self.hidden_features()
        for i in range(self.config["layers"]):
            inner = F.gelu(self.linear(self.norm(x, f"block.{i}.norm"), f"block.{i}.in"))
            x = x + self.linear(inner, f"block.{i}.out")
            if i == 0 and not self.decoder and "mixer.bias" in w:
                x = x + self.mixed_tokens(self.norm(x, "mixer.norm"))
            if i == 0 and self.decoder and "source.norm.weight" in w:
                memory = self.linear(self.norm(self.window["source_BSD"], "source.norm"),
                                     "source.linear")
                mask = additive(self.window["source_valid_BS"][:, None, None])
                x = x + self.attention(self.norm(x, "source.query_norm"), memory, mask,
                                       "source.attention", self.config["heads"])
        y = self.norm(x, "norm")
        z = y[:, :, None] + w["lead.embedding"][:self.leads]
        logits = torch.einsum("bthd,hed->bthe", z, w["output.weight"][self.targets])
        logits = logits + w["output.bias"][self.targets]
        if "prior.token" in w:
            logits = logits + self.hidden_priors(y)
        return logits, self.linear(z, "confidence")

    def mixed_tokens(self, y):
        """Attention of the encoder's tokens, with a bias by distance."""
        bias = self.w["mixer.bias"]
        reach = (bias.shape[1] - 1) // 2
        at = torch.arange(y.shape[1])
        near = bias[:, (at[None] - at[:, None]).clamp(-reach, reach) + reach]
        mask = near + additive(self.window["valid_BT"][:, None, None])
        return self.attention(y, y, mask, "mixer.attention", self.config["heads"])

    def hidden_features(self):
        w, n, E = self.w, self.config["neighbours"], self.experts
        ids, experts = self.window["token_ids_BT"], self.window["experts_BTL"]
        table = w["token.embedding"]
        x = self.linear(table[ids], "token.linear") + w["source.embedding"][self.source_row]
        for i in range(n if self.decoder else 2 * n):
            offset = i - n if i < n else i - n + 1
            x = x + F.linear(table[shifted(ids, offset, 0)], w["neighbours.weight"][i])
        if "position.embedding" in w:
            x = x + w["position.embedding"][[position_row(t) for t in range(ids.shape[1])]]

        def state(tensor, name):
            return self.linear(self.norm(tensor, name + ".norm"), name + ".linear")
        if self.config["hidden_width"] > 0:
            if self.source < 0:
                x = x + w["state.absent"]
            else:
                first = max(0, self.layers["encoder"] - 1) if self.decoder else 0
                x = x + state(self.window["hidden_BTD"], f"state.{first + self.source}")
            if self.decoder:
                x = x + state(self.window["context_BTD"], "context")

        def embedded(name, ids_BTL, first):
            layer = torch.arange(first, first + ids_BTL.shape[2])
            rows = torch.where(ids_BTL == E, w[name].shape[0] - 1, ids_BTL + layer * E)
            return w[name][rows].sum(2)
        if self.source >= 0:
            x = x + embedded("own_experts.embedding", experts[:, :, :self.source + 1],
                             self.base[self.stack])
        if self.decoder:
            x = x + embedded("previous_experts.embedding", shifted(experts, -1, E), 0)
        return x

    def hidden_priors(self, y):
        """Counts: of the own token, of the source's expert, of guesses at the next token."""
        w, E, after = self.w, self.experts, self.same_token
        table = w["prior.token"].view(w["prior.token"].shape[0], -1, E)
        parts = [table[self.window["token_ids_BT"]][:, :, self.targets[:after]]]
        if self.leads > after:
            markov = w["prior.markov"].view(-1, E + 1, self.layers["decoder"], E)
            parts.append(self.markov(markov[self.source])[:, :, after:self.leads])
        logits = torch.cat(parts, 2) * w["prior.gain"][self.source_row]
        if "next_token.bias" in w and self.leads > after:
            scores = self.linear_to_tokens(self.linear(y, "next_token.query"))
            best, ids = scores.topk(min(GUESSES, scores.shape[-1]), -1)
            counts = table[ids][:, :, :, self.targets[after:]].exp()  # [B,T,K,leads,E]
            mixed = (torch.softmax(best, -1)[..., None, None] * counts).sum(2).log()
            logits[:, :, after:] += mixed * w["prior.next_gain"][self.source_row]
        return logits

    def linear_to_tokens(self, query):
        return F.linear(query, self.w["token.embedding"], self.w["next_token.bias"])
