"""The KV cache against no cache: the same logits for every pattern and every way to cut the text;
and what is built on it."""

import os
import shutil
from dataclasses import replace
from functools import cache as cache_of
from functools import partial

import pytest
import torch

import attention
import engine
import model as model_module
from attention import KVCache, LayerSpec
from engine import fill, prefill, stream
from model import ModelConfig, Transformer, draw, layer_plan

V = 23


def tiny(pattern="rrrN", window=5, n_layer=None, seed=0, dtype=torch.float64, **more):
    torch.manual_seed(seed)
    sizes = dict(n_head=4, n_kv_head=2, d_model=16, d_ff=20, vocab_size=V, trained_length=8)
    model = Transformer(
        ModelConfig(
            n_layer=n_layer or len(pattern), pattern=pattern, window=window, **(sizes | more)
        )
    ).to(dtype)
    with torch.no_grad():
        model.embed_tokens.weight.normal_()  # far from uniform: every layer matters to the logits
    return model.requires_grad_(False)


def text(b=2, t=20, seed=1):
    return torch.randint(V, (b, t), generator=torch.Generator().manual_seed(seed))


def cuts(t, window):
    """Chunk sizes that sum to t, by name: equal ones around the window, and random ones."""
    sizes = {
        n: [n] * (t // n) + [t % n] * (t % n > 0)
        for n in (1, window - 1, window, window + 1, 2 * window + 1, t)
        if 0 < n <= t
    }
    for seed in (0, 1):
        make, random = torch.Generator().manual_seed(seed), []
        while sum(random) < t:
            random.append(
                min(int(torch.randint(1, 2 * window + 3, (), generator=make)), t - sum(random))
            )
        sizes[f"random {seed}"] = random
    return sizes


def cached(model, tokens, sizes, max_length=None):
    cache = model.new_cache(tokens.shape[0], max_length or tokens.shape[1])
    return torch.cat([model(chunk, cache=cache) for chunk in tokens.split(sizes, dim=1)], dim=1)


def differences(model, tokens, window, max_length=None):
    """The largest difference of cached from uncached logits, relative to their scale, for each
    cut."""
    expected = model(tokens)
    scale = expected.abs().max()
    return {
        name: ((cached(model, tokens, sizes, max_length) - expected).abs().max() / scale).item()
        for name, sizes in cuts(tokens.shape[1], window).items()
    }


CONFIGS = [
    dict(pattern="R"),
    dict(pattern="N"),
    dict(pattern="RN"),
    dict(pattern="rrrN"),
    dict(pattern="Nrrr"),
    dict(pattern="rrrR"),
    dict(pattern="rn"),
    dict(pattern="rrrN", qk_norm=True),
    dict(pattern="rN", n_kv_head=1),
    dict(pattern="rN", n_kv_head=4, head_dim=6, tie_embeddings=False),
    dict(pattern="rR", rope_scaling="pi", rope_factor=4.0),
    dict(pattern="rR", rope_scaling="ntk", rope_factor=4.0),
    dict(pattern="rR", rope_scaling="yarn", rope_factor=4.0, rope_original_length=8),
    *(dict(pattern="rN", length_scale=kind) for kind in ("swan", "llama4", "drope", "ssmax")),
]


@pytest.mark.parametrize(
    "fields", CONFIGS, ids=lambda fields: "-".join(str(x) for x in fields.values())
)
def test_cached_equals_uncached(fields):
    """23 tokens through a window of 5, and a cache with room to spare. float64: what is left is the
    order of sums, while one key too many, too few or at a wrong position is 1e-3 or more."""
    model = tiny(**fields)
    for max_length in (23, 40):
        for cut, difference in differences(model, text(2, 23), 5, max_length).items():
            assert difference < 1e-12, (cut, max_length)


@pytest.mark.parametrize("window", [1, 2, 3, 22, 23, 24, 50])
@pytest.mark.parametrize("pattern", ["rrrN", "nN"])
def test_every_window(pattern, window):
    for cut, difference in differences(tiny(pattern, window), text(2, 23), window).items():
        assert difference < 1e-12, cut


@pytest.mark.parametrize("backend", ["reference", "sdpa", "banded", "flex"])
def test_every_backend(backend):
    """banded and flex take whole sequences; under a cache their layers run on sdpa."""
    model = tiny("rrrN")
    expected = model(text(2, 23))
    model.backend = backend
    for sizes in cuts(23, 5).values():
        torch.testing.assert_close(
            cached(model, text(2, 23), sizes),
            expected,
            rtol=0,
            atol=1e-12 * expected.abs().max().item(),
        )


def test_the_reference_decodes_by_itself(monkeypatch):
    """Its twin would prove nothing."""
    model, calls = tiny("rrrN"), []
    model.backend, reference = "reference", attention.reference
    spy = lambda *args, **more: calls.append(1) or reference(*args, **more)
    monkeypatch.setattr(attention, "reference", spy)
    cached(model, text(2, 7), [6, 1])
    assert len(calls) == 2 * len(model.plan)


def test_float32_over_many_windows():
    """The same in float32, where rounding alone is left: 1e-5 of the logits' scale."""
    model = tiny("rrrN", window=8, dtype=torch.float32)
    assert max(differences(model, text(3, 100), 8).values()) < 1e-5


def advance_by_slot(self, t):
    """The planted bug: the ring's rows taken to be in order of age, as they stand before it first
    turns."""
    q_pos = KVCache.advance(self, t)
    for rows, positions in self.k_pos.items():
        self.k_pos[rows] = torch.arange(self.length - len(positions), self.length)
    return q_pos


def test_a_mask_by_slot_order_fails_the_same_check(monkeypatch):
    monkeypatch.setattr(
        model_module, "KVCache", type("BySlot", (KVCache,), {"advance": advance_by_slot})
    )
    found = differences(tiny("rrrN"), text(2, 23), 5)
    # it hides where slots happen to be in order
    assert found[1] < 1e-12 and found[5] < 1e-12 and found[23] < 1e-12
    for cut in (4, 6, 11, "random 0"):
        assert found[cut] > 1e-3, cut


# What it holds


@pytest.mark.parametrize("pattern", ["R", "rrrN", "Nrrr", "rn", "RN"])
@pytest.mark.parametrize("window,max_length", [(5, 64), (1, 64), (64, 64), (100, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(pattern, window, max_length, dtype):
    model = tiny(pattern, window, dtype=dtype)
    cache = model.new_cache(3, max_length)
    plan = layer_plan(model.config)
    n_windowed = sum(spec.window is not None for spec in plan)
    rows = (len(plan) - n_windowed) * max_length + n_windowed * min(window, max_length)
    # an int64 position for each row of each kind of ring
    kinds = {min(spec.window or max_length, max_length) for spec in plan}
    assert cache.nbytes == rows * 2 * 3 * 2 * 4 * dtype.itemsize + 8 * sum(kinds)
    before = cache.nbytes
    model(text(3, 40), cache=cache)
    assert cache.nbytes == before  # it does not grow
    held = sum(
        x.untyped_storage().nbytes() for x in (*cache.k, *cache.v, *cache.positions.values())
    )
    assert held == before  # and hides nothing behind a view


def test_a_quarter_of_full_attention():
    """At 32 windows of context rrrN holds (32 + 3) / (4 x 32) = 0.27 of what R holds."""
    half, full = (
        tiny(pattern, 64, n_layer=4, head_dim=64).new_cache(1, 32 * 64).nbytes
        for pattern in ("rrrN", "R")
    )
    assert half / full == pytest.approx(35 / 128, rel=0.01)  # the positions are the rest


def test_positions_are_the_last_window():
    model = tiny("rN", 5)
    cache = model.new_cache(1, 40)
    for t in (3, 1, 9, 4, 1, 1, 12):
        model(text(1, t), cache=cache)
        held = [p for p in cache.positions[5].tolist() if p >= 0]
        assert sorted(held) == list(range(max(0, cache.length - 5), cache.length))
        assert [p for p in cache.positions[40].tolist() if p >= 0] == list(range(cache.length))


def contents(cache):
    return [cache.length, *(x.clone() for x in (*cache.k, *cache.v, *cache.positions.values()))]


@pytest.mark.parametrize("held,t", [(0, 11), (7, 4), (10, 1)])
def test_past_max_length(held, t):
    model = tiny()
    cache = model.new_cache(2, 10)
    if held:
        model(text(2, held), cache=cache)
    before = contents(cache)
    for read in (model, partial(prefill, model), partial(fill, model)):
        with pytest.raises(
            ValueError,
            match=f"the cache holds 10 tokens and has {held}: {t} more need a larger max_length",
        ):
            read(text(2, t), cache=cache)
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(before, contents(cache))
    )
    if held < 10:  # and it still works
        whole = torch.cat((text(2, held), text(2, 10 - held, seed=3)), 1) if held else text(2, 10)
        rest = model(whole[:, held:], cache=cache)
        torch.testing.assert_close(rest, model(whole)[:, held:], rtol=0, atol=1e-11)


def test_refused():
    for batch_size, max_length in ((0, 8), (1, 0)):
        with pytest.raises(
            ValueError,
            match=f"a cache of {batch_size} rows of {max_length} tokens holds nothing: use 1",
        ):
            tiny().new_cache(batch_size, max_length)
    model = tiny("rrrN")
    cache = model.new_cache(2, 10)
    model.config = replace(model.config, window=3)
    with pytest.raises(ValueError, match="a cache of another pattern: make a new one"):
        model(text(2, 3), cache=cache)


def test_rows_of_a_batch_are_independent():
    model, tokens = tiny(), text(3, 23)
    together = cached(model, tokens, [4] * 5 + [3])
    other = tokens.clone()
    other[0] = (other[0] + 1) % V
    assert torch.equal(cached(model, other, [4] * 5 + [3])[1:], together[1:])
    for row in range(3):  # alone: another shape, another order of sums
        torch.testing.assert_close(
            cached(model, tokens[row : row + 1], [4] * 5 + [3])[0],
            together[row],
            rtol=0,
            atol=1e-11,
        )


def test_a_cache_joins_the_model_through_its_plan():
    """Layers of one window share positions, and a window as long as the cache shares the full
    layers'."""
    cache = KVCache(
        [LayerSpec(True, 4), LayerSpec(False, 4), LayerSpec(True, 9), LayerSpec(False, None)],
        1,
        1,
        2,
        9,
        "cpu",
        torch.float32,
    )
    assert cache.rows == [4, 4, 9, 9] and set(cache.positions) == {4, 9}


def test_prefill_is_the_last_logits_whatever_its_chunk(monkeypatch):
    model, tokens = tiny(), text(2, 23)
    expected = model(tokens)[:, -1]
    for first, chunk in ((1, 1), (4, 4), (7, 3), (20, 1), (20, 512), (23, 5), (512, 512)):
        monkeypatch.setattr(engine, "FIRST_CHUNK", first)
        monkeypatch.setattr(engine, "CHUNK", chunk)
        logits = prefill(model, tokens, model.new_cache(2, 23))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "pattern,more",
    [
        ("R", {}),
        ("rrrN", {}),
        ("Nrrr", {}),
        ("n", {}),
        ("R", {"qk_norm": True}),
        ("rN", {"length_scale": "ssmax"}),
        ("rN", {"length_scale": "swan", "trained_length": 8}),
    ],
)
def test_fill_leaves_what_a_whole_forward_leaves(pattern, more, monkeypatch):
    """The last layer computes nothing but keys and values, and what follows sees no difference; the
    cache has the same content."""
    model, tokens = tiny(pattern, n_layer=4, **more), text(2, 23)
    monkeypatch.setattr(engine, "FIRST_CHUNK", 9)
    monkeypatch.setattr(engine, "CHUNK", 5)
    whole, filled, multiplied = model.new_cache(2, 23), model.new_cache(2, 23), []
    expected = model(tokens, cache=whole)
    names = {part: name for name, part in model.named_modules()}
    with monkeypatch.context() as patch:
        forward = torch.nn.Linear.forward
        record = lambda self, x: multiplied.append(names[self]) or forward(self, x)
        patch.setattr(torch.nn.Linear, "forward", record)
        fill(model, tokens[:, :17], filled)
    last = {name.split(".")[-1] for name in multiplied if name.startswith("layers.3.")}
    assert last == {"k_proj", "v_proj"}
    assert len({name for name in multiplied if name.startswith("layers.2.")}) == 7
    torch.testing.assert_close(
        model(tokens[:, 17:], cache=filled), expected[:, 17:], rtol=0, atol=1e-11
    )
    for a, b in zip(
        (*filled.k, *filled.v, *filled.positions.values()),
        (*whole.k, *whole.v, *whole.positions.values()),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


# Text


def writer(*args, **more):
    """A model that does not repeat itself: with tied embeddings a random model says the last token
    again and again."""
    return tiny(*args, seed=3, tie_embeddings=False, **more)


@pytest.mark.parametrize("pattern", ["R", "N", "rrrN", "rn"])
@pytest.mark.parametrize("window", [1, 5, 100])
def test_generate_equals_a_slow_uncached_loop(pattern, window):
    model, tokens = writer(pattern, window), text(2, 7)
    slow = tokens
    for _ in range(20):
        slow = torch.cat((slow, model(slow)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(tokens, 20), slow)
    assert len(slow[:, 7:].unique()) > 3, "an answer that repeats itself proves little"
    joined = torch.stack(list(stream(model, tokens, 20)), 1)
    assert torch.equal(joined, slow[:, 7:])


def test_generate_nothing():
    assert torch.equal(tiny().generate(text(), 0), text())


def test_stop():
    """A row that has produced the stop token repeats it; when all rows have, the stream ends."""
    model, tokens = writer(), text(3, 7)
    free = model.generate(tokens, 15)[:, 7:]
    resumed = 0
    for stop in free.unique().tolist():
        ends = [(row == stop).nonzero()[0].item() if (row == stop).any() else 15 for row in free]
        streamed = torch.stack(list(stream(model, tokens, 15, stop=stop)), 1)
        assert streamed.shape[1] == min(15, max(ends) + 1)
        for row, (end, ids) in enumerate(zip(ends, streamed)):
            assert torch.equal(ids[:end], free[row, :end]) and (ids[end:] == stop).all()
            resumed += not torch.equal(ids, free[row, : len(ids)])
        if ends[0] < 15:  # a row alone ends where it stops
            alone = torch.stack(list(stream(model, tokens[:1], 15, stop=stop)), 1)
            assert torch.equal(alone[0], free[0, : ends[0] + 1])
    assert resumed, "no row would have gone on to another token: the examples prove nothing"


def test_a_stream_continues_its_cache():
    model, tokens = writer(), text(2, 7)
    cache = model.new_cache(2, 40)
    first = torch.stack(list(stream(model, tokens, 5, cache=cache)), 1)
    assert cache.length == 11  # the last token has not been read
    rest = torch.stack(list(stream(model, first[:, -1:], 5, cache=cache)), 1)
    assert torch.equal(torch.cat((tokens, first, rest), 1), model.generate(tokens, 10))


def test_sampling_comes_out_again():
    model = writer()
    draw = lambda seed: model.generate(
        text(4, 7), 15, temperature=1.5, generator=torch.Generator().manual_seed(seed)
    )
    torch.manual_seed(99)
    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_top_k_of_one_and_little_p_are_greedy():
    model, tokens = writer(), text(3, 7)
    greedy = model.generate(tokens, 15)
    assert torch.equal(model.generate(tokens, 15, temperature=2.0, top_k=1), greedy)
    assert torch.equal(model.generate(tokens, 15, temperature=2.0, top_p=1e-6), greedy)
    assert not torch.equal(
        model.generate(tokens, 15, temperature=2.0, generator=torch.Generator().manual_seed(0)),
        greedy,
    )


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    "settings,kept",
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(top_k=2), [1, 3]),
        (dict(top_k=9), [0, 1, 2, 3, 4]),
        (dict(top_p=0.39), [1]),
        (dict(top_p=0.41), [1, 3]),  # the token that reaches p is in
        (dict(top_p=0.8), [1, 3, 4]),
        (dict(top_p=1.0), [0, 1, 2, 3, 4]),
        (dict(top_k=3, top_p=0.7), [1, 3]),  # p of what k left: .4 and .25 of .85 are .47 and .76
        (
            dict(temperature=0.5, top_p=0.6),
            [1, 3],
        ),  # p after the temperature: .16 and .0625 of .275 are .58 and .81
    ],
)
def test_what_is_drawn(settings, kept):
    """20,000 draws: shares off by at most five standard deviations, and nothing outside."""
    temperature = settings.setdefault("temperature", 1.0)
    p = torch.zeros(5)
    p[kept] = PROBABILITIES[kept] ** (1 / temperature)
    p /= p.sum()
    n = 20_000
    drawn = draw(
        PROBABILITIES.log().expand(n, 5), **settings, generator=torch.Generator().manual_seed(0)
    )
    shares = drawn.bincount(minlength=5) / n
    assert (shares[p == 0] == 0).all()
    assert ((shares - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=t) for t in (0.0, 5e-324, 1e-40, 1e-7)]
    + [dict(temperature=1.0, top_p=5e-324)],
)
def test_where_only_the_likeliest_is_left(settings):
    """However small a number says so: no float32 holds the logits over 1e-40."""
    logits = torch.tensor([[9.0, -4.0, 88.0], [0.0, 1e-3, -1e-3]])
    assert draw(logits, **settings).tolist() == [2, 1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_temperature_on_a_model(temperature):
    """The first token of 4,000 equal rows follows softmax(logits / temperature)."""
    model, tokens = tiny("rN", dtype=torch.float32), text(1, 7)
    n = 4000
    p = (model(tokens)[0, -1] / temperature).softmax(-1)
    drawn = model.generate(
        tokens.expand(n, 7), 1, temperature=temperature, generator=torch.Generator().manual_seed(0)
    )[:, -1]
    shares = drawn.bincount(minlength=V) / n
    # five standard deviations of a share, and 1/n for the rarest, which are Poisson rather than
    # normal
    assert ((shares - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 2 / n).all()


def test_no_failure_leaves_a_half_read_cache():
    """A token outside the vocabulary is refused before the cache counts it."""
    model, tokens = tiny(), text(2, 6)
    cache = model.new_cache(2, 10)
    model(tokens, cache=cache)
    before = contents(cache)
    with pytest.raises(IndexError):
        model(torch.full((2, 2), V), cache=cache)
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(before, contents(cache))
    )


def test_scale_and_rotation_are_absolute_under_the_cache():
    """What a position means does not start afresh with a chunk: the last logits change with how far
    along they are."""
    for fields in (dict(pattern="N", length_scale="swan"), dict(pattern="R")):
        model, tokens = tiny(**fields), text(1, 12)
        cache = model.new_cache(1, 12)
        model(tokens[:, :11], cache=cache)
        late = model(tokens[:, 11:], cache=cache)
        torch.testing.assert_close(late, model(tokens)[:, 11:], rtol=0, atol=1e-12)
        assert not torch.allclose(
            late, model(tokens[:, 11:], cache=model.new_cache(1, 12)), atol=1e-3
        )


# The compiled step


def test_fixed_shapes_are_as_exact():
    """Of a `fixed` cache every ring is met whole and masked; over three wraps of the window, from a
    prompt shorter than it. The cache itself goes on as if it had been read by no other way."""
    for pattern in ("rrrN", "Nrrr", "rn", "R"):
        model, tokens = tiny(pattern), text(2, 20)
        expected, cache = model(tokens), model.new_cache(2, 30)
        got = [model(tokens[:, :3], cache=cache)]
        twin = cache.fixed()
        for i in range(3, 12):
            cache.reserve(1)
            got.append(model(tokens[:, i : i + 1], cache=twin))
        assert cache.length == 12
        got += [model(tokens[:, 12:13], cache=cache), model(tokens[:, 13:], cache=cache)]
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-12)


def test_the_compiled_step_compiles_once():
    """The same tokens as eager, over three wraps of the window and two prompts, and no
    recompilation."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on CPU needs a C++ compiler")
    model, tokens = tiny("r", dtype=torch.float32), text(2, 4)
    expected = model.generate(tokens, 14)
    write = lambda: torch.stack(list(stream(model, tokens, 14, compiled=True)), 1)
    from torch._inductor import config

    # This processor's vectors are taken as they are said to be: torch would compile a trial.
    with config.patch({"cpp.vec_isa_ok": True}):
        assert torch.equal(write(), expected[:, 4:])
    # monkeypatch would leave torch's config without the entry
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(write(), expected[:, 4:])


def test_the_compiled_step_takes_more_caches_than_torchs_limit_of_shapes(monkeypatch):
    """Each cache of another size is compiled anew, the ninth too; and what a CUDA graph would write
    to is marked as staying where it is."""
    model, compile = tiny("N"), engine.one_graph
    traced = lambda function, **how: compile(function, backend="eager", dynamic=False)
    monkeypatch.setattr(engine, "one_graph", traced)
    monkeypatch.setattr(engine, "compiled_logits", cache_of(engine.compiled_logits.__wrapped__))
    twins, fixed = [], KVCache.fixed
    monkeypatch.setattr(KVCache, "fixed", lambda cache: twins.append(fixed(cache)) or twins[-1])
    expected = list(stream(model, text(1, 3), 4))
    for room in range(8, 17):
        cache = model.new_cache(1, room)
        assert list(stream(model, text(1, 3), 4, cache=cache, compiled=True)) == expected
    assert len(twins) == 9 and twins[-1].k is cache.k

    # and the cache goes on from there, to the last token, which no step has read
    made = torch.stack(expected, dim=1)
    with torch.inference_mode():
        last = model(made[:, -1:], cache=cache)
        torch.testing.assert_close(last, model(torch.cat((text(1, 3), made), dim=1))[:, -1:])
    written = (*cache.k, *cache.v, *cache.positions.values(), twins[-1].clock)
    assert all(x._dynamo_static_input_type == "unguarded" for x in written)
    torch._dynamo.reset()


def test_the_compiled_step_knows_the_end(monkeypatch):
    model = tiny("rN")
    not_compiled = lambda model, token, cache: model(token[:, None], cache)[:, 0]
    monkeypatch.setattr(engine, "compiled_logits", lambda graphs: not_compiled)
    with pytest.raises(ValueError, match="larger max_length"):
        list(stream(model, text(1, 3), 8, cache=model.new_cache(1, 4), compiled=True))


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="this system does not tell its memory")
def test_a_cache_larger_than_the_memory_is_refused_before_it_is_made(monkeypatch):
    full = 2 * 2 * 2 * 4 * 32 * 8  # k and v, 2 rows, 2 heads of width 4, 32 tokens, float64
    for memory, fits in ((full, True), (full - 1, False)):
        pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}
        monkeypatch.setattr(os, "sysconf", pages.get)
        if fits:
            assert tiny("N").new_cache(2, 32).nbytes >= full
        else:
            with pytest.raises(ValueError, match=f"takes {full:,} bytes: .*--samples"):
                tiny("N").new_cache(2, 32)
