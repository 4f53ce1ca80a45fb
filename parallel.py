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

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
INTERRUPTS: list[int] = []  # of this rank; the others hear of it in `add_up`


def run(main) -> None:
    """Run `main` as one of the ranks, then end as it is: to take connections down may hang."""
    kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(kinds, timeout=timedelta(days=1))  # as long as rank 0 takes
    signal.signal(signal.SIGINT, interrupted)
    status = 0
    try:
        main()
        dist.barrier()  # rank 0 may still be evaluating
    except SystemExit as left:
        status = left.code or 0
    except RuntimeError:
        if RANK == 0:
            raise  # elsewhere: rank 0 has gone, and has said why
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def interrupted(number, frame) -> None:
    """One Ctrl-C ends all ranks after the same step; a second one this rank at once."""
    INTERRUPTS.append(number)
    if len(INTERRUPTS) > 1:
        raise KeyboardInterrupt


def wrap(loss: nn.Module, idle: bool) -> nn.Module:
    """`loss` with gradients meant over the ranks. `idle`: some parameters get none."""
    torch._dynamo.config.optimize_ddp = False  # splits graphs, which has failed at FlexAttention
    return nn.parallel.DistributedDataParallel(loss, find_unused_parameters=idle)


def add_up(value: Tensor) -> float:
    """The sum of a scalar over the ranks. KeyboardInterrupt in all where one was interrupted."""
    if RANKS > 1:
        value = torch.stack([value, torch.full_like(value, len(INTERRUPTS))])
        dist.all_reduce(value)
        value, interrupts = value
        if interrupts:
            raise KeyboardInterrupt
    return value.item()
