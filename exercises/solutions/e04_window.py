import torch
from torch import Tensor


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    distance = q_pos[:, None] - k_pos[None, :]
    seen = (distance >= 0) & (k_pos >= 0)
    return seen if window is None else seen & (distance < window)


def receptive_field(last: Tensor, inputs: Tensor) -> int:
    (gradient,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), inputs)
    earliest = gradient[0].abs().sum(-1).nonzero()[0].item()
    return inputs.shape[1] - earliest


ANSWER = 190
