import torch
from torch import Tensor


class Ring:
    def __init__(self, window: int):
        self.window = window
        self.held = None  # keys, values, positions of the last `window` tokens

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = 0 if self.held is None else int(self.held[2][-1]) + 1
        positions = torch.arange(first, first + k.shape[2])
        if self.held is not None:
            k = torch.cat((self.held[0], k), dim=2)
            v = torch.cat((self.held[1], v), dim=2)
            positions = torch.cat((self.held[2], positions))
        w = self.window
        self.held = k[:, :, -w:].clone(), v[:, :, -w:].clone(), positions[-w:].clone()
        return k, v, positions


ANSWER = 0.256
