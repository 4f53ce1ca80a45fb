import torch
from torch import Tensor


def exact(logits: Tensor, tokens: Tensor, answer: Tensor) -> float:
    right = logits[:-1].argmax(-1) == tokens[1:]
    asked = answer[1:]
    whole = [right[asked == question].all() for question in asked[asked >= 0].unique()]
    return torch.stack(whole).float().mean().item()


def error(values: list[float]) -> float:
    return torch.tensor(values).std().item() / len(values) ** 0.5


ANSWER = 0.8
