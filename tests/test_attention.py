"""attention.py against slow, obvious specifications: numpy loops, formulas from the papers, and
PyTorch's own mask maker."""

import math
import statistics
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

import attention
from attention import (
    attend,
    attention_weights,
    choose_backend,
    kernel_for,
    length_scale,
    rotary_table,
    rotate,
    scaled_frequencies,
    visible,
    visible_pairs,
)
from fast.kernels import flex_mask, sdpa

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

# (length, window): one key, nothing, exactly and just over the length, the edges of banded's blocks
# (a quarter of the window, 32 queries at least), and windows that reach back one to five blocks.
SHAPES = [
    *((1, 1), (1, 7), (5, 1), (130, 1), (7, 3), (7, 7), (7, 8), (64, 3), (65, 3), (129, 64)),
    *((129, 65), (200, 63), (63, 32), (64, 33), (65, 33), (191, 64), (192, 64), (193, 65)),
    *((300, 135), (300, 100), (257, 128), (513, 255), (513, 256), (520, 257), (600, 258)),
    *((1030, 513), (1030, 514), (700, 600), (1210, 600)),
]
HEADS = [(1, 1), (4, 2), (3, 1), (2, 2)]  # (query, key/value): one, grouped, multi-query, plain


def qkv(t, s=None, heads=(2, 1), d=4, batch=2, dtype=torch.float64, seed=0, grad=True):
    make = torch.Generator().manual_seed(seed)
    sizes = ((heads[0], t), (heads[1], s or t), (heads[1], s or t))
    return [
        torch.randn(batch, h, n, d, generator=make, dtype=dtype).requires_grad_(grad)
        for h, n in sizes
    ]


def seen_by_hand(t, window):
    """(t t) bool: the window in words. A query sees itself and the window - 1 tokens before it."""
    mask = np.zeros((t, t), dtype=bool)
    for i in range(t):
        mask[i, max(0, i + 1 - (window or t)) : i + 1] = True
    return mask


def attend_by_hand(q, k, v, window):
    """Softmax attention, one query at a time, in numpy float64."""
    q, k, v = (x.detach().numpy() for x in (q, k, v))
    out = np.zeros(q.shape[:3] + v.shape[3:])
    group = q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(q.shape[:3]):
        first = max(0, i + 1 - (window or q.shape[2]))
        scores = k[b, h // group, first : i + 1] @ q[b, h, i] / math.sqrt(q.shape[3])
        p = np.exp(scores - scores.max())
        out[b, h, i] = p / p.sum() @ v[b, h // group, first : i + 1]
    return out


# Backends


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_reference_is_the_definition(heads, window):
    q, k, v = qkv(9, heads=heads)
    # float64, sums of at most 9 terms of order 1: a hundred roundings
    np.testing.assert_allclose(
        attend(q, k, v, window, "reference").detach(), attend_by_hand(q, k, v, window), atol=1e-14
    )


@pytest.mark.parametrize("t,window", SHAPES)
def test_windowed_backends_equal_reference_with_gradients(t, window):
    inputs = qkv(t, heads=HEADS[(t + window) % len(HEADS)], batch=1 if t > 500 else 2)
    expected = attend(*inputs, window, "reference")
    upstream = torch.randn(
        expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1)
    )
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    for backend in ("sdpa", "banded", "auto"):
        out = attend(*inputs, window, backend)
        # float64, at most 600 terms of order 1 in another order: 600 x 2e-16 at worst; a key too
        # many or too few is 1e-3
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        for got, want in zip(torch.autograd.grad(out, inputs, upstream), expected_gradients):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("t,window", [(1, 1), (140, 1), (140, 33), (200, 65)])
def test_every_head_layout(heads, t, window):
    q, k, v = qkv(t, heads=heads, grad=False)
    expected = attend(q, k, v, window, "reference")
    # eager flex takes a second
    for backend in ("sdpa", "banded", "auto") + (("flex",) if window == 33 else ()):
        torch.testing.assert_close(attend(q, k, v, window, backend), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("t", [1, 2, 64, 65, 129, 300, 1024, 1025])
def test_full_attention_with_gradients(backend, t):
    inputs = qkv(t, heads=(4, 2))
    out, expected = (attend(*inputs, None, name) for name in (backend, "reference"))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for got, want in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected))):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "t,window", [(1, 1), (128, 128), (129, 128), (300, None), (300, 1), (300, 130), (140, 999)]
)
def test_flex_forward_on_cpu_equals_reference(t, window):
    q, k, v = qkv(t, heads=(4, 2), grad=False)
    torch.testing.assert_close(
        attend(q, k, v, window, "flex"), attend(q, k, v, window, "reference"), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("which", [0, 1, 2])
def test_flex_refuses_to_train_on_cpu(which):
    inputs = qkv(8, grad=False)
    inputs[which].requires_grad_()
    with pytest.raises(ValueError, match="flex.*no backward.*CPU.*banded"):
        attend(*inputs, 3, "flex")


@pytest.mark.parametrize(
    "t,s,window", [(3, 10, None), (3, 10, 4), (1, 10, 4), (1, 10, None), (5, 2, 9)]
)
@pytest.mark.parametrize("backend", ["sdpa", "auto"])
def test_positions_in_any_order(backend, t, s, window):
    """Keys in shuffled slots, an empty slot among them: the positions decide, not the order."""
    q, k, v = qkv(t, s, heads=(4, 2))
    k_pos = torch.randperm(s, generator=torch.Generator().manual_seed(2)) + 20 - s  # 20 - s .. 19
    k_pos[k_pos == 18] = -1
    q_pos = torch.arange(20 - t, 20) if t <= s else torch.arange(19, 19 + t)
    out = attend(q, k, v, window, backend, q_pos=q_pos, k_pos=k_pos)
    # one query at a time, over a sorted copy of just the keys it may see
    for i, query in enumerate(q_pos.tolist()):
        keys = sorted(
            (p, slot)
            for slot, p in enumerate(k_pos.tolist())
            if p >= 0 and p <= query and query - p < (window or 99)
        )
        slots = [slot for _, slot in keys]
        assert slots, "the example must leave every query a key"
        alone = torch.softmax(
            q[:, :, i, None] @ k[:, :, slots].repeat_interleave(2, 1).mT / 2, -1
        ) @ v[:, :, slots].repeat_interleave(2, 1)
        torch.testing.assert_close(out[:, :, i, None], alone, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        out, attend(q, k, v, window, "reference", q_pos, k_pos), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "banded", "flex", "auto"])
def test_one_kernel_serves_every_layer_of_its_window(backend, window):
    """A kernel with its mask made is a function of (q, k, v) alone, and keeps nothing of them."""
    if (backend, window) == ("banded", None):
        return  # banded is for windows
    kernel = kernel_for(window, 70, CPU, backend)
    for seed in (0, 1):
        q, k, v = qkv(70, grad=False, seed=seed)
        assert torch.equal(kernel(q, k, v), attend(q, k, v, window, backend))


# Who sees whom


@pytest.mark.parametrize(
    "t,window",
    [
        (1, 1),
        (9, None),
        (9, 1),
        (9, 4),
        (9, 9),
        (9, 50),
        (140, 1),
        (140, 65),
        (400, 66),
        (600, 258),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "banded", "flex", "auto"])
def test_keys_per_row(backend, t, window):
    """Query i sees min(i + 1, W) keys and they are the right ones: equal scores spread the weight
    evenly over what is seen, and values that are one-hot by key give the weights back."""
    if (backend, window) == ("banded", None) or backend == "flex" and t not in (9, 140):
        return  # banded is for windows, and eager flex is slow
    q, k = (
        torch.zeros(1, 1, t, 4, dtype=torch.float64),
        torch.zeros(1, 1, t, 4, dtype=torch.float64),
    )
    if backend == "flex":  # which wants keys and values of one width
        q = k = torch.zeros(1, 1, t, t, dtype=torch.float64)
    weights = attend(q, k, torch.eye(t, dtype=torch.float64)[None, None], window, backend)[
        0, 0
    ].numpy()
    mask = seen_by_hand(t, window)
    assert (mask.sum(1) == [min(i + 1, window or t) for i in range(t)]).all()
    assert ((weights != 0) == mask).all()
    # 1/n to a rounding
    np.testing.assert_allclose(weights, mask / mask.sum(1, keepdims=True), atol=1e-15)
    if t == 9:
        np.testing.assert_array_equal(attention_weights(q, k, window)[0, 0].numpy() != 0, mask)


@pytest.mark.parametrize("t", [1, 2, 17])
@pytest.mark.parametrize("window", [None, 1, 2, 16, 17, 18])
def test_visible_and_its_count(t, window):
    positions = torch.arange(t)
    mask = visible(positions[:, None], positions[None, :], window)
    np.testing.assert_array_equal(mask.numpy(), seen_by_hand(t, window))
    assert visible_pairs(t, window) == mask.sum().item()


def test_an_empty_slot_is_never_seen():
    assert not visible(torch.arange(3)[:, None], torch.full((1, 2), -1), 9).any()


def densified(mask, t):
    """(t t) bool of a BlockMask as a kernel reads it: full blocks whole, partial ones through
    mask_mod; and the block kinds."""
    size = mask.BLOCK_SIZE[0]
    dense, kinds = (
        torch.zeros(t, t, dtype=torch.bool),
        torch.zeros(-(-t // size), -(-t // size), dtype=torch.int),
    )
    rows = torch.arange(t)
    element = mask.mask_mod(0, 0, rows[:, None], rows[None, :])
    for kind, counts, indices in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for i in range(kinds.shape[0]):
            for j in indices[0, 0, i, : counts[0, 0, i]].tolist():
                assert kinds[i, j] == 0, "a block listed twice is counted twice"
                kinds[i, j] = kind
                at = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                dense[at] = True if kind == 2 else element[at]
    return dense, kinds


@pytest.mark.parametrize("t", [1, 127, 128, 129, 256, 400, 512, 650])
@pytest.mark.parametrize("window", [None, 1, 2, 127, 128, 129, 255, 256, 300, 5000])
def test_flex_mask_equals_torchs(t, window):
    ours = flex_mask(t, window, CPU, visible)
    torchs = create_block_mask(
        lambda b, h, q, k: visible(q, k, window), None, None, t, t, device="cpu"
    )
    assert ours.shape == torchs.shape and ours.BLOCK_SIZE == torchs.BLOCK_SIZE
    dense, kinds = densified(ours, t)
    np.testing.assert_array_equal(dense.numpy(), seen_by_hand(t, window))
    # blocks visited, so no key block is read in vain
    assert torch.equal(ours.to_dense(), torchs.to_dense())
    # PyTorch calls a ragged last row of blocks partial; we may call it whole, and the kernel checks
    # bounds.
    whole = t // 128
    assert torch.equal(kinds[:whole], densified(torchs, t)[1][:whole])
    # the transposed lists, for the backward pass
    queries = [mask.q_num_blocks + mask.full_q_num_blocks for mask in (ours, torchs)]
    assert torch.equal(*queries)
    for kind in ("", "full_"):
        by_row, by_column = (
            {
                (i, j)
                for i, (n, row) in enumerate(
                    zip(
                        getattr(ours, f"{kind}{side}_num_blocks")[0, 0].tolist(),
                        getattr(ours, f"{kind}{side}_indices")[0, 0].tolist(),
                    )
                )
                for j in row[:n]
            }
            for side in ("kv", "q")
        )
        assert by_row == {(i, j) for j, i in by_column}


@pytest.mark.parametrize(
    "backend,t,window",
    [
        ("reference", 12, 5),
        ("sdpa", 12, None),
        ("sdpa", 12, 5),
        ("banded", 150, 40),
        ("banded", 12, 5),
    ],
)
def test_causal_and_within_the_window(backend, t, window):
    inputs = qkv(t, heads=(2, 2), batch=1)
    out = attend(*inputs, window, backend)
    mask = seen_by_hand(t, window)
    for i in (0, 1, t // 2, t - 1):
        reached = torch.autograd.grad(out[0, 0, i].square().sum(), inputs, retain_graph=True)
        for name, grad in zip("qkv", reached):
            touched = (grad[0, 0] != 0).any(-1).numpy()
            expected = np.arange(t) == i if name == "q" else mask[i].copy()
            if i == 0 and name in "qk" or window == 1:
                continue  # one key: its weight is 1 whatever q and k say
            np.testing.assert_array_equal(touched, expected)


# What cannot be done is refused


@pytest.mark.parametrize(
    "message,arguments",
    [
        ("'fast' is unknown: use one of auto, reference, sdpa, banded, flex", dict(backend="fast")),
        ("'banded' is for windows .* use 'sdpa'", dict(backend="banded")),
        (
            "'banded' takes whole sequences",
            dict(backend="banded", window=3, q_pos=torch.arange(6), k_pos=torch.arange(6)),
        ),
        (
            "'flex' takes whole sequences",
            dict(backend="flex", window=3, q_pos=torch.arange(6), k_pos=torch.arange(6)),
        ),
        ("window 0 sees nothing.* use 1 or more", dict(window=0)),
        ("window -2 sees nothing", dict(window=-2)),
        ("give both q_pos and k_pos", dict(q_pos=torch.arange(6))),
        ("give both q_pos and k_pos", dict(k_pos=torch.arange(6))),
        ("give both q_pos and k_pos", dict(k_pos=torch.arange(6), backend="reference")),
    ],
)
def test_attend_and_its_kernel_refuse(message, arguments):
    with pytest.raises(ValueError, match=message):
        attend(*qkv(6, grad=False), **arguments)
    if "give both" not in message:  # of which attend alone knows the keys
        with pytest.raises(ValueError, match=message):
            kernel_for(**{"window": None, "t": 6, "device": CPU} | arguments)


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_attend_refuses_shapes(backend):
    window = None if backend == "sdpa" else 3
    with pytest.raises(ValueError, match="2 queries over 6 keys: give both q_pos and k_pos"):
        attend(*qkv(2, 6, grad=False), window=window, backend=backend)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key/value heads"):
        attend(*qkv(6, heads=(3, 2), grad=False), window=window, backend=backend)
    with pytest.raises(ValueError, match="window 0"):
        attend(*qkv(6, grad=False), window=0, backend=backend)


def test_attention_weights_refuses_a_guess():
    q, k, _ = qkv(2, 6, grad=False)
    with pytest.raises(ValueError, match="2 queries over 6 keys"):
        attention_weights(q, k)


def test_auto():
    cuda = torch.device("cuda")
    for device, window, length, cached, choice in [
        (CPU, None, 100, False, "sdpa"),
        (CPU, 16, 100, False, "banded"),
        (CPU, 16, 31, False, "sdpa"),
        (CPU, 16, 32, False, "banded"),
        (CPU, 16, 100, True, "sdpa"),
        (cuda, 16, 100, False, "flex"),
        (cuda, 16, 16, False, "sdpa"),
        (cuda, None, 100, False, "sdpa"),
        (cuda, 16, 1, True, "sdpa"),
    ]:
        assert choose_backend("auto", window, length, device, cached) == choice
    # narrower than FlexAttention's kernels take
    assert choose_backend("auto", 16, 100, cuda, head_width=8) == "banded"
    assert choose_backend("reference", 16, 100, CPU, cached=True) == "reference"  # a name is itself


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA, as do all made from it."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window,backend", [(None, "sdpa"), (64, "sdpa"), (64, "banded")])
def test_what_is_asked_of_cudas_fused_kernels(window, backend, dtype, monkeypatch):
    """Groups with a mask or in float32 would go to the kernel that writes out all scores. cuDNN
    plans for each length of a cache, and its gradients under a mask were wrong. The tokens are so
    many that the CPU's own ways are out of it."""
    asked, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, mask=None, dropout=0.0, is_causal=False, enable_gqa=False):
        asked.append((mask is not None, enable_gqa, torch.backends.cuda.cudnn_sdp_enabled()))
        return real(q, k, v, mask, dropout, is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = (x.as_subclass(OnCuda) for x in qkv(1100, heads=(4, 2), d=8, dtype=dtype, grad=False))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    expected = attend(q, k, v, window, "reference")
    got = attend(q, k, v, window, backend)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    calls = len(asked)
    assert calls > 0
    for t in (64, 1):  # a chunk under a cache, and a token, which goes to none of them
        k_pos = torch.arange(1100)
        got = attend(q[:, :, -t:], k, v, window, "sdpa", k_pos[-t:], k_pos)
        torch.testing.assert_close(got, expected[:, :, -t:], rtol=0, atol=tolerance)
    torch.testing.assert_close(
        sdpa(q[:, :, -1:], k, v),
        attend(q[:, :, -1:], k, v, None, "reference", k_pos[-1:], k_pos),
        rtol=0,
        atol=tolerance,
    )
    assert len(asked) == calls + 1
    for masked, grouped, cudnn in asked:
        assert grouped == (not masked and dtype == torch.bfloat16)
        assert cudnn != masked


# Rotation


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def turned(x, theta=10_000.0, positions=None, frequencies=None):
    """x (b t h d), turned by real pairs; the product of complex numbers must say the same."""
    if frequencies is None:
        frequencies, _ = scaled_frequencies(x.shape[-1], theta)
    positions = torch.arange(x.shape[1]) if positions is None else positions
    table = rotary_table(positions, frequencies)
    real = rotate(x.transpose(1, 2), table)
    # One rounding more or less of the result's kind; where the angle is 0 both are exact.
    rounding = torch.finfo(x.dtype).eps * x.abs().max().item()
    complex_ = rotate(x.transpose(1, 2), torch.view_as_complex(table))
    torch.testing.assert_close(complex_, real, rtol=0, atol=4 * rounding)
    return real.transpose(1, 2)


def test_rotation_by_hand():
    """Adjacent pairs: dimension 2i and 2i+1 turn together, by position x theta^(-2i/d)."""
    x = randn(2, 5, 3, 8)
    expected = np.zeros(x.shape)
    for b, t, h, i in np.ndindex(2, 5, 3, 4):
        angle = t * 100.0 ** (-2 * i / 8)
        a, c = x[b, t, h, 2 * i].item(), x[b, t, h, 2 * i + 1].item()
        expected[b, t, h, 2 * i] = a * math.cos(angle) - c * math.sin(angle)
        expected[b, t, h, 2 * i + 1] = a * math.sin(angle) + c * math.cos(angle)
    # angles below 4 in float32: 4 x 2^-24, times |x| up to 5
    np.testing.assert_allclose(turned(x, theta=100.0), expected, atol=1e-5)


def test_rotation_keeps_norms():
    x = randn(2, 300, 3, 16)
    # float32 cos and sin: cos^2 + sin^2 is 1 to 2^-23
    torch.testing.assert_close(turned(x).norm(dim=-1), x.norm(dim=-1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("scaling", ["none", "pi", "ntk", "yarn"])
def test_scores_depend_on_distance_only(scaling):
    frequencies, _ = scaled_frequencies(16, 10_000.0, scaling, 4.0, 64)
    q, k = randn(2, 1, 1, 1, 16)
    score = lambda m, n: (
        turned(q, positions=torch.tensor([m]), frequencies=frequencies)
        * turned(k, positions=torch.tensor([n]), frequencies=frequencies)
    ).sum()
    for distance in (0, 1, 3, 17):
        scores = torch.stack([score(start + distance, start) for start in (0, 1, 5, 100, 1000)])
        # float32 angles up to 1,000: 2^-24 x 1,000 = 6e-5 radians, times |q||k| about 16
        torch.testing.assert_close(scores, scores[:1].expand(5), rtol=0, atol=2e-3)
    assert abs(score(1, 0) - score(3, 0)) > 0.01  # and on distance they do depend


def test_zero_angle_is_no_position():
    x = randn(1, 3, 2, 8)
    assert torch.equal(turned(x, positions=torch.zeros(3, dtype=torch.long)), x)
    assert torch.equal(turned(x, frequencies=torch.zeros(4)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rotates_in_float32(dtype):
    """arange(4096) holds 769 distinct values in bfloat16: only the result may be rounded."""
    x = randn(1, 4096, 1, 8).to(dtype)
    assert torch.equal(turned(x), turned(x.float()).to(dtype))


def frequencies_by_hand(d, theta, scaling, s, length):
    """paper.md, section 6, in numpy float64."""
    w = theta ** (-2 * np.arange(d // 2) / d)
    if scaling == "pi":
        return w / s, 1.0
    if scaling == "ntk":
        return (theta * s ** (d / (d - 2))) ** (-2 * np.arange(d // 2) / d), 1.0
    if scaling == "yarn":
        dim = lambda r: d * np.log(length / (2 * np.pi * r)) / (2 * np.log(theta))
        low, high = max(np.floor(dim(32)), 0), min(np.ceil(dim(1)), d - 1)
        ramp = np.clip(
            (np.arange(d // 2) - low) / (high - low + (0.001 if low == high else 0)), 0, 1
        )
        return w * (1 - ramp) + w / s * ramp, 0.1 * np.log(s) + 1
    return w, 1.0


@pytest.mark.parametrize("scaling", ["none", "pi", "ntk", "yarn"])
@pytest.mark.parametrize(
    "d,theta,s,length",
    [
        (64, 10_000.0, 8.0, 4096),
        (128, 2e6, 4.0, 8192),
        (8, 100.0, 2.0, 64),
        (8, 100.0, 3.0, 7),
        (32, 1e4, 1.0, 512),
        (4, 1e4, 2.0, 10**7),
    ],
)
def test_frequencies_against_the_formulas(d, theta, s, length, scaling):
    frequencies, amplitude = scaled_frequencies(d, theta, scaling, s, length)
    expected, factor = frequencies_by_hand(d, theta, scaling, s, length)
    assert frequencies.dtype == torch.float32
    # float32: exponent and power rounded, ln(2e6) x 2^-24 + a few 2^-24
    np.testing.assert_allclose(frequencies, expected, rtol=3e-6)
    assert amplitude == pytest.approx(factor, rel=1e-12)


def test_the_scalings_say_what_they_promise():
    plain, _ = scaled_frequencies(64, 10_000.0)
    ntk, _ = scaled_frequencies(64, 10_000.0, "ntk", 8.0)
    yarn, _ = scaled_frequencies(64, 10_000.0, "yarn", 8.0, 4096)
    assert ntk[0] == plain[0] and ntk[-1] == pytest.approx(plain[-1].item() / 8, rel=1e-5)
    assert yarn[0] == plain[0] and yarn[-1] == plain[-1] / 8
    assert torch.equal(scaled_frequencies(64, 10_000.0, "pi", 8.0)[0], plain / 8)


def test_scalings_refused():
    with pytest.raises(ValueError, match="'linear' is unknown: use one of none, pi, ntk, yarn"):
        scaled_frequencies(8, 1e4, "linear")
    with pytest.raises(ValueError, match="'yarn' needs rope_original_length"):
        scaled_frequencies(8, 1e4, "yarn", 2.0)


def test_tables_far_out():
    """At position 100,000 the table is as good as float32 angles are: position x frequency is off
    by one rounding of the frequency and one of the product, 2 x 100,000 x 2^-24 = 0.012 radians.
    bfloat16 positions would be off by 256."""
    frequencies, _ = scaled_frequencies(64, 10_000.0)
    positions = torch.arange(99_000, 100_001)
    pairs = rotary_table(positions, frequencies, 1.5)
    assert pairs.shape == (1001, 32, 2) and pairs.dtype == torch.float32
    table = torch.view_as_complex(pairs)
    exact = 1.5 * np.exp(1j * positions.numpy()[:, None] * 10_000.0 ** (-2 * np.arange(32) / 64))
    assert np.abs(table.numpy() - exact).max() < 1.5 * 0.02
    rounded = 1.5 * np.exp(
        1j
        * (positions.numpy()[:, None].astype(np.float32) * frequencies.numpy()).astype(np.float64)
    )
    # cos and sin of the float32 angle: a few 2^-24
    np.testing.assert_allclose(table.numpy(), rounded, atol=1e-6)


# Length scales


@pytest.mark.parametrize("kind", ["swan", "llama4", "drope", "ssmax"])
def test_length_scales_against_the_formulas(kind):
    a, positions = 362, [0, 1, 2, 360, 361, 362, 722, 723, 1085, 8191, 200_000]
    expected = []
    for n in positions:  # n is the query's position from 0, so it sees n + 1 keys
        expected.append(
            {
                "swan": math.log(a + n) / math.log(a),
                "llama4": 1 + 0.1 * math.log(1 + (n + 1) // a),
                "drope": 1 + 0.412 * math.log(max((n + 1) / a, 1)),
                "ssmax": math.log(max(n + 1, 2)),
            }[kind]
        )
    scale = length_scale(kind, torch.tensor(positions), a)
    assert scale.dtype == torch.float32
    np.testing.assert_allclose(scale, expected, rtol=1e-6)  # float32 logarithms


def test_length_scales_leave_short_texts_alone():
    assert length_scale("none", torch.arange(5), None) is None
    assert length_scale("swan", torch.tensor([0]), 64).item() == 1
    assert (length_scale("llama4", torch.arange(63), 64) == 1).all() and length_scale(
        "llama4", torch.tensor([63]), 64
    ) > 1
    assert (length_scale("drope", torch.arange(64), 64) == 1).all() and length_scale(
        "drope", torch.tensor([64]), 64
    ) > 1
    assert length_scale("ssmax", torch.arange(3), None) is not None  # it needs no base


def test_length_scales_refused():
    with pytest.raises(
        ValueError, match="'log' is unknown: use one of none, swan, llama4, drope, ssmax"
    ):
        length_scale("log", torch.arange(3), 64)
    for kind in ("swan", "llama4", "drope"):
        with pytest.raises(ValueError, match=f"'{kind}' needs a trained length or length_base"):
            length_scale(kind, torch.arange(3), None)


# Speed


def test_banded_is_fifteen_times_faster_than_the_dense_mask():
    """At T = 16k and W = 128, forward and backward. A dense mask skips nothing, so each query costs
    it the same: it is given a 32nd of the queries over all the keys, its mask ready made, and its
    time counts 32 times. (Measured in full it is no better: 37 times, and tens of seconds a
    run.)"""
    t, window, part = 16_384, 128, 32
    rows = torch.arange(t - t // part, t)
    kernel = kernel_for(window, len(rows), CPU, "sdpa", rows, torch.arange(t))  # its mask is made
    q, k, v = qkv(t, heads=(2, 2), d=32, batch=1, dtype=torch.float32)

    def seconds(run):
        start = time.perf_counter()
        torch.autograd.grad(run().sum(), (q, k, v))
        return time.perf_counter() - start

    dense = lambda: kernel(q[:, :, rows], k, v)
    banded = lambda: attend(q, k, v, window, "banded")
    with torch.no_grad():  # the same answer, in float32 over 128 keys
        torch.testing.assert_close(dense(), banded()[:, :, rows], rtol=0, atol=1e-5)
    ratios = [part * seconds(dense) / seconds(banded) for _ in range(5)]
    assert statistics.median(ratios) > 15, ratios


@pytest.mark.parametrize("t,window", [(24, None), (24, 5), (200, None)])
def test_bfloat16_trains_through_float32_on_a_cpu(t, window):
    """Its fused backward pass is slow there; under autocast too the sums are float32's, and so are
    the gradients, rounded once."""
    torch.manual_seed(0)
    rough = [
        torch.randn(1, heads, t, 16, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    fine = [x.detach().float().requires_grad_() for x in rough]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*rough, window=window, backend="sdpa")
    expected = attend(*fine, window=window, backend="sdpa")
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected.bfloat16())
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.float())
    for a, b in zip(rough, fine):
        assert torch.equal(a.grad, b.grad.bfloat16())
