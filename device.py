"""What a GPU is given: whether to compile, how many tokens at once, and the loss in fewer products.

The first two by arithmetic, so that the first step neither waits for a compiler that cannot earn
its time back nor runs out of memory.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from attention import LayerSpec, Shared
from engine import Joined, is_plain
from fast.kernels import as_autocast
from fast.loss import linear_cross_entropy
from model import Block, Transformer
from parallel import RANKS
from recipe import Recipe
from run import Run

# Training FLOPs a graph from which compiling pays: half a minute of an H100 at a third of its peak
# is about what the compiler takes. Not measured on one yet.
COMPILING_PAYS = 1e16
MOST_AT_ONCE = 2**17  # tokens; larger products are no faster


def settle(run: Run) -> str:
    """Decide what `run` leaves open, and say so in a line."""
    recipe, cuda, parameters = run.recipe, run.device.type == "cuda", run.model.matmul_parameters()
    ahead = [stage for stage in recipe.stages() if run.step < stage.end]
    # Each length, and each treatment of positions, is a graph of its own.
    treated = [(replace(stage.config, trained_length=None), stage.lengths) for stage in ahead]
    shapes = len({(config, length) for config, lengths in treated for length in lengths})
    work = 6 * parameters * recipe.batch_tokens * (run.max_steps - run.step) / RANKS
    if run.compile is None:
        run.compile = cuda and work > COMPILING_PAYS * shapes
    if run.micro_batch == 0:
        run.micro_batch = recipe.batch_tokens
        if cuda:
            free, _ = torch.cuda.mem_get_info(run.device)
            run.micro_batch = fitting(recipe, parameters, free, run.compile, run.bf16)
    how = f"{work:.1e} FLOPs ahead in {shapes} shapes; from {COMPILING_PAYS:.0e} a shape it pays"
    compiled = "compiled" if run.compile else "not compiled"
    return f"{compiled} ({how}), micro-batches of {run.micro_batch:,} tokens"


def fitting(recipe: Recipe, parameters: int, free: float, compiled: bool, bf16: bool) -> int:
    """Tokens of a micro-batch: a process's share of a step, halved until they are no more than
    MOST_AT_ONCE and fit into nine tenths of the `free` bytes."""
    c = recipe.model
    # What a layer keeps of a token for the backward pass, in bytes: the stream, its norm and what
    # is written to it; gate, up and their product; q, k and v, before and after the rotation.
    # torch's allocator counts a seventh less; of eager code a seventh more; compiled, a layer that
    # is recomputed has the gradients of its joined products beside it.
    layer = 8 * c.d_model + 6 * c.d_ff + (6 * c.n_head + 8 * c.n_kv_head) * c.head_width
    wide = 1 if bf16 else 2
    layer *= (1 if compiled else 4 / 3) * wide
    kept = 2 * wide * c.d_model if recipe.recompute else layer
    token = layer * (5 / 3 if compiled and recipe.recompute else 1) + c.n_layer * kept
    fixed = 20 * parameters + 2**31  # weights, gradients and the optimizers' states; logits
    most = min(MOST_AT_ONCE, (0.9 * free - fixed) / token)
    tokens = recipe.batch_tokens // RANKS
    while tokens > max(most, 1):
        tokens = -(-tokens // 2)
    return tokens


def training_loss(model: Transformer, device: torch.device) -> Callable[..., Tensor]:
    """What a step of training calls: Transformer.loss, on CUDA by `joined_loss`."""
    return partial(joined_loss, model) if device.type == "cuda" else model.loss


def joined_loss(
    model: Transformer, tokens: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The twin of Transformer.loss, each block in two products instead of seven: what its norm
    gives is read once, and gets one gradient instead of the sum of five."""
    x = as_autocast(model.embed_tokens(tokens))
    shared = model.share(tokens.shape[1], tokens.device, None)
    run = in_two_products
    if model.recompute:
        run = partial(recompute, in_two_products, use_reentrant=False)
    for i, (block, spec) in enumerate(zip(model.layers, model.plan)):
        x = run(block, x, spec, shared, i)
    output = model.embed_tokens if model.config.tie_embeddings else model.lm_head
    hidden, scale = model.norm(x), model.config.logit_scale
    return linear_cross_entropy(hidden, output.weight, targets, weights, scale)


def in_two_products(block: Block, x: Tensor, spec: LayerSpec, shared: Shared, layer: int) -> Tensor:
    """block(x, ...), its matrices joined on the way, so that gradients reach each of them."""
    return (Joined(block) if is_plain(block) else block)(x, spec, shared, layer)
