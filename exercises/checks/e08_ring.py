"""A cache that forgets."""

import torch
from torch import Tensor

from exercises.harness import Wrong, answer, kept, name_of, plain, points


class Stream:
    """Tokens of random keys and values, given to a Ring chunk by chunk; what comes back is compared
    with what the chunk's queries need."""

    def __init__(self, mine, window: int, b: int = 1, k: int = 1, d: int = 4, dtype=torch.float32):
        self.ring, self.window, self.length = mine.Ring(window), window, 0
        self.keys = torch.zeros(b, k, 0, d, dtype=dtype)
        self.values = self.keys

    def extend(self, t: int, look: bool = True) -> None:
        """The next t tokens; `look` at what comes back."""
        b, h, _, d = self.keys.shape
        k, v = (torch.randn(b, h, t, d).to(self.keys.dtype) for _ in "kv")
        self.keys, self.values = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        self.length += t
        got = self.ring.extend(k.clone(), v.clone())
        plain("what `extend` returns", got, tuple, list)
        if len(got) != 3:
            raise Wrong(f"`extend` returns {len(got)} things: keys, values and positions are three")
        if look:
            self.examine(t, *got)

    def examine(self, t: int, keys, values, positions) -> None:
        """Wrong unless attention of the last t queries, masked by these positions, is that over
        everything: each key that a query sees is there once, with its value."""
        self.forms(keys, values, positions)
        first, end, said = self.length - t, self.length, positions.tolist()
        tokens = [self.token(keys[:, :, j]) for j in range(len(said))]
        needed = range(max(0, first - self.window + 1), end)
        queries = torch.arange(first, end)[:, None]
        place = torch.tensor(said, dtype=torch.int64)
        seen = (place >= 0) & (place <= queries) & (queries - place < self.window)
        wrong = [j for j in range(len(said)) if seen[:, j].any() and tokens[j] != said[j]]
        absent = [p for p in needed if p not in tokens]
        held = sorted(token for token in tokens if token is not None)
        step = f"token {first}" if t == 1 else f"tokens {first} to {end - 1}"

        for j in wrong:
            if keys[:, :, j].abs().max() == 0:
                raise Wrong(f"empty slots are seen: one of zeros says position {said[j]}; say -1")
        unsaid = [p for p in needed if said.count(p) != 1]
        if (wrong or absent or unsaid) and said == list(range(len(said))) and tokens != said:
            self.slots(tokens, held)
        if absent:
            query = max(first, absent[-1])
            early = "forgets too early" if absent[-1] < first else "a key of this chunk is gone"
            raise Wrong(
                f"{early}: with {step}, query {query} needs key {absent[-1]} (window "
                f"{self.window}), and it is not among keys {held}"
            )
        if wrong:
            j = wrong[0]
            what = "a changed key" if tokens[j] is None else f"the key of token {tokens[j]}"
            raise Wrong(f"with {step}, position {said[j]} comes with {what}")
        for p in unsaid:
            how = "is hidden: its position is not given" if p not in said else "comes twice"
            raise Wrong(f"with {step}, key {p} {how}")
        for p in needed:
            if not torch.equal(values[:, :, said.index(p)], self.values[:, :, p]):
                raise Wrong(f"values of another token: with {step}, key {p} has not its own value")

    def slots(self, tokens: list, held: list) -> None:
        """Positions that count from 0: of a ring, or of what is left."""
        if tokens == held:
            raise Wrong(
                f"positions restart at 0: token {tokens[0]} is the first that you hold, and its "
                "position is still its own"
            )
        for slot, token in enumerate(tokens):
            if token not in (None, slot):
                raise Wrong(
                    f"masked by slot: slot {slot} holds token {token}, and you say position "
                    f"{slot}; keep the position of each slot beside it"
                )

    def forms(self, keys, values, positions) -> None:
        """Types, shapes and dtypes."""
        b, h, _, d = self.keys.shape
        for what, got in (("keys", keys), ("values", values), ("positions", positions)):
            plain(what, got, Tensor)
        if positions.ndim != 1 or positions.dtype not in (torch.int64, torch.int32):
            raise Wrong(
                f"positions have the shape {tuple(positions.shape)} in {name_of(positions.dtype)}: "
                "they are (s) whole numbers, int64"
            )
        for what, got in (("keys", keys), ("values", values)):
            if got.shape != (b, h, len(positions), d):
                wanted = (b, h, len(positions), d)
                raise Wrong(
                    f"{what} have the shape {tuple(got.shape)}; with these positions {wanted}"
                )
            if got.dtype != self.keys.dtype:
                raise Wrong(
                    f"{what} come out in {name_of(got.dtype)}, not {name_of(self.keys.dtype)}"
                )
            if got.requires_grad:
                raise Wrong(f"{what} want a gradient: a cache has none")

    def token(self, key: Tensor) -> int | None:
        """Which token a key (b k d) is of."""
        equal = (self.keys == key[:, :, None]).all(3).all(1).all(0)
        return int(equal.nonzero()[0]) if equal.any() else None


@points(2)
def check_one_by_one(mine):
    """A token at a time."""
    for window in (4, 1, 3):
        stream = Stream(mine, window)
        for _ in range(3 * window + 2):
            stream.extend(1)
    streams = [Stream(mine, window) for window in (4, 2)]  # two layers
    for _ in range(6):
        for stream in streams:
            stream.extend(1)


@points(2)
def check_all_at_once(mine):
    """One chunk, shorter and longer than the window: each of its queries needs its own keys."""
    for window, t in ((4, 3), (4, 4), (4, 11), (1, 5), (8, 9)):
        Stream(mine, window, k=2).extend(t)


@points(2)
def check_prompt_then_tokens(mine):
    """A prompt of any length, then a token at a time."""
    for window, prompt in ((4, 6), (4, 4), (4, 2), (5, 13), (1, 3)):
        stream = Stream(mine, window)
        stream.extend(prompt)
        for _ in range(2 * window + 1):
            stream.extend(1)


@points(3)
def check_any_chunks(mine):
    """Chunks of window - 1, window, window + 1, and of random sizes; rows, heads and bfloat16."""
    for window in (4, 7, 2, 1):
        for t in {max(1, window - 1), window, window + 1}:
            stream = Stream(mine, window)
            for _ in range(5):
                stream.extend(t)
    for round in range(8):
        window = int(torch.randint(1, 7, ()))
        dtype = torch.bfloat16 if round % 4 == 3 else torch.float32
        stream = Stream(mine, window, b=1 + round % 2, k=1 + round % 3, dtype=dtype)
        for _ in range(8):
            stream.extend(int(torch.randint(1, 2 * window + 2, ())))


@points(3)
def check_bounded(mine):
    """Bytes that it keeps alive, wherever they hide: those of `window` tokens."""
    cases = ((8, 1, (40, 1)), (8, 2, (40, 1)), (8, 1, (3, 5)), (8, 1, (1,)), (1, 1, (3,)))
    for window, heads, chunks in cases:
        stream = Stream(mine, window, heads, heads, d=64)
        early = fed(mine, stream, chunks, 60)
        grown = fed(mine, stream, chunks, 260) - early
        if grown > 1000:
            raise Wrong(f"remembers everything: {grown:,} bytes more after 200 more tokens")


def fed(mine, stream: Stream, chunks: tuple, length: int) -> int:
    """Feed chunks until the stream is so long -> bytes of what is kept beside tensors. Wrong where
    the tensors hold more than `window` tokens."""
    b, h, _, d = stream.keys.shape
    token, other = 2 * b * h * d * stream.keys.element_size(), 0
    # Positions may be kept in a tensor or two; a token more may not.
    most = stream.window * token + 16 * stream.window + 128
    while stream.length < length:
        for t in chunks:
            stream.extend(t, look=False)
            if stream.length < length - 45:
                continue
            held, seen, other = kept(stream.ring, mine)
            tokens = f"{held / token:.1f} tokens after {stream.length}, with window {stream.window}"
            if held > most >= seen:
                raise Wrong(f"a slice keeps its whole chunk alive, {tokens}: clone() what you keep")
            if held > most:
                raise Wrong(f"remembers too much: {tokens}")
    return other


@points(2)
def check_answer(mine):
    """What rrrN keeps of what four full layers keep."""
    hints = {
        0.0078: "that is a windowed layer; one in four has no window and keeps everything",
        0.0234: "three of four layers have a window; the NoPE layer keeps everything",
        0.25: "the windowed layers keep a little too: 64 tokens each",
        3.9: "the other way round: rrrN over four full layers",
    }
    given = mine.ANSWER
    if type(given) in (int, float) and abs(given - 0.25) < 0.0005:
        raise Wrong(f"ANSWER = {given}: {hints[0.25]}")
    answer(given, 0.256, 0.004, hints)
