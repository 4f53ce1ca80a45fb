"""model.py: patterns, who reaches whom (by gradient), the layer against a slow written-out one, the
loss, the counts."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import attention
import fast.loss as loss_module
from attention import LayerSpec, rotary_table, rotate, scaled_frequencies
from device import training_loss
from fast.kernels import one_graph
from model import ModelConfig, Transformer, layer_plan

V = 23
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
PATTERNS = ["R", "N", "RN", "rrrN", "Nrrr", "rrrR", "rn", "n"]


def config(pattern="rrrN", n_layer=None, window=3, **more):
    sizes = dict(n_head=4, n_kv_head=2, d_model=16, d_ff=20, vocab_size=V)
    return ModelConfig(
        n_layer=n_layer or len(pattern), pattern=pattern, window=window, **(sizes | more)
    )


def tiny(*args, seed=0, dtype=torch.float64, **more):
    """A model whose every parameter is random, gains too, and large enough for each to matter."""
    torch.manual_seed(seed)
    model = Transformer(config(*args, **more)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
        model.embed_tokens.weight.normal_()
    return model


def text(b=2, t=20, seed=1):
    return torch.randint(V, (b, t), generator=torch.Generator().manual_seed(seed))


# Patterns


R, N, r, n = LayerSpec(True, None), LayerSpec(False, None), LayerSpec(True, 8), LayerSpec(False, 8)


@pytest.mark.parametrize(
    "pattern,n_layer,plan",
    [
        ("R", 3, [R, R, R]),
        ("N", 2, [N, N]),
        ("RN", 4, [R, N, R, N]),
        ("rrrN", 4, [r, r, r, N]),
        ("rrrN", 8, [r, r, r, N, r, r, r, N]),
        ("rrrR", 4, [r, r, r, R]),
        ("Nrrr", 4, [N, r, r, r]),
        ("RRRN", 4, [R, R, R, N]),
        ("rrrrrR", 6, [r, r, r, r, r, R]),
        ("n", 2, [n, n]),
        ("rn", 2, [r, n]),
    ],
)
def test_layer_plans(pattern, n_layer, plan):
    assert layer_plan(config(pattern, n_layer, window=8)) == plan


def test_a_window_that_no_letter_uses_is_harmless():
    assert layer_plan(config("RN", window=8)) == layer_plan(config("RN", window=None)) == [R, N]


@pytest.mark.parametrize(
    "message,fields",
    [
        (
            "pattern 'rxN' has an unknown letter 'x': use R, r, N and n",
            dict(pattern="rxN", n_layer=3),
        ),
        (
            r"pattern 'rrrN' \(4 letters\) does not tile 6 layers: make n_layer a multiple",
            dict(n_layer=6),
        ),
        ("pattern '' .*does not tile 4 layers", dict(pattern="", n_layer=4)),
        (
            "pattern 'rrrN' has a windowed .*no window: give one, such as window = 64",
            dict(window=None),
        ),
        ("window 0 is below 1", dict(window=0)),
        ("window -5 is below 1", dict(window=-5, pattern="R")),
        ("n_layer 0 is below 1", dict(n_layer=0)),
        ("n_head 0 is below 1", dict(n_head=0)),
        ("n_kv_head 0 is below 1", dict(n_kv_head=0)),
        ("d_model 0 is below 1", dict(d_model=0)),
        ("d_ff -1 is below 1", dict(d_ff=-1)),
        ("vocab_size 0 is below 1", dict(vocab_size=0)),
        ("head_dim 0 is below 1", dict(head_dim=0)),
        ("rope_original_length 0 is below 1", dict(rope_original_length=0)),
        ("trained_length 0 is below 1", dict(trained_length=0)),
        ("length_base 1 is below 2", dict(length_base=1)),
        ("n_head 4 is not a multiple of n_kv_head 3", dict(n_kv_head=3)),
        ("n_head 4 is not a multiple of n_kv_head 8", dict(n_kv_head=8)),
        (
            "d_model 18 is not a multiple of n_head 4: change one, or give head_dim",
            dict(d_model=18),
        ),
        ("head_dim 3 is odd: rotation turns pairs", dict(head_dim=3)),
        ("head_dim 5 is odd", dict(d_model=20)),
        ("rope_theta 0.0 is not positive", dict(rope_theta=0.0)),
        ("rope_factor 0.5 is below 1: it is new length / trained length", dict(rope_factor=0.5)),
        ("norm_eps 0.0 is not positive", dict(norm_eps=0.0)),
        (
            "rope_scaling 'linear' is unknown: use one of none, pi, ntk, yarn",
            dict(rope_scaling="linear"),
        ),
        (
            "length_scale 'log' is unknown: use one of none, swan, llama4, drope, ssmax",
            dict(length_scale="log"),
        ),
        (
            "'yarn' needs rope_original_length, the trained length",
            dict(rope_scaling="yarn", rope_factor=4.0),
        ),
    ],
)
def test_config_refuses(message, fields):
    good = dict(
        n_layer=4,
        n_head=4,
        n_kv_head=2,
        d_model=16,
        d_ff=20,
        vocab_size=V,
        pattern="rrrN",
        window=3,
    )
    ModelConfig(**good)
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(good | fields))


def test_a_replaced_config_is_checked_too():
    with pytest.raises(ValueError, match="no window"):
        replace(config("R", window=None), pattern="r")


@pytest.mark.parametrize(
    "built,changed",
    [
        ({}, {"length_scale": "ssmax"}),
        ({"length_scale": "ssmax"}, {"length_scale": "swan"}),
        ({}, {"qk_norm": True}),
        ({"qk_norm": True}, {"qk_norm": False}),
    ],
)
def test_what_owns_weights_cannot_be_switched(built, changed):
    """Not even where a replaced config asks for it; that ssmax be left out can be asked."""
    model = tiny("rN", trained_length=8, **built)
    model.config = replace(model.config, **changed)
    with pytest.raises(ValueError, match="own weights"):
        model(text())
    with pytest.raises(ValueError, match="own weights"):
        model.generate(text(1, 3), 1)
    model.config = replace(model.config, length_scale="none", qk_norm=model.owns[0])
    model(text())


def test_a_length_scale_that_no_letter_uses_is_harmless():
    """As a window is: a phase may bring a full NoPE layer later."""
    assert torch.equal(tiny("rR", length_scale="swan", length_base=9)(text()), tiny("rR")(text()))


def test_a_new_pattern_touches_no_parameter():
    model, tokens = tiny("rrrN"), text()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.state_dict().items()}
    first = model(tokens)
    for pattern in ("R", "N", "Nrrr"):
        model.config = replace(model.config, pattern=pattern)
        born = Transformer(model.config).double()
        born.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens), born(tokens))
        assert not torch.allclose(model(tokens), first, atol=1e-3)
    model.config = replace(model.config, pattern="rrrN")
    assert torch.equal(model(tokens), first)
    assert all(
        (p.data_ptr(), True) == (before[name][0], torch.equal(p, before[name][1]))
        for name, p in model.state_dict().items()
    )


# Who reaches whom, by gradient


def reached(model, t, i, batch=1):
    """(t) bool: the tokens whose embeddings the output at position i depends on."""
    stream = []
    hidden = model.hidden(text(batch, t), layers=stream)
    direction = torch.randn(
        hidden.shape[-1], dtype=hidden.dtype, generator=torch.Generator().manual_seed(2)
    )
    (grad,) = torch.autograd.grad(hidden[0, i] @ direction, stream[0])
    assert not grad[1:].any(), "rows of a batch must not mix"
    return (grad[0] != 0).any(-1).numpy()


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_causal_by_gradient(pattern, backend):
    model = tiny(pattern, n_layer=4)
    model.backend = backend
    for t, i in ((1, 0), (2, 0), (14, 0), (14, 5), (14, 13)):
        expected = np.zeros(t, dtype=bool)
        first = (
            0
            if pattern.upper() == pattern or "N" in pattern or "R" in pattern
            else max(0, i - 4 * (3 - 1))
        )
        expected[first : i + 1] = True
        np.testing.assert_array_equal(reached(model, t, i, batch=2), expected)


@pytest.mark.parametrize("letter", ["r", "n"])
@pytest.mark.parametrize("window,n_layer", [(1, 3), (2, 1), (2, 4), (5, 2), (9, 3)])
def test_windows_alone_reach_this_far_and_no_further(letter, window, n_layer):
    """A query sees window - 1 tokens before itself, and each layer reaches that much further:
    n_layer (W - 1) + 1."""
    t = 40
    seen = reached(tiny(letter, n_layer, window), t, t - 1)
    np.testing.assert_array_equal(seen, np.arange(t) >= t - (n_layer * (window - 1) + 1))


def last_logits(model, tokens):
    return model(tokens)[:, -1]


def test_order_of_the_past():
    """NoPE alone is a bag of words: one N layer cannot tell the order of what came before. Two can,
    since the middle of the sequence has seen different prefixes; and one R layer can, which is what
    rotation is for."""
    tokens = text(1, 12)
    shuffled = torch.cat(
        (tokens[:, torch.randperm(11, generator=torch.Generator().manual_seed(3))], tokens[:, -1:]),
        1,
    )
    assert not torch.equal(tokens, shuffled)
    gap = lambda model: (
        (last_logits(model, tokens) - last_logits(model, shuffled)).abs().max().item()
    )
    assert gap(tiny("N", 1)) < 1e-12  # a sum of 12 terms in another order, float64
    assert gap(tiny("N", 2)) > 1e-3
    assert gap(tiny("R", 1)) > 1e-3


@pytest.mark.parametrize(
    "pattern,window,t", [("N", 3, 9), ("n", 3, 9), ("Nn", 4, 5), ("n", 1, 4), ("n", 30, 9)]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nope_on_a_constant_text_is_uniform(pattern, window, t, backend):
    """Equal tokens without positions have equal scores: the weight of each visible key is 1 /
    (number of visible keys)."""
    model, weights = tiny(pattern, 2, window), []
    model.backend = backend
    logits = model(torch.full((2, t), 7), weights=weights)
    assert len(weights) == 2
    for spec, (w, k_pos) in zip(layer_plan(model.config), weights):
        assert w.shape == (2, 4, t, t) and torch.equal(k_pos, torch.arange(t))
        for i in range(t):
            count = min(i + 1, spec.window or t)
            expected = torch.zeros(t, dtype=w.dtype)
            expected[i + 1 - count : i + 1] = 1 / count
            # float64; scores equal to a rounding
            torch.testing.assert_close(w[:, :, i], expected.expand(2, 4, t), rtol=0, atol=1e-14)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_collecting_weights_changes_nothing(backend, cached):
    """T = 20 is more than twice the window, where auto is banded, which takes no positions."""
    model, tokens, weights = tiny("rrrN"), text(), []
    model.backend = backend
    with torch.no_grad():
        expected = model(tokens)
        got = model(tokens, cache=model.new_cache(2, 30) if cached else None, weights=weights)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert [w.shape for w, _ in weights] == [(2, 4, 20, 20)] * 4
    for (w, k_pos), spec in zip(weights, layer_plan(model.config)):
        torch.testing.assert_close(
            w.sum(-1), torch.ones(2, 4, 20, dtype=w.dtype), rtol=0, atol=1e-14
        )
        assert [(row > 0).sum().item() for row in w[0, 0]] == [
            min(i + 1, spec.window or 20) for i in range(20)
        ]


# The layer, written out


def norm_by_hand(x, gain, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * gain


def turn_by_hand(x, theta):
    """x (t h d): adjacent pairs as complex numbers, float64 throughout."""
    t, _, d = x.shape
    turn = np.exp(1j * np.arange(t)[:, None] * theta ** (-2 * np.arange(d // 2) / d))[:, None]
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack((z.real, z.imag), -1).reshape(x.shape)


def attention_by_hand(layer, h, spec, theta, norm_first=True, scale=None):
    """One sequence h (t c) through a layer's attention, head by head and query by query."""
    w = {name: p.detach().numpy() for name, p in layer.self_attn.named_parameters()}
    t, d = len(h), layer.self_attn.head_dim
    q, k, v = ((h @ w[f"{x}_proj.weight"].T).reshape(t, -1, d) for x in "qkv")
    norm = (
        (lambda x, name: norm_by_hand(x, w[name])) if "q_norm.weight" in w else (lambda x, name: x)
    )
    turn = (lambda x: turn_by_hand(x, theta)) if spec.rope else (lambda x: x)
    if norm_first:
        q, k = turn(norm(q, "q_norm.weight")), turn(norm(k, "k_norm.weight"))
    else:
        q, k = norm(turn(q), "q_norm.weight"), norm(turn(k), "k_norm.weight")
    if scale is not None:
        q = q * scale
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        group = head // (q.shape[1] // k.shape[1])
        for i in range(t):
            keys = slice(max(0, i + 1 - (spec.window or t)), i + 1)
            p = np.exp(k[keys, group] @ q[i, head] / math.sqrt(d))
            out[i, head] = p / p.sum() @ v[keys, group]
    return out.reshape(t, -1) @ w["o_proj.weight"].T


def model_by_hand(model, tokens, **more):
    """Logits of one sequence by the paper's formulas: x + attn(LN(x)) + mlp(LN(x)), one norm for
    both."""
    c = model.config
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    x = w["embed_tokens.weight"][tokens]
    for i, (layer, spec) in enumerate(zip(model.layers, layer_plan(c))):
        p = f"layers.{i}."
        h = norm_by_hand(x, w[p + "input_layernorm.weight"], c.norm_eps)
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        x = (
            x
            + attention_by_hand(layer, h, spec, c.rope_theta, **more)
            + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
        )
    return (
        norm_by_hand(x, w["norm.weight"], c.norm_eps)
        @ w.get("lm_head.weight", w["embed_tokens.weight"]).T
        * c.logit_scale
    )


@pytest.mark.parametrize("pattern", ["R", "N", "rrrN", "n"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(qk_norm=True),
        dict(n_kv_head=1),
        dict(n_kv_head=4, head_dim=6),
        dict(tie_embeddings=False, logit_scale=0.25),
        dict(norm_eps=0.1, rope_theta=50.0),
    ],
    ids=lambda more: "-".join(more) or "plain",
)
def test_the_model_is_the_formula(pattern, more):
    model, tokens = tiny(pattern, **more), text(2, 11)
    for row in range(2):
        # float64 except for the float32 rotary table: angles below 11 are off by 11 x 2^-23 =
        # 1.3e-6 rad, logits are about 5
        np.testing.assert_allclose(
            model(tokens)[row].detach(),
            model_by_hand(model, tokens[row]),
            atol=1e-4 if "N" != pattern != "n" else 1e-11,
        )


def test_qk_norm_comes_before_the_rotation():
    """The order matters since LayerNorm takes the mean off and has a gain per dimension; swapped,
    the test above must fail."""
    model, tokens = tiny("R", qk_norm=True), text(1, 11)[0]
    got = model(tokens[None])[0].detach().numpy()
    assert np.abs(got - model_by_hand(model, tokens)).max() < 1e-4
    assert np.abs(got - model_by_hand(model, tokens, norm_first=False)).max() > 1e-2
    assert model.layers[0].self_attn.q_norm.weight.shape == (4,)  # one gain for all heads


@pytest.mark.parametrize("kind", ["swan", "llama4", "drope", "ssmax"])
def test_length_scale_acts_on_q_of_full_nope_layers_alone(kind):
    model, tokens = tiny("N", length_scale=kind, length_base=4), text(1, 11)
    n = np.arange(11)
    scale = {
        "swan": np.log(4 + n) / np.log(4),
        "llama4": 1 + 0.1 * np.log(1 + (n + 1) // 4),
        "drope": 1 + 0.412 * np.log(np.maximum((n + 1) / 4, 1)),
        "ssmax": np.log(np.maximum(n + 1, 2)),
    }[kind][:, None, None]
    if kind == "ssmax":
        scale = scale * model.layers[0].self_attn.s_scale.detach().numpy()[:, None]
    expected = model_by_hand(model, tokens[0], scale=scale)
    # the scale is float32
    np.testing.assert_allclose(model(tokens)[0].detach(), expected, atol=1e-5)
    for pattern in ("R", "r", "n"):  # elsewhere the switch does nothing
        model.config = replace(model.config, pattern=pattern)
        with_scale = model(tokens)
        model.config = replace(model.config, length_scale="none")
        assert torch.equal(model(tokens), with_scale)
        model.config = replace(model.config, length_scale=kind)


def test_trained_length_is_the_default_base():
    given, kept = (
        tiny("N", length_scale="swan", **base)
        for base in (dict(length_base=9), dict(trained_length=9))
    )
    assert torch.equal(given(text()), kept(text()))
    both = tiny("N", length_scale="swan", length_base=9, trained_length=5)
    assert torch.equal(given(text()), both(text()))


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
def test_rope_scaling_reaches_the_layers(scaling):
    model, tokens = (
        tiny("R", rope_scaling=scaling, rope_factor=4.0, rope_original_length=16),
        text(1, 11),
    )
    frequencies, amplitude = scaled_frequencies(4, 10_000.0, scaling, 4.0, 16)
    stream, layer = [], model.layers[0]
    model.hidden(tokens, layers=stream)
    h = layer.input_layernorm(stream[0])
    table = rotary_table(torch.arange(11), frequencies, amplitude)
    split = lambda x: x.unflatten(-1, (-1, 4)).transpose(1, 2)
    q, k, v = (split(getattr(layer.self_attn, f"{x}_proj")(h)) for x in "qkv")
    y = attention.attend(rotate(q, table), rotate(k, table), v, backend="reference")
    expected = stream[0] + layer.self_attn.o_proj(y.transpose(1, 2).flatten(2)) + layer.mlp(h)
    torch.testing.assert_close(stream[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", ["rrrN", "rn", "R"])
def test_backends_agree_in_the_model(pattern):
    model, tokens = tiny(pattern), text(2, 50)
    logits = {}
    with torch.no_grad():  # flex has no backward pass on CPU
        for model.backend in attention.BACKENDS:
            logits[model.backend] = model(tokens)
    for backend in attention.BACKENDS:
        torch.testing.assert_close(logits[backend], logits["reference"], rtol=0, atol=1e-11)


@pytest.mark.parametrize("pattern", ["r", "R"])
@pytest.mark.parametrize("cached", [False, True])
def test_an_unknown_backend_is_refused(pattern, cached):
    """Whatever layers there are: a misspelt --backend must not run as something else."""
    model = tiny(pattern)
    model.backend = "fast"
    with pytest.raises(ValueError, match="'fast' is unknown"):
        model(text(), cache=model.new_cache(2, 20) if cached else None)


def test_one_mask_for_each_window(monkeypatch):
    made = []
    kernel_for = attention.kernel_for
    monkeypatch.setattr(attention, "kernel_for", lambda *a: made.append(a[0]) or kernel_for(*a))
    model = tiny("rrrN", n_layer=8)
    model.backend = "sdpa"
    model(text())
    assert sorted(made, key=str) == [3, None]


def test_hidden_collects_the_residual_stream():
    model, tokens, stream = tiny("rrrN"), text(), []
    hidden = model.hidden(tokens, layers=stream)
    assert [x.shape for x in stream] == [(2, 20, 16)] * 5
    assert torch.equal(stream[0], model.embed_tokens(tokens)) and torch.equal(
        model.norm(stream[-1]), hidden
    )
    assert torch.equal(model.unembed(hidden), model(tokens))


# Loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


LOSSES = {
    "mean": (False, False),
    "ignored": (True, False),
    "weights": (False, True),
    "ignored-weights": (True, True),
}


@pytest.mark.parametrize("chunk", [None, 1, 7 * V, 10**9])
@pytest.mark.parametrize("ignored,weighted", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    "more",
    [{}, dict(logit_scale=0.25), dict(tie_embeddings=False, logit_scale=3.0)],
    ids=["tied", "scaled", "untied"],
)
def test_loss_is_cross_entropy(monkeypatch, more, ignored, weighted, chunk):
    """By chunks (of one row, of seven, all at once) and against F.cross_entropy on whole logits,
    gradients too."""
    if chunk:
        monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", chunk)
        monkeypatch.setattr(loss_module, "LEAST_ROWS", 1)
    model, tokens, targets = tiny("rN", **more), text(2, 9), text(2, 9, seed=5)
    if ignored:
        targets[0, :4] = targets[1, -1] = -100
    weights = (
        torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
        if weighted
        else None
    )
    if weighted:
        weights[1, 2:6] = 0  # rows that are left out
    loss = model.loss(tokens, targets, weights)
    each = F.cross_entropy(
        model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    ).view(2, 9)
    expected = (each * weights).sum() if weighted else each.sum() / (targets != -100).sum()
    # the default weights are float32: 2^-24 of a loss of about 5
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    got, want = gradients(model, 3 * loss), gradients(model, 3 * expected)
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-6, atol=1e-7 if weights is None else 1e-12
        )


def test_a_target_outside_the_vocabulary_is_refused():
    """Only -100 means "does not count": any other negative number is a mistake, not the token 0."""
    model, tokens = tiny("rN"), text()
    for wrong in (-1, V):
        with pytest.raises(IndexError):
            model.loss(tokens, torch.full_like(tokens, wrong))


def test_rows_without_weight_are_left_out():
    """Even what is not a number: nobody computes it."""
    hidden = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    hidden[0, 2] = math.nan
    matrix, targets = torch.randn(5, 8), torch.tensor([[1, 2, 3, 4]])
    weights = torch.tensor([[0.5, 1.0, 0.0, 2.0]])
    loss = loss_module.linear_cross_entropy(hidden, matrix, targets, weights, 1.0)
    each = F.cross_entropy(hidden[0] @ matrix.T, targets[0], reduction="none")
    torch.testing.assert_close(loss, (each * weights[0])[[0, 1, 3]].sum())


def test_loss_with_no_target_is_zero():
    model, tokens = tiny("rN"), text()
    loss = model.loss(tokens, torch.full_like(tokens, -100))
    assert loss == 0 and not any(g.any() for g in gradients(model, loss).values())


def test_micro_batches_add_up():
    """Weights of 1/N over the whole batch: its halves' losses and gradients sum to the whole's."""
    model, tokens, targets = tiny("rN"), text(4, 9), text(4, 9, seed=5)
    weights = torch.full((4, 9), 1 / 36, dtype=torch.float64)
    whole = gradients(model, model.loss(tokens, targets, weights))
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        model.loss(tokens[half], targets[half], weights[half]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=0, atol=1e-14)


def test_loss_in_bfloat16():
    """A bfloat16 model keeps log-softmax and the sum in float32, and hands each parameter a
    gradient of its own kind."""
    model, tokens = tiny("rN", dtype=torch.bfloat16), text()
    loss = model.loss(tokens, tokens)
    expected = F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-2, atol=0)  # logits rounded to 2^-9
    assert all(
        g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients(model, loss).values()
    )


def test_autocast_narrows_the_residual_stream():
    """Its products take bfloat16, so what is added up between them is bfloat16 too; parameters,
    the loss and every gradient stay float32."""
    model, tokens = tiny("rN", dtype=torch.float32), text()
    expected = model.loss(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        kept = []
        hidden = model.hidden(tokens, layers=kept)
        loss = model.loss(tokens, tokens)
    assert {x.dtype for x in (*kept, hidden)} == {torch.bfloat16}
    assert loss.dtype == torch.float32 and loss != expected
    # Logits of a few units, each rounded to 2^-9 several times on its way.
    torch.testing.assert_close(loss, expected, rtol=0, atol=0.02)
    for g, fine in zip(gradients(model, loss).values(), gradients(model, expected).values()):
        assert g.dtype == torch.float32
        assert (g - fine).norm() < 0.05 * fine.norm()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 and the meta device alone
        assert tiny("rN").hidden(tokens).dtype == torch.float64
        assert tiny("rN").to("meta").hidden(tokens.to("meta")).is_meta


@pytest.mark.parametrize("pattern", ["rrrN", "R"])
def test_recomputation_is_bit_for_bit(pattern):
    model, tokens = tiny(pattern, n_layer=4, dtype=torch.float32), text()
    plain = gradients(model, model.loss(tokens, tokens))
    model.recompute = True
    calls = Counter()
    model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.update(["forward"]))
    again = gradients(model, model.loss(tokens, tokens))
    assert calls["forward"] == 2, "nothing was recomputed"
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = Transformer(config("rrrN", d_model=32, d_ff=64))
    tokens, targets = text(2, 16), text(2, 16, seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    first = model.loss(tokens, targets).item()
    assert abs(first - math.log(V)) < 0.5  # a fresh model knows nothing
    for _ in range(60):
        loss = model.loss(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.loss(tokens, targets) < 0.1


# Parameters, counts and names


@pytest.mark.parametrize("tied", [True, False])
def test_initial_standard_deviations(tied):
    torch.manual_seed(0)
    model = Transformer(
        config("rrrN", d_model=64, d_ff=96, vocab_size=300, head_dim=12, tie_embeddings=tied)
    )
    fan_in = {
        "q_proj": 64,
        "k_proj": 64,
        "v_proj": 64,
        "o_proj": 48,
        "gate_proj": 64,
        "up_proj": 64,
        "down_proj": 96,
        "lm_head": 64,
    }
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
            continue
        module = name.split(".")[-2]
        expected = 0.02 if module == "embed_tokens" else fan_in[module] ** -0.5
        if module in ("o_proj", "down_proj"):
            expected /= math.sqrt(2 * 4)
        # a sample's standard deviation is off by 1 / sqrt(2 n); five of those
        assert p.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * p.numel())), name
        assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name


@pytest.mark.parametrize("qk_norm,ssmax", [(False, False), (True, True)])
def test_parameter_counts(qk_norm, ssmax):
    """c = 16, 4 heads and 2 key/value heads of width 4, d_ff = 20, 4 layers."""
    count = lambda **more: sum(
        p.numel()
        for p in Transformer(
            config("rrrN", qk_norm=qk_norm, length_scale="ssmax" if ssmax else "none", **more)
        ).parameters()
    )
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 20 + 16 + (2 * 4) * qk_norm + 4 * ssmax
    assert count() == 4 * layer + 16 + V * 16
    assert count(tie_embeddings=False) == 4 * layer + 16 + 2 * V * 16


def test_the_vocabulary_multiplies_once():
    assert (
        Transformer(config()).matmul_parameters()
        == Transformer(config(tie_embeddings=False)).matmul_parameters()
        == 4 * (3 * 256 + 3 * 320) + V * 16
    )


@pytest.mark.parametrize(
    "more",
    [{}, dict(tie_embeddings=False), dict(qk_norm=True, n_kv_head=1)],
    ids=["tied", "untied", "qk_norm"],
)
def test_flops_are_counted_right(monkeypatch, more):
    """6 N a token, forward and backward, by PyTorch's own counter with attention taken out; in
    chunks of the loss too."""
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 7 * V)
    monkeypatch.setattr(loss_module, "LEAST_ROWS", 1)
    model, tokens = Transformer(config("rrrN", **more)), text(2, 20)
    # a stand-in for the kernel: the right shape, no products, and a gradient for each of q, k and v
    kernel = lambda q, k, v: q + v.repeat_interleave(q.shape[1] // v.shape[1], 1) * k.mean()
    monkeypatch.setattr(attention, "kernel_for", lambda *_: kernel)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    assert counter.get_total_flops() == 6 * model.matmul_parameters() * tokens.numel()


def test_evaluation_costs_a_third():
    """Without gradients the loss does the forward products alone: 2 N a token."""
    model, tokens = Transformer(config("N", 1)), text(2, 20)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens)
    products = sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(op)
    )
    assert products == 2 * model.matmul_parameters() * tokens.numel()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 3, 10])
def test_flops_know_windows(pattern, length):
    model = Transformer(config(pattern, 4, head_dim=6))
    pairs = sum(
        min(i + 1, spec.window or length)
        for spec in layer_plan(model.config)
        for i in range(length)
    )
    assert model.flops_per_token(length) == pytest.approx(
        6 * model.matmul_parameters() + 12 * 6 * 4 * pairs / length
    )


def test_names_are_hugging_faces():
    names = ["embed_tokens.weight"]
    for i in range(2):
        names += [f"layers.{i}.input_layernorm.weight"]
        names += [f"layers.{i}.self_attn.{x}_proj.weight" for x in "qkvo"] + [
            f"layers.{i}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")
        ]
    assert sorted(Transformer(config("rN")).state_dict()) == sorted(names + ["norm.weight"])
    untied = Transformer(
        config("rN", tie_embeddings=False, qk_norm=True, length_scale="ssmax")
    ).state_dict()
    extra = [
        f"layers.{i}.self_attn.{x}"
        for i in range(2)
        for x in ("q_norm.weight", "k_norm.weight", "s_scale")
    ]
    assert sorted(untied) == sorted(names + ["norm.weight", "lm_head.weight"] + extra)


# What it refuses


@pytest.mark.parametrize(
    "message,tokens,more",
    [
        (f"token {V} is outside the vocabulary of {V}", [[1, V]], {}),
        ("token -1 is outside the vocabulary", [[-1, 2]], {}),
        ("the prompt is empty", [[]], {}),
        ("max_new_tokens -1 is negative", [[1]], dict(max_new_tokens=-1)),
        ("temperature -0.5 is negative", [[1]], dict(temperature=-0.5)),
        ("temperature nan", [[1]], dict(temperature=math.nan)),
        ("top_k 0 is below 1", [[1]], dict(top_k=0)),
        ("top_p 0 is not in", [[1]], dict(top_p=0)),
        ("top_p 1.5 is not in", [[1]], dict(top_p=1.5)),
    ],
)
def test_generate_refuses(message, tokens, more):
    with pytest.raises(ValueError, match=message):
        tiny().generate(torch.tensor(tokens, dtype=torch.long), **more)


def test_generate_refuses_no_rows():
    with pytest.raises(ValueError, match="the prompt is empty"):
        tiny().generate(torch.zeros(0, 3, dtype=torch.long))


def test_a_compiled_loss_at_one_length_after_another():
    """As `train.py --compile` goes from phase to phase: a graph for each length, and no symbols."""
    model, traced = tiny("rN"), []
    trace = lambda graph, _: traced.append(graph) or graph
    loss = one_graph(model.loss, backend=trace, dynamic=False)
    for t in (70, 1100, 70):
        tokens = text(1, t)
        compiled, eager = (
            gradients(model, f(tokens[:, :-1], tokens[:, 1:])) for f in (loss, model.loss)
        )
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-11)
    assert len(traced) == 2 and not any("sym_size" in graph.code for graph in traced)
    torch._dynamo.reset()


def test_a_block_mask_is_part_of_the_compiled_graph():
    """FlexAttention's, which CUDA's windows have: no break, and rotation by real numbers."""
    model, tokens, graphs = tiny("rN").requires_grad_(False), text(2, 300), []
    model.backend = "flex"
    trace = lambda graph, _: graphs.append(graph) or graph
    loss = one_graph(model.loss, backend=trace, dynamic=False)
    for _ in range(2):
        got = loss(tokens[:, :-1], tokens[:, 1:])
        torch.testing.assert_close(got, model.loss(tokens[:, :-1], tokens[:, 1:]))
    assert len(graphs) == 1 and "view_as_complex" not in graphs[0].code
    torch._dynamo.reset()


def test_one_graph_compiles_more_shapes_than_torchs_limit_or_says_so():
    traced = []
    trace = lambda graph, _: traced.append(graph) or graph
    double = one_graph(lambda x: 2 * x, backend=trace, dynamic=False)
    for n in range(2, 14):
        double(torch.zeros(n))
    assert len(traced) == 12
    with torch._dynamo.config.patch(recompile_limit=1):
        with pytest.raises(Exception, match="fullgraph"):
            double(torch.zeros(100))
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_compiled_loss_is_one_graph_and_guards_on_nothing_hidden(device):
    """The second step, a new configuration that changes no layer, and evaluation between the steps
    trace nothing anew: of what training compiles for either device."""
    model, traced = tiny("rN"), []
    loss = training_loss(model, torch.device(device))
    loss = one_graph(loss, backend=lambda graph, _: traced.append(graph) or graph)
    tokens = text(2, 40)
    for trained_length in (None, None, 40):
        model.config = replace(model.config, trained_length=trained_length)
        gradients(model, loss(tokens[:, :-1], tokens[:, 1:]))
        with torch.no_grad():
            model(tokens)
    assert len(traced) == 1
    torch._dynamo.reset()
