import math

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1).to(q.dtype)


ANSWER = 7.86
