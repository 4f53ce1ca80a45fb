"""How fast this code is beside what people use: transformers' Cohere2 with the same weights, and
GPT-2 as nanoGPT trains it.

    python -m lab.speed                      training step, forward, decoding, memory: minutes
    python -m lab.speed train --compile      ours compiled (and GPT-2); Cohere2 stays eager
    python -m lab.speed long --repeats 2     16k tokens; Cohere2's dense masks take minutes on a CPU
    python -m lab.speed job                  where the time of `python train.py` goes
    python -m lab.speed --out results        also into results/speed-MACHINE.md, section by section

Who is compared runs by turns in one process, after all have said the same; times are medians, of
one thread its CPU time. Peak memory is of a step in a process of its own, beyond the model. FLOPs
count visible pairs only (Transformer.flops_per_token), and beside that as usually published,
6 N + 12 L d T; both as a share of the matmul rate that the machine showed in the same turns, and as
MFU where the datasheet's peak is known. On CUDA models run in bfloat16 autocast, on CPU in float32.
"""

import contextlib
import importlib.metadata
import io
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from argparse import BooleanOptionalAction
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import engine
import train
from attention import attend, visible_pairs
from commandline import CommandLine, choose_device, guarded
from data.batches import held_out_examples
from data.needles import Needles
from evaluate import needle_score, needle_table, validation_loss
from lab.cost import peak_bytes
from lab.gpt2 import GPT2
from lab.report import at_least, markdown
from lab.runs import multiplies_bfloat16
from model import ModelConfig, Transformer

SHAPE = {"n_layer": 8, "n_head": 8, "n_kv_head": 2, "d_model": 256, "d_ff": 704}
SHAPE |= {"vocab_size": 512, "window": 256}
# GPT-2's shape, and ours with its depth, width, vocabulary and number of parameters.
GPT2_124M = {"n_layer": 12, "n_head": 12, "d_model": 768, "vocab_size": 50304}
GPT2_350M = {"n_layer": 24, "n_head": 16, "d_model": 1024, "vocab_size": 50304}
OURS_124M = GPT2_124M | {"n_kv_head": 4, "d_ff": 2432, "window": 128}
OURS_350M = GPT2_350M | {"n_kv_head": 4, "d_ff": 3200, "window": 128}
PEERS = {  # (theirs, ours, sequences of 1,024 tokens at a time on CPU and CUDA)
    "124M": (GPT2_124M, OURS_124M, (1, 32)),
    "350M": (GPT2_350M, OURS_350M, (1, 16)),
}


@dataclass(frozen=True)
class Setup:
    """How to measure."""

    device: str
    compiled: bool
    threads: int
    repeats: int
    new_tokens: int

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds: of the CPU where one thread works, so that what else the machine does counts
        little; else of the wall."""
        return time.process_time if self.threads == 1 and not self.cuda else time.perf_counter

    def autocast(self):
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.cuda)


@dataclass(frozen=True)
class Job:
    """A model to train and the size of its batch: all that another process needs to build it. Equal
    shapes get equal weights."""

    name: str
    kind: str  # ours, cohere2 or gpt2
    shape: dict
    batch: int
    length: int
    compiled: bool = False
    recompute: bool = False
    whole: bool = False  # ours, with the cross-entropy of whole logits

    def model(self) -> Transformer | GPT2:
        """Ours, or GPT-2."""
        if self.kind == "gpt2":
            return GPT2(**self.shape, length=self.length)
        return Transformer(ModelConfig(**self.shape))

    def build(self, device: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
        """The model, and its loss of (tokens, targets)."""
        torch.manual_seed(0)
        model = self.model()
        model.recompute = self.recompute
        if self.kind == "cohere2":
            model = as_cohere2(model)
        model.to(device).train()
        logits_of = model
        if self.kind == "cohere2":
            logits_of = lambda tokens: model(tokens, use_cache=False).logits

        def whole(tokens: Tensor, targets: Tensor) -> Tensor:
            logits = logits_of(tokens).flatten(0, 1).float()
            return F.cross_entropy(logits, targets.flatten())

        loss_of = model.loss if self.kind == "ours" and not self.whole else whole
        return model, torch.compile(loss_of) if self.compiled else loss_of

    def flops(self) -> tuple[float, float]:
        """Training FLOPs a token: of visible pairs only, and 6 N + 12 L d T."""
        with torch.device("meta"):
            model = self.model()
        everything = 12 * self.shape["n_layer"] * self.shape["d_model"] * self.length
        return model.flops_per_token(self.length), 6 * model.matmul_parameters() + everything


def as_cohere2(model: Transformer) -> nn.Module:
    """transformers' Cohere2 with the weights of `model`, its attention through SDPA."""
    import transformers  # the oracle; only here

    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(folder, attn_implementation="sdpa")


def training_step(job: Job, setup: Setup) -> Callable[[], float]:
    """What runs forward and backward once, to its end, and returns the loss."""
    model, loss_of = job.build(setup.device)
    generator = torch.Generator().manual_seed(1)
    size = (job.batch, job.length + 1)
    text = torch.randint(job.shape["vocab_size"] - 1, size, generator=generator)
    tokens, targets = text[:, :-1].to(setup.device), text[:, 1:].to(setup.device)

    def step() -> float:
        with setup.autocast():
            loss = loss_of(tokens, targets)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step


def agree(said: dict[str, Tensor], tolerance: float) -> None:
    """ValueError where one says something else than the first, relative to its largest number."""
    (first, expected), *others = said.items()
    for name, got in others:
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            raise ValueError(
                f"{name} and {first} do not say the same: off by {error:.1e} of the largest "
                f"number, and {tolerance:.0e} is allowed; their times mean nothing"
            )


def alternate(
    works: dict[str, Callable], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each by `clock`, taken by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            started = clock()
            work()
            seconds[name].append(clock() - started)
    return {name: statistics.median(seen) for name, seen in seconds.items()}


def matmul(setup: Setup) -> tuple[Callable[[], float], float]:
    """What multiplies two large square matrices once, and its FLOPs."""
    n = 8192 if setup.cuda else 2048
    a = torch.randn(n, n, device=setup.device, dtype=setup.dtype)
    return lambda: (a @ a)[0, 0].item(), 2.0 * n**3


def step_memory(job: Job, setup: Setup) -> int:
    """Peak bytes of two steps, beyond the model: for a process of its own."""
    device = torch.device(setup.device)
    step = training_step(job, setup)
    base = peak_bytes(device)
    step(), step()
    return peak_bytes(device) - base


def alone(setup: Setup, work: Callable, *args):
    """work(*args) in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, torch.set_num_threads, (setup.threads,)) as pool:
        return pool.apply(work, args)


def datasheet_peak(setup: Setup) -> float | None:
    """Dense bf16 FLOP/s of the GPU, where train.py knows it."""
    return next((peak for key, peak in train.PEAK_FLOPS.items() if key in machine(setup)), None)


def machine(setup: Setup) -> str:
    """What the GPU, or else the CPU, calls itself."""
    if setup.cuda:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.exists() and re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
    return named[1] if named else platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------
# Training steps


def training(jobs: list[Job], setup: Setup, at_most: int = 10**6) -> str:
    """Training steps of the jobs by turns, at most so many, as a table; the last job is who the
    others are measured by."""
    repeats, (multiply, flops_of_multiply) = min(setup.repeats, at_most), matmul(setup)
    steps = {job.name: training_step(job, setup) for job in jobs}
    losses = {name: torch.tensor(step(), dtype=torch.float64) for name, step in steps.items()}
    for job in jobs:
        peers = [other.name for other in jobs if other.shape == job.shape]
        agree({name: losses[name] for name in peers}, 1e-2 if setup.cuda else 1e-5)
    seconds = alternate(steps | {"matmul": multiply}, repeats, setup.clock)
    rate, peak = flops_of_multiply / seconds["matmul"], datasheet_peak(setup)
    del steps

    rows, base = [], jobs[-1]
    for job in jobs:
        took, flops = seconds[job.name], job.flops()
        speed = job.batch * job.length / took
        cells = [job.name, f"{took * 1e3:,.1f}", f"{seconds[base.name] / took:.2f}"]
        cells += [f"{flops[0] / base.flops()[0]:.2f}", f"{speed:,.0f}"]
        cells += [f"{each * speed / rate:.0%}" for each in flops]
        if job.compiled and not setup.cuda:
            cells.append("")  # a compiler in the process would be counted too
        else:
            cells.append(f"{alone(setup, step_memory, job, setup) / 2**20:,.0f}")
        rows.append(cells + [f"{each * speed / peak:.1%}" for each in flops if peak])
    head = ["", "ms a step", "speed", "FLOPs", "tokens/s", "of the matmul rate"]
    head += ["by 6N + 12LdT", "peak MiB"] + ["MFU", "MFU by 6N + 12LdT"] * bool(peak)
    size = f"{base.batch} x {base.length:,} tokens a step, forward and backward"
    turns = f"medians of {repeats} turns; one matrix product {rate / 1e9:,.0f} GFLOP/s"
    return f"{size}; {turns}.\n\n{markdown(head, rows)}"


def peers(setup: Setup, shape: dict, batch: int, length: int) -> list[Job]:
    """Ours and Cohere2."""
    name = "ours, compiled" if setup.compiled else "ours"
    return [
        Job(name, "ours", shape, batch, length, setup.compiled),
        Job("Cohere2, SDPA, eager", "cohere2", shape, batch, length),
    ]


def train_section(setup: Setup, shape: dict = SHAPE, batch: int = 4, length: int = 1024) -> str:
    """A training step beside Cohere2's."""
    return training(peers(setup, shape, batch, length), setup)


def long_section(setup: Setup, shape: dict = SHAPE, length: int = 16384) -> str:
    """The same with one long sequence."""
    return training(peers(setup, shape, 1, length), setup, at_most=3)


def memory_section(
    setup: Setup, shape: dict = SHAPE | {"vocab_size": 16384}, batch: int = 4, length: int = 1024
) -> str:
    """What the loss by chunks and `recompute` save and cost."""
    job = lambda name, **more: Job(name, "ours", shape, batch, length, setup.compiled, **more)
    jobs = [
        job("loss by chunks, recompute", recompute=True),
        job("loss by chunks (the default)"),
        job("whole logits, recompute", whole=True, recompute=True),
        job("whole logits", whole=True),
    ]
    return f"A vocabulary of {shape['vocab_size']:,}. {training(jobs, setup, at_most=3)}"


def gpt2_section(setup: Setup, sizes: dict = PEERS, length: int = 1024) -> str:
    """Training steps of GPT-2, 124M (on CUDA 350M too), beside ours with as many parameters."""
    parts, mode = [], ", compiled" if setup.compiled else ""
    for size, (theirs, ours, batches) in sizes.items():
        if size == "124M" or setup.cuda:
            how = (batches[setup.cuda], length, setup.compiled)
            jobs = [
                Job(f"ours, {size}{mode}", "ours", ours, *how),
                Job(f"GPT-2, {size}{mode}", "gpt2", theirs, *how),
            ]
            parts.append(training(jobs, setup, at_most=20 if setup.cuda else 3))
    return "\n\n".join(parts)


def contexts_section(
    setup: Setup, shape: dict | None = None, lengths: tuple = (), windows: tuple = ()
) -> str:
    """R against rrrN at growing context and as many tokens a step, all with `recompute`."""
    shape = shape or (OURS_124M if setup.cuda else SHAPE)
    lengths = lengths or ((4096, 16384, 65536, 131072) if setup.cuda else (1024, 4096))
    windows = windows or ((1024, 4096) if setup.cuda else (64, 256))
    parts = []
    for length in lengths:
        how = (max(lengths) // length, length, setup.compiled, True)
        jobs = []
        for window in windows:
            hybrid = shape | {"pattern": "rrrN", "window": window}
            jobs.append(Job(f"rrrN, window {window:,}", "ours", hybrid, *how))
        jobs.append(Job("R", "ours", shape | {"pattern": "R"}, *how))
        parts.append(training(jobs, setup, at_most=3))
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------
# Forward, decoding, kernels


def forward_section(setup: Setup, shape: dict = SHAPE, batch: int = 4, length: int = 1024) -> str:
    """Logits of a batch, without gradients."""
    runs = {}
    for job in peers(setup, shape, batch, length):
        model, _ = job.build(setup.device)
        theirs = partial(model, use_cache=False)
        ours = torch.compile(model) if job.compiled else model
        runs[job.name] = theirs if job.kind == "cohere2" else ours
    tokens = torch.randint(shape["vocab_size"] - 1, (batch, length), device=setup.device)

    @torch.no_grad()
    def logits(run) -> Tensor:
        with setup.autocast():
            out = run(tokens)
        return (out if isinstance(out, Tensor) else out.logits).float().cpu()

    agree({name: logits(run) for name, run in runs.items()}, 5e-2 if setup.cuda else 1e-4)
    works = {name: partial(logits, run) for name, run in runs.items()}
    head, size = ["", "ms", "speed", "tokens/s"], f"Logits of {batch} x {length:,} tokens"
    return f"{size}; {side_by_side(works, setup, batch * length, head, '.1f', 1)}"


def decode_section(setup: Setup, shape: dict = SHAPE, prompt: int = 64) -> str:
    """Greedy decoding of one sequence."""
    jobs = peers(setup, shape, 1, prompt)
    ours, theirs = (job.build(setup.device)[0].eval() for job in jobs)
    tokens = torch.randint(shape["vocab_size"] - 1, (1, prompt), device=setup.device)
    new = setup.new_tokens

    def our_text() -> Tensor:
        made = engine.stream(ours, tokens, new, compiled=setup.compiled)
        return torch.cat((tokens, torch.stack(list(made), dim=1)), dim=1).float()

    def their_text() -> Tensor:
        exactly = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return theirs.generate(tokens, **exactly).float()

    works = {jobs[0].name: our_text, jobs[1].name: their_text}
    agree({name: work() for name, work in works.items()}, 0)
    head = ["", "ms a token", "speed", "tokens/s"]
    size = f"{new} tokens after a prompt of {prompt}, float32"
    return f"{size}; {side_by_side(works, setup, new, head, '.2f', new)}"


def side_by_side(
    works: dict[str, Callable], setup: Setup, tokens: int, head: list[str], digits: str, units: int
) -> str:
    """Medians of works that make so many tokens; the last is who others are measured by."""
    seconds = alternate(works, setup.repeats, setup.clock)
    *_, base = seconds.values()
    rows = []
    for name, took in seconds.items():
        milliseconds = f"{took / units * 1e3:,{digits}}"
        rows.append([name, milliseconds, f"{base / took:.2f}", f"{tokens / took:,.0f}"])
    return f"medians of {setup.repeats} turns.\n\n{markdown(head, rows)}"


def copying_rate(setup: Setup) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.randn(2**28 if setup.cuda else 2**25, device=setup.device)
    target = torch.empty_like(source)
    work = {"copy": lambda: target.copy_(source)[0].item()}
    return 2 * source.nbytes / alternate(work, 9, setup.clock)["copy"]


def long_decode_section(setup: Setup, shape: dict | None = None, context: int | None = None) -> str:
    """Decoding one sequence after a long context, rrrN against R."""
    shape = shape or (OURS_124M | {"window": 1024} if setup.cuda else SHAPE)
    context = context or (131072 if setup.cuda else 8192)
    bandwidth, rows, count = copying_rate(setup), [], setup.new_tokens + 8
    tokens = torch.randint(shape["vocab_size"] - 1, (1, context), device=setup.device)
    for pattern in ("rrrN", "R"):
        model = Transformer(ModelConfig(**shape | {"pattern": pattern}))
        model = model.to(setup.device, setup.dtype).eval()
        cache = model.new_cache(1, context + count)
        text = engine.stream(model, tokens, count, cache=cache, compiled=setup.compiled)
        for _ in range(8):  # the prompt, and what is compiled or captured at the first steps
            next(text).item()
        works = {"token": partial(lambda text: next(text).item(), text)}
        took = alternate(works, setup.new_tokens, setup.clock)["token"]
        size = model.matmul_parameters() * setup.dtype.itemsize + cache.nbytes
        cells = [pattern, f"{took * 1e3:.2f}", f"{size / 2**20:,.0f}"]
        rows.append([*cells, f"{size / took / 1e9:,.0f}", f"{size / took / bandwidth:.0%}"])
    head = ["", "ms a token", "MiB read (weights, cache)", "GB/s", "of the copying rate"]
    mode = ", the step compiled" * setup.compiled + " into a CUDA graph" * setup.cuda
    text = f"One sequence of {context:,} tokens, window {shape['window']:,}, {setup.dtype}{mode}"
    text += f"; medians of {setup.new_tokens} tokens; copying {bandwidth / 1e9:,.0f} GB/s"
    return f"{text}.\n\n{markdown(head, rows)}"


def varlen(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """PyTorch's varlen_attn (CUDA, half precision) over rows of equal length: q (b h t d), k and v
    (b k t d) -> (b h t d)."""
    from torch.nn.attention.varlen import varlen_attn

    b, h, t, _ = q.shape
    k, v = (x.repeat_interleave(h // k.shape[1], dim=1) for x in (k, v))  # 2.11 does not group
    q, k, v = (rearrange(x, "b h t d -> (b t) h d") for x in (q, k, v))
    ends = torch.arange(0, (b + 1) * t, t, device=q.device, dtype=torch.int32)
    # It counts the keys before the query's own.
    out = varlen_attn(q, k, v, ends, ends, t, t, window_size=(window - 1, 0))
    return rearrange(out, "(b t) h d -> b h t d", b=b)


def kernels_section(
    setup: Setup, length: int | None = None, windows: tuple = (), heads: tuple = ()
) -> str:
    """Windowed attention alone, forward and backward, beside what its visible pairs would take at
    the causal kernel's rate."""
    length = length or (16384 if setup.cuda else 4096)
    h, k, d = heads or ((12, 4, 64) if setup.cuda else (8, 2, 32))
    make = partial(torch.randn, device=setup.device, dtype=setup.dtype)
    qkv = [make(1, n, length, d).requires_grad_() for n in (h, k, k)]
    upstream, rows = make(1, h, length, d), []
    names = ("flex", "varlen_attn", "banded", "sdpa") if setup.cuda else ("banded", "sdpa")

    def run(name: str, window: int) -> Tensor:
        if name == "varlen_attn":
            return varlen(*qkv, window)
        return attend(*qkv) if name == "causal" else attend(*qkv, window, name)

    def both(name: str, window: int) -> float:
        return torch.autograd.grad(run(name, window), qkv, upstream)[0][0, 0, 0, 0].item()

    for window in windows or ((1024, 4096) if setup.cuda else (64, 256)):
        with torch.no_grad():
            said = {name: run(name, window).float() for name in names}
        agree(said, 2e-2 if setup.cuda else 1e-5)
        works = {name: partial(both, name, window) for name in (*names, "causal")}
        alternate(works, 1, setup.clock)
        seconds = alternate(works, setup.repeats, setup.clock)
        promised = seconds["causal"] * visible_pairs(length, window) / visible_pairs(length)
        for name, took in seconds.items():
            share = f"{promised / took:.2f}" if name in names else "1.00"
            rows.append([f"{window:,}", name, f"{took * 1e3:,.2f}", share])
    head = ["window", "kernel", "ms", "of the causal kernel's FLOP rate"]
    size = f"One sequence of {length:,}, {h} heads and {k} of keys and values, width {d}"
    turns = f"{setup.dtype}; medians of {setup.repeats} turns"
    return f"{size}, {turns}.\n\n{markdown(head, rows)}"


# ------------------------------------------------------------------------------------------------
# The main job


def job_section(setup: Setup, argv: tuple = ()) -> str:
    """Where the time of `python train.py` goes, and of `python train.py --bf16` on a CPU that has
    bfloat16 units."""
    parts = [job_times(setup, argv)]
    if not setup.cuda and multiplies_bfloat16():
        parts.append(job_times(setup, (*argv, "--bf16")))
    return "\n\n".join(parts)


def job_times(setup: Setup, argv: tuple) -> str:
    """Some steps of each stage, times the number of them."""
    run, _ = train.read([*argv, "--device", setup.device])
    run.optimizers = train.make_optimizers(run.model, run.recipe)
    model, recipe, corpus = run.model, run.recipe, run.corpus
    held_out = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    whole: Counter = Counter()
    for stage in recipe.stages():
        model.config, seen = stage.config, {}
        steps = range(stage.start, stage.end)
        for step in steps[: setup.repeats]:
            with clocked(seen, "data (made ahead, in a thread)", setup):
                batch = train.batch_of(run, step).to(run.device)
            with clocked(seen, "forward", setup), train.autocast(run):
                loss = model.loss(batch.tokens, batch.targets, batch.weights)
            with clocked(seen, "backward", setup):
                loss.backward()
            with clocked(seen, "clipping", setup):
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer in run.optimizers:
                with clocked(seen, type(optimizer).__name__, setup):
                    optimizer.step()
            model.zero_grad(set_to_none=True)
        times = dict.fromkeys(seen, len(steps))
        with clocked(seen, "evaluation: loss", setup):
            validation_loss(model, corpus, stage.longest, recipe.eval_tokens)
        if run.needles:
            counts = held_out.counts(stage.longest)
            with clocked(seen, "evaluation: needles", setup):
                needle_score(model, held_out_examples(held_out, stage.longest, 8, *counts))
        ends = (step + 1 for step in steps)
        evaluations = sum(n % recipe.eval_every == 0 or n == stage.end for n in ends)
        for part, seconds in seen.items():
            whole[part] += statistics.median(seconds) * times.get(part, evaluations)
    if run.needles and recipe.eval_questions:
        seen = {}
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, clocked(seen, "the final needle table", setup):
            needle_table(model, held_out, model.config.trained_length, recipe.eval_questions)
        whole.update({part: seconds[0] for part, seconds in seen.items()})
    total = sum(whole.values())
    rows = [[part, f"{s:,.1f}", f"{s / total:.0%}"] for part, s in whole.most_common()]
    rows.append(["all", f"{total:,.1f}", ""])
    precision = "bfloat16 autocast" if run.bf16 else "float32"
    size = f"{recipe.steps:,} steps of {recipe.batch_tokens:,} tokens, {run.name}, {precision}"
    how = f"each part's median of {setup.repeats} steps, times their number"
    aside = "the forward pass makes the gradients of the loss on its way"
    return f"{size}; {how}; {aside}.\n\n{markdown(['part', 'seconds', 'share'], rows)}"


@contextlib.contextmanager
def clocked(seen: dict[str, list[float]], part: str, setup: Setup):
    """The seconds of a block, noted under `part`."""
    started = setup.clock()
    yield
    if setup.cuda:
        torch.cuda.synchronize()
    seen.setdefault(part, []).append(setup.clock() - started)


SECTIONS: dict[str, tuple[str, Callable[[Setup], str]]] = {
    "train": ("Training step", train_section),
    "forward": ("Forward", forward_section),
    "decode": ("Decoding", decode_section),
    "memory": ("Activation checkpointing and the loss by chunks", memory_section),
    "long": ("Training step at 16k tokens", long_section),
    "gpt2": ("GPT-2", gpt2_section),
    "contexts": ("Growing context, as many tokens a step", contexts_section),
    "long-decode": ("Decoding after a long context", long_decode_section),
    "kernels": ("Windowed attention kernels", kernels_section),
    "job": ("Where the time of `python train.py` goes", job_section),
}
DEFAULT = ("train", "forward", "decode", "memory")
ON_CUDA = (*DEFAULT, "gpt2", "contexts", "long-decode", "kernels")
WITH_COHERE2 = {"train", "forward", "decode", "long"}


def record(path: Path, machine_name: str, heading: str, body: str) -> None:
    """Put a section into the file, in the place of an earlier one with its heading."""
    _, *parts = path.read_text(encoding="utf-8").split("\n## ") if path.exists() else [""]
    sections = dict(part.split("\n", 1) for part in parts)
    sections[heading] = f"\n{body}\n"
    preface = (
        f"# Speed on {machine_name}\n\nWritten by `python -m lab.speed --out {path.parent}`, a "
        "section at a time; what the columns mean is said in lab/speed.py.\n"
    )
    text = "".join(f"\n## {name}\n{body.rstrip()}\n" for name, body in sections.items())
    path.write_text(preface + text, encoding="utf-8")


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    argv = sys.argv[1:] if argv is None else argv
    parser = CommandLine(prog="python -m lab.speed", description=__doc__)
    default = f"(default: {' '.join(DEFAULT)}; on CUDA all but long and job)"
    sections = {"nargs": "*", "metavar": "SECTION"}
    parser.add_argument("sections", **sections, help=f"of {', '.join(SECTIONS)} {default}")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="turns; slow sections take fewer")
    parser.add_argument("--new-tokens", type=int, default=256)
    action = BooleanOptionalAction
    parser.add_argument("--compile", action=action, help="ours and GPT-2 (default: on CUDA)")
    parser.add_argument("--out", type=Path, help="a folder, for its speed-MACHINE.md")
    args = parser.parse(argv)
    for name in args.sections:
        if name not in SECTIONS:
            raise ValueError(f"section {name!r} is unknown: use {', '.join(SECTIONS)}")
    at_least(1, threads=args.threads, repeats=args.repeats, new_tokens=args.new_tokens)
    device, _ = choose_device(args.device)
    if args.out and not args.out.is_dir():
        raise FileNotFoundError(f"--out {args.out} is no folder: make it first")
    cuda = device.type == "cuda"
    compiled = cuda if args.compile is None else args.compile
    setup = Setup(str(device), compiled, args.threads, args.repeats, args.new_tokens)
    sections, version = args.sections or (ON_CUDA if cuda else DEFAULT), ""
    if WITH_COHERE2 & set(sections):
        try:
            version = f", transformers {importlib.metadata.version('transformers')}"
        except importlib.metadata.PackageNotFoundError:
            mend = "which is not installed: pip install -r requirements-dev.txt"
            raise ValueError(f"lab.speed compares with transformers, {mend}") from None
    torch.set_num_threads(setup.threads)
    where, clock = machine(setup), "CPU" if setup.clock is time.process_time else "wall"
    for name in sections:
        title, section = SECTIONS[name]
        title += ", compiled" if setup.compiled else ""
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before it"
        how = f"{setup.threads} thread(s), {clock} time, {load}"
        command = f"`python -m lab.speed {shlex.join(argv)}`: torch {torch.__version__}{version}"
        body = f"{command}, {how}.\n\n{section(setup)}"
        print(f"## {title}\n\n{body}\n", flush=True)
        if args.out:
            slug = re.sub("[^a-z0-9]+", "-", where.lower()).strip("-")
            record(args.out / f"speed-{slug}.md", where, title, body)


if __name__ == "__main__":
    main()
