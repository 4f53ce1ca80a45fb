"""The language model: a pattern of layers, the parallel block, and what one does with it.

The architecture is the paper's (arXiv 2501.18795, sections 2 and 5) as Command R7B ships it: one
bias-free LayerNorm feeds attention and SwiGLU in parallel; tied embeddings; logits times
`logit_scale`. Modules have Hugging Face's names: a checkpoint puts `model.` before them, no more.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

import attention
import checkpoint
from attention import Attention, Kernel, KVCache, LayerSpec, Shared
from fast.kernels import as_autocast, sdpa
from fast.loss import linear_cross_entropy


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what the model computes. ValueError for a value that makes no model.

    `pattern` has one letter a layer and is tiled; capital sees all, small sees `window` keys:

        R  RoPE, every token so far         N  no position, every token so far
        r  RoPE, a window                   n  no position, a window

    R is RoPE, N NoPE, RN RNoPE (section 4), rrrN RNoPE-SWA (section 5), Nrrr SWAN-GPT's order.
    """

    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    d_model: int = 128
    d_ff: int = 336
    vocab_size: int = 2048
    pattern: str = "rrrN"
    window: int | None = 64  # keys that a small letter sees, the query's own included
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
        check_config(self)

    @property
    def head_width(self) -> int:  # d
        return self.head_dim or self.d_model // self.n_head


def layer_plan(config: ModelConfig) -> list[LayerSpec]:
    """The pattern, read: one LayerSpec for each layer."""
    specs = []
    for letter in config.pattern:
        window = config.window if letter.islower() else None
        specs.append(LayerSpec(rope=letter in "Rr", window=window))
    return specs * (config.n_layer // len(config.pattern))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) * up)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (b t c) -> (b t c)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One norm, two readers, one sum: attention and MLP side by side."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.d_model, config.norm_eps, bias=False)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, spec: LayerSpec, shared: Shared, layer: int) -> Tensor:
        """x (b t c) -> (b t c)."""
        h = self.input_layernorm(x)
        return x + self.self_attn(h, spec, shared, layer) + self.mlp(h)


class Transformer(nn.Module):
    """A decoder of `config.n_layer` blocks. How positions are treated is read from `config`, so
    `model.config = replace(model.config, pattern=...)` changes it and touches no parameter."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.owns = config, (config.qk_norm, config.length_scale == "ssmax")
        self.backend = "auto"  # the attention kernel, one of attention.BACKENDS
        self.recompute = False  # keep only the blocks' inputs for the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps, bias=False)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialise()

    @property
    def plan(self) -> list[LayerSpec]:
        return layer_plan(self.config)

    @torch.no_grad()
    def initialise(self) -> None:
        """Std fan_in^-0.5, divided by sqrt(2 n_layer) in o_proj and down_proj; embeddings 0.02."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                p.normal_(std=p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.div_((2 * self.config.n_layer) ** 0.5)
        self.embed_tokens.weight.normal_(std=0.02)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, weights=None) -> Tensor:
        """Logits (b t v) of tokens (b t) int64. With a cache the tokens continue what it holds
        (under no_grad, or it keeps a graph). A list given as `weights` collects of each layer
        (attention weights (b h t s), key positions (s)), from the written-out softmax."""
        return self.unembed(self.hidden(tokens, cache, weights=weights))

    def hidden(self, tokens: Tensor, cache=None, layers=None, weights=None) -> Tensor:
        """(b t c) after the final norm. A list given as `layers` collects the residual stream, each
        (b t c): the embeddings, then what every block makes of it."""
        x = as_autocast(self.embed_tokens(tokens))
        shared = self.share(tokens.shape[1], tokens.device, cache, weights)
        if layers is not None:
            layers.append(x)
        for i, (block, spec) in enumerate(zip(self.layers, self.plan)):
            if self.recompute and torch.is_grad_enabled() and cache is None and weights is None:
                block = partial(recompute, block, use_reentrant=False)
            x = block(x, spec, shared, i)
            if layers is not None:
                layers.append(x)
        return self.norm(x)

    def share(self, t: int, device, cache: KVCache | None, weights=None, table=None) -> Shared:
        """What the layers of a forward over the next t tokens share; moves the cache on by t.
        `table`: their rotary table, where it has been made before."""
        c, plan, backend = self.config, self.plan, self.backend
        owns = c.qk_norm, self.owns[1] if c.length_scale == "none" else c.length_scale == "ssmax"
        require(owns == self.owns, "qk_norm and ssmax own weights: build the model with them")
        require(cache is None or cache.plan == plan, "a cache of another pattern: make a new one")
        whole = cache is None or cache.is_empty  # a sequence from its beginning
        q_pos = torch.arange(t, device=device) if cache is None else cache.advance(t)

        def kernel(window: int | None) -> Kernel:
            k_pos = q_pos if whole else cache.key_positions(window)
            if weights is not None:
                return lambda *qkv: attention.reference(*qkv, window, q_pos, k_pos, weights)
            chosen = attention.choose_backend(backend, window, t, device, not whole, c.head_width)
            if whole:  # "banded" is for windows: full layers then take sdpa
                chosen = "sdpa" if chosen == "banded" and window is None else chosen
                return attention.kernel_for(window, t, device, chosen)
            if cache.all_visible(t) and backend != "reference":
                return sdpa  # one query, and the ring holds just what it sees: no mask
            chosen = "reference" if chosen == "reference" else "sdpa"  # others take whole sequences
            return attention.kernel_for(window, t, device, chosen, q_pos, k_pos)

        table = self.rotary_table(q_pos) if table is None else table
        scale = attention.length_scale(c.length_scale, q_pos, c.length_base or c.trained_length)
        kernels = {window: kernel(window) for window in {spec.window for spec in plan}}
        return Shared(table, scale, kernels, cache)

    def rotary_table(self, positions: Tensor) -> Tensor:
        """The table of `rotate` for positions (t)."""
        c = self.config
        frequencies = attention.scaled_frequencies(
            c.head_width, c.rope_theta, c.rope_scaling, c.rope_factor, c.rope_original_length
        )
        table = attention.rotary_table(positions, *frequencies)
        return table if torch.compiler.is_compiling() else torch.view_as_complex(table)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits (.. v) of hidden (.. c)."""
        if self.config.tie_embeddings:
            return F.linear(hidden, self.embed_tokens.weight) * self.config.logit_scale
        return self.lm_head(hidden) * self.config.logit_scale

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum of weight x negative log-likelihood in nats, over tokens and targets (b t); a target
        of -100 does not count. weights (b t) float; None: 1 / (targets that count) each."""
        hidden, scale = self.hidden(tokens), self.config.logit_scale
        output = self.embed_tokens if self.config.tie_embeddings else self.lm_head
        return linear_cross_entropy(hidden, output.weight, targets, weights, scale)

    def new_cache(self, batch_size: int = 1, max_length: int = 8192) -> KVCache:
        """An empty cache for this pattern, on the model's device and in its dtype."""
        c, p = self.config, self.embed_tokens.weight
        sizes = (batch_size, c.n_kv_head, c.head_width, max_length)
        return KVCache(self.plan, *sizes, p.device, p.dtype)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """tokens (b t) -> (b t+new); settings as in `draw`. A row that has produced `stop` repeats
        it; when all have, that is the end. engine.stream does the same faster, but for rounding."""
        check_settings(self.config, tokens, max_new_tokens, temperature, top_k, top_p)
        cache = self.new_cache(len(tokens), tokens.shape[1] + max_new_tokens)
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        new = tokens  # what the cache has not read
        for _ in range(max_new_tokens):
            hidden = self.hidden(new, cache)
            token = draw(self.unembed(hidden[:, -1]), temperature, top_k, top_p, generator)
            if stop is not None:
                token = torch.where(ended, stop, token)
                ended |= token == stop
            new = token[:, None]
            tokens = torch.cat((tokens, new), dim=1)
            if ended.all():
                break
        return tokens

    def matmul_parameters(self) -> int:
        """N: the parameters that multiply every token; tied embeddings count, as output matrix."""
        count = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return count if self.config.tie_embeddings else count - self.embed_tokens.weight.numel()

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs of a token in sequences of `length`: 6 N + 12 d h x visible pairs per
        token, summed over layers: causal pairs alone, for full layers half of nanoGPT's count."""
        pairs = sum(attention.visible_pairs(length, spec.window) for spec in self.plan)
        d_h = self.config.head_width * self.config.n_head
        return 6 * self.matmul_parameters() + 12 * d_h * (pairs / length)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the folder `path`, as Cohere2 if it can."""
        checkpoint.save(path, asdict(self.config), self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path, device="cpu", dtype=torch.float32) -> "Transformer":
        """The model in the folder `path`, ours or Hugging Face's Cohere2, straight to `device` and
        `dtype`. OSError or ValueError where it is missing, damaged, or not implemented."""
        config = checkpoint.read_config(path, ModelConfig)
        with checkpoint.shapes_only():
            model = cls(config)
        checkpoint.load_weights(path, model, device, dtype)
        return model.eval()


def draw(logits: Tensor, temperature: float, top_k=None, top_p=None, generator=None) -> Tensor:
    """One token (b) from logits (b v): the likeliest at temperature 0, else drawn from the top_k
    likeliest, of these from the likeliest that make up a probability of top_p."""
    if temperature < 1e-6:  # so cold that only the likeliest is left
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        surplus = p.cumsum(-1) - p >= max(top_p, 1e-9)  # what comes before already makes up p
        logits = logits.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# What is refused ----------------------------------------------------------------------------------


def check_config(c: ModelConfig) -> None:
    """ValueError for what makes no model, naming the value and the mend."""
    sizes = "n_layer n_head n_kv_head d_model d_ff vocab_size window head_dim"
    for name in (sizes + " rope_original_length trained_length").split():
        value = getattr(c, name)
        require(value is None or value >= 1, f"{name} {value} is below 1")
    attention.one_of("rope_scaling", c.rope_scaling, attention.ROPE_SCALINGS)
    attention.one_of("length_scale", c.length_scale, attention.LENGTH_SCALES)

    p, d, factor, unknown = c.pattern, c.head_width, c.rope_factor, c.pattern.strip("RrNn")
    windowed, scaling = p != p.upper(), c.rope_scaling
    count = c.n_layer * c.d_model * (3 * c.d_ff + 2 * c.n_head * d) + c.vocab_size * c.d_model
    many = f"n_layer {c.n_layer}, d_model {c.d_model}, d_ff {c.d_ff}, vocab_size {c.vocab_size} "
    indivisible = f"d_model {c.d_model} is not a multiple of n_head {c.n_head}: "
    untiled = f"pattern {p!r} ({len(p)} letters) does not tile {c.n_layer} layers: "
    unseen = f"pattern {p!r} has a windowed (small) letter and no window: "
    original = scaling == "yarn" and c.rope_original_length is None
    wrong = {
        f"n_head {c.n_head} is not a multiple of n_kv_head {c.n_kv_head}": c.n_head % c.n_kv_head,
        indivisible + "change one, or give head_dim": not c.head_dim and c.d_model % c.n_head,
        many + f"make {count:,} parameters: use less": count > 2**40 or c.n_layer > 10_000,
        f"rope_theta {c.rope_theta} is not positive": not 0 < c.rope_theta < math.inf,
        f"norm_eps {c.norm_eps} is not positive": not 0 < c.norm_eps < math.inf,
        f"head_dim {d} is odd: rotation turns pairs of dimensions": d % 2,
        f"rope_factor {factor} is below 1: it is new length / trained length": not factor >= 1,
        f"rope_factor {factor} does nothing without rope_scaling": factor > 1 and scaling == "none",
        f"rope_scaling 'ntk' needs head_dim of 4 or more, not {d}": scaling == "ntk" and d < 4,
        "rope_scaling 'yarn' needs rope_original_length, the trained length": original,
        "rope_scaling 'yarn' needs rope_theta above 1": scaling == "yarn" and c.rope_theta <= 1,
        f"length_base {c.length_base} is below 2": c.length_base is not None and c.length_base < 2,
        f"logit_scale {c.logit_scale} is not finite": not math.isfinite(c.logit_scale),
        f"pattern {p!r} has an unknown letter {unknown!r}: use R, r, N and n": unknown,
        untiled + "make n_layer a multiple of its length": not p or c.n_layer % len(p),
        unseen + "give one, such as window = 64": windowed and c.window is None,
    }
    for message, holds in wrong.items():
        require(not holds, message)


def check_settings(
    c: ModelConfig, tokens: Tensor, max_new_tokens: int, temperature=0.0, top_k=None, top_p=None
) -> None:
    """ValueError for a prompt (b t) or settings that no text can be made from."""
    require(tokens.numel() > 0, "the prompt is empty: give at least one token")
    require(max_new_tokens >= 0, f"max_new_tokens {max_new_tokens} is negative")
    require(temperature >= 0, f"temperature {temperature} is negative, or no number: 0 is greedy")
    require(top_k is None or top_k >= 1, f"top_k {top_k} is below 1")
    require(top_p is None or 0 < top_p <= 1, f"top_p {top_p} is not in (0, 1]")
    for token, v in ((tokens.min().item(), c.vocab_size), (tokens.max().item(), c.vocab_size)):
        require(0 <= token < v, f"token {token} is outside the vocabulary of {v}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
