"""The transformer of I2I in PyTorch, for benchmarks.accelerator: same layers, same matmuls, one training step.

Blocks with their own modulation, self-attention by SDPA, cross-attention to one condition token (two matmuls), an MLP of four
widths with tanh GELU; plain MSE on noise. Blocks are compiled one by one (torch.compile of the block), which is as fast as
compiling the network and takes a minute less. Parameters float32, bfloat16 autocast, fused AdamW, multi-tensor EMA.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q, self.kv, self.cross = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, s, y):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(s).chunk(6, dim=-1)
        q, k, v = self.qkv(modulate(x, shift_1, scale_1)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate_1[:, None] * self.out(attended)
        x = x + self.cross(self.kv(y).chunk(2, dim=-1)[1])[:, None]  # softmax over one token is 1
        hidden = F.gelu(self.fc1(modulate(x, shift_2, scale_2)), approximate="tanh")
        return x + gate_2[:, None] * self.fc2(hidden)


class DiT(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, channels: int, patch: int, tokens: int):
        super().__init__()
        self.patch, self.positions = patch, nn.Buffer(0.02 * torch.randn(1, tokens, width))
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.tokens = nn.Sequential(nn.Linear(768, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.table, self.final = nn.Parameter(torch.randn(2, width) / width**0.5), nn.Linear(width, patch**2 * channels)

    def forward(self, x, t, feature):
        angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, device=x.device) / 128)
        s = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        y, silu = self.tokens(feature), F.silu(s)
        h = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            h = block(h, silu, y)
        h = self.final(modulate(h, self.table[0] + s, self.table[1] + s))
        side = x.shape[-1] // self.patch
        h = h.unflatten(1, (side, side)).unflatten(-1, (self.patch, self.patch, -1))
        return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class TorchStep:
    """Training steps on one random batch. latent: (c, h, w). parameters: their number."""

    def __init__(self, width: int, depth: int, heads: int, latent: tuple[int, int, int], batch: int, compiled: bool):
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        net = DiT(width, depth, heads, latent[0], 2, latent[1] * latent[2] // 4).to(self.device)
        if compiled:
            for block in net.blocks:
                block.compile()
        self.net, self.params = net, list(net.parameters())
        self.parameters = sum(p.numel() for p in self.params)
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=True)
        self.ema = [p.detach().clone() for p in self.params]
        self.x, self.noise = (torch.randn(batch, *latent, device=self.device) for _ in range(2))
        self.t, self.feature = torch.rand(batch, device=self.device) * 1000, torch.randn(batch, 768, device=self.device)

    def steps(self, count: int) -> float:
        for _ in range(count):
            with torch.autocast(self.device, torch.bfloat16):
                out = self.net(self.x, self.t, self.feature)
            loss = F.mse_loss(out.float(), self.noise)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.params, 1e-4)
        return loss.item()  # waits for the device
