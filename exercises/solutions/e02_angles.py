import torch
from torch import Tensor


def angles(positions: Tensor, d: int, theta: float) -> Tensor:
    frequencies = theta ** (-2 * torch.arange(d // 2) / d)
    return positions.float()[:, None] * frequencies


ANSWER = 319
