import torch
import torch.nn.functional as F
from torch import Tensor


def logits(
    tokens: Tensor, w: dict[str, Tensor], layers: list[tuple[bool, int | None]], sizes: dict, parts
) -> Tensor:
    d, positions = sizes["head_dim"], torch.arange(tokens.shape[1])
    angles = parts.angles(positions, d, sizes["theta"])
    norm = lambda x, gain: F.layer_norm(x, gain.shape, gain)
    x = w["embed_tokens.weight"][tokens]
    for i, (rotated, window) in enumerate(layers):
        linear = lambda y, name: y @ w[f"layers.{i}.{name}_proj.weight"].T
        h = norm(x, w[f"layers.{i}.input_layernorm.weight"])
        q, k, v = (linear(h, f"self_attn.{name}") for name in "qkv")
        q, k, v = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y in (q, k, v))
        if rotated:
            q, k = parts.rotate(q, angles), parts.rotate(k, angles)
        a = parts.weights(q, k, parts.visible(positions, positions, window))
        y = (a @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)).transpose(1, 2)
        mlp = linear(F.silu(linear(h, "mlp.gate")) * linear(h, "mlp.up"), "mlp.down")
        x = x + linear(y.flatten(2), "self_attn.o") + mlp
    return norm(x, w["norm.weight"]) @ w["embed_tokens.weight"].T * sizes["logit_scale"]


ANSWER = 4.17
