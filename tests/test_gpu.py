"""What only a CUDA device can show: FlexAttention's kernels, bfloat16 autocast, torch.compile, and
checkpoints that leave the GPU.

Skipped elsewhere. Head widths are 32 or more, since FlexAttention's CUDA kernels take no fewer than
16.
"""

import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import fast.loss as loss_module
from attention import attend, attention_weights, visible
from device import fitting, training_loss
from engine import stream
from fast.kernels import flex_mask, one_graph
from model import ModelConfig, Transformer
from recipe import build, read_toml
from train import make_optimizers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = dict(
    n_layer=4,
    n_head=4,
    n_kv_head=2,
    d_model=128,
    d_ff=336,
    vocab_size=512,
    pattern="rrrN",
    window=64,
)
# (length, window)
SHAPES = [
    (1, 1),
    (64, 200),
    (128, 128),
    (200, 64),
    (257, 1),
    (384, 129),
    (1000, 128),
    (1024, None),
    (700, None),
]
# The largest error, relative to the largest entry. float32: 1,000 terms in another order, and exp2
# for exp, about 2^-20; bfloat16: inputs are the same numbers, and weights and results are rounded
# to 2^-9 on the way, a few times in a gradient.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def qkv(t, heads=(4, 2), d=32, dtype=torch.float32, seed=0):
    make = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(2, h, t, d, generator=make, device="cuda", dtype=dtype).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    ]


def assert_near(got, expected, tolerance, what=""):
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < tolerance, f"{what} is off by {error:.1e} of its scale"


def compare(backend, inputs, window):
    """Forward and backward of a backend against `reference` on the same numbers in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = attend(*inputs, window, backend), attend(*exact, window, "reference")
    assert out.dtype == inputs[0].dtype
    tolerance = TOLERANCE[out.dtype]
    assert_near(out, expected, tolerance, "the output")
    upstream = torch.randn(
        expected.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda"
    ).to(out.dtype)
    gradients = zip(
        "qkv",
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(expected, exact, upstream.double()),
    )
    for name, got, want in gradients:
        # one key has weight 1: the exact gradient is 0
        if name != "v" and (window == 1 or out.shape[2] == 1):
            assert got.abs().max() < 10 * tolerance
        else:
            assert_near(got, want, tolerance, f"the gradient of {name}")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles its own shapes, and counts them; in float32 that is no TF32, which the
    commands allow."""
    torch.compiler.reset()
    counters.clear()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("t,window", SHAPES)
def test_flex_equals_reference_with_gradients(t, window, dtype):
    compare("flex", qkv(t, dtype=dtype), window)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2), (1, 1)])
@pytest.mark.parametrize("d", [32, 64])
def test_flex_with_every_head_layout(heads, d):
    compare("flex", qkv(300, heads, d), 64)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("t", [17, 66, 100, 127])
def test_flex_over_short_prompts(t, heads):
    """torch has another kernel for fewer than 128 queries, and for some groups none."""
    compare("flex", qkv(t, heads), 16)


def test_flex_is_fused_for_more_shapes_than_torchs_limit():
    """Batch sizes and head layouts; beyond eight it would run unfused, in silence."""
    for heads in ((4, 4), (4, 2), (4, 1), (8, 4), (8, 2), (8, 8)):
        for grad in (True, False):
            q, k, v = (x.requires_grad_(grad) for x in map(torch.Tensor.detach, qkv(300, heads)))
            torch.cuda.reset_peak_memory_stats()
            attend(q, k, v, 64, "flex")
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 9


def test_flex_over_changing_lengths_and_windows():
    """One process meets many shapes: nothing goes stale between them."""
    for t, window in (
        (256, 64),
        (512, 64),
        (300, 64),
        (300, 32),
        (1024, 128),
        (256, 64),
        (256, None),
    ):
        compare("flex", qkv(t), window)


def test_flex_counts_its_keys():
    """Equal scores, and values that are one-hot by key (64 keys at a time, a width that the kernel
    takes): row i shows min(i + 1, W) of them."""
    t, window = 320, 130
    q = k = torch.zeros(1, 1, t, 64, device="cuda")
    eye = torch.eye(t, device="cuda").view(t, t // 64, 64)
    weights = torch.cat(
        [attend(q, k, eye[:, i][None, None].contiguous(), window, "flex") for i in range(t // 64)],
        -1,
    )[0, 0]
    rows = torch.arange(t, device="cuda")
    seen = (rows[:, None] >= rows) & (rows[:, None] - rows < window)
    assert torch.equal(weights != 0, seen) and seen.sum(1).tolist() == [
        min(i + 1, window) for i in range(t)
    ]


def test_flex_keeps_no_square():
    """32k tokens: the scores alone would take 4 GB a head in float32."""
    q, k, v = qkv(32_768, (1, 1), 32, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, v, 128, "flex").float().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**29
    assert flex_mask(32_768, 128, q.device, visible).kv_num_blocks.device.type == "cuda"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("backend", ["sdpa", "banded"])
@pytest.mark.parametrize(
    "t,window", [(1, 1), (192, 64), (200, 64), (257, 1), (320, 64), (384, 129), (60, 64)]
)
def test_windows_through_sdpa(backend, heads, dtype, t, window):
    """A mask together with enable_gqa would fall to the kernel that writes out all scores; ours
    repeats the keys instead. cuDNN's gradients under a mask were wrong at 64 beyond a multiple of
    128."""
    compare(backend, qkv(t, heads, dtype=dtype), window)


def test_full_attention_in_float32_keeps_no_square():
    """As evaluation runs: 16k tokens, whose scores alone would take 4 GiB."""
    q, k, v = (x.detach() for x in qkv(16_384, (2, 1)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < 2**28


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("t,s", [(1, 90), (7, 90), (64, 90), (1, 4001)])
def test_sdpa_with_positions(t, s, dtype):
    """As under a cache: keys in any order, an empty slot among them."""
    q, (_, k, v) = qkv(t, dtype=dtype)[0], qkv(s, dtype=dtype)
    k_pos = torch.randperm(s, device="cuda") - 1
    q_pos = torch.arange(s - t, s, device="cuda").clamp(max=s - 2)
    got = attend(q, k, v, 33, "sdpa", q_pos, k_pos)
    weights = attention_weights(q.double(), k.double(), 33, q_pos, k_pos)
    assert_near(got, weights @ v.double().repeat_interleave(2, 1), TOLERANCE[dtype])


# The model


def model_and_batch(t=256, **more):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**(CONFIG | more))).cuda()
    tokens = torch.randint(512, (2, t + 1), generator=torch.Generator().manual_seed(1)).cuda()
    return model, tokens[:, :-1], tokens[:, 1:]


def step(model, loss_of, tokens, targets, autocast):
    """A training step's loss and gradients."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = loss_of(tokens, targets)
    loss.backward()
    # ssmax: N layers alone use theirs
    return loss.item(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same_step(got, expected, tolerance):
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    for name, want in expected[1].items():
        error = (got[1][name] - want).norm() / want.norm()
        assert error < tolerance, f"the gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize(
    "pattern,more",
    [
        ("rrrN", {}),
        ("R", {}),
        ("rn", {}),
        ("rrrN", dict(qk_norm=True)),
        ("rrrN", dict(length_scale="ssmax")),
    ],
)
def test_every_backend_trains_alike(pattern, more):
    """float32, the same sums in other orders through four layers."""
    model, tokens, targets = model_and_batch(pattern=pattern, **more)
    model.backend = "reference"
    expected = step(model, model.loss, tokens, targets, autocast=False)
    loss_of = training_loss(model, tokens.device)
    for model.backend in ("sdpa", "banded", "flex", "auto"):
        assert_same_step(step(model, loss_of, tokens, targets, autocast=False), expected, 1e-3)


@pytest.mark.parametrize(
    "pattern,more",
    [
        ("rrrN", {}),
        ("R", {}),
        ("rrrN", dict(qk_norm=True)),
        ("Nrrr", dict(length_scale="swan", length_base=64)),
        ("rN", dict(tie_embeddings=False)),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
def test_bfloat16_autocast_step(backend, pattern, more):
    """The master weights stay float32; q, k and v may come in two kinds, since LayerNorm gives
    float32 (qk_norm). bfloat16 has 8 bits: the loss to 1%, gradients to 10% of their norm."""
    model, tokens, targets = model_and_batch(pattern=pattern, **more)
    expected = step(model, model.loss, tokens, targets, autocast=False)
    model.backend = backend
    got = step(model, training_loss(model, tokens.device), tokens, targets, autocast=True)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in got[1].values())
    assert got[0] == pytest.approx(expected[0], rel=0.01)
    for name, want in expected[1].items():
        assert (got[1][name] - want).norm() < 0.1 * want.norm(), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("pattern,more", [("rrrN", {}), ("R", {}), ("rrrN", dict(qk_norm=True))])
def test_compiled_step_equals_eager(pattern, more, autocast):
    model, tokens, targets = model_and_batch(pattern=pattern, **more)
    eager = step(model, model.loss, tokens, targets, autocast)
    loss_of = one_graph(training_loss(model, tokens.device), dynamic=False)
    compiled = step(model, loss_of, tokens, targets, autocast)
    # fusion rounds less often than eager bfloat16 does
    assert_same_step(compiled, eager, 0.1 if autocast else 1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_step_is_one_graph_a_length(recompute):
    """The block mask is a part of it: a break there gave the layers complex numbers, for which
    there is no compiled code."""
    model, tokens, targets = model_and_batch(512)
    model.recompute = recompute
    loss_of = one_graph(training_loss(model, tokens.device), dynamic=False)
    for t in (256, 256, 512, 256):
        step(model, loss_of, tokens[:, :t].contiguous(), targets[:, :t].contiguous(), True)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_default_micro_batch_fits(compiled, recompute):
    """The arithmetic of device.fitting against the allocator: a step of gpu-30m with its
    optimizers, in the memory that it was told of."""
    recipe = build(read_toml(Path(__file__).parent.parent / "recipes" / "gpu-30m.toml"), {})
    recipe = replace(recipe, recompute=recompute)
    memory = 8 * 2**30
    model = Transformer(recipe.model).cuda()
    model.recompute = recompute
    rows = fitting(recipe, model.matmul_parameters(), memory, compiled, True) // 2048
    assert rows >= 4, "else this shows nothing"
    tokens = torch.zeros(rows, 2048, dtype=torch.long, device="cuda")
    optimizers = make_optimizers(model, recipe, bf16=True)
    loss_of = training_loss(model, tokens.device)
    loss_of = one_graph(loss_of, dynamic=False) if compiled else loss_of
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(tokens, tokens)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert 0.2 * memory < torch.cuda.max_memory_allocated() < memory


def test_what_resumes_waits_for_no_counter():
    """AdamW counts its steps on the CPU; on the GPU each count would be a wait."""
    model, tokens, targets = model_and_batch()
    recipe = build(read_toml(Path(__file__).parent.parent / "recipes" / "gpu-30m.toml"), {})

    def resumed(states):
        optimizers = make_optimizers(model, recipe, bf16=True)
        for optimizer, state in zip(optimizers, states):
            optimizer.load_state_dict(state)
        step(model, training_loss(model, tokens.device), tokens, targets, True)
        for optimizer in optimizers:
            optimizer.step()
        return optimizers

    saved = io.BytesIO()
    torch.save([optimizer.state_dict() for optimizer in resumed([])], saved)
    saved.seek(0)
    again = resumed(torch.load(saved, map_location="cpu", weights_only=True))
    states = [state for optimizer in again for state in optimizer.state.values()]
    assert {x.device.type for state in states for x in state.values() if x.ndim} == {"cuda"}
    assert {state["step"].device.type for state in states if "step" in state} == {"cpu"}


def test_compiled_steps_learn():
    model, tokens, targets = model_and_batch()
    optimizer, loss_of = (
        torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True),
        one_graph(training_loss(model, tokens.device), dynamic=False),
    )
    losses = []
    for i in range(60):
        loss, _ = step(model, loss_of, tokens, targets, autocast=True)
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < 0.5 * losses[0], losses[::10]


def test_recomputation_gives_the_same_gradients():
    model, tokens, targets = model_and_batch()
    loss_of = training_loss(model, tokens.device)
    plain = step(model, loss_of, tokens, targets, autocast=True)
    model.recompute = True
    # Flex's backward adds in any order
    assert_same_step(step(model, loss_of, tokens, targets, autocast=True), plain, 1e-2)


def test_loss_by_chunks_equals_cross_entropy(monkeypatch):
    model, tokens, targets = model_and_batch(logit_scale=0.5)
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cuda", 100 * 512)
    monkeypatch.setattr(loss_module, "LEAST_ROWS", 1)
    whole = lambda tokens, targets: F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert_same_step(
        step(model, model.loss, tokens, targets, False),
        step(model, whole, tokens, targets, False),
        1e-3,
    )


def test_cached_equals_uncached_on_cuda():
    model, tokens, _ = model_and_batch(300)
    with torch.no_grad():
        model.embed_tokens.weight.normal_()
        expected = model(tokens)
        for sizes in (1, 63, 64, 65, 129, 300):
            cache = model.new_cache(2, 300)
            got = torch.cat(
                [model(chunk, cache=cache) for chunk in tokens.split(sizes, dim=1)], dim=1
            )
            assert_near(got, expected.double(), 1e-4, f"chunks of {sizes}")
    assert model.generate(tokens[:, :20], 10).shape == (2, 30)


def test_a_checkpoint_from_cuda_loads_on_cpu(tmp_path):
    model, tokens, targets = model_and_batch(100)
    # a compiled model has no prefix in its names
    step(model, one_graph(model.loss, dynamic=False), tokens, targets, autocast=True)
    model.save_pretrained(tmp_path / "saved")
    loaded = Transformer.from_pretrained(tmp_path / "saved", device="cpu")
    assert loaded.config == model.config
    for name, p in loaded.state_dict().items():
        assert p.device.type == "cpu" and torch.equal(p, model.state_dict()[name].cpu())
    with torch.no_grad():
        here = copy.deepcopy(loaded)(tokens.cpu())
        assert_near(model(tokens).cpu(), here.double(), 1e-4, "the logits")
    back = Transformer.from_pretrained(tmp_path / "saved", device="cuda", dtype=torch.bfloat16)
    assert next(back.parameters()).is_cuda and next(back.parameters()).dtype == torch.bfloat16


def test_the_decode_step_is_a_cuda_graph():
    """Compiled and captured, over three wraps of the window: the same greedy tokens as eager in
    float32."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**CONFIG | {"window": 16})).cuda().eval()
    tokens = torch.randint(512, (2, 20), device="cuda")
    for prompt, count in ((tokens, 60), (tokens[:, :7], 30)):
        expected = model.generate(prompt, count)[:, prompt.shape[1] :]
        written = torch.stack(list(stream(model, prompt, count, compiled=True)), 1)
        assert torch.equal(written, expected)
    assert not counters["inductor"]["cudagraph_skips"]
