"""The measurements of exercises 7, 9, 10 and 11: a student's functions on trained checkpoints."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from commandline import guarded
from data.batches import held_out_examples, validation_windows
from data.corpus import DEFAULT_CORPUS, Corpus, load_corpus
from data.needles import Needles
from evaluate import NEEDLES, QUESTIONS, needle_score, validation_loss
from model import ModelConfig, Transformer, require


def measurement(function: Callable) -> Callable:
    """A function that reads the command line, whose errors are one line."""

    @wraps(function)
    def called(*arguments):
        def command(argv) -> None:
            try:
                function(*arguments)
            except NotImplementedError:
                raise ValueError("write this exercise's functions first") from None

        guarded(command)()

    return called


def opened(count: int) -> tuple[list[Transformer], Corpus]:
    """The models of the checkpoints named on the command line, and the first one's corpus."""
    paths = [Path(word) for word in sys.argv[1:]]
    many = "a checkpoint" if count == 1 else f"{count} checkpoints"
    usage = f"name {many}, such as out/laptop-r64r64r64N-s1/last: `python train.py` makes it"
    require(len(paths) == count, usage)
    models = [Transformer.from_pretrained(path) for path in paths]
    try:
        record = json.loads((paths[0].absolute().parent / "run.json").read_text(encoding="utf-8"))
        folder = Path(record["recipe"]["data"])
    except FileNotFoundError:
        folder = DEFAULT_CORPUS
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the run.json beside {paths[0]} is damaged ({error!r})") from None
    corpus = load_corpus(folder)
    for path, model in zip(paths, models):
        found, wanted = model.config.vocab_size, corpus.tokenizer.n_vocab
        differs = f"{path} has {found} tokens in its vocabulary, the corpus {folder} {wanted}"
        require(found == wanted, f"{differs}: they do not belong together")
    return models, corpus


def single(needles: Needles, length: int, count: int) -> list:
    """Examples with one needle in their middle."""
    seeds = [np.random.default_rng([1, length, i]) for i in range(count)]
    return [needles.task("single", rng, length, 0.5) for rng in seeds]


@measurement
@torch.inference_mode()
def attention(masses: Callable, entropy: Callable, length: int = 2048, count: int = 4) -> None:
    """Exercise 7: where each layer's attention goes when a needle is asked for."""
    (model,), corpus = opened(1)
    examples = single(Needles(corpus.tokenizer, corpus.val, evaluation=True), length, count)
    spent = [[] for _ in model.plan]
    for example in examples:
        weights: list = []
        model(torch.from_numpy(example.tokens)[None], weights=weights)
        segment = torch.from_numpy(example.segment).long()
        for layer, (w, _) in zip(spent, weights):
            layer.append([*masses(w[0], segment).tolist(), entropy(w[0], segment)])
    print(f"{length:,} tokens, {count} examples       begin  needle    text      qc    bits")
    for i, (spec, rows) in enumerate(zip(model.plan, spent)):
        kind = "RoPE" if spec.rope else "NoPE"
        numbers = "".join(f"{value:>8.4f}" for value in np.mean(rows, axis=0))
        print(f"layer {i} ({kind}, window {str(spec.window or 'none'):>4})     {numbers}")


def student(exercise: str, name: str) -> Callable:
    """A function of an earlier exercise, as the student wrote it."""
    function = getattr(import_module(f"exercises.{exercise}"), name)

    def called(*arguments):
        try:
            return function(*arguments)
        except NotImplementedError:
            here = f"exercises/{exercise}.py"
            raise ValueError(f"{here} is not written, and this runs on your `{name}`") from None

    return called


@measurement
@torch.inference_mode()
def whole(logits: Callable, length: int = 512, count: int = 8) -> None:
    """Exercise 9: the loss of the student's whole model, beside the project's. ValueError where
    they differ."""
    (model,), corpus = opened(1)
    c = model.config
    plain = (c.qk_norm, c.rope_scaling, c.length_scale, c.tie_embeddings) == (
        False,
        "none",
        "none",
        True,
    )
    require(plain, "exercise 9 is for checkpoints without QK-Norm, scaling and an output matrix")
    parts = SimpleNamespace(
        angles=student("e02_angles", "angles"),
        rotate=student("e01_rotate", "rotate"),
        visible=student("e04_window", "visible"),
        weights=student("e03_weights", "weights"),
    )
    layers = student("e05_pattern", "plan")(c.pattern, c.n_layer, c.window)
    sizes = dict(n_head=c.n_head, n_kv_head=c.n_kv_head, head_dim=c.head_width)
    sizes |= dict(theta=c.rope_theta, logit_scale=c.logit_scale)
    mine, ours = [], []
    for window in validation_windows(corpus, length, count):
        tokens, targets = window[None, :-1], window[1:]
        theirs = logits(tokens, model.state_dict(), layers, sizes, parts)
        mine.append(F.cross_entropy(theirs[0], targets).item())
        ours.append(model.loss(tokens, targets[None]).item())
    mine, ours = np.mean(mine), np.mean(ours)
    wrong = f"your model's loss is {mine:.4f} and the project's {ours:.4f}: something differs"
    require(abs(mine - ours) < 1e-3, wrong + " (pytest exercises/ -k 'e01 or e02 or e03 or e04')")
    print(
        f"loss in nats over {count} windows of {length}: yours {mine:.6f}, the project's {ours:.6f}"
    )


@measurement
@torch.inference_mode()
def needles(exact: Callable, error: Callable, lengths=(512, 2048), count: int = 16) -> None:
    """Exercise 10: two checkpoints, asked for needles at two lengths."""
    models, corpus = opened(2)
    hidden = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    for length in lengths:
        scores, means = [], []
        for model in models:
            values = []
            for example in held_out_examples(hidden, length, count, NEEDLES, QUESTIONS):
                tokens, asked = torch.from_numpy(example.tokens), torch.from_numpy(example.answer)
                values.append(exact(model(tokens[None])[0], tokens, asked))
            means.append(sum(values) / count)
            scores.append(f"{model.config.pattern} {means[-1]:.3f} +- {error(values):.3f}")
        print(f"{length:>5,} tokens: {', '.join(scores)}; difference {means[0] - means[1]:.3f}")


@measurement
def extension(extend: Callable, length: int = 2048, count: int = 24) -> None:
    """Exercise 11: R at four times its length with and without the student's extension, and what a
    late change does to rrrN."""
    (rope, hybrid), corpus = opened(2)
    texts = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    trained = rope.config.trained_length or 512
    found = []
    for config in (rope.config, extend(rope.config, length / trained)):
        rope.config = config
        found.append(needle_score(rope, single(texts, length, count)).exact)
    print(
        f"{rope.config.pattern} at {length:,}, {count} single needles: as trained {found[0]:.3f}, "
        f"extended {found[1]:.3f}; difference {found[1] - found[0]:.3f}"
    )
    show_changes(hybrid, corpus, single(texts, trained, count), trained)


CHANGES = [
    ("as trained", {}),
    ("pattern rrrR", {"pattern": "rrrR"}),
    ("pattern rrrn", {"pattern": "rrrn"}),
    ("pattern r", {"pattern": "r"}),
    ("theta 2,000,000", {"rope_theta": 2e6}),
    ("window 32", {"window": 32}),
]


def show_changes(model: Transformer, corpus: Corpus, examples: list, length: int) -> None:
    """Needles and loss of a trained hybrid whose positions are treated otherwise than before."""
    trained: ModelConfig = model.config
    print(f"{trained.pattern} at {length:,}, trained once and changed late: needles, loss in nats")
    for name, change in CHANGES:
        try:
            model.config = replace(trained, **change)
        except ValueError as refusal:
            print(f"  {name:<16} {refusal}")
            continue
        loss, _ = validation_loss(model, corpus, length, 8 * length)
        print(f"  {name:<16} {needle_score(model, examples).exact:.3f}   {loss:.3f}")
