import torch
from torch import Tensor


def masses(w: Tensor, segment: Tensor) -> Tensor:
    spent = w[:, segment == 3].mean((0, 1))
    return torch.stack([spent[segment == kind].sum() for kind in range(4)])


def entropy(w: Tensor, segment: Tensor) -> float:
    rows = w[:, segment == 3]
    return torch.special.entr(rows).sum(-1).mean().item() / 0.6931471805599453


ANSWER = 0.46
