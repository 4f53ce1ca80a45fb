"""What a context costs: decoding, prefill, a training step, cache and peak memory at growing
lengths, beside what arithmetic promises. How lab.speed measures stands here too.

    python -m lab.cost                          under five minutes on a laptop's CPU
    python -m lab.cost --lengths 512 2048 --patterns R rrrN --out results/cost
    python -m lab.cost --lengths 65536 --patterns rrrN --no-train      reading a long prompt alone

Each measurement has a process of its own, so that its peak memory is its own.
"""

import math
import multiprocessing
import re
import statistics
import sys
import time
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import engine
from commandline import choose_device, guarded
from lab.report import at_least, check_out, command, listing, plot_lines, progress, write
from model import ModelConfig, Transformer, require

SMALL = {"n_layer": 4, "n_head": 4, "n_kv_head": 2, "d_model": 128, "d_ff": 336}
LARGE = {"n_layer": 12, "n_head": 12, "n_kv_head": 4, "d_model": 768, "d_ff": 2048}
SIZES = {  # one for every pattern; small enough for a CPU, large enough for a GPU to be busy
    "cpu": SMALL | {"vocab_size": 2048, "window": 64},
    "cuda": LARGE | {"vocab_size": 16384, "window": 1024},
}
LENGTHS = {"cpu": [512, 1024, 2048, 4096, 8192], "cuda": [4096, 16384, 65536, 131072]}
DECODED = 32  # tokens
PANELS = {
    "decode_ms": "decoding, ms a token",
    "prefill_ms": "prefill, ms",
    "train_ms": "training step, ms",
    "cache_bytes": "cache, bytes",
}

# How to measure ----------------------------------------------------------------------------------


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, read once the device has done its work: of the CPU where one thread of it works, so
    that what else the machine does counts little; else of the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    read = time.process_time if alone else time.perf_counter
    wait = torch.get_device_module(device).synchronize
    return lambda: (wait(), read())[1]


def timed(work: Callable, clock: Callable[[], float]) -> float:
    """Seconds that the work takes."""
    started = clock()
    work()
    return clock() - started


def alternate(works: dict[str, Callable], turns: Iterable, clock: Callable) -> dict[str, float]:
    """Median seconds of each work by the clock, taken by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in turns:
        for name, work in works.items():
            seconds[name].append(timed(work, clock))
    return {name: statistics.median(seen) for name, seen in seconds.items()}


def in_own_process(work: Callable, *args):
    """work(*args) in a new process with as many threads."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(work, args)


def peak_bytes(device: torch.device) -> int:
    """The largest memory so far: of the device's allocator, or of this process (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage also counts what the parent held before
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    mac = sys.platform == "darwin"
    require(mac, "peak memory is not measured on Windows: use Linux or macOS")
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def dtype_of(device: torch.device) -> torch.dtype:
    """In which models run: bfloat16 on CUDA."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def training_step(model: nn.Module, loss_of: Callable, *batch: Tensor) -> Callable[[], Tensor]:
    """What runs forward and backward once and returns loss_of(*batch)."""
    device = batch[0].device.type

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(*batch)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return step


class Cost(NamedTuple):
    """One pattern at one context length; shares are of full attention everywhere (pattern R)."""

    pattern: str
    length: int
    decode_ms: float  # a token, after `length` tokens of context
    prefill_ms: float  # of the context
    train_ms: float  # forward and backward of one sequence; nan where it was left out
    flops_share: float  # of the training step: what train_ms should follow
    cache_bytes: int
    cache_share: float
    cache_promised: float  # (n_full + n_windowed min(1, W/L)) / n_layer
    peak_mib: float  # of the process while decoding and training, beyond model and torch


def measure(
    pattern, length, sizes, device, repeats=3, training=True, decoded=DECODED, compiled=False
) -> Cost:
    """Medians of one pattern at one length, in tokens, on random tokens, for a model of these sizes
    on a named device; without `training`, of reading and writing alone."""
    device = torch.device(device)
    clock, steps, prefills, decodes = clock_of(device), [math.nan], [], []
    torch.manual_seed(0)
    model = Transformer(ModelConfig(pattern=pattern, **sizes)).to(device)
    tokens = torch.randint(model.config.vocab_size, (1, length), device=device)
    base = peak_bytes(device)

    if training:
        step = training_step(model, model.loss, tokens, tokens)
        step()
        steps = [timed(step, clock) for _ in range(repeats)]
    model.to(dtype_of(device)).requires_grad_(False)
    for _ in range(repeats):
        cache = model.new_cache(1, length + decoded + 1)
        text = engine.stream(model, tokens, decoded + 1, cache=cache, compiled=compiled)
        prefills.append(timed(text.__next__, clock))
        decodes += [timed(text.__next__, clock) for _ in range(decoded)]
    peak = peak_bytes(device) - base

    promised = sum(min(1, (spec.window or length) / length) for spec in model.plan)
    flops = model.flops_per_token(length)
    model.config = replace(model.config, pattern="R")
    return Cost(
        pattern=pattern,
        length=length,
        decode_ms=1e3 * statistics.median(decodes),
        prefill_ms=1e3 * statistics.median(prefills),
        train_ms=1e3 * statistics.median(steps),
        flops_share=flops / model.flops_per_token(length),
        cache_bytes=cache.nbytes,
        cache_share=cache.nbytes / model.new_cache(1, cache.max_length).nbytes,
        cache_promised=promised / len(model.plan),
        peak_mib=peak / 2**20,
    )


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = command("cost", __doc__)
    add = parser.add_argument
    add("--patterns", nargs="+", default=["R", "RN", "rrrN"])
    lengths = "tokens (default: 512 to 8k on CPU, 4k to 128k on CUDA)"
    add("--lengths", nargs="+", type=int, help=lengths)
    add("--train", action=BooleanOptionalAction, default=True, help="a training step too")
    add("--compile", action=BooleanOptionalAction, default=False, help="the decode step compiled")
    args = parser.parse(argv)
    device, _ = choose_device(args.device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    sizes, lengths = SIZES[kind], args.lengths or LENGTHS[kind]
    for pattern in args.patterns:
        ModelConfig(pattern=pattern, **sizes)
    at_least(2, lengths=min(lengths))
    check_out(Path(f"{args.out}.csv"))

    measured = []
    for length, pattern in progress(list(product(lengths, args.patterns))):
        how = (pattern, length, sizes, device, 3, args.train, DECODED, args.compile)
        measured.append(in_own_process(measure, *how))
    where = f"{sizes} on {device}, {torch.get_num_threads()} threads"
    logarithmic = {"xscale": "log", "yscale": "log"}
    plot = lambda rows, out: plot_lines(rows, "length", "pattern", PANELS, out, **logarithmic)
    write(measured, args.out, plot, f"{where}\n{listing(measured)}")


if __name__ == "__main__":
    main()
