"""Cross-entropy of a large vocabulary by chunks of rows, gradients made on the way."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.kernels import as_autocast

# Elements (rows v) of logits that stand in memory at a time; on CPU what its cache holds.
LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**27}
LEAST_ROWS = 256  # each chunk also adds to the whole (v c) gradient of the output matrix


def linear_cross_entropy(
    hidden: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor | None, scale: float
) -> Tensor:
    """Sum of weights x cross-entropy of the logits scale x hidden matrix^T, a scalar in float32 at
    least: hidden (b t c), matrix (v c), targets and weights (b t); a target of -100 does not count.
    weights None: the mean, 1 / (targets that count).

    Equal to torch's `cross_entropy` of whole logits, the largest tensor of a training step.
    """
    if weights is None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = 1 / (targets != -100).sum(dtype=wide).clamp(min=1).expand_as(targets)
    h, y, w = hidden.flatten(0, 1), targets.flatten(), weights.flatten()
    if hidden.is_cpu and not torch.compiler.is_compiling():  # (a GPU would wait for their number)
        h, y, w = h[w != 0], y[w != 0], w[w != 0]
    return LinearCrossEntropy.apply(h, matrix, y, w, scale, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """The gradient of the logits is softmax - one-hot, known as soon as they are; so each chunk of
    rows turns them into gradients at once, if `wanted`, and (n v) logits never stand in memory."""

    @staticmethod
    def forward(ctx, hidden, matrix, targets, weights, scale, wanted) -> Tensor:
        device, wide = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
        weights = (weights * (targets != -100)).to(wide)
        targets = targets.masked_fill(targets == -100, 0)
        narrow = as_autocast(matrix)  # once, not for each chunk
        matrix = matrix.to(hidden.dtype) if narrow is matrix else narrow
        total = torch.zeros((), device=device, dtype=wide)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_matrix = torch.zeros_like(matrix, dtype=wide) if wanted else None
        columns = torch.arange(len(matrix), device=device)
        rows = max(LOGITS_AT_ONCE.get(device.type, 2**26) // len(matrix), LEAST_ROWS)
        for i in range(0, len(hidden), rows):
            h, y, w = hidden[i : i + rows], targets[i : i + rows], weights[i : i + rows]
            logp = F.linear(scale * h, matrix).to(wide).log_softmax(-1)
            # Not `total +=`: torch 2.11 would compile that to gradients of zero.
            total = total + F.nll_loss(logp, y, reduction="none").dot(w)
            if wanted:
                d_logits = logp.exp_()
                if torch.compiler.is_compiling():  # the same, in one pass with what is around it
                    d_logits = torch.where(columns == y[:, None], d_logits - 1, d_logits)
                else:
                    d_logits[torch.arange(len(y), device=device), y] -= 1
                d_logits = d_logits.mul_((scale * w)[:, None]).to(matrix.dtype)
                d_hidden[i : i + rows] = d_logits @ matrix
                d_matrix += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_matrix)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor):
        d_hidden, d_matrix = ctx.saved_tensors
        return d_total * d_hidden, d_total * d_matrix, None, None, None, None
