"""How fast this code is beside what people use: transformers' Cohere2 with the same weights, and GPT-2 as nanoGPT trains it.

    python -m lab.speed                      training step, forward, decoding, and the memory switches: minutes on one CPU thread
    python -m lab.speed train --compile      ours compiled (and GPT-2); Cohere2 stays eager
    python -m lab.speed long --repeats 2     16k tokens; Cohere2's dense masks take minutes on a CPU
    python -m lab.speed job                  where the time of `python train.py` goes
    python -m lab.speed --out results        also written to results/speed-MACHINE.md; its other sections stay

Who is compared runs by turns in one process, after all have said the same; times are medians, of one thread its CPU time. Peak memory is of a step in a
process of its own, beyond the model. FLOPs count visible pairs only (Transformer.flops_per_token), and beside that as usually
published, 6 N + 12 L d T; both as a share of the matmul rate that the machine showed in the same turns, and as MFU where the
datasheet's peak is known. On CUDA models run in bfloat16 autocast, on CPU in float32.
"""

import argparse
import contextlib
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
from commandline import CommandLine, choose_device, fail
from data.batches import held_out_examples
from data.needles import Needles
from evaluate import needle_score, needle_table, validation_loss
from lab.cost import peak_bytes
from lab.gpt2 import GPT2
from lab.runs import multiplies_bfloat16
from model import ModelConfig, Transformer

SHAPE = {
    "n_layer": 8,
    "n_head": 8,
    "n_kv_head": 2,
    "d_model": 256,
    "d_ff": 704,
    "vocab_size": 512,
    "window": 256,
}
PEERS = {  # GPT-2's shape; ours with its depth, width, vocabulary and number of parameters; sequences of 1,024 tokens at a time on (CPU, CUDA)
    "124M": (
        {"n_layer": 12, "n_head": 12, "d_model": 768, "vocab_size": 50304},
        {
            "n_layer": 12,
            "n_head": 12,
            "n_kv_head": 4,
            "d_model": 768,
            "d_ff": 2432,
            "vocab_size": 50304,
            "window": 128,
        },
        (1, 32),
    ),
    "350M": (
        {"n_layer": 24, "n_head": 16, "d_model": 1024, "vocab_size": 50304},
        {
            "n_layer": 24,
            "n_head": 16,
            "n_kv_head": 4,
            "d_model": 1024,
            "d_ff": 3200,
            "vocab_size": 50304,
            "window": 128,
        },
        (1, 16),
    ),
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
        """Seconds: of the CPU where one thread works, so that what else the machine does counts little; else of the wall."""
        return time.process_time if self.threads == 1 and not self.cuda else time.perf_counter

    def autocast(self):
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.cuda)


@dataclass(frozen=True)
class Job:
    """A model to train and the size of its batch: all that another process needs to build it. Equal shapes get equal weights."""

    name: str
    kind: str  # ours, cohere2 or gpt2
    shape: dict
    batch: int
    length: int
    compiled: bool = False
    recompute: bool = False
    whole: bool = (
        False  # ours, with the cross-entropy of whole logits in place of the loss by chunks
    )

    def build(self, device: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
        """The model, and its loss of (tokens, targets)."""
        torch.manual_seed(0)
        model = (
            GPT2(**self.shape, length=self.length)
            if self.kind == "gpt2"
            else Transformer(ModelConfig(**self.shape))
        )
        if self.kind == "cohere2":
            model = as_cohere2(model)
        else:
            model.recompute = self.recompute
        model.to(device).train()
        logits = (
            (lambda tokens: model(tokens, use_cache=False).logits)
            if self.kind == "cohere2"
            else model
        )
        loss_of = lambda tokens, targets: F.cross_entropy(
            logits(tokens).flatten(0, 1).float(), targets.flatten()
        )
        if self.kind == "ours" and not self.whole:
            loss_of = model.loss
        return model, torch.compile(loss_of) if self.compiled else loss_of

    def flops(self) -> tuple[float, float]:
        """Training FLOPs a token: of visible pairs only, and 6 N + 12 L d T."""
        with torch.device("meta"):
            model = (
                GPT2(**self.shape, length=self.length)
                if self.kind == "gpt2"
                else Transformer(ModelConfig(**self.shape))
            )
        everything = (
            6 * model.matmul_parameters()
            + 12 * self.shape["n_layer"] * self.shape["d_model"] * self.length
        )
        return model.flops_per_token(self.length), everything


def as_cohere2(model: Transformer) -> nn.Module:
    """transformers' Cohere2 with the weights of `model`, its attention through SDPA."""
    import transformers  # the oracle; only here

    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def training_step(job: Job, setup: Setup) -> Callable[[], float]:
    """What runs forward and backward once, to its end, and returns the loss."""
    model, loss_of = job.build(setup.device)
    text = torch.randint(
        job.shape["vocab_size"] - 1,
        (job.batch, job.length + 1),
        generator=torch.Generator().manual_seed(1),
    )
    tokens, targets = text[:, :-1].to(setup.device), text[:, 1:].to(setup.device)

    def step() -> float:
        with setup.autocast():
            loss = loss_of(tokens, targets)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step


def agree(said: dict[str, Tensor], tolerance: float) -> None:
    """ArithmeticError where one says something else than the first, relative to its largest number."""
    (first, expected), *others = said.items()
    for name, got in others:
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            raise ArithmeticError(
                f"{name} and {first} do not say the same: off by {error:.1e} of the largest number, and {tolerance:.0e} is allowed; their times mean nothing"
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


def matmul(setup: Setup, n: int | None = None) -> tuple[Callable[[], float], float]:
    """What multiplies two large square matrices once, and its FLOPs."""
    n = n or (8192 if setup.cuda else 2048)
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
    with multiprocessing.get_context("spawn").Pool(
        1, torch.set_num_threads, (setup.threads,)
    ) as pool:
        return pool.apply(work, args)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def training(jobs: list[Job], setup: Setup, repeats: int | None = None) -> str:
    """Training steps of the jobs by turns, as a table; the last is who the others are measured by."""
    repeats, (multiply, multiply_flops) = repeats or setup.repeats, matmul(setup)
    steps = {job.name: training_step(job, setup) for job in jobs}
    losses = {name: torch.tensor(step(), dtype=torch.float64) for name, step in steps.items()}
    for job in jobs:
        agree(
            {other.name: losses[other.name] for other in jobs if other.shape == job.shape},
            1e-2 if setup.cuda else 1e-5,
        )
    seconds = alternate(steps | {"matmul": multiply}, repeats, setup.clock)
    rate, peak = multiply_flops / seconds["matmul"], datasheet_peak(setup)
    del steps
    head = [
        "",
        "ms a step",
        "speed",
        "FLOPs",
        "tokens/s",
        "of the matmul rate",
        "by 6N + 12LdT",
        "peak MiB",
    ] + ["MFU", "MFU by 6N + 12LdT"] * bool(peak)
    rows = []
    for job in jobs:
        took, speed = seconds[job.name], job.batch * job.length / seconds[job.name]
        memory = (
            ""
            if job.compiled and not setup.cuda
            else f"{alone(setup, step_memory, job, setup) / 2**20:,.0f}"
        )  # a compiler in the process would be counted too
        rows.append([
            job.name, f"{took * 1e3:,.1f}", f"{seconds[jobs[-1].name] / took:.2f}", f"{job.flops()[0] / jobs[-1].flops()[0]:.2f}", f"{speed:,.0f}",
            *(f"{flops * speed / rate:.0%}" for flops in job.flops()), memory, *(f"{flops * speed / peak:.1%}" for flops in job.flops() if peak),
        ])  # fmt: skip
    size = f"{jobs[0].batch} x {jobs[0].length:,} tokens a step, forward and backward; medians of {repeats} turns; one matrix product {rate / 1e9:,.0f} GFLOP/s"
    return f"{size}.\n\n{table(head, rows)}"


def datasheet_peak(setup: Setup) -> float | None:
    """Dense bf16 FLOP/s of the GPU, where train.py knows it."""
    return next((peak for key, peak in train.PEAK_FLOPS.items() if key in machine(setup)), None)


def machine(setup: Setup) -> str:
    """What the GPU, or else the CPU, calls itself."""
    if setup.cuda:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# The sections


def peers(setup: Setup, shape: dict, batch: int, length: int) -> list[Job]:
    """Ours and Cohere2."""
    return [
        Job(
            "ours, compiled" if setup.compiled else "ours",
            "ours",
            shape,
            batch,
            length,
            setup.compiled,
        ),
        Job("Cohere2, SDPA, eager", "cohere2", shape, batch, length),
    ]


def train_section(setup: Setup, shape: dict = SHAPE, batch: int = 4, length: int = 1024) -> str:
    """A training step beside Cohere2's."""
    return training(peers(setup, shape, batch, length), setup)


def long_section(setup: Setup, shape: dict = SHAPE, length: int = 16384) -> str:
    """The same with one long sequence."""
    return training(peers(setup, shape, 1, length), setup, min(setup.repeats, 3))


def forward_section(setup: Setup, shape: dict = SHAPE, batch: int = 4, length: int = 1024) -> str:
    """Logits of a batch, without gradients."""
    works = {}
    for job in peers(setup, shape, batch, length):
        model, _ = job.build(setup.device)
        run = (
            torch.compile(model)
            if job.compiled
            else model
            if job.kind == "ours"
            else partial(model, use_cache=False)
        )
        works[job.name] = run
    tokens = torch.randint(shape["vocab_size"] - 1, (batch, length), device=setup.device)

    @torch.no_grad()
    def logits(run) -> Tensor:
        with setup.autocast():
            out = run(tokens)
        return (out if isinstance(out, Tensor) else out.logits).float().cpu()

    agree({name: logits(run) for name, run in works.items()}, 5e-2 if setup.cuda else 1e-4)
    seconds = alternate(
        {name: partial(logits, run) for name, run in works.items()}, setup.repeats, setup.clock
    )
    *_, base = seconds.values()
    rows = [
        [name, f"{took * 1e3:,.1f}", f"{base / took:.2f}", f"{batch * length / took:,.0f}"]
        for name, took in seconds.items()
    ]
    return f"Logits of {batch} x {length:,} tokens; medians of {setup.repeats} turns.\n\n" + table(
        ["", "ms", "speed", "tokens/s"], rows
    )


def decode_section(setup: Setup, shape: dict = SHAPE, prompt: int = 64) -> str:
    """Greedy decoding of one sequence."""
    (_, ours, _), (_, theirs, _) = (
        (job.name, *job.build(setup.device)) for job in peers(setup, shape, 1, prompt)
    )
    ours.eval(), theirs.eval()
    if setup.compiled:
        ours.compile_decoding()
    tokens, new = (
        torch.randint(shape["vocab_size"] - 1, (1, prompt), device=setup.device),
        setup.new_tokens,
    )
    works = {
        "ours, compiled" if setup.compiled else "ours": lambda: ours.generate(tokens, new).float(),
        "Cohere2, SDPA, eager": lambda: theirs.generate(
            tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False
        ).float(),
    }
    agree({name: work() for name, work in works.items()}, 0)
    seconds = alternate(works, setup.repeats, setup.clock)
    *_, base = seconds.values()
    rows = [
        [name, f"{took / new * 1e3:.2f}", f"{base / took:.2f}", f"{new / took:,.0f}"]
        for name, took in seconds.items()
    ]
    return (
        f"{new} tokens after a prompt of {prompt}, float32; medians of {setup.repeats} turns.\n\n"
        + table(["", "ms a token", "speed", "tokens/s"], rows)
    )


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
    return f"A vocabulary of {shape['vocab_size']:,}. " + training(
        jobs, setup, min(setup.repeats, 3)
    )


def gpt2_section(setup: Setup, sizes: dict = PEERS, length: int = 1024) -> str:
    """Training steps of GPT-2, 124M (on CUDA 350M too), beside ours with as many parameters."""
    parts = []
    for size, (theirs, ours, batches) in sizes.items():
        if size == "124M" or setup.cuda:
            batch, mode = batches[setup.cuda], ", compiled" if setup.compiled else ""
            jobs = [
                Job(f"ours, {size}{mode}", "ours", ours, batch, length, setup.compiled),
                Job(f"GPT-2, {size}{mode}", "gpt2", theirs, batch, length, setup.compiled),
            ]
            parts.append(training(jobs, setup, min(setup.repeats, 20 if setup.cuda else 3)))
    return "\n\n".join(parts)


def contexts_section(
    setup: Setup, shape: dict | None = None, lengths: tuple = (), windows: tuple = ()
) -> str:
    """R against rrrN at growing context and as many tokens a step, all with `recompute`."""
    shape = shape or (PEERS["124M"][1] if setup.cuda else SHAPE)
    lengths = lengths or ((4096, 16384, 65536, 131072) if setup.cuda else (1024, 4096))
    windows = windows or ((1024, 4096) if setup.cuda else (64, 256))
    parts = []
    for length in lengths:
        job = lambda name, **more: Job(
            name,
            "ours",
            shape | more,
            max(lengths) // length,
            length,
            setup.compiled,
            recompute=True,
        )
        jobs = [
            *(job(f"rrrN, window {window:,}", pattern="rrrN", window=window) for window in windows),
            job("R", pattern="R"),
        ]
        parts.append(training(jobs, setup, min(setup.repeats, 3)))
    return "\n\n".join(parts)


def long_decode_section(setup: Setup, shape: dict | None = None, context: int | None = None) -> str:
    """Decoding one sequence after a long context, rrrN against R."""
    shape = shape or (PEERS["124M"][1] | {"window": 1024} if setup.cuda else SHAPE)
    context = context or (131072 if setup.cuda else 8192)
    source = torch.randn(2**28 if setup.cuda else 2**25, device=setup.device)
    target = torch.empty_like(source)
    copying = alternate({"copy": lambda: target.copy_(source)[0].item()}, 9, setup.clock)["copy"]
    bandwidth, rows = 2 * source.nbytes / copying, []
    del source, target
    tokens = torch.randint(shape["vocab_size"] - 1, (1, context), device=setup.device)
    for pattern in ("rrrN", "R"):
        model = (
            Transformer(ModelConfig(**shape | {"pattern": pattern}))
            .to(setup.device, setup.dtype)
            .eval()
        )
        if setup.compiled:
            model.compile_decoding()
        cache = model.new_cache(1, context + setup.new_tokens + 8)
        stream = engine.stream(model, tokens, setup.new_tokens + 8, cache=cache)
        for _ in range(8):  # the prompt, and what is compiled or captured at the first steps
            next(stream).item()
        took = alternate({"token": lambda: next(stream).item()}, setup.new_tokens, setup.clock)[
            "token"
        ]
        size = model.matmul_parameters() * setup.dtype.itemsize + cache.nbytes
        rows.append(
            [
                pattern,
                f"{took * 1e3:.2f}",
                f"{size / 2**20:,.0f}",
                f"{size / took / 1e9:,.0f}",
                f"{size / took / bandwidth:.0%}",
            ]
        )
    head = ["", "ms a token", "MiB read (weights, cache)", "GB/s", "of the copying rate"]
    mode = (
        ", the step compiled" + (" into a CUDA graph" if setup.cuda else "")
        if setup.compiled
        else ""
    )
    return f"One sequence of {context:,} tokens, window {shape['window']:,}, {setup.dtype}{mode}; medians of {setup.new_tokens} tokens; copying {bandwidth / 1e9:,.0f} GB/s.\n\n{table(head, rows)}"


def varlen(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """PyTorch's varlen_attn (CUDA, half precision) over rows of equal length: q (b h t d), k and v (b k t d) -> (b h t d)."""
    from torch.nn.attention.varlen import varlen_attn

    b, h, t, _ = q.shape
    k, v = (
        x.repeat_interleave(h // k.shape[1], dim=1) for x in (k, v)
    )  # torch 2.11 does not group
    q, k, v = (rearrange(x, "b h t d -> (b t) h d") for x in (q, k, v))
    ends = torch.arange(0, (b + 1) * t, t, device=q.device, dtype=torch.int32)
    out = varlen_attn(
        q, k, v, ends, ends, t, t, window_size=(window - 1, 0)
    )  # it counts the keys before the query's own
    return rearrange(out, "(b t) h d -> b h t d", b=b)


def kernels_section(
    setup: Setup, length: int | None = None, windows: tuple = (), heads: tuple = ()
) -> str:
    """Windowed attention alone, forward and backward, beside what its visible pairs would take at the causal kernel's rate."""
    length = length or (16384 if setup.cuda else 4096)
    h, k, d = heads or ((12, 4, 64) if setup.cuda else (8, 2, 32))
    make = lambda heads: (
        torch.randn(1, length, heads, d, device=setup.device, dtype=setup.dtype)
        .transpose(1, 2)
        .requires_grad_()
    )
    qkv, rows = [make(h), make(k), make(k)], []
    upstream = torch.randn(1, h, length, d, device=setup.device, dtype=setup.dtype)
    for window in windows or ((1024, 4096) if setup.cuda else (64, 256)):
        names = (
            ("flex", "varlen_attn", "banded", "sdpa") if setup.cuda else ("banded", "sdpa")
        )  # on CPU Flex has no backward pass
        run = lambda name: (
            varlen(*qkv, window)
            if name == "varlen_attn"
            else attend(
                *qkv, None if name == "causal" else window, "sdpa" if name == "causal" else name
            )
        )
        with torch.no_grad():
            agree({name: run(name).float() for name in names}, 2e-2 if setup.cuda else 1e-5)

        def both(name: str) -> float:
            return torch.autograd.grad(run(name), qkv, upstream)[0][0, 0, 0, 0].item()

        works = {name: partial(both, name) for name in (*names, "causal")}
        alternate(works, 1, setup.clock)
        seconds = alternate(works, setup.repeats, setup.clock)
        promised = seconds["causal"] * visible_pairs(length, window) / visible_pairs(length)
        rows += [
            [
                f"{window:,}",
                name,
                f"{took * 1e3:,.2f}",
                f"{promised / took:.2f}" if name in names else "1.00",
            ]
            for name, took in seconds.items()
        ]
    head = ["window", "kernel", "ms", "of the causal kernel's FLOP rate"]
    return f"One sequence of {length:,}, {h} heads and {k} of keys and values, width {d}, {setup.dtype}; medians of {setup.repeats} turns.\n\n{table(head, rows)}"


def job_section(setup: Setup, argv: tuple = ()) -> str:
    """Where the time of `python train.py` goes, and of `python train.py --bf16` on a CPU that has bfloat16 units."""
    native = not setup.cuda and multiplies_bfloat16()
    return "\n\n".join(job_times(setup, (*argv, *more)) for more in ([], ["--bf16"])[: 1 + native])


def job_times(setup: Setup, argv: tuple) -> str:
    """Some steps of each stage, times the number of them."""
    with tempfile.TemporaryDirectory() as folder:
        run = train.read([*argv, "--out", f"{folder}/run", "--device", setup.device])
    model, recipe, stages = run.model, run.recipe, run.recipe.stages()
    held_out = Needles(run.corpus.tokenizer, run.corpus.val, evaluation=True)
    whole: Counter = Counter()
    for stage in stages:
        model.config, parts = stage.config, {}

        def clock(part: str, work: Callable):
            """work(), its seconds noted under `part`."""
            started = setup.clock()
            result = work()
            if setup.cuda:
                torch.cuda.synchronize()
            parts.setdefault(part, []).append(setup.clock() - started)
            return result

        for step in range(stage.start, min(stage.start + setup.repeats, stage.end)):
            batch = clock(
                "data (made ahead, in a thread)", lambda: train.batch_of(run, stages, step)
            ).to(run.device)
            with train.autocast(run):
                loss = clock(
                    "forward", lambda: model.loss(batch.tokens, batch.targets, batch.weights)
                )
            clock("backward", loss.backward)
            clock("clipping", lambda: nn.utils.clip_grad_norm_(model.parameters(), recipe.clip))
            for optimizer in run.optimizers:
                clock(type(optimizer).__name__, optimizer.step)
            model.zero_grad(set_to_none=True)
        times = Counter(dict.fromkeys(parts, stage.end - stage.start))
        evaluations = sum(
            step % recipe.eval_every == 0 or step == stage.end
            for step in range(stage.start + 1, stage.end + 1)
        )
        clock(
            "evaluation: loss",
            lambda: validation_loss(model, run.corpus, stage.longest, recipe.eval_tokens),
        )
        if run.needles:
            clock(
                "evaluation: needles",
                lambda: needle_score(
                    model,
                    held_out_examples(held_out, stage.longest, 8, *held_out.counts(stage.longest)),
                ),
            )
        for part, seen in parts.items():
            whole[part] += statistics.median(seen) * times.get(part, evaluations)
    if run.needles and recipe.eval_questions:
        started = setup.clock()
        with contextlib.redirect_stdout(io.StringIO()):
            needle_table(model, held_out, model.config.trained_length, recipe.eval_questions)
        whole["the final needle table"] = setup.clock() - started
    total = sum(whole.values())
    rows = [
        [part, f"{seconds:,.1f}", f"{seconds / total:.0%}"] for part, seconds in whole.most_common()
    ]
    size = f"{recipe.steps:,} steps of {recipe.batch_tokens:,} tokens, {run.name}, {'bfloat16 autocast' if run.bf16 else 'float32'}; each part's median of {setup.repeats} steps, times their number; the forward pass makes the gradients of the loss on its way"
    return (
        f"{size}.\n\n{table(['part', 'seconds', 'share'], [*rows, ['all', f'{total:,.1f}', '']])}"
    )


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
DEFAULT = {
    False: ("train", "forward", "decode", "memory"),
    True: ("train", "forward", "decode", "memory", "gpt2", "contexts", "long-decode", "kernels"),
}
WITH_COHERE2 = {"train", "forward", "decode", "long"}


def record(path: Path, machine_name: str, heading: str, body: str) -> None:
    """Put a section into the file, in the place of an earlier one with its heading."""
    preface = f"# Speed on {machine_name}\n\nWritten by `python -m lab.speed --out {path.parent}`, a section at a time; what the columns mean is said in lab/speed.py.\n"
    _, *parts = path.read_text().split("\n## ") if path.exists() else [""]
    sections = dict(part.split("\n", 1) for part in parts)
    sections[heading] = f"\n{body}\n"
    path.write_text(
        preface + "".join(f"\n## {name}\n{text.rstrip()}\n" for name, text in sections.items())
    )


def main(argv: list[str] | None = None) -> None:
    """The command. Bad input, peers that disagree and exhausted memory are one line and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = CommandLine(
        prog="python -m lab.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: {' '.join(DEFAULT[False])}; on CUDA all but long and job)",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="turns; slow sections take fewer")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile ours and GPT-2 (default: on CUDA)",
    )
    parser.add_argument(
        "--out", type=Path, help="a folder: what is printed also goes into its speed-MACHINE.md"
    )
    try:
        args = parser.parse(argv)
        for name in args.sections:
            if name not in SECTIONS:
                raise ValueError(f"section {name!r} is unknown: use {', '.join(SECTIONS)}")
        for name in ("threads", "repeats", "new_tokens"):
            if getattr(args, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1"
                )
        device, _ = choose_device(args.device)
        if args.out and not args.out.is_dir():
            raise FileNotFoundError(f"--out {args.out} is no folder: make it first")
        cuda = device.type == "cuda"
        setup = Setup(
            str(device),
            cuda if args.compile is None else args.compile,
            args.threads,
            args.repeats,
            args.new_tokens,
        )
        sections, version = args.sections or DEFAULT[cuda], ""
        if WITH_COHERE2 & set(sections):
            try:
                import transformers
            except ImportError:
                raise ValueError(
                    "lab.speed compares with transformers, which is not installed: pip install -r requirements-dev.txt"
                ) from None
            version = f", transformers {transformers.__version__}"
    except (ValueError, OSError) as error:
        fail(error)
    torch.set_num_threads(setup.threads)
    where = machine(setup)
    for name in sections:
        title, section = SECTIONS[name]
        title += ", compiled" if setup.compiled else ""
        clock = "CPU" if setup.clock is time.process_time else "wall"
        load = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before it"
        try:
            body = (
                f"`python -m lab.speed {shlex.join(argv)}`: torch {torch.__version__}{version}, {setup.threads} thread(s), {clock} time{load}.\n\n"
                + section(setup)
            )
        except ArithmeticError as error:
            fail(error)
        except torch.OutOfMemoryError:
            fail(f"section {name!r} is out of memory on {where}: leave it out by naming the others")
        print(f"## {title}\n\n{body}\n", flush=True)
        if args.out:
            record(
                args.out / f"speed-{re.sub('[^a-z0-9]+', '-', where.lower()).strip('-')}.md",
                where,
                title,
                body,
            )


if __name__ == "__main__":
    main()
