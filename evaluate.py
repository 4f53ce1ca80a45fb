"""What training and the lab measure: validation loss, and needles found at growing lengths."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from data.batches import held_out_examples, validation_windows
from data.corpus import Corpus
from data.needles import SLACK, Example, Needles
from engine import fill
from model import Transformer

NEEDLES, QUESTIONS = 8, 4  # of an evaluation example, at every length
TIMES = (0.5, 1, 2, 4, 8, 16)  # the trained length
LONG = (
    8192  # tokens beyond which a table asks fewer questions: as many tokens, not as many examples
)


def mean_and_error(values) -> tuple[float, float]:
    """Mean of independent values, and its standard error (nan for a single one)."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(
        values
    ) > 1 else math.nan


@torch.inference_mode()
def validation_loss(
    model: Transformer, corpus: Corpus, length: int, tokens: int
) -> tuple[float, float]:
    """(nats per token, bits per UTF-8 byte) over about `tokens` of plain validation text,
    end-of-text left out."""
    windows = validation_windows(corpus, length, max(1, tokens // length))
    sizes = torch.tensor(
        [len(corpus.tokenizer.token_bytes(i)) for i in range(corpus.tokenizer.n_vocab)]
    )
    nats = counted = size = 0.0
    device = next(model.parameters()).device
    for chunk in windows.split(max(1, 4096 // length)):
        targets = chunk[:, 1:]
        text = (targets != corpus.tokenizer.eot_token).float()
        nats += model.loss(chunk[:, :-1].to(device), targets.to(device), text.to(device)).item()
        counted += text.sum().item()
        size += sizes[targets].sum().item()
    return nats / counted, nats / math.log(2) / size


@dataclass(frozen=True)
class Score:
    """Needle answers at one length: shares, and the standard error of `exact` over examples (their
    answers share a context)."""

    length: int
    questions: int
    exact: float
    digits: float
    error: float


@torch.inference_mode()
def needle_score(model: Transformer, examples: list[Example]) -> Score:
    """Score examples of one length teacher-forced: greedy is right exactly when every argmax is."""
    exact, digits, questions = [], [], 0
    device = next(model.parameters()).device
    for example in examples:
        tokens, answer = torch.from_numpy(example.tokens), torch.from_numpy(example.answer)[1:]
        asked = answer >= 0
        # what stands before is only read, the same number of tokens in (nearly) every example
        first = int(asked.int().argmax()) // 128 * 128
        cache, tokens, asked, answer = (
            model.new_cache(1, len(tokens)),
            tokens[None].to(device),
            asked[first:],
            answer[first:],
        )
        fill(model, tokens[:, :first], cache)
        hidden = model.hidden(tokens[:, first:-1], cache)[0, asked.to(device)]
        right = (
            (model.unembed(hidden).argmax(-1) == tokens[0, first + 1 :][asked.to(device)])
            .cpu()
            .numpy()
        )
        answer = answer[asked].numpy()
        whole = [right[answer == i].all() for i in np.unique(answer)]
        exact.append(np.mean(whole))
        digits.append(np.mean(right))
        questions += len(whole)
    mean, error = mean_and_error(exact)
    return Score(len(examples[0].tokens), questions, mean, float(np.mean(digits)), error)


def fits(needles: Needles, length: int) -> bool:
    """Is there room for the needles in `length` tokens, and for `length` tokens in the text?"""
    return 1 + (NEEDLES + QUESTIONS) * needles.line <= length <= len(needles.text) - SLACK


def needle_table(
    model: Transformer, needles: Needles, trained: int, questions: int = 200
) -> list[Score]:
    """Scores at TIMES the trained length, printed as they come; lengths that do not fit are
    named."""
    print(
        f"\nneedles: exact match, digits and standard error, {NEEDLES} hidden and {QUESTIONS} "
        "asked, held-out text, keys and values"
    )
    scores = []
    for times in TIMES:
        length = int(times * trained)
        row = f"  {length:>7,} tokens ({times:g}x)"
        if not fits(needles, length):
            print(
                f"{row}   left out: too {'long' if times > 1 else 'short'} for this corpus and "
                "these needles"
            )
            continue
        count = (
            -(-questions // QUESTIONS)
            if length <= LONG
            else -(-questions * LONG // (QUESTIONS * length))
        )
        score = needle_score(model, held_out_examples(needles, length, count, NEEDLES, QUESTIONS))
        print(
            f"{row}   exact {score.exact:.3f} +- {score.error:.3f}   digits {score.digits:.3f}   "
            f"of {score.questions}",
            flush=True,
        )
        scores.append(score)
    return scores
