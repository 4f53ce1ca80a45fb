"""9. Put together                                                     30 minutes, 10 points

A whole language model is these parts and some matrices. The block is the paper's, as Command R7B
ships it: one norm feeds attention and MLP side by side, and both add to x.

        x = embeddings of the tokens
        each layer:   h = LayerNorm(x)                         gain input_layernorm
                      x = x + attention(h) + MLP(h)            MLP: down(silu(gate(h)) * up(h))
        logits = LayerNorm(x) times the embeddings times logit_scale           gain norm

Names of the weights: embed_tokens.weight (v c), norm.weight (c), and of layer 0
layers.0.input_layernorm.weight (c), layers.0.self_attn.q_proj.weight ((h d) c), k_proj and v_proj
((k d) c), o_proj (c (h d)), layers.0.mlp.gate_proj.weight (f c), up_proj (f c), down_proj (c f).

Hint: y @ weight.T is a linear layer. F.layer_norm(x, gain.shape, gain) and F.silu may be used.
Values are shared among query heads as keys are.
"""

import torch.nn.functional as F  # noqa: F401
from torch import Tensor


def logits(
    tokens: Tensor, w: dict[str, Tensor], layers: list[tuple[bool, int | None]], sizes: dict, parts
) -> Tensor:
    """Logits (b t v) of tokens (b t).

    layers is exercise 5's list: (rotated, window) of each. sizes has n_head, n_kv_head, head_dim,
    theta and logit_scale. parts has your functions of exercises 1 to 4: parts.angles, parts.rotate,
    parts.visible, parts.weights. About 18 lines.
    """
    raise NotImplementedError


# Question: what is the loss of your model with the weights that you trained, in nats? The
# measurement runs on your exercises 1 to 5, and refuses when the project's model says otherwise.
#     python -m exercises.e09_model out/laptop-r64r64r64N-s1/last
ANSWER = None


if __name__ == "__main__":
    from exercises import measure

    measure.whole(logits)
