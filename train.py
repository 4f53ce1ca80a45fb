"""Train a model by a recipe, evaluate it, and leave a checkpoint.

python train.py                                   the laptop recipe: rrrN on this Python's
                                                  standard library, in minutes
python train.py --pattern R --qk-norm             another variant, the same recipe
python train.py my.toml --data corpora/mine       another recipe, another corpus
python train.py --resume out/laptop-R-s1          go on where a run stopped
python train.py --init CHECKPOINT --max-steps 0   only evaluate
torchrun --nproc-per-node 2 train.py              two GPUs, or two processes on CPU
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict

from commandline import damaged, guarded, is_out_of_memory, unheard  # isort: skip
import torch
from torch import nn
from tqdm import tqdm

import parallel
from attention import choose_backend
from data.batches import Batch, epochs, held_out_examples, prefetch, training_batch
from data.needles import Needles
from device import settle, training_loss
from evaluate import needle_score, needle_table, validation_loss
from fast.kernels import one_graph
from fast.muon import Muon
from model import Transformer, layer_plan, require
from recipe import Recipe, Stage
from run import Log, Run, begin, claim, config_at, is_run, read, resume, save

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from the datasheets
EPOCHS_TO_WARN = 4  # repeated text teaches nearly as much as new text up to here (2305.16264)


def make_optimizers(model: Transformer, recipe: Recipe, bf16: bool = False) -> list:
    """Muon for the matrices inside the layers; AdamW, without decay, for the rest."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and name.startswith("layers.") else others).append(p)
    return [
        Muon(matrices, recipe.lr, recipe.weight_decay, torch.bfloat16 if bf16 else None),
        torch.optim.AdamW(others, recipe.lr, betas=(0.9, 0.95), weight_decay=0),
    ]


def restore(run: Run, states: list[dict]) -> None:
    """Load a checkpoint's momenta and moments into the optimizers; rates and decay stay the
    recipe's. ValueError where names or shapes do not fit the parameters."""
    names = ("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq")  # of Muon, of AdamW
    with damaged(run.out / "last" / "training.pt"):
        for optimizer, state, kept in zip(run.optimizers, states, names, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
            for p, averages in optimizer.state.items():
                shapes = {name: () if name == "step" else p.shape for name in kept}
                require({name: x.shape for name, x in averages.items()} == shapes, "shapes")


def train(run: Run) -> None:
    """Run the recipe's remaining steps, then evaluate."""
    recipe, model = run.recipe, run.model
    held_out = run.needles and Needles(run.corpus.tokenizer, run.corpus.val, evaluation=True)
    announce(run)
    loss = training_loss(model, run.device)
    loss = one_graph(loss, dynamic=False) if run.compile else loss
    log = Log(run.log, run.step)
    steps = range(run.step, run.max_steps)
    disable = None if steps and parallel.RANK == 0 else True  # None: shown on a terminal alone
    options = {"unit": "step", "dynamic_ncols": True, "disable": disable}
    batches = prefetch(lambda step: batch_of(run, step), steps)
    seconds, tokens, timed = 0.0, 0, set()
    with tqdm(total=recipe.steps, initial=run.step, **options) as bar:
        for step, batch in zip(steps, batches):
            stage = recipe.stage_at(step)
            model.config = stage.config  # a phase may change how positions are treated
            if step == stage.start:
                run.best = math.inf  # losses at other lengths or positions do not compare

            # One update.
            started, lr = time.perf_counter(), stage.rate(step)
            value, norm = update(run, batch, loss, lr)
            if not math.isfinite(value + norm):
                found = f"learning rate {lr:.4g}, gradient norm {norm:.4g}"
                raise FloatingPointError(f"the loss is {value} ({found})")
            run.step, took = step + 1, time.perf_counter() - started

            # What it said.
            length = batch.tokens.shape[1]
            entry = {"step": run.step, "loss": value, "lr": lr, "grad_norm": norm}
            log.write(**entry, length=length, seconds=took)
            shape = stage.start, length
            if shape in timed or not run.compile:  # its first step was spent in the compiler
                seconds, tokens = seconds + took, tokens + batch.tokens.numel()
            timed.add(shape)
            rate = tokens / max(seconds, 1e-9)
            speed = f"{rate:,.0f} tokens/s, MFU {mfu(run, length, rate)}"
            bar.set_postfix_str(f"loss {value:.3f}, {speed}", refresh=False)
            bar.update()

            if run.step % recipe.eval_every == 0 or run.step in (stage.end, run.max_steps):
                if parallel.RANK == 0:
                    with autocast(run):
                        bar.write(evaluate(run, stage, held_out, log))
                seconds = tokens = 0.0
    if parallel.RANK == 0:
        with autocast(run):
            finish(run, held_out, log)


def batch_of(run: Run, step: int) -> Batch:
    """The global batch of a step: nothing but the recipe and the step decides it."""
    recipe, stage = run.recipe, run.recipe.stage_at(step)
    size = (stage.length(step), recipe.batch_tokens)
    shares = (stage.needle_share, stage.answer_weight)
    return training_batch(run.corpus, run.needles, recipe.seed, step, *size, *shares)


def update(run: Run, batch: Batch, loss_of: Callable, lr: float) -> tuple[float, float]:
    """One step of both optimizers, by micro-batches -> (loss as training_batch weighs it, gradient
    norm before clipping). What is not finite changes nothing."""
    batch = parallel.own_rows(batch)
    rows = max(1, run.micro_batch // batch.tokens.shape[1])
    total = torch.zeros((), device=run.device)
    for start in range(0, len(batch.tokens), rows):
        part = batch.rows(start, start + rows).to(run.device)
        with autocast(run):
            loss = loss_of(part.tokens, part.targets, part.weights)
        loss.backward()
        total += loss.detach()
    parallel.add_up(total, run.model)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip)
    value, norm = torch.stack((total, norm)).tolist()  # the step's one wait for the device
    if math.isfinite(value + norm):
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    run.model.zero_grad(set_to_none=True)
    return value, norm


def autocast(run: Run):
    """bfloat16 products and residual stream: as the recipe says, else where there are units."""
    return torch.autocast(run.device.type, torch.bfloat16) if run.bf16 else nullcontext()


def evaluate(run: Run, stage: Stage, held_out: Needles | None, log: Log) -> str:
    """Validation loss, and needles as dense as in training, at a stage's longest length; a save."""
    nats, bits = validation_loss(run.model, run.corpus, stage.longest, run.recipe.eval_tokens)
    entry = {"step": run.step, "length": stage.longest, "val_loss": nats, "val_bits_per_byte": bits}
    line = f"step {run.step}: validation loss {nats:.3f}, {bits:.3f} bits per byte"
    if held_out:
        examples = held_out_examples(held_out, stage.longest)
        entry["needles"] = needle_score(run.model, examples).exact
        line += f", needles {entry['needles']:.2f}"
    log.write(**entry)
    improved = nats < run.best
    run.best = min(nats, run.best)
    save(run, run.out, improved)
    return f"{line} at {stage.longest:,} tokens"


def mfu(run: Run, length: int, tokens_per_second: float) -> str:
    """The share of the devices' dense bf16 peak that the model's FLOPs make up; n/a where the peak
    is unknown."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
    flops = run.model.flops_per_token(length) * tokens_per_second
    return "n/a" if peak is None else f"{flops / (parallel.RANKS * peak):.1%}"


def announce(run: Run) -> None:
    """What is about to run, and what a reader should know about it."""
    recipe, config = run.recipe, config_at(run.recipe, run.step + (run.step < run.max_steps))
    where = f"{parallel.RANKS} x {run.device.type}" if parallel.RANKS > 1 else run.device
    precision = "bfloat16 autocast" if run.bf16 else "float32"
    count = sum(p.numel() for p in run.model.parameters())
    print(f"{run.out}: {count:,} parameters on {where}, {precision}")
    settled = settle(run)
    if run.compile or run.device.type == "cuda":
        print(settled)
    train, val, hash = len(run.corpus.train), len(run.corpus.val), run.corpus.hash
    print(f"corpus {recipe.data} ({hash}): {train:,} tokens to train on, {val:,} to validate")
    specs = [f"{'RoPE' if s.rope else 'NoPE'}:{s.window or 'all'}" for s in layer_plan(config)]
    print(f"layers {config.pattern}: {' '.join(specs)}")
    for stage in recipe.stages():
        for length in stage.lengths:
            kernels, d = f"length {length:,}, kernels", config.head_width
            for window in sorted({spec.window for spec in layer_plan(stage.config)}, key=bool):
                kernel = choose_backend(run.model.backend, window, length, run.device, head_width=d)
                kernel = "sdpa" if (kernel, window) == ("banded", None) else kernel
                kernels += f" {kernel} for {f'windows of {window}' if window else 'full layers'},"
            print(f"steps {stage.start}..{stage.end - 1}: {stage.config.pattern}, {kernels[:-1]}")
    times = epochs(run.corpus, run.needles, recipe)
    tokens = f"{recipe.steps} steps of {recipe.batch_tokens:,} tokens"
    warning = f"; WARNING: more than {EPOCHS_TO_WARN} teach by heart, a larger corpus is wanted"
    warning = warning if times > EPOCHS_TO_WARN else ""
    print(f"{tokens}: {times:.2f} epochs of the corpus{warning}")


def finish(run: Run, held_out: Needles | None, log: Log) -> None:
    """The final measurements, printed and logged, and a few words from the model."""
    model, corpus, recipe = run.model.eval(), run.corpus, run.recipe
    model.config = config_at(recipe, run.step)
    trained = model.config.trained_length or recipe.stages()[-1].config.trained_length
    length = min(trained, len(corpus.val) - 1)
    nats, bits = validation_loss(model, corpus, length, recipe.eval_tokens)
    step = f"(step {run.step}, {trained:,} tokens of context)"
    print(f"validation loss {nats:.4f} nats per token, {bits:.4f} bits per byte {step}")
    table = []
    if held_out and recipe.eval_questions:
        scores = needle_table(model, held_out, trained, recipe.eval_questions)
        table = [asdict(score) for score in scores]
    log.write(step=run.step, final=True, val_loss=nats, val_bits_per_byte=bits, table=table)

    tokenizer = corpus.tokenizer
    prompt = [tokenizer.eot_token, *tokenizer.encode_ordinary("def main():\n")]
    prompt = torch.tensor([prompt], device=run.device)
    ids = model.generate(prompt, 64, stop=tokenizer.eot_token)[0, 1:].tolist()
    text = tokenizer.decode_bytes(ids).decode(errors="replace")
    print(f"\na greedy sample:\n{text}\n")
    if run.step:
        last = run.out / "last"
        print(f"checkpoint {last}; more text: python sample.py --checkpoint {last}")


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command. What ends a training is one line and status 2; what it has done is kept."""
    with unheard():
        run, resuming = read(argv, __doc__)
        try:
            with claim(run):
                run.optimizers = make_optimizers(run.model, run.recipe, run.bf16)
                if resuming:
                    restore(run, resume(run))
                else:
                    begin(run, sys.argv[1:] if argv is None else argv)
                train(run)
        except KeyboardInterrupt:
            mend = f": go on with --resume {run.out}" if is_run(run.out) else ""
            raise KeyboardInterrupt(f"interrupted after step {run.step}{mend}") from None
        except FloatingPointError as error:
            mend = f"lower --lr; the last good checkpoint is {run.out / 'last'}"
            mend = mend if is_run(run.out) else "these weights are damaged"
            raise FloatingPointError(f"step {run.step}: {error}: {mend}") from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            micro = f"--micro-batch {run.micro_batch} tokens on {run.device}"
            raise MemoryError(f"with {micro}: give a smaller --micro-batch") from error


if __name__ == "__main__":
    main() if parallel.RANKS == 1 else parallel.run(main)
