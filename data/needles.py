"""Needles in a haystack of real text, after RULER (2404.06654), small enough for a small model.

A needle is a comment line, `# parse_buffer is 48213`, hidden between lines of the corpus; the
questions at the end have the same form, so that completing one is copying the value behind the
key's earlier mention. A key is two words of the vocabulary joined to a name (one word, or two with
a space between, is also ordinary text, and is learned late or never); keys and values are each
split by hash into training and held-out, and each example knows where everything is: which tokens
are answers, and the paper's four segments (section 3).
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from data.tokenizer import Tokenizer

# the paper's segments: first 10 tokens, needles, all else, question and completion
BEGIN, NEEDLE, CONTEXT, QC = range(4)
DIGITS = 5  # of a value
HELD_OUT = 5  # one key or value in five is held out
NAME = re.compile(rb" [a-z]{3,12}")  # a token that is a whole word after a space
SLACK = 2048  # tokens in which a line must end
NEAR = 32  # tokens that a needle may stand away from its depth, to stand where a line ends

# The evaluation tasks, after RULER (2404.06654): what is hidden, and what is asked.
TASKS = {
    "single": "one needle, asked",
    "multi-key": "eight needles, one asked",
    "multi-query": "eight needles, four asked",
    "crowded": "a needle every 32 tokens, four asked",
    "multi-value": "one key with four values, asked in order of appearance; four other needles",
    "variable-tracking": "four chains `a is 48213`, `b equals a`, `c equals b`; what is one c?",
    "aggregation": "eight marked words, one more often than the others: which?",
}
WRONG = 7  # candidates beside the right answer: likelihood has a chance of 1/8


@dataclass(frozen=True)
class Example:
    """One sequence. Position i of every array speaks of tokens[i]."""

    tokens: np.ndarray  # (t) int64, beginning with end-of-text
    answer: np.ndarray  # (t) int64: which question's answer this token belongs to, -1 for none
    segment: np.ndarray  # (t) int8: BEGIN, NEEDLE (every hidden line), CONTEXT or QC
    # for each question WRONG other answers, (7 n) int64, as many tokens as the right one has
    wrong: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Line:
    """A line of tokens, ids[start:end] being what a question about it asks for."""

    ids: np.ndarray
    start: int
    end: int

    @property
    def answer(self) -> np.ndarray:
        return self.ids[self.start : self.end]


def held_out(name: str) -> bool:
    """Is this key or value kept from training? A hash decides, so that everybody decides alike."""
    return hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % HELD_OUT == 0


class Needles:
    """Builds examples from the token ids of a split; `evaluation` chooses the held-out keys and
    values."""

    def __init__(self, tokenizer: Tokenizer, text: np.ndarray, evaluation: bool):
        self.tokenizer, self.text, self.evaluation = tokenizer, text, evaluation
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
        self.words = sorted(piece[1:].decode() for piece in pieces if NAME.fullmatch(piece))
        if len(self.words) < 20:
            raise ValueError(
                f"the vocabulary has {len(self.words)} whole words of lower-case Latin letters and "
                "keys need 20: train without needles (--needle-share 0), or prepare the corpus "
                "with a larger --vocab-size if its text has more of them"
            )
        # Which tokens end a line, begin a word, begin a character? (A character may be several.)
        self.ends_line = np.array([piece.endswith(b"\n") for piece in pieces])
        self.begins_word = np.array([piece[:1] in (b"", b" ", b"\t") for piece in pieces])
        self.begins_character = np.array([not b"\x80" <= piece[:1] < b"\xc0" for piece in pieces])
        longest = "9" * DIGITS
        lines = [self._line(f"# {self.words[0]}_{word} is", longest) for word in self.words]
        self.line = max(len(line.ids) for line in lines)  # tokens of the longest needle

    def counts(self, length: int) -> tuple[int, int]:
        """How many needles and questions a training example of `length` has: many, so that each
        step teaches much."""
        fitting = (length - 1) // (2 * self.line)
        if fitting < 1:
            raise ValueError(
                f"length {length} has no room for a needle of {self.line} tokens and its "
                "question: train longer, or set needle_share = 0"
            )
        return min(max(4, length // 32), fitting), min(max(4, length // 64), fitting)

    def example(
        self,
        rng: np.random.Generator,
        length: int,
        needles: int,
        questions: int,
        depth: float | None = None,
    ) -> Example:
        """`length` tokens of text with `needles` hidden in it and `questions` of them asked at the
        end, in random order.

        The first needle asked lies at `depth` (0 is the beginning, 1 just before the questions),
        the others anywhere; None: all anywhere. Raises ValueError when length has no room for them.
        """
        least = 1 + (needles + questions) * self.line
        if length < least:
            raise ValueError(
                f"{needles} needles and {questions} questions may need {least} tokens: {length} "
                "is too short"
            )
        lines = self._needles(rng, needles)
        asked = rng.permutation(needles)[:questions]
        depths = anywhere(needles)
        if depth is not None:
            depths[asked[0]] = depth
        return self._compose(rng, length, lines, [lines[i] for i in asked], depths)

    def task(
        self, name: str, rng: np.random.Generator, length: int, depth: float | None = None
    ) -> Example:
        """An example of one of the TASKS, with wrong candidates, asked in order of appearance. The
        needle asked first (the beginning of the chain) lies at `depth`, others that are asked
        anywhere behind it, the rest, and all of aggregation, anywhere; None: that one anywhere too.
        Raises ValueError for an unknown name or when length has no room."""
        first = rng.random() if depth is None else depth

        def following(count: int) -> np.ndarray:
            """Depths of `count` needles, one at `first` and the others behind it, in order."""
            return np.append(first, np.sort(rng.uniform(first, 1, count - 1)))

        make = self._value  # what wrong answers look like
        if name in ("single", "multi-key", "multi-query", "crowded"):
            several = max(4, length // 32) if name == "crowded" else 8
            hidden = self._needles(rng, 1 if name == "single" else several)
            questions = 4 if name in ("multi-query", "crowded") else 1
            asked, rivals = hidden[:questions], hidden[questions:]
            depths = np.append(following(questions), anywhere(len(rivals)))
        elif name == "multi-value":
            key, *others = self._draw(rng, 5, self._key)
            values = self._draw(rng, 8, self._value)
            asked = [self._line(f"# {key} is", value) for value in values[:4]]
            rivals = [self._line(f"# {key} is", value) for key, value in zip(others, values[4:])]
            hidden, depths = asked + rivals, np.append(following(4), anywhere(4))
        elif name == "variable-tracking":
            keys, values = self._draw(rng, 12, self._key), self._draw(rng, 4, self._value)
            hidden = []
            for a, b, c, value in zip(keys[0::3], keys[1::3], keys[2::3], values):
                hidden.append(self._line(f"# {a} is", value))
                hidden.append(self._line(f"# {b} equals", a))
                hidden.append(self._line(f"# {c} equals", b))
            depths = np.concatenate([following(3), *(np.sort(rng.random(3)) for _ in "bcd")])
            asked, rivals = [self._line(f"# {keys[2]} is", values[0])], hidden[3::3]
        elif name == "aggregation":
            make = self._word
            words = self._draw(rng, 8, make)
            top, *rivals = [self._line("# seen", word) for word in words]
            hidden, depths = [top] * 5 + rivals * 2, anywhere(5 + 2 * len(rivals))
            asked = [self._line("# most seen", words[0])]
        else:
            raise ValueError(f"the task {name!r} is unknown: use one of {', '.join(TASKS)}")
        example = self._compose(rng, length, hidden, asked, depths)
        wrong = tuple(self._wrong(rng, line, asked, rivals, make) for line in asked)
        return replace(example, wrong=wrong)

    def _needles(self, rng: np.random.Generator, count: int) -> list[Line]:
        """Lines of different keys and values."""
        keys, values = self._draw(rng, count, self._key), self._draw(rng, count, self._value)
        return [self._line(f"# {key} is", value) for key, value in zip(keys, values)]

    def _wrong(
        self,
        rng: np.random.Generator,
        line: Line,
        asked: list[Line],
        rivals: list[Line],
        make: Callable[[np.random.Generator], str],
    ) -> np.ndarray:
        """(7 n): the other needles' values first, then values that stand nowhere, all as many
        tokens long as the right one."""
        right, n = {tuple(other.answer) for other in asked}, line.end - line.start
        wrong = {tuple(rival.answer): None for rival in rivals if len(rival.answer) == n}
        for _ in range(1000):
            if len(wrong) >= WRONG:
                break
            answer = self._line("#", *self._draw(rng, 1, make)).answer
            if len(answer) == n and tuple(answer) not in right:
                wrong[tuple(answer)] = None
        if len(wrong) < WRONG:
            raise ValueError(
                f"this vocabulary has too few other answers of {n} tokens: prepare the corpus "
                "with another --vocab-size"
            )
        return np.array(list(wrong)[:WRONG])

    def _compose(
        self,
        rng: np.random.Generator,
        length: int,
        hidden: list[Line],
        asked: list[Line],
        depths: np.ndarray,
    ) -> Example:
        """`hidden` in real text at `depths` (0 to 1, nan for anywhere; in order where two fall
        together), `asked` at its end."""
        tail = sum(len(line.ids) for line in asked)
        room = length - 1 - tail - sum(len(line.ids) for line in hidden)
        if room < 0:
            raise ValueError(
                f"{len(hidden)} hidden lines and {len(asked)} questions take {length - room} "
                f"tokens: {length} is too short"
            )
        text = self._haystack(rng, room)
        places = self._places(rng, text, depths)
        parts, start = [(np.array([self.tokenizer.eot_token]), CONTEXT)], 0
        for i in np.argsort(places, kind="stable"):
            parts += [(text[start : places[i]], CONTEXT), (hidden[i].ids, NEEDLE)]
            start = places[i]
        parts += [(text[start:], CONTEXT), *((line.ids, QC) for line in asked)]

        segment = np.concatenate([np.full(len(ids), kind, dtype=np.int8) for ids, kind in parts])
        segment[:10] = np.where(segment[:10] == CONTEXT, BEGIN, segment[:10])
        answer, begin = np.full(length, -1), length - tail
        for question, line in enumerate(asked):
            answer[begin + line.start : begin + line.end] = question
            begin += len(line.ids)
        return Example(np.concatenate([ids for ids, _ in parts]).astype(np.int64), answer, segment)

    def _haystack(self, rng: np.random.Generator, room: int) -> np.ndarray:
        """`room` consecutive tokens that end with a line's end, where one ends within SLACK."""
        if len(self.text) < room + SLACK:
            raise ValueError(
                f"the corpus has {len(self.text)} tokens in this split and an example needs "
                f"{room + SLACK}: prepare a larger one"
            )
        start = int(rng.integers(len(self.text) - room - SLACK + 1))
        if room:
            last = start + room - 1
            ends = np.flatnonzero(self.ends_line[self.text[last : last + SLACK]])
            start += int(ends[0]) if len(ends) else 0
        return np.asarray(self.text[start : start + room])

    def _places(self, rng: np.random.Generator, text: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """Before which token of the text each needle stands: where the line nearest to its depth
        begins. In text of long lines that may be far: a needle that is asked for at a depth, and
        every needle in text of hardly any lines, then stands inside of one, before a word, or at
        least before a character."""
        given, room = ~np.isnan(depths), len(text)
        wanted = np.where(given, depths, rng.random(len(depths))) * room
        lines = np.append(0, 1 + np.flatnonzero(self.ends_line[text]))
        places = nearest(lines, wanted)
        strict = given | (len(lines) <= 1 + room // 256)
        for begins in (self.begins_word, self.begins_character):
            far = strict & (np.abs(places - wanted) > max(NEAR, room // 10))
            if far.any():
                boundaries = np.concatenate([[0], np.flatnonzero(begins[text]), [room]])
                places[far] = nearest(boundaries, wanted[far])
        return places

    def _draw(
        self, rng: np.random.Generator, count: int, make: Callable[[np.random.Generator], str]
    ) -> list[str]:
        """`count` different names of this split. Raises ValueError where the vocabulary has too
        few."""
        found: dict[str, None] = {}
        for _ in range(10_000):
            if len(found) == count:
                return list(found)
            name = make(rng)
            if held_out(name) == self.evaluation:
                found[name] = None
        raise ValueError(
            f"a needle example wants {count} names and this vocabulary makes {len(found)}: "
            "prepare the corpus with a larger --vocab-size, or train without needles "
            "(--needle-share 0)"
        )

    def _key(self, rng: np.random.Generator) -> str:
        first, second = rng.integers(len(self.words), size=2)
        return f"{self.words[first]}_{self.words[second]}"

    def _word(self, rng: np.random.Generator) -> str:
        return self.words[rng.integers(len(self.words))]

    def _value(self, rng: np.random.Generator) -> str:
        return f"{rng.integers(10**DIGITS):0{DIGITS}d}"

    def _line(self, stem: str, answer: str) -> Line:
        """The line `stem answer`."""
        before = self.tokenizer.encode_ordinary(stem)
        after = self.tokenizer.encode_ordinary(f" {answer}")
        space = self.tokenizer.token_bytes(after[0]) == b" "  # alone it is no part of the answer
        ids = np.array(before + after + self.tokenizer.encode_ordinary("\n"))
        return Line(ids, len(before) + space, len(before) + len(after))


def anywhere(count: int) -> np.ndarray:
    """Depths of `count` needles that may stand anywhere."""
    return np.full(count, np.nan)


def nearest(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each of wanted (n) the nearest of places."""
    return places[np.abs(places[None, :] - wanted[:, None]).argmin(1)]
