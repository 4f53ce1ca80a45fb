"""Muon: momentum, orthogonalised (Keller Jordan). torch.optim.Muon's update, batched by shape."""

import math

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw", for matrices. Those of one shape go
    through together, in `dtype`: bfloat16, which torch's own insists on, is some fifteen times
    slower on a CPU without bfloat16 units."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, dtype=None):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, weights in shapes.items():
                for p in weights:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads = [p.grad for p in weights]
                momenta = [self.state[p]["momentum_buffer"] for p in weights]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                # The size of AdamW's updates, so that both take one learning rate.
                rms = 0.2 * math.sqrt(max(shape))
                directions = orthogonalise(torch.stack(nesterov), self.dtype).unbind()
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, directions, alpha=-group["lr"] * rms)


def orthogonalise(g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(n rows columns) -> matrices with the same singular vectors, all singular values near 1, by
    five Newton-Schulz steps in `dtype` (None: g's own)."""
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).to(dtype or g.dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).to(g.dtype)
