"""Train a model by a recipe, evaluate it, and leave a checkpoint.

python train.py                                   the laptop recipe: rrrN on this Python's standard library, in minutes
python train.py --pattern R --qk-norm             another variant, the same recipe
python train.py my.toml --data corpora/mine       another recipe, another corpus
python train.py --resume out/laptop-R-s1          go on where a run stopped
python train.py --init CHECKPOINT --max-steps 0   only evaluate
torchrun --nproc-per-node 2 train.py              the same on two GPUs, or in two processes on CPU
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import parallel
import recipe as recipes
from attention import choose_backend
from commandline import fail
from data.batches import Batch, held_out_examples, prefetch, training_batch
from data.corpus import DEFAULT_CORPUS, Corpus, load_corpus
from data.needles import Needles
from data.prepare import prepare_stdlib
from data.tokenizer import load_tokenizer
from evaluate import needle_score, needle_table, validation_loss
from model import Transformer, layer_plan
from parallel import RANK, RANKS
from recipe import Recipe, Stage
from run import choose_device

HERE = Path(__file__).parent
WITH_RESUME = {
    "resume",
    "out",
    "max_steps",
    "micro_batch",
    "device",
    "backend",
}  # --out only says which run
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from the datasheets
EPOCHS_TO_WARN = 4  # repeated text teaches nearly as much as new text up to here (2305.16264)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps, for the matrices of the layers; torch.optim.Muon's update with
    adjust_lr_fn="match_rms_adamw". Matrices of one shape go through together, and on CPU in float32: bfloat16, which
    torch's own insists on, is some fifteen times slower on a CPU without bfloat16 units.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                updates.setdefault(p.shape, []).append(
                    (p, p.grad.lerp(momentum, group["momentum"]))
                )  # Nesterov
            for shape, pairs in updates.items():
                rms = 0.2 * math.sqrt(
                    max(shape)
                )  # the size of AdamW's updates, so that both take one learning rate
                for (p, _), update in zip(
                    pairs, orthogonalise(torch.stack([update for _, update in pairs]))
                ):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                        update, alpha=-group["lr"] * rms
                    )


def orthogonalise(g: Tensor) -> Tensor:
    """(n rows columns) -> matrices with the same singular vectors and all singular values near 1 (Keller Jordan's coefficients)."""
    x = g if g.device.type == "cpu" else g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return (x.mT if tall else x).to(g.dtype)


def make_optimizers(model: Transformer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW, without decay, for embeddings, gains and the output head."""
    named = [
        (p.ndim == 2 and name.startswith("layers."), p) for name, p in model.named_parameters()
    ]
    muon = Muon([p for matrix, p in named if matrix], recipe.lr, recipe.weight_decay)
    adamw = torch.optim.AdamW(
        [p for matrix, p in named if not matrix], recipe.lr, betas=(0.9, 0.95), weight_decay=0
    )
    return [muon, adamw]


# ---------------------------------------------------------------------------------------------------------------------
# What to run


@dataclass
class Run:
    """Everything that training needs, read and checked."""

    recipe: Recipe
    name: str
    out: Path
    corpus: Corpus
    needles: Needles | None
    model: Transformer
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    bf16: bool
    compile: bool
    micro_batch: int
    max_steps: int
    step: int = 0  # steps done
    best: float = math.inf


def read(argv: list[str] | None) -> Run:
    """The run that the command line asks for, with its folder made last. Raises ValueError or OSError with the whole message."""
    args = vars(recipes.command_line(__doc__).parse(argv))
    path = args.pop("recipe") or HERE / "recipes" / "laptop.toml"
    options = {
        key: args.pop(key)
        for key in (
            "out",
            "resume",
            "init",
            "max_steps",
            "micro_batch",
            "device",
            "backend",
            "compile",
        )
        if key in args
    }
    resuming = "resume" in options
    if resuming and (options.keys() | args.keys()) - WITH_RESUME:
        extra = sorted((options.keys() | args.keys()) - WITH_RESUME)[0].replace("_", "-")
        raise ValueError(
            f"--resume continues a run by its own recipe and cannot take --{extra}: leave it out, or start another run"
        )
    for key, least in (("max_steps", 0), ("micro_batch", 1)):
        if options.get(key, least) < least:
            raise ValueError(f"--{key.replace('_', '-')} {options[key]} must be at least {least}")
    device, native_bf16 = choose_device(options.get("device"))
    model = None
    if resuming:
        out = (
            options["resume"]
            or options.get("out")
            or HERE.joinpath(
                "out", recipes.run_name(recipes.build(recipes.read_toml(path)), path.stem)
            )
        )
        name, recipe = read_run(out)
    else:
        if "init" in options:
            model = Transformer.from_pretrained(options["init"], device)
        name, recipe = (
            path.stem,
            recipes.build(recipes.read_toml(path), args, model and model.config, path.name),
        )
        out = options.get("out", Path("out", recipes.run_name(recipe, name)))
    if recipe.data == str(DEFAULT_CORPUS) and not DEFAULT_CORPUS.exists():
        prepare_stdlib(DEFAULT_CORPUS)
    corpus = load_corpus(recipe.data)
    recipe = fit_vocabulary(recipe, corpus)
    stages = recipe.stages()
    needles = (
        Needles(corpus.tokenizer, corpus.train, evaluation=False)
        if any(stage.needle_share for stage in stages)
        else None
    )
    for stage in stages:  # one batch of each length, to know now that the corpus can fill it
        for length in stage.lengths:
            if min(len(corpus.train), len(corpus.val)) <= length:
                raise ValueError(
                    f"the corpus {recipe.data} has {min(len(corpus.train), len(corpus.val)):,} tokens in a split and the recipe reads {length:,} at a time: prepare a larger one, or train shorter"
                )
            if recipe.batch_tokens // length % RANKS:
                raise ValueError(
                    f"batch_tokens {recipe.batch_tokens} are {recipe.batch_tokens // length} sequences of {length}, which do not divide among {RANKS} processes: start another number of them, or give --batch-tokens {length * RANKS} or a multiple"
                )
            training_batch(
                corpus, needles, recipe.seed, 0, length, length, float(stage.needle_share > 0)
            )
    source = out / "last" if resuming else options.get("init")
    if source is not None and load_tokenizer(source).hash != corpus.tokenizer.hash:
        raise ValueError(
            f"the checkpoint {source} and the corpus {recipe.data} have different tokenizers: give the checkpoint's own corpus with --data, or start without it"
        )
    if resuming:
        model = Transformer.from_pretrained(source, device)
    elif model is None:
        torch.manual_seed(recipe.seed)
        model = Transformer(recipe.model, recipe.mimetic).to(device)
    model.config, model.backend, model.recompute = (
        recipe.model,
        options.get("backend", "auto"),
        recipe.recompute,
    )
    run = Run(
        recipe, name, out, corpus, needles, model.train(), make_optimizers(model, recipe), device,
        native_bf16 if recipe.bf16 is None else recipe.bf16,
        options.get("compile", device.type == "cuda"), options.get("micro_batch", recipe.batch_tokens),
        min(options.get("max_steps", recipe.steps), recipe.steps),
    )  # fmt: skip
    if resuming:
        load_state(run)
    elif RANK == 0:
        claim(run, sys.argv[1:] if argv is None else argv)
    return run


def fit_vocabulary(recipe: Recipe, corpus: Corpus) -> Recipe:
    """The recipe with the corpus's vocabulary, which is the model's."""
    return replace(recipe, model=replace(recipe.model, vocab_size=corpus.tokenizer.n_vocab))


def claim(run: Run, argv: list[str]) -> None:
    """Make the run's folder and write run.json. Raises ValueError where there is a run already."""
    if (run.out / "run.json").exists():
        raise ValueError(
            f"{run.out} already holds a run: go on with --resume {run.out}, or choose another folder with --out"
        )
    run.out.mkdir(parents=True, exist_ok=True)
    git = (
        subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE)
        if (HERE / ".git").exists()
        else None
    )
    record = {
        "name": run.name,
        "arguments": argv,
        "recipe": recipes.to_tables(run.recipe),
        "corpus": run.corpus.hash,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if run.device.type == "cuda"
        else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "processes": RANKS,
        "git": git.stdout.strip() if git else None,
    }
    (run.out / "run.json").write_text(json.dumps(record, indent=1) + "\n")


def read_run(out: Path) -> tuple[str, Recipe]:
    """Name and recipe of the run in `out`. Raises FileNotFoundError where there is nothing to resume."""
    if not (out / "run.json").is_file() or not (out / "last").exists():
        raise FileNotFoundError(
            f"nothing to resume in {out}: it has no run with a checkpoint; start one without --resume"
        )
    try:
        record = json.loads((out / "run.json").read_text())
        name, tables = record["name"], record["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{out / 'run.json'} is damaged ({error}): start another run with --init {out / 'last'}"
        ) from None
    return name, recipes.build(tables, name=str(out / "run.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(run: Run) -> None:
    """Run the recipe's remaining steps, then evaluate."""
    recipe, model, corpus = run.recipe, run.model, run.corpus
    stages = recipe.stages()
    if RANK == 0:
        announce(run, stages)
    held_out = Needles(corpus.tokenizer, corpus.val, evaluation=True) if run.needles else None
    loss = parallel.Loss(model, run.compile)
    if RANKS > 1:
        loss = parallel.wrap(loss)
        parallel.share_interrupts()
    log = Log(run.out / "log.jsonl" if RANK == 0 else Path(os.devnull), run.step)
    if RANK == 0 and run.step == 0 and run.max_steps > 0:
        save(run)  # so that there is something to resume from the first moment
    bar = tqdm(
        total=recipe.steps,
        initial=run.step,
        unit="step",
        dynamic_ncols=True,
        disable=True if RANK > 0 or not run.max_steps else None,
    )
    batches = prefetch(lambda step: batch_of(run, stages, step), range(run.step, run.max_steps))
    seconds = tokens = 0.0
    for step, batch in zip(range(run.step, run.max_steps), batches):
        stage = stage_at(stages, step)
        if model.config != stage.config:
            model.config = stage.config
        if step == stage.start:
            run.best = math.inf
        started = time.perf_counter()
        value, norm = update(run, batch, loss, stage.rate(step))
        if not math.isfinite(value) or not math.isfinite(norm):
            bar.close()
            raise FloatingPointError(
                f"step {step}: the loss is {value} (learning rate {stage.rate(step):.4g}, gradient norm {norm:.4g}): lower --lr; the last good checkpoint is {run.out / 'last'}"
            )
        run.step = step + 1
        seconds, tokens = seconds + time.perf_counter() - started, tokens + batch.tokens.numel()
        log.write(
            step=run.step,
            loss=value,
            lr=stage.rate(step),
            grad_norm=norm,
            length=batch.tokens.shape[1],
            seconds=time.perf_counter() - started,
        )
        speed = tokens / seconds
        bar.set_postfix_str(
            f"loss {value:.3f}, {speed:,.0f} tokens/s, MFU {mfu(run, batch.tokens.shape[1], speed)}",
            refresh=False,
        )
        bar.update()
        if RANK == 0 and (
            run.step % recipe.eval_every == 0 or run.step in (stage.end, run.max_steps)
        ):
            nats, bits = validation_loss(model, corpus, stage.longest, recipe.eval_tokens)
            entry = {
                "step": run.step,
                "length": stage.longest,
                "val_loss": nats,
                "val_bits_per_byte": bits,
            }
            if held_out:
                examples = held_out_examples(
                    held_out, stage.longest, 8, *held_out.counts(stage.longest)
                )
                entry["needles"] = needle_score(model, examples).exact
            log.write(**entry)
            needles = f", needles {entry['needles']:.2f}" if held_out else ""
            bar.write(
                f"step {run.step}: validation loss {nats:.3f}, {bits:.3f} bits per byte{needles} at {stage.longest:,} tokens"
            )
            improved = nats < run.best
            run.best = min(nats, run.best)
            save(run, improved)
            seconds = tokens = 0.0
    bar.close()
    if run.step:
        model.config = stage_at(stages, run.step - 1).config
    if RANKS > 1:
        parallel.keep_interrupts()
    if RANK == 0:
        finish(run, held_out, log)


def stage_at(stages: list[Stage], step: int) -> Stage:
    """The stage of a step; beyond the end, the last."""
    return next((stage for stage in stages if step < stage.end), stages[-1])


def batch_of(run: Run, stages: list[Stage], step: int) -> Batch:
    """The global batch of a step: nothing but the recipe and the step decides it."""
    stage = stage_at(stages, step)
    return training_batch(
        run.corpus,
        run.needles,
        run.recipe.seed,
        step,
        stage.length(step),
        run.recipe.batch_tokens,
        stage.needle_share,
        stage.answer_weight,
    )


def update(run: Run, batch: Batch, loss_of: nn.Module, lr: float) -> tuple[float, float]:
    """One step of both optimizers, by micro-batches -> (loss, gradient norm before clipping). A loss that is not finite changes nothing."""
    share = len(batch.tokens) // RANKS
    batch = batch.rows(RANK * share, (RANK + 1) * share)
    rows = max(1, run.micro_batch // batch.tokens.shape[1])
    total = torch.zeros((), device=run.device)
    for start in range(0, share, rows):
        part = batch.rows(start, start + rows).to(run.device)
        last = start + rows >= share
        with autocast(run), nullcontext() if last or RANKS == 1 else loss_of.no_sync():
            loss = loss_of(part.tokens, part.targets, part.weights)
        (RANKS * loss).backward()  # against the mean over the ranks
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip)
    value, norm = parallel.add_up(total), norm.item()
    if math.isfinite(value) and math.isfinite(norm):
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    run.model.zero_grad(set_to_none=True)
    return value, norm


def autocast(run: Run):
    """bfloat16 products where the recipe says so or the GPU has them natively; float32 elsewhere."""
    return torch.autocast(run.device.type, torch.bfloat16) if run.bf16 else nullcontext()


def mfu(run: Run, length: int, tokens_per_second: float) -> str:
    """The share of the devices' dense bf16 peak that the model's FLOPs make up; n/a where the peak is unknown."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
    return (
        "n/a"
        if peak is None
        else f"{run.model.flops_per_token(length) * tokens_per_second / (RANKS * peak):.1%}"
    )


def announce(run: Run, stages: list[Stage]) -> None:
    """What is about to run, and what a reader should know about it."""
    recipe, config = run.recipe, stage_at(stages, run.step).config
    print(
        f"{run.out}: {sum(p.numel() for p in run.model.parameters()):,} parameters on {run.device if RANKS == 1 else f'{RANKS} x {run.device.type}'}, {'bfloat16 autocast' if run.bf16 else 'float32'}"
        + ("" if run.bf16 or run.device.type == "cpu" else " (no native bfloat16)")
    )
    print(
        f"corpus {recipe.data} ({run.corpus.hash}): {len(run.corpus.train):,} tokens to train on, {len(run.corpus.val):,} to validate"
    )
    windows = " ".join(
        f"{'RoPE' if s.rope else 'NoPE'}:{s.window or 'all'}" for s in layer_plan(config)
    )
    print(f"layers {config.pattern}: {windows}")
    for stage in stages:
        for length in stage.lengths:
            kernels = {
                choose_backend(
                    run.model.backend, s.window, length, run.device, head_width=config.head_width
                )
                for s in layer_plan(stage.config)
                if s.window
            }
            print(
                f"steps {stage.start}..{stage.end - 1}: length {length:,}, kernels sdpa for full layers"
                + (f", {kernels.pop()} for windowed" if kernels else "")
            )
    epochs = recipe.steps * recipe.batch_tokens / len(run.corpus.train)
    print(
        f"{recipe.steps} steps of {recipe.batch_tokens:,} tokens: {epochs:.2f} epochs of the corpus"
        + (
            f"; WARNING: more than {EPOCHS_TO_WARN} teach by heart, a larger corpus is wanted"
            if epochs > EPOCHS_TO_WARN
            else ""
        )
    )


class Log:
    """log.jsonl: one JSON object a line; what an earlier attempt wrote beyond `step` is dropped."""

    def __init__(self, path: Path, step: int):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= step else []
                except ValueError:  # the line a kill cut off
                    continue
        path.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a")

    def write(self, **entry) -> None:
        """Append, and let it be seen at once."""
        print(json.dumps(entry), file=self.file, flush=True)


def save(run: Run, improved: bool = False) -> None:
    """A checkpoint folder for the steps done; `last` points to it, `best` too where `improved`; folders nobody points to go."""
    folder = run.out / f"step-{run.step:06d}"
    if not folder.exists():
        with checkpoint.atomic_folder(folder) as partial:
            run.model.save_pretrained(partial)
            run.corpus.tokenizer.save(partial)
            state = {
                "step": run.step,
                "best": run.best,
                "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            }
            torch.save(state, partial / "training.pt")
    for link in ("last", "best") if improved else ("last",):
        checkpoint.point(run.out / link, folder)
    wanted = {(run.out / link).resolve() for link in ("last", "best") if (run.out / link).exists()}
    for other in run.out.glob("step-??????"):
        if other.resolve() not in wanted:
            shutil.rmtree(other)


def load_state(run: Run) -> None:
    """Optimizers and step from `last`. Raises ValueError for a damaged file."""
    path = run.out / "last" / "training.pt"
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        run.step, run.best = state["step"], state["best"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"nothing to resume: {path} not found; start another run with --init {run.out / 'last'}"
        ) from None
    except Exception as error:  # torch.load raises whatever the bytes provoke
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): start another run with --init {run.out / 'last'}"
        ) from error


def finish(run: Run, held_out: Needles | None, log: Log) -> None:
    """The final measurements, printed and logged, and a few words from the model."""
    model, corpus = run.model.eval(), run.corpus
    trained = model.config.trained_length or run.recipe.stages()[-1].config.trained_length
    nats, bits = validation_loss(
        model, corpus, min(trained, len(corpus.val) - 1), run.recipe.eval_tokens
    )
    print(
        f"validation loss {nats:.4f} nats per token, {bits:.4f} bits per byte (step {run.step}, {trained:,} tokens of context)"
    )
    scores = (
        needle_table(model, held_out, trained, run.recipe.eval_questions)
        if held_out and run.recipe.eval_questions
        else []
    )
    log.write(
        step=run.step,
        final=True,
        val_loss=nats,
        val_bits_per_byte=bits,
        table=[asdict(score) for score in scores],
    )
    prompt = torch.tensor(
        [[corpus.tokenizer.eot_token, *corpus.tokenizer.encode_ordinary("def ")]], device=run.device
    )
    text = corpus.tokenizer.decode_bytes(
        model.generate(prompt, 48, stop=corpus.tokenizer.eot_token)[0, 1:].tolist()
    )
    print(f"\na greedy sample:\n{text.decode(errors='replace')}\n")
    if run.step:
        print(
            f"checkpoint {run.out / 'last'}; more text: python sample.py --checkpoint {run.out / 'last'}"
        )


def main(argv: list[str] | None = None) -> None:
    """The command. Bad input, a loss that is not finite and exhausted memory are one line and status 2."""
    try:
        with parallel.rank_0_first():
            run = read(argv)
    except (ValueError, OSError) as error:
        fail(error)
    try:
        train(run)
    except FloatingPointError as error:
        parallel.stop(error)
    except torch.OutOfMemoryError:
        fail(
            f"out of memory with --micro-batch {run.micro_batch} tokens on {run.device}: give a smaller --micro-batch"
        )
    except KeyboardInterrupt:
        parallel.stop(f"interrupted after step {run.step}: go on with --resume {run.out}")


if __name__ == "__main__":
    main() if RANKS == 1 else parallel.run(main)
