"""How fast this code is beside what people use: transformers' Cohere2 with the same weights, and
GPT-2 as nanoGPT trains it. Who is compared stands in lab/speed.toml.

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

import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import tomllib
from argparse import BooleanOptionalAction, Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import engine
import train
from attention import attend, one_of, visible_pairs
from commandline import CommandLine, choose_device, guarded
from data.batches import held_out_examples
from data.needles import Needles
from evaluate import needle_score, needle_table, validation_loss
from lab import cost
from lab.cost import alternate, clock_of, dtype_of, in_own_process, peak_bytes
from lab.gpt2 import GPT2
from lab.report import at_least, markdown, progress
from lab.runs import multiplies_bfloat16
from model import ModelConfig, Transformer, require
from recipe import Stage
from run import Run, read

DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
SHAPES, SECTIONS, TASKS = DATA["shapes"], DATA["sections"], DATA["tasks"]
Table = tuple[str, list[dict[str, str]]]  # what was measured, and rows: column -> cell


@dataclass(frozen=True)
class Job:
    """A model and what it does with how many tokens: all that another process needs to build it.
    Equal shapes get equal weights."""

    name: str
    shape: dict
    batch: int
    length: int
    kind: str = "ours"  # or cohere2, gpt2
    task: str = "train"  # or forward, decode
    compiled: bool = False
    recompute: bool = False
    whole: bool = False  # ours, with the cross-entropy of whole logits
    new_tokens: int = 0  # to decode

    def model(self) -> Transformer | GPT2:
        """Ours, or GPT-2."""
        if self.kind == "gpt2":
            return GPT2(**self.shape, length=self.length)
        return Transformer(ModelConfig(**self.shape))

    def build(self, device: torch.device) -> tuple[nn.Module, Callable, Callable]:
        """The model, its logits of tokens, and its loss of (tokens, targets)."""
        torch.manual_seed(0)
        model = logits = self.model()
        model.recompute = self.recompute
        if self.kind == "cohere2":
            model = as_cohere2(model)
            logits = lambda tokens: model(tokens, use_cache=False).logits

        def whole(tokens: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits(tokens).flatten(0, 1).float(), targets.flatten())

        loss = model.loss if self.kind == "ours" and not self.whole else whole
        return model.to(device), logits, loss

    def work(self, device: torch.device) -> Callable[[], Tensor]:
        """What does the task once and returns what it says: a loss, logits or new tokens."""
        model, logits, loss = self.build(device)
        compiled = torch.compile if self.compiled else lambda function: function
        size, generator = (self.batch, self.length + 1), torch.Generator().manual_seed(1)
        text = torch.randint(self.shape["vocab_size"] - 1, size, generator=generator).to(device)
        tokens, new = text[:, :-1], self.new_tokens
        if self.task == "train":
            return cost.training_step(model, compiled(loss), tokens, text[:, 1:])

        if self.task == "forward":
            half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
            return torch.no_grad()(half(partial(compiled(logits), tokens)))

        if self.kind == "cohere2":
            exactly = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            return lambda: model.generate(tokens, **exactly)[:, self.length :]
        stream = partial(engine.stream, model, tokens, new, compiled=self.compiled)
        return lambda: torch.stack(list(stream()), dim=1)

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


def jobs_of(table: dict, args: Namespace) -> list[Job]:
    """The jobs of a table of lab/speed.toml."""
    jobs = []
    for model in table["models"]:
        words = table | model | {"new_tokens": args.new_tokens}
        words["shape"] = SHAPES[words["shape"]] | words.get("config", {})
        if args.compile and not words.get("eager"):
            words |= {"compiled": True, "name": f"{model['name']}, compiled"}
        jobs.append(Job(**{f.name: words[f.name] for f in fields(Job) if f.name in words}))
    return jobs


def models(section: dict, args: Namespace) -> Iterator[Table]:
    """Models that do the same."""
    for table in section["tables"]:
        table = section | table
        turns = min(args.repeats, table.get("turns", args.repeats))
        yield compare(jobs_of(table, args), args.device, turns)


def compare(jobs: list[Job], device: torch.device, turns: int) -> Table:
    """Jobs of one task by turns; the last is who the others are measured by."""
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
        took, decodes = seconds[job.name], job.task == "decode"
        speed = (job.new_tokens if decodes else job.batch * job.length) / took
        row = {"": job.name, task["unit"]: f"{1e3 / speed if decodes else 1e3 * took:,.2f}"}
        row |= {"speed": f"{seconds[base.name] / took:.2f}", "tokens/s": f"{speed:,.0f}"}
        if job.task == "train":
            row |= training_columns(job, base, speed, rate, device)
        rows.append(row)
    size = task["does"].format(base.batch, base.length, base.new_tokens)
    return f"{size}; medians of {turns} turns; one matrix product {rate / 1e9:,.0f} GFLOP/s", rows


def training_columns(job: Job, base: Job, speed: float, rate: float, device) -> dict[str, str]:
    """Memory, and FLOPs: beside those of `base`, and at a speed in tokens a second as a share of
    the matmul rate and of the datasheet's peak."""
    flops, published = job.flops()
    row = {"FLOPs": f"{flops / base.flops()[0]:.2f}"}
    row["of the matmul rate"] = f"{flops * speed / rate:.0%}"
    row["by 6N + 12LdT"] = f"{published * speed / rate:.0%}"
    row["peak MiB"] = ""
    if device.type == "cuda" or not job.compiled:  # a compiler in the process counts too
        row["peak MiB"] = f"{in_own_process(step_memory, job, device) / 2**20:,.0f}"
    for key, peak in train.PEAK_FLOPS.items():
        if key in machine(device):
            row["MFU"] = f"{flops * speed / peak:.1%}"
            row["MFU by 6N + 12LdT"] = f"{published * speed / peak:.1%}"
    return row


def agree(said: dict[str, Tensor], tolerance: float) -> None:
    """ValueError where one says something else than the first, relative to its largest number."""
    (first, expected), *others = said.items()
    for name, got in others:
        error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
        differ = f"{name} and {first} do not say the same: off by {error:.1e} of the largest number"
        nothing = f"and {tolerance:.0e} is allowed; their times mean nothing"
        require(error <= tolerance, f"{differ}, {nothing}")


def step_memory(job: Job, device: torch.device) -> int:
    """Peak bytes of two steps, beyond the model: for a process of its own."""
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


# Sections of their own ----------------------------------------------------------------------------


def long_decode(section: dict, args: Namespace) -> Iterator[Table]:
    """Decoding one sequence after a long context, rrrN against R."""
    device, dtype, context = args.device, dtype_of(args.device), section["length"]
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    bandwidth = 2 * source.nbytes / alternate({"": copy}, range(9), clock_of(device))[""]
    shape, rows = SHAPES[section["shape"]] | section["config"], []
    with torch.device("meta"):
        weights = Transformer(ModelConfig(**shape)).matmul_parameters() * dtype.itemsize
    how = (shape, device, 1, False, args.new_tokens, args.compile)
    for pattern in ("rrrN", "R"):
        costs = in_own_process(cost.measure, pattern, context, *how)
        read, took = weights + costs.cache_bytes, costs.decode_ms / 1e3
        row = {"": pattern, "ms a token": f"{costs.decode_ms:.2f}"}
        row["MiB read (weights, cache)"] = f"{read / 2**20:,.0f}"
        row["GB/s"] = f"{read / took / 1e9:,.0f}"
        row["of the copying rate"] = f"{read / took / bandwidth:.0%}"
        rows.append(row)
    mode = ", the step compiled" * args.compile + " into a CUDA graph" * (device.type == "cuda")
    text = f"One sequence of {context:,} tokens, window {shape['window']:,}, {dtype}{mode}; "
    text += f"medians of {args.new_tokens} tokens; copying {bandwidth / 1e9:,.0f} GB/s"
    yield text, rows


def kernels(section: dict, args: Namespace) -> Iterator[Table]:
    """Windowed attention alone, forward and backward, beside what its visible pairs would take at
    the causal kernel's rate."""
    (h, k, d), length, device = section["heads"], section["length"], args.device
    make = partial(torch.randn, device=device, dtype=dtype_of(device))
    qkv = [make(1, n, length, d).requires_grad_() for n in (h, k, k)]
    upstream, rows = make(1, h, length, d), []
    for window in section["windows"]:
        runs = {name: partial(attend, *qkv, window, name) for name in section["names"]}
        if "varlen_attn" in runs:
            runs["varlen_attn"] = partial(varlen, *qkv, window)
        agree({name: run().detach() for name, run in runs.items()}, section["tolerance"])
        runs["causal"] = partial(attend, *qkv)
        both = lambda run: torch.autograd.grad(run(), qkv, upstream)
        works = {name: partial(both, run) for name, run in runs.items()}
        alternate(works, range(1), clock_of(device))
        seconds = alternate(works, progress(range(args.repeats)), clock_of(device))
        for name, took in seconds.items():
            pairs = visible_pairs(length, None if name == "causal" else window)
            rate = seconds["causal"] / took * pairs / visible_pairs(length)
            row = {"window": f"{window:,}", "kernel": name, "ms": f"{took * 1e3:,.2f}"}
            rows.append(row | {"of the causal kernel's FLOP rate": f"{rate:.2f}"})
    size = f"One sequence of {length:,}, {h} heads and {k} of keys and values, width {d}"
    yield f"{size}, {dtype_of(device)}; medians of {args.repeats} turns", rows


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


def training_job(section: dict, args: Namespace) -> Iterator[Table]:
    """Where the time of `python train.py` goes, and of `python train.py --bf16` on a CPU that has
    bfloat16 units."""
    twice = args.device.type == "cpu" and multiplies_bfloat16()
    for flags in ([], ["--bf16"])[: 1 + twice]:
        run, _ = read([*section["flags"], *flags, "--device", str(args.device)])
        seconds = part_seconds(run, args.repeats)
        total = seconds.total()
        rows = []
        for part, s in seconds.most_common():
            rows.append({"part": part, "seconds": f"{s:,.1f}", "share": f"{s / total:.0%}"})
        rows.append({"part": "all", "seconds": f"{total:,.1f}", "share": ""})
        steps = f"{run.recipe.steps:,} steps of {run.recipe.batch_tokens:,} tokens"
        precision = "bfloat16 autocast" if run.bf16 else "float32"
        how = f"each part's median of {args.repeats} steps, times their number"
        aside = "the forward pass makes the gradients of the loss on its way"
        yield f"{steps}, {run.name}, {precision}; {how}; {aside}", rows


def part_seconds(run: Run, steps: int) -> Counter:
    """Seconds of each part of a training: its median in some steps of a stage, times how often
    train.py does it."""
    run.optimizers = train.make_optimizers(run.model, run.recipe)
    recipe, clock, seconds = run.recipe, clock_of(run.device), Counter()
    held_out = Needles(run.corpus.tokenizer, run.corpus.val, evaluation=True)
    for stage in recipe.stages():
        seen = defaultdict(list)
        started = clock()
        for part in stage_parts(run, stage, held_out, steps):
            seen[part].append(clock() - started)
            started = clock()
        ends = range(stage.start + 1, stage.end + 1)
        evaluations = sum(n % recipe.eval_every == 0 or n == stage.end for n in ends)
        for part, times in seen.items():
            count = evaluations if part.startswith("evaluation") else len(ends)
            seconds[part] += statistics.median(times) * count
    if run.needles and recipe.eval_questions:
        trained = run.model.config.trained_length
        table = partial(needle_table, run.model, held_out, trained, recipe.eval_questions)
        with redirect_stdout(None):
            seconds["the final needle table"] = cost.timed(table, clock)
    return seconds


def stage_parts(run: Run, stage: Stage, held_out: Needles, steps: int) -> Iterator[str]:
    """Some steps of a stage and its evaluation; yields the name of each part when it is done."""
    model, recipe = run.model, run.recipe
    model.config = stage.config
    for step in range(stage.start, stage.end)[:steps]:
        batch = train.batch_of(run, step).to(run.device)
        yield "data (made ahead, in a thread)"
        with train.autocast(run):
            loss = model.loss(batch.tokens, batch.targets, batch.weights)
        yield "forward"
        loss.backward()
        yield "backward"
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        yield "clipping"
        for optimizer in run.optimizers:
            optimizer.step()
            yield type(optimizer).__name__
        model.zero_grad()
    validation_loss(model, run.corpus, stage.longest, recipe.eval_tokens)
    yield "evaluation: loss"
    if run.needles:
        counts = held_out.counts(stage.longest)
        needle_score(model, held_out_examples(held_out, stage.longest, 8, *counts))
        yield "evaluation: needles"


def measured(name: str, section: dict, args: Namespace) -> str:
    """A section's text: its tables, each below a line that says what was measured."""
    own = {"long-decode": long_decode, "kernels": kernels, "job": training_job}
    parts = []
    for text, rows in own.get(name, models)(section, args):
        parts.append(f"{text}.\n\n{markdown(rows[0], map(dict.values, rows))}")
    return section.get("intro", "") + "\n\n".join(parts)


def record(folder: Path, where: str, title: str, body: str) -> None:
    """Put a section into the machine's file, in the place of an earlier one with its title."""
    slug = re.sub("[^a-z0-9]+", "-", where.lower()).strip("-")
    path = folder / f"speed-{slug}.md"
    text = f"# Speed on {where}\n\nWritten by `python -m lab.speed --out {folder}`, a section "
    text += "at a time; what the columns mean is said in lab/speed.py.\n"
    if path.exists():
        text = path.read_text(encoding="utf-8")
    section = f"\n## {title}\n\n{body}\n"
    earlier = rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)"
    text, found = re.subn(earlier, lambda _: section, text, flags=re.DOTALL)
    path.write_text(text if found else text + section, encoding="utf-8")


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    argv = sys.argv[1:] if argv is None else argv
    parser = CommandLine(prog="python -m lab.speed", description=__doc__)
    add = parser.add_argument
    default = f"{' '.join(DATA['default']['cpu'])}; on CUDA all but long and job"
    which = f"of {', '.join(SECTIONS)} (default: {default})"
    add("sections", nargs="*", metavar="SECTION", help=which)
    add("--device", help="default: cuda where there is one, else cpu")
    add("--threads", type=int, default=1)
    add("--repeats", type=int, default=7, help="turns; slow sections take fewer")
    add("--new-tokens", type=int, default=256)
    add("--compile", action=BooleanOptionalAction, help="ours and GPT-2 (default: on CUDA)")
    add("--out", type=Path, help="a folder, for its speed-MACHINE.md")
    args = parser.parse(argv)
    for name in args.sections:
        one_of("section", name, SECTIONS)
    at_least(1, threads=args.threads, repeats=args.repeats, new_tokens=args.new_tokens)
    if args.out and not args.out.is_dir():
        raise FileNotFoundError(f"--out {args.out} is no folder: make it first")
    args.device, _ = choose_device(args.device)
    kind = "cuda" if args.device.type == "cuda" else "cpu"
    args.compile = kind == "cuda" if args.compile is None else args.compile
    torch.set_num_threads(args.threads)

    names = args.sections or DATA["default"][kind]
    libraries = f"torch {torch.__version__}"
    if any("cohere2" in str(SECTIONS[name]) for name in names):
        mend = "which is not installed: pip install -r requirements-dev.txt"
        require(find_spec("transformers"), f"lab.speed compares with transformers, {mend}")
        libraries += f", transformers {version('transformers')}"
    where = machine(args.device)
    clock = "wall" if kind == "cuda" or args.threads > 1 else "CPU"
    for name in names:
        load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"  # on Windows
        load = f"load {load} on {os.cpu_count()} cores before it"
        how = f"{libraries}, {args.threads} thread(s), {clock} time, {load}"
        section = SECTIONS[name] | SECTIONS[name].get(kind, {})
        title = section["title"] + ", compiled" * args.compile
        text = measured(name, section, args)
        body = f"`python -m lab.speed {shlex.join(argv)}`: {how}.\n\n{text}"
        print(f"## {title}\n\n{body}\n", flush=True)
        if args.out:
            record(args.out, where, title, body)


if __name__ == "__main__":
    main()
