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

import importlib.metadata
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from functools import partial
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
from model import ModelConfig, Transformer
from recipe import Stage
from run import Run, read

DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
SHAPES, SECTIONS = DATA["shapes"], DATA["sections"]
DEFAULT = ("train", "forward", "decode", "memory")
ON_CUDA = (*DEFAULT, "gpt2", "contexts", "long-decode", "kernels")
WITH_COHERE2 = {"train", "forward", "decode", "long"}
TASKS = {  # what is done, what its time is of, and how far peers may differ on CPU and CUDA
    "train": ("{} x {:,} tokens a step, forward and backward", "ms a step", (1e-5, 1e-2)),
    "forward": ("Logits of {} x {:,} tokens", "ms", (1e-4, 5e-2)),
    "decode": ("{2} tokens after a prompt of {1}, float32", "ms a token", (0, 0)),
}


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
        model.to(device)

        def whole(tokens: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits(tokens).flatten(0, 1).float(), targets.flatten())

        return model, logits, model.loss if self.kind == "ours" and not self.whole else whole

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


def measured(name: str, args: Namespace) -> tuple[str, str]:
    """Title and text of a section."""
    section = SECTIONS[name] | SECTIONS[name].get(args.device.type, {})
    own = {"long-decode": long_decode, "kernels": kernels, "job": training_job}
    return section["title"] + ", compiled" * args.compile, own.get(name, models)(args, section)


def models(args: Namespace, section: dict) -> str:
    """A section that compares models, table by table."""
    parts = []
    for table in section["tables"]:
        table = section | table
        turns = min(args.repeats, table.get("turns", args.repeats))
        parts.append(compare(jobs_of(table, args), args.device, turns))
    return section.get("intro", "") + "\n\n".join(parts)


def compare(jobs: list[Job], device: torch.device, turns: int) -> str:
    """Jobs of one task by turns, as a table; the last is who the others are measured by."""
    base, cuda = jobs[-1], device.type == "cuda"
    does, unit, tolerance = TASKS[base.task]
    works = {job.name: job.work(device) for job in jobs}
    said = {name: work() for name, work in works.items()}
    for job in jobs:
        peers = {peer.name: said[peer.name] for peer in jobs if peer.shape == job.shape}
        agree(peers, tolerance[cuda])
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
        row = {"": job.name, unit: f"{1e3 / speed if decodes else 1e3 * took:,.2f}"}
        row |= {"speed": f"{seconds[base.name] / took:.2f}", "tokens/s": f"{speed:,.0f}"}
        if job.task == "train":
            row |= training_columns(job, base, speed, rate, device)
        rows.append(row)
    size = does.format(base.batch, base.length, base.new_tokens)
    how = f"medians of {turns} turns; one matrix product {rate / 1e9:,.0f} GFLOP/s"
    return f"{size}; {how}.\n\n{markdown(rows[0], map(dict.values, rows))}"


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
        if not error <= tolerance:
            raise ValueError(
                f"{name} and {first} do not say the same: off by {error:.1e} of the largest "
                f"number, and {tolerance:.0e} is allowed; their times mean nothing"
            )


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


def long_decode(args: Namespace, section: dict) -> str:
    """Decoding one sequence after a long context, rrrN against R."""
    device, dtype, context = args.device, dtype_of(args.device), section["length"]
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    copy = {"copy": partial(torch.empty_like(source).copy_, source)}
    bandwidth = 2 * source.nbytes / alternate(copy, range(9), clock_of(device))["copy"]
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
    return f"{text}.\n\n{markdown(rows[0], map(dict.values, rows))}"


def kernels(args: Namespace, section: dict) -> str:
    """Windowed attention alone, forward and backward, beside what its visible pairs would take at
    the causal kernel's rate."""
    (h, k, d), length, device = section["heads"], section["length"], args.device
    make = partial(torch.randn, device=device, dtype=dtype_of(device))
    qkv = [make(1, n, length, d).requires_grad_() for n in (h, k, k)]
    upstream, rows = make(1, h, length, d), []
    tolerance = 2e-2 if device.type == "cuda" else 1e-5
    for window in section["windows"]:
        runs = {name: partial(attend, *qkv, window, name) for name in section["names"]}
        if "varlen_attn" in runs:
            runs["varlen_attn"] = partial(varlen, *qkv, window)
        agree({name: run().detach() for name, run in runs.items()}, tolerance)
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
    turns = f"{dtype_of(device)}; medians of {args.repeats} turns"
    return f"{size}, {turns}.\n\n{markdown(rows[0], map(dict.values, rows))}"


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


def training_job(args: Namespace, section: dict, argv: Sequence[str] = ()) -> str:
    """Where the time of `python train.py` goes, and of `python train.py --bf16` on a CPU that has
    bfloat16 units: some steps of each stage, times the number of them."""
    bf16 = args.device.type == "cpu" and multiplies_bfloat16()
    variants = [[], ["--bf16"]] if bf16 else [[]]
    argv = [*argv, "--device", str(args.device)]
    return "\n\n".join(job_times(args, argv + flags) for flags in variants)


def job_times(args: Namespace, argv: list[str]) -> str:
    """Medians of a part's times, times how often train.py does it."""
    run, _ = read(argv)
    run.optimizers = train.make_optimizers(run.model, run.recipe)
    recipe, clock, whole = run.recipe, clock_of(run.device), Counter()
    held_out = Needles(run.corpus.tokenizer, run.corpus.val, evaluation=True)
    for stage in recipe.stages():
        seen = defaultdict(list)
        started = clock()
        for part in stage_parts(run, stage, held_out, args.repeats):
            seen[part].append(clock() - started)
            started = clock()
        ends = range(stage.start + 1, stage.end + 1)
        evaluations = sum(n % recipe.eval_every == 0 or n == stage.end for n in ends)
        for part, seconds in seen.items():
            count = evaluations if part.startswith("evaluation") else len(ends)
            whole[part] += statistics.median(seconds) * count
    if run.needles and recipe.eval_questions:
        trained = run.model.config.trained_length
        with redirect_stdout(None):
            table = partial(needle_table, run.model, held_out, trained, recipe.eval_questions)
            whole["the final needle table"] = cost.timed(table, clock)
    total = whole.total()
    rows = [[part, f"{s:,.1f}", f"{s / total:.0%}"] for part, s in whole.most_common()]
    rows.append(["all", f"{total:,.1f}", ""])
    precision = "bfloat16 autocast" if run.bf16 else "float32"
    size = f"{recipe.steps:,} steps of {recipe.batch_tokens:,} tokens, {run.name}, {precision}"
    how = f"each part's median of {args.repeats} steps, times their number"
    aside = "the forward pass makes the gradients of the loss on its way"
    return f"{size}; {how}; {aside}.\n\n{markdown(['part', 'seconds', 'share'], rows)}"


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


def record(path: Path, where: str, title: str, body: str) -> None:
    """Put a section into the file, in the place of an earlier one with its title."""
    text = f"# Speed on {where}\n\nWritten by `python -m lab.speed --out {path.parent}`, a section "
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
    which = f"of {', '.join(SECTIONS)} (default: {' '.join(DEFAULT)}; on CUDA all but long and job)"
    add("sections", nargs="*", metavar="SECTION", help=which)
    add("--device", help="default: cuda where there is one, else cpu")
    add("--threads", type=int, default=1)
    add("--repeats", type=int, default=7, help="turns; slow sections take fewer")
    add("--new-tokens", type=int, default=256)
    mode = "ours and GPT-2 (default: on CUDA)"
    add("--compile", action=BooleanOptionalAction, help=mode)
    add("--out", type=Path, help="a folder, for its speed-MACHINE.md")
    args = parser.parse(argv)
    for name in args.sections:
        one_of("section", name, SECTIONS)
    at_least(1, threads=args.threads, repeats=args.repeats, new_tokens=args.new_tokens)
    if args.out and not args.out.is_dir():
        raise FileNotFoundError(f"--out {args.out} is no folder: make it first")
    args.device, _ = choose_device(args.device)
    cuda = args.device.type == "cuda"
    args.compile = cuda if args.compile is None else args.compile
    torch.set_num_threads(args.threads)

    sections = args.sections or (ON_CUDA if cuda else DEFAULT)
    libraries = f"torch {torch.__version__}"
    if WITH_COHERE2 & set(sections):
        try:
            libraries += f", transformers {importlib.metadata.version('transformers')}"
        except importlib.metadata.PackageNotFoundError:
            mend = "which is not installed: pip install -r requirements-dev.txt"
            raise ValueError(f"lab.speed compares with transformers, {mend}") from None
    where = machine(args.device)
    clock = "wall" if cuda or args.threads > 1 else "CPU"
    for name in sections:
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before it"
        how = f"{libraries}, {args.threads} thread(s), {clock} time, {load}"
        title, text = measured(name, args)
        body = f"`python -m lab.speed {shlex.join(argv)}`: {how}.\n\n{text}"
        print(f"## {title}\n\n{body}\n", flush=True)
        if args.out:
            slug = re.sub("[^a-z0-9]+", "-", where.lower()).strip("-")
            record(args.out / f"speed-{slug}.md", where, title, body)


if __name__ == "__main__":
    main()
