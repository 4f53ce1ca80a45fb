"""How fast this code is beside what people use: transformers' Cohere2 with the same weights, and
GPT-2 as nanoGPT trains it. Who is compared stands in lab/speed.toml.

    python -m lab.speed                      training step, forward, decoding, memory: minutes
    python -m lab.speed train --compile      all compiled; Cohere2 decodes with its static cache
    python -m lab.speed cost                 what a context costs, beside what arithmetic promises
    python -m lab.speed gpt2 kernels joined  GPT-2; windowed layers' kernels; matrices joined
    python -m lab.speed long --repeats 2     16k tokens; Cohere2's dense masks take minutes on a CPU

Who is compared runs by turns in one process, after all have said the same; times are medians, of
one thread its CPU time. Peak memory is of a step in a process of its own, beyond the model. FLOPs
count visible pairs only (Transformer.flops_per_token): as a share of the matmul rate that the
machine showed in the same turns, and as MFU where the datasheet's peak is known. On CUDA models run
in bfloat16 autocast, on CPU in float32.
"""

import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import tomllib
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
from attention import one_of
from checkpoint import shapes_only
from commandline import CommandLine, choose_device, guarded
from device import joined_loss, training_loss
from fast.kernels import one_graph
from lab.gpt2 import GPT2
from lab.report import at_least, markdown, progress
from model import ModelConfig, Transformer, require
from train import PEAK_FLOPS

DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
SHAPES, SECTIONS, TASKS = DATA["shapes"], DATA["sections"], DATA["tasks"]


# How to measure ----------------------------------------------------------------------------------


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, read once the device has done its work: of the CPU where one thread of it works, so
    that what else the machine does counts little; else of the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    read = time.process_time if alone else time.perf_counter
    wait = torch.get_device_module(device).synchronize
    return lambda: (wait(), read())[1]


def alternate(works: dict[str, Callable], turns: Iterable, clock: Callable) -> dict[str, float]:
    """Median seconds of each work by the clock, taken by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in turns:
        for name, work in works.items():
            started = clock()
            work()
            seconds[name].append(clock() - started)
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
    require(sys.platform == "darwin", "peak memory is measured on Linux and macOS only")
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def dtype_of(device: torch.device) -> torch.dtype:
    """In which models run: bfloat16 on CUDA."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Job:
    """A model and what it does with how many tokens. Equal shapes get equal weights."""

    name: str
    shape: dict
    batch: int
    length: int
    kind: str = "ours"  # or cohere2, gpt2
    task: str = "train"  # or forward, prefill, decode, continue
    compiled: bool = False
    backend: str = "auto"  # ours: the kernel of windowed layers
    recompute: bool = False
    loss: str = "training"  # ours: what train.py calls there; or joined, separate, whole logits
    new_tokens: int = 0  # to decode

    def model(self, filled: bool = True) -> Transformer | GPT2:
        """Ours, or GPT-2."""
        with nullcontext() if filled else shapes_only():
            if self.kind == "gpt2":
                return GPT2(**self.shape, length=self.length)
            return Transformer(ModelConfig(**self.shape))

    def build(self, device: torch.device) -> tuple[nn.Module, Callable, Callable]:
        """The model, its logits of tokens, and its loss of (tokens, targets)."""
        torch.manual_seed(0)
        model = logits = self.model()
        model.recompute, model.backend = self.recompute, self.backend
        if self.kind == "cohere2":
            model = as_cohere2(model)
            logits = lambda tokens: model(tokens, use_cache=False).logits

        def whole(tokens: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits(tokens).flatten(0, 1).float(), targets.flatten())

        loss = whole
        if self.kind == "ours":
            ways = {"training": training_loss(model, device), "separate": model.loss}
            ways |= {"joined": partial(joined_loss, model), "whole": whole}
            loss = ways[self.loss]
        return model.to(device), logits, loss

    def work(self, device: torch.device) -> Callable[[], Tensor]:
        """What does the task once and returns what it says: a loss, logits or new tokens."""
        model, logits, loss = self.build(device)
        compiled = partial(one_graph, dynamic=False) if self.compiled else lambda function: function
        size, generator = (self.batch, self.length + 1), torch.Generator().manual_seed(1)
        text = torch.randint(self.shape["vocab_size"] - 1, size, generator=generator).to(device)
        tokens, new = text[:, :-1], self.new_tokens
        half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        if self.task == "train":
            loss_of = half(compiled(loss))

            def step() -> Tensor:
                value = loss_of(tokens, text[:, 1:])
                value.backward()
                model.zero_grad()
                return value.detach()

            return step
        if self.task == "forward":
            return torch.no_grad()(half(partial(compiled(logits), tokens)))
        if self.kind == "cohere2":
            exactly = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            if self.compiled:
                exactly |= {"cache_implementation": "static", "compile_config": compiled_anywhere()}
            return lambda: model.generate(tokens, **exactly)[:, self.length :]
        stream = partial(engine.stream, model, tokens, compiled=self.compiled)
        if self.task == "decode":
            return lambda: torch.stack(list(stream(new)), dim=1)
        model.to(dtype_of(device)).requires_grad_(False)
        cache = lambda room: model.new_cache(self.batch, self.length + room)
        if self.task == "prefill":
            return lambda: engine.prefill(model, tokens, cache(0))
        text = stream(16 * new, cache=cache(16 * new))  # in every turn it goes on
        return lambda: torch.stack([next(text) for _ in range(new)], dim=1)

    def flops(self) -> float:
        """Training FLOPs a token."""
        return self.model(filled=False).flops_per_token(self.length)

    def cache(self) -> tuple[int, float]:
        """Bytes of a cache of the context, and what arithmetic promises of full attention's:
        (n_full + n_windowed min(1, W/L)) / n_layer."""
        model = self.model(filled=False)
        held = [min(1, (spec.window or self.length) / self.length) for spec in model.plan]
        return model.new_cache(self.batch, self.length).nbytes, sum(held) / len(held)


def as_cohere2(model: Transformer) -> nn.Module:
    """transformers' Cohere2 with the weights of `model`, its attention through SDPA."""
    mend = "which is not installed: pip install -r requirements-dev.txt"
    require(find_spec("transformers"), f"lab.speed compares with transformers, {mend}")
    import transformers  # the oracle; only here

    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(folder, attn_implementation="sdpa")


def compiled_anywhere():
    """What makes transformers compile the step of its static cache, on a CPU, too."""
    from transformers import CompileConfig

    config = CompileConfig()
    config._compile_all_devices = True
    return config


def jobs_of(table: dict, args: Namespace) -> list[Job]:
    """The jobs of a table of lab/speed.toml."""
    jobs = []
    for model in table["models"]:
        words = {"new_tokens": args.new_tokens} | table | model
        words["shape"] = SHAPES[words["shape"]] | words.get("config", {})
        if args.compile:
            words |= {"compiled": True, "name": f"{model['name']}, compiled"}
        jobs.append(Job(**{f.name: words[f.name] for f in fields(Job) if f.name in words}))
    return jobs


def compare(jobs: list[Job], device: torch.device, turns: int) -> str:
    """Jobs of one task by turns, in Markdown; the last is who the others are measured by."""
    base, cuda = jobs[-1], device.type == "cuda"
    task = TASKS[base.task]
    works = {job.name: job.work(device) for job in jobs}
    said = {name: work() for name, work in works.items()}
    for job in jobs:
        peers = {peer.name: said[peer.name] for peer in jobs if peer.shape == job.shape}
        agree(peers, task["tolerance"][cuda])
    n = 8192 if cuda else 2048
    square = torch.randn(n, n, device=device, dtype=dtype_of(device))
    works["matmul"] = partial(torch.matmul, square, square)
    seconds = alternate(works, progress(range(turns)), clock_of(device))
    rate = 2 * n**3 / seconds["matmul"]
    del works, said, square  # and so the models
    rows = []
    for job in jobs:
        took, decodes = seconds[job.name], job.task in ("decode", "continue")
        speed = (job.new_tokens if decodes else job.batch * job.length) / took
        row = {"": job.name, task["unit"]: f"{1e3 / speed if decodes else 1e3 * took:,.2f}"}
        row |= {"speed": f"{seconds[base.name] / took:.2f}", "tokens/s": f"{speed:,.0f}"}
        if job.task == "continue":
            held, promised = job.cache()
            row |= {"cache bytes": f"{held:,}", "share": f"{held / base.cache()[0]:.3f}"}
            row["promised"] = f"{promised:.3f}"
        if job.task == "train":
            row["FLOPs"] = f"{job.flops() / base.flops():.2f}"
            row["of the matmul rate"] = f"{job.flops() * speed / rate:.0%}"
            peaks = [peak for name, peak in PEAK_FLOPS.items() if name in machine(device)]
            row |= {"MFU": f"{job.flops() * speed / peak:.1%}" for peak in peaks}
        if job.task in ("train", "prefill"):
            row["peak MiB"] = ""
            if cuda or not job.compiled:  # a compiler in the process counts too
                row["peak MiB"] = f"{in_own_process(step_memory, job, device) / 2**20:,.0f}"
        rows.append(row)
    size = task["does"].format(base.batch, base.length, base.new_tokens)
    how = f"medians of {turns} turns; one matrix product {rate / 1e9:,.0f} GFLOP/s"
    return f"{size}; {how}.\n\n{markdown(rows[0], map(dict.values, rows))}"


def agree(said: dict[str, Tensor], tolerance: float) -> None:
    """ValueError where one says something else than the first, relative to its largest number."""
    (first, expected), *others = said.items()
    for name, got in others:
        error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
        differ = f"{name} and {first} do not say the same: off by {error:.1e} of the largest number"
        nothing = f"and {tolerance:.0e} is allowed; their times mean nothing"
        require(error <= tolerance, f"{differ}, {nothing}")


def step_memory(job: Job, device: torch.device) -> int:
    """Peak bytes of doing it twice, beyond the model: for a process of its own."""
    step = job.work(device)
    base = peak_bytes(device)
    step(), step()
    return peak_bytes(device) - base


def machine(device: torch.device) -> str:
    """What the GPU, or else the CPU, calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.exists() and re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
    return named[1] if named else platform.processor() or platform.machine()


def measured(section: dict, args: Namespace) -> str:
    """A section's text: its tables, each below a line that says what was measured."""
    tables = []
    for table in section["tables"]:
        table = section | table
        turns = min(args.repeats, table.get("turns", args.repeats))
        tables.append(compare(jobs_of(table, args), args.device, turns))
    return section.get("intro", "") + "\n\n".join(tables)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(prog="python -m lab.speed", description=__doc__)
    add = parser.add_argument
    default = f"{' '.join(DATA['default']['cpu'])}; on CUDA all but long"
    which = f"of {', '.join(SECTIONS)} (default: {default})"
    add("sections", nargs="*", metavar="SECTION", help=which)
    add("--device", help="default: cuda where there is one, else cpu")
    add("--threads", type=int, default=1)
    add("--repeats", type=int, default=7, help="turns; slow sections take fewer")
    add("--new-tokens", type=int, default=256)
    add("--compile", action=BooleanOptionalAction, help="all of them (default: on CUDA)")
    args = parser.parse(argv)
    for name in args.sections:
        one_of("section", name, SECTIONS)
    at_least(1, threads=args.threads, repeats=args.repeats, new_tokens=args.new_tokens)
    args.device, _ = choose_device(args.device)
    kind = "cuda" if args.device.type == "cuda" else "cpu"
    args.compile = kind == "cuda" if args.compile is None else args.compile
    torch.set_num_threads(args.threads)

    libraries = [f"{name} {version(name)}" for name in ("torch", "transformers") if find_spec(name)]
    libraries.append(f"{args.threads} thread(s)")
    clock = "wall" if kind == "cuda" or args.threads > 1 else "CPU"
    print(f"Speed on {machine(args.device)}: {', '.join(libraries)}, {clock} time.")
    for name in args.sections or DATA["default"][kind]:
        load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"  # on Windows
        section = SECTIONS[name] | SECTIONS[name].get(kind, {})
        title = section["title"] + ", compiled" * args.compile
        body = f"Load {load} on {os.cpu_count()} cores before it. {measured(section, args)}"
        print(f"\n## {title}\n\n{body}", flush=True)


if __name__ == "__main__":
    main()
