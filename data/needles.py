"""Needles in a haystack of real text, after RULER (2404.06654), small enough for a small model.

A needle is a comment line, `# parse_buffer is 48213`, hidden between lines of the corpus; the questions at the end have the same
form, so that completing one is copying the value behind the key's earlier mention. A key is two words of the vocabulary joined to
a name (one word, or two with a space between, is also ordinary text, and is learned late or never); keys and values are each split
by hash into training and held-out, and each example knows where everything is: which tokens are answers, and the paper's four
segments (section 3).
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np

from data.tokenizer import Tokenizer

BEGIN, NEEDLE, CONTEXT, QC = range(4)  # the paper's segments: first 10 tokens, needles, all else, question and completion
DIGITS = 5  # of a value
HELD_OUT = 5  # one key or value in five is held out
NAME = re.compile(rb" [a-z]{3,12}")  # a token that is a whole word after a space
SLACK = 2048  # tokens in which a line must end


@dataclass(frozen=True)
class Example:
    """One sequence. Position i of every array speaks of tokens[i]."""

    tokens: np.ndarray  # (t) int64, beginning with end-of-text
    answer: np.ndarray  # (t) int64: which question's answer this token belongs to, -1 for none
    segment: np.ndarray  # (t) int8: BEGIN, NEEDLE, CONTEXT or QC


def held_out(name: str) -> bool:
    """Is this key or value kept from training? A hash decides, so that everybody decides alike."""
    return hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % HELD_OUT == 0


class Needles:
    """Builds examples from the token ids of a split; `evaluation` chooses the held-out keys and values."""

    def __init__(self, tokenizer: Tokenizer, text: np.ndarray, evaluation: bool):
        self.tokenizer, self.text, self.evaluation = tokenizer, text, evaluation
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
        self.ends_line = np.array([piece.endswith(b"\n") for piece in pieces])
        self.words = sorted(piece[1:].decode() for piece in pieces if NAME.fullmatch(piece))
        if len(self.words) < 20:
            raise ValueError(f"the vocabulary has {len(self.words)} whole words and keys need 20: prepare the corpus with a larger --vocab-size")
        self.line = max(len(self._line(f"{self.words[0]}_{word}", "9" * DIGITS)[0]) for word in self.words)  # tokens of the longest needle

    def counts(self, length: int) -> tuple[int, int]:
        """How many needles and questions a training example of `length` has: many, so that each step teaches much."""
        fitting = (length - 1) // (2 * self.line)
        if fitting < 1:
            raise ValueError(f"length {length} has no room for a needle of {self.line} tokens and its question: train longer, or set needle_share = 0")
        return min(max(4, length // 32), fitting), min(max(4, length // 64), fitting)

    def example(self, rng: np.random.Generator, length: int, needles: int, questions: int, depth: float | None = None) -> Example:
        """`length` tokens of text with `needles` hidden in it and `questions` of them asked at the end, in random order.

        The first needle asked lies at `depth` (0 is the beginning, 1 just before the questions), the others anywhere; None: all
        anywhere. Raises ValueError when length has no room for them.
        """
        least = 1 + (needles + questions) * self.line
        if length < least:
            raise ValueError(f"{needles} needles and {questions} questions may need {least} tokens: {length} is too short")
        keys, values = self._draw(rng, needles, self._key), self._draw(rng, needles, self._value)
        lines = [self._line(key, value) for key, value in zip(keys, values)]
        asked = rng.permutation(needles)[:questions]
        tail = sum(len(lines[i][0]) for i in asked)
        room = length - 1 - tail - sum(len(line) for line, _ in lines)
        text = self._haystack(rng, room)
        depths = rng.random(needles)
        if depth is not None:
            depths[asked[0]] = depth
        breaks = np.concatenate(([0], 1 + np.flatnonzero(self.ends_line[text])))  # a line may begin here
        places = breaks[np.abs(breaks[None, :] - depths[:, None] * room).argmin(1)]

        parts, start = [(np.array([self.tokenizer.eot_token]), CONTEXT, -1, 0)], 0
        for i in np.argsort(places, kind="stable"):
            parts += [(text[start : places[i]], CONTEXT, -1, 0), (lines[i][0], NEEDLE, -1, 0)]
            start = places[i]
        parts.append((text[start:], CONTEXT, -1, 0))
        parts += [(lines[i][0], QC, question, lines[i][1]) for question, i in enumerate(asked)]
        answer = np.full(length, -1)
        segment = np.concatenate([np.full(len(ids), kind, dtype=np.int8) for ids, kind, _, _ in parts])
        segment[:10] = np.where(segment[:10] == CONTEXT, BEGIN, segment[:10])
        end = 0
        for ids, _, question, digits in parts:
            end += len(ids)
            if question >= 0:
                answer[end - 1 - digits : end - 1] = question  # the last token is the line's end
        return Example(np.concatenate([ids for ids, *_ in parts]).astype(np.int64), answer, segment)

    def _draw(self, rng: np.random.Generator, count: int, make) -> list[str]:
        """`count` different names of this split."""
        found: dict[str, None] = {}
        while len(found) < count:
            name = make(rng)
            if held_out(name) == self.evaluation:
                found[name] = None
        return list(found)

    def _key(self, rng: np.random.Generator) -> str:
        first, second = rng.integers(len(self.words), size=2)
        return f"{self.words[first]}_{self.words[second]}"

    def _value(self, rng: np.random.Generator) -> str:
        return f"{rng.integers(10**DIGITS):0{DIGITS}d}"

    def _line(self, key: str, value: str) -> tuple[np.ndarray, int]:
        """Token ids of a needle's line, and how many of them are the value's."""
        stem, number = self.tokenizer.encode_ordinary(f"# {key} is"), self.tokenizer.encode_ordinary(f" {value}")
        digits = len(number) - (self.tokenizer.token_bytes(number[0]) == b" ")  # the space is no part of the answer
        return np.array(stem + number + self.tokenizer.encode_ordinary("\n")), digits

    def _haystack(self, rng: np.random.Generator, room: int) -> np.ndarray:
        """`room` consecutive tokens that end with a line's end."""
        if len(self.text) < room + SLACK:
            raise ValueError(f"the corpus has {len(self.text)} tokens in this split and an example needs {room + SLACK}: prepare a larger one")
        start = int(rng.integers(len(self.text) - room - SLACK + 1))
        ends = np.flatnonzero(self.ends_line[self.text[start + room - 1 : start + room - 1 + SLACK]]) if room else []
        start += int(ends[0]) if len(ends) else 0
        return np.asarray(self.text[start : start + room])
