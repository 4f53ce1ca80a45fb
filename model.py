"""The language model: a pattern of layers, the parallel block, and what one does with it (logits, loss, text).

The architecture is the paper's (arXiv 2501.18795, sections 2 and 5) as Command R7B ships it: one bias-free LayerNorm feeds
attention and SwiGLU in parallel, x + attn(LN(x)) + mlp(LN(x)); tied embeddings; logits times `logit_scale`. Modules and
weights have Hugging Face's names, so a checkpoint needs no renaming.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
from attention import (
    LENGTH_SCALES,
    ROPE_SCALINGS,
    Attention,
    Context,
    KVCache,
    LayerNorm,
    LayerSpec,
    as_complex,
    choose_backend,
    length_scale,
    make_mask,
    rotary_frequencies,
    rotary_table,
    visible_pairs,
)

LOGITS_AT_ONCE = {
    "cpu": 2**20,
    "cuda": 2**26,
}  # elements (b t v) the loss makes at a time; on CPU what a cache holds
LEAST_ROWS = 256  # of those: each chunk also adds to the whole (v c) gradient of the output matrix
MIMETIC = ("none", "nope", "all")  # layers whose queries begin half like their keys
TABLES_AT_ONCE = 64  # positions whose rotary tables decoding makes together
PREFILL_CHUNK = 512  # tokens of a prompt per forward under a cache, so that a long one never makes (t s) masks or (t v) logits
FIRST_CHUNK = 8192  # tokens before them: nothing is held yet, so that these are a whole sequence and take its kernels, which need no masks


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what the model computes. Raises ValueError for a value that makes no model.

    `pattern` has one letter a layer and is tiled; capital sees all, small sees `window` keys:

        R  RoPE, every earlier token        N  no position, every earlier token
        r  RoPE, a window                   n  no position, a window

    R is the RoPE baseline, N NoPE, RN RNoPE (paper, section 4), rrrN RNoPE-SWA (section 5), Nrrr SWAN-GPT's order.
    """

    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    d_model: int = 128
    d_ff: int = 336
    vocab_size: int = 2048
    pattern: str = "rrrN"
    window: int | None = None  # keys that a small letter sees, the query's own included
    head_dim: int | None = None  # None: d_model / n_head
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: str = "none"  # none, pi, ntk, yarn
    rope_factor: float = 1.0  # new length / trained length
    rope_original_length: int | None = None  # YaRN's trained length
    length_scale: str = "none"  # of the full NoPE layers: none, swan, llama4, drope, ssmax
    length_base: int | None = None  # None: trained_length
    trained_length: int | None = None  # the longest length trained so far; train.py keeps it
    logit_scale: float = 1.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "vocab_size"):
            _require(getattr(self, name) >= 1, f"{name} {getattr(self, name)} is below 1")
        for name in ("window", "head_dim", "rope_original_length", "trained_length"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} {value} is below 1")
        _require(
            self.n_head % self.n_kv_head == 0,
            f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}: use a divisor",
        )
        _require(
            self.head_dim is not None or self.d_model % self.n_head == 0,
            f"d_model {self.d_model} is not a multiple of n_head {self.n_head}: change one, or give head_dim",
        )
        _require(
            self.head_width % 2 == 0,
            f"head_dim {self.head_width} is odd: rotation turns pairs of dimensions",
        )
        _require(self.rope_theta > 0, f"rope_theta {self.rope_theta} is not positive")
        _require(
            self.rope_factor >= 1,
            f"rope_factor {self.rope_factor} is below 1: it is new length / trained length",
        )
        _require(
            self.rope_factor == 1 or self.rope_scaling != "none",
            f"rope_factor {self.rope_factor} does nothing without rope_scaling: give pi, ntk or yarn",
        )
        _require(self.norm_eps > 0, f"norm_eps {self.norm_eps} is not positive")
        _one_of("rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        _one_of("length_scale", self.length_scale, LENGTH_SCALES)
        _require(
            self.length_base is None or self.length_base >= 2,
            f"length_base {self.length_base} is below 2",
        )
        _require(
            self.rope_scaling != "ntk" or self.head_width >= 4,
            f"rope_scaling 'ntk' needs head_dim of 4 or more, not {self.head_width}",
        )
        if self.rope_scaling == "yarn":
            _require(
                self.rope_original_length is not None,
                "rope_scaling 'yarn' needs rope_original_length, the trained length",
            )
        layer_plan(self)

    @property
    def head_width(self) -> int:
        """d: dimensions of a head."""
        return self.head_dim or self.d_model // self.n_head


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} {value!r} is unknown: use one of {', '.join(choices)}")


def layer_plan(config: ModelConfig) -> list[LayerSpec]:
    """The pattern, read: one LayerSpec for each layer. Raises ValueError, naming the value and the mend."""
    pattern, window = config.pattern, config.window
    unknown = [letter for letter in pattern if letter not in "RrNn"]
    _require(
        not unknown,
        f"pattern {pattern!r} has an unknown letter {''.join(unknown)!r}: use R, r, N and n",
    )
    _require(
        len(pattern) > 0 and config.n_layer % len(pattern) == 0,
        f"pattern {pattern!r} ({len(pattern)} letters) does not tile {config.n_layer} layers: "
        "make n_layer a multiple of its length",
    )
    _require(
        window is not None or pattern == pattern.upper(),
        f"pattern {pattern!r} has a windowed (small) letter and no window: give one, such as window = 64",
    )
    specs = [
        LayerSpec(rope=letter in "Rr", window=window if letter.islower() else None)
        for letter in pattern
    ]
    return specs * (config.n_layer // len(pattern))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) * up)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """h (b t c) -> (b t c)."""
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Block(nn.Module):
    """x + attn(LN(x)) + mlp(LN(x)): one norm, two readers, one sum."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = LayerNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(
            config.d_model,
            config.n_head,
            config.n_kv_head,
            config.head_width,
            config.qk_norm,
            config.length_scale == "ssmax",
            config.norm_eps,
        )
        self.mlp = MLP(config)
        self.widths = [matrix.out_features for matrix in self.matrices()[0]]
        self.joined: tuple[Tensor, ...] = ()  # see `join`

    def forward(
        self, x: Tensor, spec: LayerSpec, context: Context, layer: int, remember: bool = False
    ) -> Tensor:
        """x (b t c) -> (b t c). `remember`: only the keys and values, for the cache; x as it is."""
        h, attn = self.input_layernorm(x), self.self_attn
        if remember:
            attn.remember(attn.k_proj(h), attn.v_proj(h), spec, context, layer)
            return x
        if context.joined:  # the same in two products
            q, k, v, gate, up = (h @ self.joined[0]).split_with_sizes(self.widths, dim=-1)
            found = torch.cat((attn.mix(q, k, v, spec, context, layer), F.silu(gate) * up), dim=-1)
            return x + found @ self.joined[1]
        y = attn.mix(attn.q_proj(h), attn.k_proj(h), attn.v_proj(h), spec, context, layer)
        return x + attn.o_proj(y) + self.mlp(h)

    def _apply(self, *args, **kwargs):
        """Moving or casting the model parts the parameters from `joined`: do not keep its memory."""
        self.joined = ()
        return super()._apply(*args, **kwargs)

    def matrices(self) -> tuple[list[nn.Linear], list[nn.Linear]]:
        """Those that read the norm's output, and those that write to the residual stream."""
        attn, mlp = self.self_attn, self.mlp
        return [attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj], [
            attn.o_proj,
            mlp.down_proj,
        ]

    def parts(self) -> list[tuple[nn.Linear, Tensor]]:
        """Each matrix with its part of `joined`, transposed."""
        split = lambda group, whole, dim: whole.split([m.weight.shape[1 - dim] for m in group], dim)
        return [
            pair
            for group, whole, dim in zip(self.matrices(), self.joined, (1, 0))
            for pair in zip(group, split(group, whole, dim))
        ]

    @torch.inference_mode(False)
    @torch.no_grad()
    def join(self) -> None:
        """Lay the readers side by side, (c all), and the writers below each other, (all c); the parameters become views, unless they
        are already. Decoding is bound by reading the matrices and by the number of calls, and a parallel block needs two
        products, not seven. (In training the strided views cost more than they save.) Another layout may round in another way.
        """
        if not self.joined or any(
            m.weight.data_ptr() != part.data_ptr() for m, part in self.parts()
        ):
            self.joined = tuple(
                torch.cat([m.weight.t() for m in group], dim).contiguous()
                for group, dim in zip(self.matrices(), (1, 0))
            )
            for m, part in self.parts():
                m.weight.data = part.t()


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of weights x cross-entropy of scale x hidden matrix^T: hidden (n c), matrix (v c), targets and weights (n).
    `wanted`: will there be a backward pass?

    The gradient of the logits is softmax - one-hot, known as soon as the logits are; so each chunk of rows turns its
    logits into gradients at once, and the (n v) logits of a long context never stand in memory.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        matrix: Tensor,
        targets: Tensor,
        weights: Tensor,
        scale: float,
        wanted: bool,
    ) -> Tensor:
        """The sum, a scalar in float32 at least; with `wanted` both gradients are made on the way and kept."""
        counted = targets != -100
        targets = targets.masked_fill(~counted, 0)
        weights = (weights * counted).to(torch.promote_types(hidden.dtype, torch.float32))
        matrix = matrix.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device, dtype=weights.dtype)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_matrix = torch.zeros_like(matrix, dtype=weights.dtype) if wanted else None
        rows = max(LOGITS_AT_ONCE.get(hidden.device.type, 2**26) // matrix.shape[0], LEAST_ROWS)
        for i in range(0, len(hidden), rows):
            h, y, w = hidden[i : i + rows], targets[i : i + rows], weights[i : i + rows]
            logp = F.linear(scale * h, matrix).to(w.dtype).log_softmax(-1)
            total = total + F.nll_loss(logp, y, reduction="none").dot(
                w
            )  # in place, torch 2.11 compiles it to gradients of zero
            if wanted:
                d_logits = logp.exp_()
                d_logits[torch.arange(len(y), device=y.device), y] -= 1
                d_logits = d_logits.mul_((scale * w)[:, None]).to(h.dtype)
                d_hidden[i : i + rows] = d_logits @ matrix
                d_matrix += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_matrix)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor):
        d_hidden, d_matrix = ctx.saved_tensors
        return d_total * d_hidden, d_total * d_matrix, None, None, None, None


class Transformer(nn.Module):
    """A decoder of `config.n_layer` blocks. How positions are treated is read from `self.config` at every forward, so
    `model.config = replace(model.config, pattern=...)` changes it and touches no parameter. `mimetic`: see `_initialise`."""

    def __init__(self, config: ModelConfig, mimetic: str = "nope"):
        super().__init__()
        self.config = config
        self.backend = "auto"  # the kernel of the windowed layers
        self._read: tuple = (None,)  # see `_read_config`
        self._tables: tuple = (None,)  # see `_context`
        self._compiled_step = None  # see `compile_decoding`
        self.recompute = (
            False  # keep only the blocks' inputs for the backward pass (activation checkpointing)
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._initialise(mimetic)

    @torch.no_grad()
    def _initialise(self, mimetic: str) -> None:
        """Matrices at fan_in^-0.5, the two that write to the residual stream smaller by sqrt(2 n_layer), embeddings at 0.02.

        A NoPE layer's queries begin half as its keys, at the same size: it finds things by what they are, and like attending to like
        is where that begins (mimetic initialisation, 2305.09828). `mimetic` "none" leaves that out, "all" does it in RoPE layers too.
        """
        for name, p in self.named_parameters():
            if p.ndim == 2:
                p.normal_(std=p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.div_((2 * self.config.n_layer) ** 0.5)
        self.embed_tokens.weight.normal_(std=0.02)
        for block, spec in zip(self.layers, layer_plan(self.config)):
            if mimetic == "all" or mimetic == "nope" and not spec.rope:
                q, k = block.self_attn.q_proj.weight, block.self_attn.k_proj.weight
                q.mul_(0.75**0.5).add_(
                    repeat(
                        k,
                        "(k d) c -> (k g d) c",
                        k=self.config.n_kv_head,
                        g=self.config.n_head // self.config.n_kv_head,
                    ),
                    alpha=0.5,
                )

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, weights: list | None = None
    ) -> Tensor:
        """Logits (b t v) of tokens (b t) int64. With a cache the tokens continue what it holds (under no_grad, or it keeps a graph). A list given as `weights`
        collects (attention weights (b h t s), key positions (s)) of each layer, from the written-out softmax."""
        return self.unembed(self.hidden(tokens, cache, weights=weights))

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        layers: list | None = None,
        weights: list | None = None,
        joined: bool = False,
        last: bool = True,
    ) -> Tensor:
        """(b t c) after the final norm. A list given as `layers` collects the residual stream: embeddings, then each block's.
        `joined`: multiply by the matrices that `Block.join` has laid together. Without `last` the last layer
        only fills its cache, and what is returned is of no use."""
        plan, *_ = self._read_config()
        x = self.embed_tokens(tokens)
        context = self._context(plan, tokens.shape[1], tokens.device, cache, weights, joined)
        if layers is not None:
            layers.append(x)
        for i, (block, spec) in enumerate(zip(self.layers, plan, strict=True)):
            args = x, spec, context, i, not last and i == len(plan) - 1
            x = (
                recompute(block, *args, use_reentrant=False)
                if self.recompute and torch.is_grad_enabled()
                else block(*args)
            )
            if layers is not None:
                layers.append(x)
        return self.norm(x)

    def _read_config(self) -> tuple[list[LayerSpec], Tensor, float]:
        """Plan, rotary frequencies and their amplitude, read once for as long as `config` is the same object."""
        if self._read[0] is not self.config:
            c = self.config
            with torch.inference_mode(False):
                turning = rotary_frequencies(
                    c.head_width,
                    c.rope_theta,
                    c.rope_scaling,
                    c.rope_factor,
                    c.rope_original_length,
                )
            self._read = (c, layer_plan(c), *turning)
        return self._read[1:]

    def _context(
        self,
        plan: list[LayerSpec],
        t: int,
        device,
        cache: KVCache | None,
        weights: list | None,
        joined: bool,
    ) -> Context:
        """Positions, tables and masks: one of each kind per forward, however many layers there are."""
        c = self.config
        k_pos = slots = None
        continues = cache is not None and (
            cache.clock is not None or cache.length > 0
        )  # a first chunk meets nothing but itself
        if cache is None:
            q_pos = torch.arange(t, device=device)
        else:
            assert cache.plan == plan, "this cache was made for another pattern or window"
            q_pos, slots, met = cache.advance(t)
            k_pos = (
                {spec.window: met[rows] for spec, rows in zip(plan, cache.rows)}
                if continues
                else None
            )
        if (
            joined and cache.clock is None
        ):  # decoding: the tables of a whole block of positions at once
            block, at = divmod(cache.length - 1, TABLES_AT_ONCE)
            if self._tables[0] != (block, c, device):
                positions = torch.arange(
                    block * TABLES_AT_ONCE, (block + 1) * TABLES_AT_ONCE, device=device
                )
                self._tables = (
                    (block, c, device),
                    as_complex(rotary_table(positions, *self._read_config()[1:])),
                )
            table = self._tables[1][at : at + 1]
        else:
            table = rotary_table(q_pos, *self._read_config()[1:])
            table = table if torch.compiler.is_compiling() else as_complex(table)
        context = Context(
            table=table,
            scale=length_scale(c.length_scale, q_pos, c.length_base or c.trained_length),
            backends={},
            masks={},
            cache=cache,
            q_pos=q_pos if continues else None,
            k_pos=k_pos,
            slots=slots,
            weights=weights,
            joined=joined,
        )
        for window in {spec.window for spec in plan}:
            backend = choose_backend(self.backend, window, t, device, continues, c.head_width)
            if backend == "banded" and window is None or continues and backend != "reference":
                backend = "sdpa"  # banded is for windows; only sdpa and reference take a chunk of a sequence
            context.backends[window] = backend
            if cache is None or t > 1 or cache.clock is not None:
                context.masks[window] = make_mask(
                    backend, window, t, device, context.q_pos, k_pos and k_pos[window]
                )
        return context

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits (b t v) of hidden (b t c)."""
        matrix = self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight
        logits = F.linear(hidden, matrix)
        return logits if self.config.logit_scale == 1 else logits * self.config.logit_scale

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum of weight x negative log-likelihood in nats, over tokens and targets (b t); a target of -100 does not count.

        `weights` (b t) float; by default the mean: 1 / (number of targets that count).
        """
        hidden, targets = self.hidden(tokens).flatten(0, 1), targets.flatten()
        if weights is None:
            weights = torch.ones(
                targets.shape,
                device=targets.device,
                dtype=torch.promote_types(hidden.dtype, torch.float32),
            ) / (targets != -100).sum().clamp(min=1)
        matrix = self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight
        return LinearCrossEntropy.apply(
            hidden,
            matrix,
            targets,
            weights.flatten(),
            self.config.logit_scale,
            torch.is_grad_enabled(),
        )

    # Text

    def new_cache(self, batch_size: int = 1, max_length: int = 8192) -> KVCache:
        """An empty cache for this pattern, on the model's device and in its dtype."""
        c, p = self.config, self.embed_tokens.weight
        return KVCache(
            self._read_config()[0],
            batch_size,
            c.n_kv_head,
            c.head_width,
            max_length,
            p.device,
            p.dtype,
        )

    def check_settings(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        """ValueError for a prompt or settings that `stream` cannot take."""
        _require(tokens.shape[1] > 0, "the prompt is empty: give at least one token")
        _require(max_new_tokens >= 0, f"max_new_tokens {max_new_tokens} is negative")
        _require(
            temperature >= 0,
            f"temperature {temperature} is negative: 0 is greedy, 1 samples the model's distribution",
        )
        _require(top_k is None or top_k >= 1, f"top_k {top_k} is below 1")
        _require(top_p is None or 0 < top_p <= 1, f"top_p {top_p} is not in (0, 1]")
        low, high, v = tokens.min().item(), tokens.max().item(), self.config.vocab_size
        _require(
            low >= 0 and high < v,
            f"token {low if low < 0 else high} is outside the vocabulary of {v}",
        )

    @torch.inference_mode()
    def fill(self, tokens: Tensor, cache: KVCache) -> None:
        """Read tokens (b t) into the cache by chunks. No more of the last layer than its keys and values: nothing comes after it to read the rest.
        Raises ValueError, and reads nothing, where they do not fit."""
        cache.check_room(tokens.shape[1])
        first = FIRST_CHUNK if cache.length == 0 else PREFILL_CHUNK
        for chunk in (tokens[:, :first], *tokens[:, first:].split(PREFILL_CHUNK, dim=1)):
            if chunk.shape[1]:
                self.hidden(chunk, cache, last=False)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read tokens (b t) into the cache; logits (b v) for the token after the last. Raises ValueError as `fill` does."""
        cache.check_room(tokens.shape[1])
        self.fill(tokens[:, :-1], cache)
        return self(tokens[:, -1:], cache)[:, 0]

    def compile_decoding(self) -> None:
        """Compile the decode step (into a CUDA graph, on CUDA): seconds or minutes once, then less time a token."""
        graphs = {"mode": "reduce-overhead"} if self.embed_tokens.weight.is_cuda else {}
        self._compiled_step = torch.compile(
            self._logits_after, fullgraph=True, dynamic=False, **graphs
        )

    def _logits_after(self, token: Tensor, cache: KVCache) -> Tensor:
        return self.unembed(self.hidden(token[:, None], cache, joined=True))[:, 0]

    def _step(self, token: Tensor, cache: KVCache) -> Tensor:
        """Logits (b v) after one more token (b) of every row."""
        if self._compiled_step is None:
            return self._logits_after(token, cache)
        if cache.clock is None:
            cache.fix_shapes()
        cache.reserve(1)
        return self._compiled_step(
            token, cache
        ).clone()  # a CUDA graph writes its outputs over at the next step

    @torch.inference_mode()
    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | None = None,
        generator: torch.Generator | None = None,
        cache: KVCache | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next token (b) of every row of tokens (b t), up to max_new_tokens times. Temperature 0 is greedy.

        A row that has produced `stop` repeats it; when all have, the stream ends. Raises ValueError as `check_settings` does.
        """
        self.check_settings(tokens, max_new_tokens, temperature, top_k, top_p)
        if cache is None:
            cache = self.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
        for block in self.layers:
            block.join()
        ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        for i in range(max_new_tokens):
            logits = self.prefill(tokens, cache) if i == 0 else self._step(token, cache)
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if stop is not None:
                token = torch.where(ended, stop, token)
                ended |= token == stop
            yield token
            if stop is not None and ended.all():
                return

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        **more,
    ) -> Tensor:
        """tokens (b t) -> (b t+new): what `stream` yields, joined; it takes the same settings."""
        new = list(self.stream(tokens, max_new_tokens, temperature, top_k, **more))
        return torch.cat([tokens, torch.stack(new, dim=1)], dim=1) if new else tokens

    # Counts

    def matmul_parameters(self) -> int:
        """N: the parameters that multiply every token. Tied embeddings count once, as the output matrix."""
        count = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return count if self.config.tie_embeddings else count - self.embed_tokens.weight.numel()

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs of a token in sequences of `length`: 6 N + 12 d h x visible pairs per token, summed over layers.

        Only visible pairs count, so a window makes the number smaller, not the model look slower.
        """
        c = self.config
        pairs = sum(visible_pairs(length, spec.window) for spec in layer_plan(c)) / length
        return 6 * self.matmul_parameters() + 12 * c.head_width * c.n_head * pairs

    # Files

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the folder `path`, in Cohere2's layout where it can express the model."""
        checkpoint.save(path, asdict(self.config), self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Transformer":
        """The model in the folder `path`: ours or Hugging Face's Cohere2, sharded or not, straight to `device` and `dtype`.

        Raises OSError for a missing file and ValueError for one that is damaged or asks for what is not implemented here.
        """
        fields = checkpoint.load_config(path)
        try:
            config = ModelConfig(**fields)
        except (TypeError, ValueError) as error:  # an unknown field, or a value that makes no model
            raise ValueError(f"{Path(path) / 'config.json'} makes no model: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        checkpoint.load_weights(path, model, device, dtype)
        return model.eval()


def sample_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token (b) from logits (b v): the likeliest at temperature 0, else drawn from the k likeliest that make up p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        surplus = p.cumsum(-1) - p >= top_p  # what comes before already makes up p
        logits = logits.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
