from dataclasses import replace

import torch
from torch import Tensor

from model import layer_plan


def frequencies(d: int, theta: float, method: str, factor: float) -> Tensor:
    if method == "ntk":
        theta = theta * factor ** (d / (d - 2))
    turns = theta ** (-torch.arange(0, d, 2) / d)
    return turns / factor if method == "pi" else turns


def extend(config, factor: float):
    if all(spec.rope for spec in layer_plan(config)):
        return replace(config, rope_scaling="ntk", rope_factor=factor)
    return config


ANSWER = 0.4
