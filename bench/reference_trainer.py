"""The reference's side of trainer_bench: the same inter-layer model as a PyTorch loop.

usage: reference_trainer.py THREADS WIDTH HEADS FF LAYERS EXPERTS CONTEXT BATCH TOKENS LEADS DROPOUT
Prints "ready PARAMETERS", then answers each line `N` with the seconds of N training steps: forward, cross-entropy,
backward, clipping, fused AdamW. What a careful user writes with torch.nn: fused attention, batch first, one batch in memory.
"""
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Interlayer(nn.Module):
    def __init__(self, width, heads, ff, layers, experts, context, leads, dropout):
        super().__init__()
        self.context = context
        self.expert = nn.Embedding(experts + 1, width)
        self.slot = nn.Embedding(12, width)
        self.lead = nn.Embedding(leads, width)
        layer = nn.TransformerEncoderLayer(width, heads, ff, dropout, F.gelu, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.pattern = nn.MultiheadAttention(width, heads, batch_first=True)
        self.memory = nn.Parameter(torch.randn(64, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, ff), nn.GELU(), nn.Dropout(dropout), nn.Linear(ff, ff // 2), nn.GELU(),
                                  nn.Dropout(dropout), nn.Linear(ff // 2, experts))
        self.confidence = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, 1), nn.Sigmoid())
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids, position):
        b, t, w = ids.shape
        x = (self.expert(ids) + self.slot.weight[:w]).view(b, t * w, -1) + position
        x = self.encoder(x)
        rows = x.view(b * t, w, -1)
        c, _ = self.pool(rows.mean(1, keepdim=True), rows, rows, need_weights=False)
        c = c.view(1, b * t, -1)
        memory = self.memory.unsqueeze(0)
        m, _ = self.pattern(c, memory, memory, need_weights=False)
        h = self.dropout(self.norm(c + m)).view(b, t, 1, -1) + self.lead.weight
        return self.head(h), self.confidence(h)


def main(threads, width, heads, ff, layers, experts, context, batch, tokens, leads, dropout):
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model = Interlayer(width, heads, ff, layers, experts, context, leads, dropout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, experts, (batch, tokens, context))
    labels = torch.randint(0, experts, (batch, tokens, leads))
    position = torch.randn(tokens * context, width)
    print("ready", sum(p.numel() for p in model.parameters()), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            optimizer.zero_grad(set_to_none=True)
            logits, confidence = model(ids, position)
            right = (logits.detach().argmax(-1) == labels).float()
            loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten())
            loss = loss + 0.1 * F.binary_cross_entropy(confidence.squeeze(-1), right)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*[int(a) for a in sys.argv[1:-1]], float(sys.argv[-1]))
