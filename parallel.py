"""Data parallel, by torchrun and torch's DistributedDataParallel: several processes (ranks) train as one would.

Every rank reads the same input and makes the same batches, and takes its rows of each. A batch's weights were counted over all of it, so
the ranks' losses and gradients add up. Rank 0 alone prints, evaluates and writes.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commandline import fail
from model import Transformer

RANK, RANKS, LOCAL_RANK, LOCAL_RANKS = (
    int(os.environ.get(name, one))
    for name, one in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
)  # as torchrun says
INTERRUPTS: list[int] = []  # see `share_interrupts`


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 passes the block before the others, which leave in silence where it fails: it has said why."""
    passed = [False]
    if (
        RANKS > 1
    ):  # they wait for rank 0 as long as it takes: it prepares the corpus, evaluates and saves
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1)
        )
    if RANK > 0:
        dist.broadcast_object_list(passed)
        if not passed[0]:
            sys.exit()
    try:
        yield
        passed = [True]
    finally:
        if RANK == 0 and RANKS > 1:
            dist.broadcast_object_list(passed)


class Loss(nn.Module):
    """`model.loss` as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, model: Transformer, compiled: bool):
        super().__init__()
        self.model = model
        self.forward = torch.compile(model.loss) if compiled else model.loss


def wrap(loss: Loss) -> nn.Module:
    """The loss of a rank's rows, whose gradients become the mean of all ranks'."""
    torch._dynamo.config.optimize_ddp = False  # one graph, as in one process: splitting it has failed at FlexAttention and checkpointing (pytorch#137481, #104674)
    idle = (
        loss.model.layers[0].self_attn.s_scale is not None
    )  # ssmax's scales get no gradient but in full NoPE layers
    return DistributedDataParallel(loss, find_unused_parameters=idle)


def add_up(value: Tensor) -> float:
    """The sum over the ranks of a scalar. KeyboardInterrupt in all of them where one was interrupted."""
    if RANKS == 1:
        return value.item()
    sums = torch.stack([value, torch.full_like(value, len(INTERRUPTS))])
    dist.all_reduce(sums)
    total, interrupts = sums.tolist()
    if interrupts:
        raise KeyboardInterrupt
    return total


def share_interrupts() -> None:
    """From here on the ranks tell each other of a Ctrl-C, in `add_up`: one that stopped alone would leave the others waiting."""
    signal.signal(signal.SIGINT, lambda number, _: INTERRUPTS.append(number))


def keep_interrupts() -> None:
    """From here on nobody waits for the others: a Ctrl-C is a rank's own again."""
    signal.signal(signal.SIGINT, signal.SIG_DFL if RANK > 0 else signal.default_int_handler)


def stop(error: Exception | str) -> None:
    """What all ranks have met at once, said by one of them, with exit status 2."""
    sys.exit() if RANK > 0 else fail(error)


def run(main: Callable[[], None]) -> None:
    """Run `main` in one of several processes, which then ends as it is: to take its connections down may abort, or wait for one that is gone."""
    try:
        main()
        dist.barrier()  # rank 0 may still be evaluating
        status = 0
    except SystemExit as left:
        status = left.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
