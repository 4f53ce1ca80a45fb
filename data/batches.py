"""Batches as a function of (seed, step): exact resume, the same data at any micro-batch size, no
state to save.

Every sequence begins with end-of-text, the place where attention can rest (the sink of the paper's
section 3).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.corpus import Corpus
from data.needles import NEEDLE, QC, Example, Needles


@dataclass(frozen=True)
class Batch:
    """tokens, targets (b t) int64 and weights (b t) float32, of which the sum over the global batch
    is 1 without needles; see `training_batch`."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor

    def rows(self, start: int, end: int) -> "Batch":
        """A micro-batch. The weights were counted over the whole batch, so the losses of its parts
        add up to its loss."""
        return Batch(self.tokens[start:end], self.targets[start:end], self.weights[start:end])

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`."""

        def move(x: Tensor) -> Tensor:
            if device.type == "cuda":
                return x.pin_memory().to(device, non_blocking=True)
            return x.to(device)

        return Batch(move(self.tokens), move(self.targets), move(self.weights))


def window(ids: np.ndarray, start: int, length: int, eot: int) -> np.ndarray:
    """(length + 1): end-of-text, then `length` tokens of plain text from `start`. Documents follow
    one another there, and attention sees across."""
    return np.concatenate(([eot], ids[start : start + length])).astype(np.int64)


def training_batch(
    corpus: Corpus,
    needles: Needles | None,
    seed: int,
    step: int,
    length: int,
    batch_tokens: int,
    needle_share: float = 0.0,
    answer_weight: float = 0.5,
) -> Batch:
    """The global batch of `step`: batch_tokens / length sequences, of which `needle_share` carry
    needles.

    Every target weighs 1 / N, but hidden lines nothing: they are to be found, not to be written.
    Each of the A answer tokens weighs another answer_weight / A. Both are counted over this whole
    batch.
    """
    rng = np.random.default_rng([seed, step])
    count = max(batch_tokens // length, 1)
    hiding = round(count * needle_share)  # sequences with needles
    assert needles is not None or hiding == 0, "a share of needles and nothing that makes them"
    examples = [needles.example(rng, length + 1, *needles.counts(length)) for _ in range(hiding)]
    starts = rng.integers(len(corpus.train) - length, size=count - hiding)
    plain = [window(corpus.train, start, length, corpus.tokenizer.eot_token) for start in starts]
    tokens = torch.from_numpy(np.stack([example.tokens for example in examples] + plain))

    weights = torch.full((count, length), 1 / (count * length))
    if examples:
        answers = torch.from_numpy(np.stack([example.answer[1:] >= 0 for example in examples]))
        segments = torch.from_numpy(np.stack([example.segment[1:] for example in examples]))
        weights[:hiding] *= segments != NEEDLE
        weights[:hiding] += answer_weight / answers.sum() * answers
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights)


def validation_windows(corpus: Corpus, length: int, count: int) -> Tensor:
    """(count length+1) int64: the same evenly spaced windows of plain validation text every
    time."""
    count = min(count, max(1, len(corpus.val) // length))  # no token twice
    starts = np.linspace(0, len(corpus.val) - length, count).astype(int)
    eot = corpus.tokenizer.eot_token
    return torch.from_numpy(np.stack([window(corpus.val, s, length, eot) for s in starts]))


def held_out_examples(needles: Needles, length: int, count: int = 8, *each: int) -> list[Example]:
    """The same `count` examples of `length` tokens every time, with so many needles and questions
    `each`: by default those of training's evaluations."""
    each = each or needles.counts(length)
    rngs = (np.random.default_rng([length, i]) for i in range(count))
    return [needles.example(rng, length, *each) for rng in rngs]


def epochs(corpus: Corpus, needles: Needles | None, recipe) -> float:
    """How often a whole run reads the training text. The needles and questions of a sequence are
    made anew each time and are none of it."""
    read = 0.0
    for stage in recipe.stages():
        for length, share in stage.lengths.items():
            tokens = (stage.end - stage.start) * share / sum(stage.lengths.values())
            tokens *= recipe.batch_tokens
            count = recipe.batch_tokens // length
            if hiding := round(count * stage.needle_share):  # sequences with needles
                examples = held_out_examples(needles, length, 16)
                made = np.mean([np.isin(each.segment, (NEEDLE, QC)) for each in examples])
                tokens *= 1 - made * hiding / count
            read += tokens
    return float(read) / len(corpus.train)


def prefetch(make: Callable[[int], Batch], steps: Iterable[int]) -> Iterator[Batch]:
    """make(step) for each step, one ahead in a thread."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        ahead = None
        for step in steps:
            ready, ahead = ahead, worker.submit(make, step)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


def check_fit(corpus: Corpus, recipe, ranks: int, ahead: bool = True) -> Needles | None:
    """The needles of training, where a stage of the recipe asks for some. ValueError where the
    corpus cannot fill the stages' batches or, with steps `ahead`, what is evaluated between them,
    or where so many processes cannot share a batch."""
    stages, batch_tokens = recipe.stages(), recipe.batch_tokens
    most = stages[0].config.vocab_size
    if corpus.tokenizer.n_vocab > most:
        tokens = f"the corpus {corpus.folder} has {corpus.tokenizer.n_vocab:,} tokens"
        raise ValueError(f"{tokens} in its vocabulary and the model {most:,}: give another --init")
    needles = held_out = None
    if any(stage.needle_share for stage in stages):
        needles = Needles(corpus.tokenizer, corpus.train, evaluation=False)
        held_out = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    tokens = min(len(corpus.train), len(corpus.val))
    for stage in stages:
        for length in stage.lengths:
            if tokens <= length:
                raise ValueError(
                    f"the corpus {corpus.folder} has {tokens:,} tokens in a split and the recipe "
                    f"reads {length:,} at a time: prepare a larger one, or train shorter"
                )
            rows = batch_tokens // length
            if rows % ranks:
                raise ValueError(
                    f"batch_tokens {batch_tokens} are {rows} sequences of {length}, which do not "
                    f"divide among {ranks} processes: start another number of them, or give "
                    f"--batch-tokens {length * ranks} or a multiple"
                )
            # One sequence with needles: its names and lines are checked where it is made.
            share = float(stage.needle_share > 0)
            training_batch(corpus, needles, recipe.seed, 0, length, length, share)
    for length in {stage.longest for stage in stages if held_out and ahead}:
        held_out_examples(held_out, length)
    return needles
