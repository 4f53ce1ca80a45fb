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
LONG = 8192  # tokens beyond which a table asks fewer questions: as many tokens, not examples


def mean_and_error(values) -> tuple[float, float]:
    """Mean of independent values, and its standard error (nan for a single one)."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


@torch.inference_mode()
def validation_loss(
    model: Transformer, corpus: Corpus, length: int, tokens: int
) -> tuple[float, float]:
    """(nats per token, bits per UTF-8 byte) over about `tokens` of plain validation text,
    end-of-text left out. FloatingPointError where they are not finite."""
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
    if not math.isfinite(nats):
        raise FloatingPointError(f"the validation loss is {nats}")
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
        place = (answer >= 0).nonzero()[:, 0]
        # What stands before is only read, the same number of tokens in (nearly) every example.
        first = int(place[0]) // 128 * 128
        text, cache = tokens[None].to(device), model.new_cache(1, len(tokens))
        fill(model, text[:, :first], cache)
        hidden = model.hidden(text[:, first:-1], cache)[0, (place - first).to(device)]
        likeliest = model.unembed(hidden).argmax(-1).cpu()
        right, asked = (likeliest == tokens[place + 1]).numpy(), answer[place].numpy()
        whole = [right[asked == i].all() for i in np.unique(asked)]
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
            wrong = "long" if length > len(needles.text) - SLACK else "short"
            print(f"{row}   left out: too {wrong} for this corpus and these needles")
            continue
        count = math.ceil(questions * min(1, LONG / length) / QUESTIONS)
        score = needle_score(model, held_out_examples(needles, length, count, NEEDLES, QUESTIONS))
        print(
            f"{row}   exact {score.exact:.3f} +- {score.error:.3f}   digits {score.digits:.3f}   "
            f"of {score.questions}",
            flush=True,
        )
        scores.append(score)
    return scores
