"""Data parallel by torchrun: several processes (ranks) train as one would.

Every rank makes the same batches and takes its rows of each. A batch's weights were counted over
all of it, so the ranks' losses and gradients add up. Rank 0 alone prints, evaluates and writes.
"""

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commandline import RANK, RANKS

INTERRUPTS: list[int] = []  # of this rank; the others hear of it in `add_up`


def run(main) -> None:
    """Run `main` as one of the ranks, then end as it is: to take connections down may hang."""
    kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(kinds, timeout=timedelta(days=1))  # as long as rank 0 evaluates
    signal.signal(signal.SIGINT, interrupted)
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    status = 0
    try:
        main()
    except SystemExit as left:
        status = left.code or 0
    except RuntimeError as error:
        if RANK == 0 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise  # where another rank is lost, that one has said why
    sys.stdout.flush()
    os._exit(status)


def interrupted(number: int, frame) -> None:
    """One Ctrl-C ends all ranks after the same step; a second one this rank at once."""
    INTERRUPTS.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def own_rows(batch):
    share = len(batch.tokens) // RANKS
    return batch.rows(RANK * share, (RANK + 1) * share)


def add_up(loss: Tensor, model: nn.Module) -> None:
    """Give every rank the sum of all ranks' losses, a scalar, and gradients, in place.
    KeyboardInterrupt in all of them where one was interrupted."""
    if RANKS > 1:
        interrupts = torch.full_like(loss, len(INTERRUPTS))
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        sums = nn.utils.parameters_to_vector([interrupts, loss, *grads])
        dist.all_reduce(sums)  # one message: many would take longer
        nn.utils.vector_to_parameters(sums, [interrupts, loss, *grads])
        if interrupts:
            raise KeyboardInterrupt
