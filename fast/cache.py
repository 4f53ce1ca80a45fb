"""The KV cache: what later tokens attend to, and no more."""

import os
from copy import copy

import torch
from torch import Tensor


class KVCache:
    """Keys (rotated) and values of every layer: of a full layer all, up to `max_length`, of a
    windowed one the last `window`. `plan` is its list of LayerSpec.

    Each layer is a ring of rows, position p in slot p mod rows; a full layer's ring never comes
    round. Every slot knows its absolute position (-1: empty), and the mask is made from positions,
    so that any chunking of a prompt gives the same attention: softmax does not mind the order of
    the slots. (A mask by slot order would leak the future.)

    A step is `advance(t)`, once, and then `extend(layer, k, v)` for each layer.
    """

    def __init__(
        self, plan, batch_size, n_kv_head, head_dim, max_length, device="cpu", dtype=torch.float32
    ):
        if batch_size < 1 or max_length < 1:
            nothing = "holds nothing: use 1 or more of both"
            raise ValueError(f"a cache of {batch_size} rows of {max_length} tokens {nothing}")
        self.plan, self.max_length, self.length = list(plan), max_length, 0
        self.rows = [self.ring(spec.window) for spec in plan]
        size = 2 * batch_size * n_kv_head * head_dim * sum(self.rows) * dtype.itemsize
        known = torch.device(device).type == "cpu" and hasattr(os, "sysconf")  # not on Windows
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else 2**38
        if size > most:
            how = "ask for fewer tokens (--max-new-tokens) or rows (--samples)"
            raise ValueError(f"a cache of {batch_size} x {max_length} takes {size:,} bytes: {how}")
        shapes = [(batch_size, n_kv_head, rows, head_dim) for rows in self.rows]
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.v = [torch.zeros_like(k) for k in self.k]
        # By the size of the ring: the position in each slot, and of the present step the slots that
        # its newest keys go to and the positions of the keys that its queries attend to.
        self.positions = {rows: torch.full((rows,), -1, device=device) for rows in set(self.rows)}
        self.slots: dict[int, Tensor] = {}
        self.k_pos: dict[int, Tensor] = {}
        self.clock: Tensor | None = None  # see `fixed`

    def ring(self, window: int | None) -> int:
        """Rows of a layer that sees `window` keys."""
        return min(window or self.max_length, self.max_length)

    def advance(self, t: int) -> Tensor:
        """Make room for the next t tokens -> their positions (t). Raises ValueError, and changes
        nothing, when they do not fit."""
        if self.clock is None:
            self.reserve(t)
            q_pos = torch.arange(self.length - t, self.length, device=self.k[0].device)
        else:
            q_pos = self.clock.clone()
            self.clock += t
        self.slots, self.k_pos = {}, {}
        for rows, held in self.positions.items():
            newest = q_pos if t <= rows else q_pos[-rows:]
            self.slots[rows] = newest % rows
            if self.overflows(rows, t):
                self.k_pos[rows] = torch.cat((held[: min(self.length - t, rows)], q_pos))
            else:
                self.k_pos[rows] = held if self.is_whole(rows) else held[: self.length]
            held.index_copy_(0, self.slots[rows], newest)
        return q_pos

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's k and v (b k t d) of the tokens just advanced over -> the keys and values
        that their queries attend to (b k s d), at the positions `key_positions`."""
        rows, t = self.rows[layer], k.shape[2]
        k_held, v_held, slots = self.k[layer], self.v[layer], self.slots[rows]
        k, v = k.to(k_held.dtype), v.to(k_held.dtype)
        if self.overflows(rows, t):
            held = min(self.length - t, rows)
            k_all = torch.cat((k_held[:, :, :held], k), dim=2)
            v_all = torch.cat((v_held[:, :, :held], v), dim=2)
            k_held.index_copy_(2, slots, k[:, :, -rows:])
            v_held.index_copy_(2, slots, v[:, :, -rows:])
            return k_all, v_all
        k_held.index_copy_(2, slots, k)
        v_held.index_copy_(2, slots, v)
        if self.is_whole(rows):
            return k_held, v_held
        return k_held[:, :, : self.length], v_held[:, :, : self.length]

    def key_positions(self, window: int | None) -> Tensor:
        """(s) positions of the keys that this step's queries attend to, by a layer's window."""
        return self.k_pos[self.ring(window)]

    def overflows(self, rows: int, t: int) -> bool:
        """Must the queries of a chunk attend to keys whose slots its newest take? One token, or a
        ring that never comes round, need not."""
        return t > 1 and rows < self.max_length

    def is_whole(self, rows: int) -> bool:
        """Do queries attend to every row of a ring? Else those up to `length`."""
        return self.clock is not None or self.length >= rows

    @property
    def is_empty(self) -> bool:
        """Has it read nothing yet, so that what comes next is a whole sequence?"""
        return self.clock is None and self.length == 0

    def all_visible(self, t: int) -> bool:
        """Does each of t queries see every key that it is given? One does, unless `fixed`."""
        return t == 1 and self.clock is None

    def fixed(self) -> "KVCache":
        """A twin in this memory for single tokens at shapes that never change, to be compiled: time
        is a tensor, rings are read whole, empty slots masked. The cache itself must `reserve`."""
        twin = copy(self)
        twin.clock = torch.tensor([self.length], device=self.k[0].device)
        return twin

    def check_room(self, t: int) -> None:
        """ValueError where t more tokens do not fit."""
        if self.length + t > self.max_length:
            held = f"the cache holds {self.max_length} tokens and has {self.length}"
            raise ValueError(f"{held}: {t} more need a larger max_length")

    def reserve(self, t: int) -> None:
        """Count t more tokens. Raises ValueError, and changes nothing, when they do not fit."""
        self.check_room(t)
        self.length += t

    def fork(self, n: int) -> "KVCache":
        """A copy in which every row stands n times: n continuations of one prompt."""
        twin = copy(self)
        twin.k = [x.repeat_interleave(n, dim=0) for x in self.k]
        twin.v = [x.repeat_interleave(n, dim=0) for x in self.v]
        twin.positions = {rows: held.clone() for rows, held in self.positions.items()}
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds, all of them allocated from the start."""
        return sum(x.nbytes for x in (*self.k, *self.v, *self.positions.values()))

    @property
    def full_nbytes(self) -> int:
        """Bytes of keys and values if every layer held everything."""
        return sum(x.nbytes // x.shape[2] for x in (*self.k, *self.v)) * self.max_length
