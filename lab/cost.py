"""What a context costs: decoding, prefill, a training step, cache and peak memory at growing
lengths, beside what arithmetic promises.

    python -m lab.cost                          under five minutes on a laptop's CPU
    python -m lab.cost --device cuda            to 128k tokens
    python -m lab.cost --lengths 512 2048 --patterns R rrrN --out results/cost
    python -m lab.cost --lengths 65536 --patterns rrrN --no-train      reading a long prompt alone

Writes OUT.csv and OUT.png and prints a table. Each measurement has a process of its own, so that
its peak memory is its own.
"""

import math
import multiprocessing
import re
import statistics
import sys
import time
from argparse import BooleanOptionalAction
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

import engine
from attention import visible_pairs
from commandline import CommandLine, choose_device, guarded
from lab.report import check_out, figure_of, progress, write
from model import ModelConfig, Transformer

SMALL = {"n_layer": 4, "n_head": 4, "n_kv_head": 2, "d_model": 128, "d_ff": 336}
LARGE = {"n_layer": 12, "n_head": 12, "n_kv_head": 4, "d_model": 768, "d_ff": 2048}
SIZES = {  # one for every pattern; small enough for a CPU, large enough for a GPU to be busy
    "cpu": SMALL | {"vocab_size": 2048, "window": 64},
    "cuda": LARGE | {"vocab_size": 16384, "window": 1024},
}
LENGTHS = {"cpu": [512, 1024, 2048, 4096, 8192], "cuda": [4096, 16384, 65536, 131072]}
DECODED = 32  # tokens


@dataclass(frozen=True)
class Cost:
    """One pattern at one context length; fractions are of full attention everywhere (pattern R)."""

    pattern: str
    length: int
    decode_ms: float  # a token, after `length` tokens of context
    prefill_ms: float  # of the context
    train_ms: float  # forward and backward of one sequence; nan where it was left out
    cache_bytes: int
    peak_mb: float  # of the process while decoding and training, beyond model and torch
    cache_promised: float  # (n_full + n_windowed min(1, W/L)) / n_layer
    pairs_promised: float  # visible pairs, which attention's work in training and prefill follows


def measure(
    pattern: str,
    length: int,
    sizes: dict,
    device_name: str,
    repeats: int = 3,
    training: bool = True,
) -> Cost:
    """Median times of one pattern at one length, in tokens, on random tokens; without `training`,
    of reading and writing alone."""
    device = torch.device(device_name)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(pattern=pattern, **sizes)).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = torch.randint(model.config.vocab_size, (1, length), device=device)
    base = peak_bytes(device)

    def timed(work: Callable) -> float:
        """Milliseconds."""
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1e3

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model.loss(tokens, tokens)
        loss.backward()
        model.zero_grad()

    train = math.nan
    if training:
        step()
        train = statistics.median(timed(step) for _ in range(repeats))
    model.to(dtype).requires_grad_(False)
    prefills, decodes = [], []
    for _ in range(repeats):
        cache = model.new_cache(1, length + DECODED + 1)
        write_next = engine.stream(model, tokens, DECODED + 1, cache=cache).__next__
        prefills.append(timed(write_next))
        decodes += [timed(write_next) for _ in range(DECODED)]
    windows = [spec.window for spec in model.plan]
    pairs = sum(visible_pairs(length, window) for window in windows)
    return Cost(
        pattern,
        length,
        statistics.median(decodes),
        statistics.median(prefills),
        train,
        cache.nbytes,
        (peak_bytes(device) - base) / 2**20,
        sum(min(1, (window or length) / length) for window in windows) / len(windows),
        pairs / (visible_pairs(length) * len(windows)),
    )


def peak_bytes(device: torch.device) -> int:
    """The largest memory so far: of the device's allocator, or of this process (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage also counts what the parent held before
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    try:
        import resource
    except ImportError:
        raise ValueError("peak memory is not measured on Windows: use Linux or macOS") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere


def table(costs: list[Cost]) -> str:
    """Rows by length, each cost beside its fraction of R's and what arithmetic promises."""
    base = {cost.length: cost for cost in costs if cost.pattern == "R"}
    head = ["context", "pattern", "decode ms", "prefill ms", "train ms", "peak MiB"]
    head += ["cache bytes", "of R's", "promised", "train of R's", "pairs promised"]
    rows = [head]
    for cost in sorted(costs, key=lambda c: c.length):
        of = base.get(cost.length)
        row = [f"{cost.length:,}", cost.pattern, f"{cost.decode_ms:.2f}"]
        row += [f"{x:,.0f}" for x in (cost.prefill_ms, cost.train_ms, cost.peak_mb)]
        row += [f"{cost.cache_bytes:,}"]
        row += [f"{cost.cache_bytes / of.cache_bytes:.3f}" if of else ""]
        row += [f"{cost.cache_promised:.3f}"]
        row += [f"{cost.train_ms / of.train_ms:.2f}" if of else "", f"{cost.pairs_promised:.3f}"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = lambda row: "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
    return "\n".join(map(line, rows))


def plot(costs: list[Cost], out: Path) -> None:
    """A panel each for times and cache against the context length, both axes logarithmic."""
    panels = {"decode_ms": "decoding, ms a token", "prefill_ms": "prefill, ms"}
    if not math.isnan(costs[0].train_ms):
        panels["train_ms"] = "training step, ms"
    panels["cache_bytes"] = "cache, bytes"
    figure, axes = figure_of(14, 3.6, 1, len(panels))
    for axis, (key, title) in zip(axes, panels.items()):
        for pattern in dict.fromkeys(cost.pattern for cost in costs):
            of = [cost for cost in costs if cost.pattern == pattern]
            points = sorted((cost.length, getattr(cost, key)) for cost in of)
            axis.plot(*zip(*points), marker=".", label=pattern)
        axis.set(title=title, xlabel="context, tokens", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(out, dpi=120)


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(prog="python -m lab.cost", description=__doc__)
    parser.add_argument("--patterns", nargs="+", default=["R", "RN", "rrrN"])
    lengths = "tokens (default: 512 to 8k on CPU, 4k to 128k on CUDA)"
    parser.add_argument("--lengths", nargs="+", type=int, help=lengths)
    train = {"action": BooleanOptionalAction, "default": True}
    parser.add_argument("--train", **train, help="measure a training step too")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path("cost"), help="OUT.csv, OUT.png (cost)")
    args = parser.parse(argv)
    device, _ = choose_device(args.device)
    sizes = SIZES.get(device.type, SIZES["cpu"])
    for pattern in args.patterns:
        ModelConfig(pattern=pattern, **sizes)
    lengths = args.lengths or LENGTHS.get(device.type, LENGTHS["cpu"])
    if min(lengths) < 2:
        raise ValueError(f"--lengths {min(lengths)} must be at least 2")
    check_out(args.out)

    costs = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for length, pattern in progress(list(product(lengths, args.patterns))):
            job = (pattern, length, sizes, str(device), 3, args.train)
            costs.append(pool.apply(measure, job))
    where = f"{sizes} on {device}, {torch.get_num_threads()} threads"
    write(costs, args.out, plot, f"{where}\n{table(costs)}")


if __name__ == "__main__":
    main()
