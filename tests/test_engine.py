"""engine.py: what others have done to a model acts on every token, and nothing is done to it."""

import gc
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parameters_to_vector, prune

from engine import JOINED, Joined, fill, joined, prefill, stream
from model import ModelConfig, Transformer

V = 23


def tiny(pattern="rrrN", seed=0, dtype=torch.float64, **more):
    """A model that does not repeat itself."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=4, n_head=4, n_kv_head=2, d_model=16, d_ff=20, vocab_size=V, window=5)
    model = Transformer(ModelConfig(pattern=pattern, **sizes, **more, tie_embeddings=False))
    return model.to(dtype).requires_grad_(False)


def text(b=1, t=9, seed=1):
    return torch.randint(V, (b, t), generator=torch.Generator().manual_seed(seed))


def written(model, tokens, count=20, **settings):
    return torch.cat((tokens, torch.stack(list(stream(model, tokens, count, **settings)), 1)), 1)


def uncached(model, tokens, count=20):
    """Greedy text by whole forwards: nothing joined, nothing cached, nothing left out."""
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


class LoRA(nn.Module):
    """A wrapper as adapters put it around a matrix, which keeps the weight's name."""

    def __init__(self, base):
        super().__init__()
        self.base, rank = base, 2
        make = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(rank, base.in_features, generator=make).double())
        self.b = nn.Parameter(torch.randn(base.out_features, rank, generator=make).double())

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def wrap(path, make):
    """Put make(module) in the place of the module at `path`."""

    def change(model):
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)))

    return change


def doubled(linear):
    twin = Doubled(linear.in_features, linear.out_features, bias=False).double()
    twin.weight = linear.weight
    return twin


def biased(linear):
    twin = nn.Linear(linear.in_features, linear.out_features).double()
    twin.weight = linear.weight
    nn.init.normal_(twin.bias)
    return twin


def instance_forward(model):
    linear = model.layers[1].self_attn.k_proj
    linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)


def hook(path):
    turn = lambda module, inputs, y: y.roll(1, -1)
    return lambda model: model.get_submodule(path).register_forward_hook(turn)


CHANGES = {
    "LoRA on q": wrap("layers.0.self_attn.q_proj", LoRA),
    "LoRA on down": wrap("layers.2.mlp.down_proj", LoRA),
    "LoRA on v of the last": wrap("layers.3.self_attn.v_proj", LoRA),
    "subclassed": wrap("layers.1.mlp.up_proj", doubled),
    "with a bias": wrap("layers.1.self_attn.o_proj", biased),
    "forward of the instance": instance_forward,
    "hook on a matrix": hook("layers.0.mlp.gate_proj"),
    "hook on attention": hook("layers.1.self_attn"),
    "hook on the last block": hook("layers.3"),
    "hook on an MLP": hook("layers.2.mlp"),
    "hook on the output": hook("lm_head"),
    "pruned": lambda model: prune.l1_unstructured(model.layers[0].mlp.up_proj, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_wrapped_or_hooked_acts_on_every_token(change):
    model, tokens = tiny(), text()
    plain = uncached(model, tokens)
    change(model)
    expected = uncached(model, tokens)
    assert not torch.equal(expected, plain), "the change changes nothing: the example is too weak"
    assert torch.equal(written(model, tokens), expected)
    assert torch.equal(model.generate(tokens, 20), expected)


def test_a_subclass_of_the_model_acts_on_every_token():
    class Turned(Transformer):
        def hidden(self, *args, **options):
            return super().hidden(*args, **options).roll(1, -1)

    model, tokens = tiny(), text()
    plain = model.generate(tokens, 20)
    model.__class__ = Turned
    assert not torch.equal(model.generate(tokens, 20), plain)
    assert torch.equal(written(model, tokens), model.generate(tokens, 20))


@pytest.mark.parametrize("path", ["layers.3", "layers.3.mlp", "layers.0.self_attn.q_proj", "norm"])
def test_a_hook_hears_of_every_token(path):
    """A prompt of 9 and 20 new tokens, of which the last is never read, whatever the chunks."""
    model, heard = tiny(), []
    module = model.get_submodule(path)
    module.register_forward_hook(lambda m, x, y: heard.append(y.shape[1]))
    written(model, text())
    if path == "norm":  # the last norm of a prompt's earlier tokens would be read by nobody
        assert sum(heard) >= 20
    else:
        assert sum(heard) == 9 + 19


def test_quantized_matrices_are_called():
    model, tokens = tiny(dtype=torch.float32), text()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert not isinstance(quantized.layers[0].mlp.up_proj, nn.Linear)
    assert torch.equal(written(quantized, tokens), quantized.generate(tokens, 20))


def test_generating_leaves_the_parameters_as_they_are(tmp_path):
    model = tiny(dtype=torch.float32)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    written(model, text())
    for name, p in model.named_parameters():
        assert p.is_contiguous() and p.data_ptr() == before[name][0], name
        assert torch.equal(p, before[name][1]), name
    parameters_to_vector(model.parameters())
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # which takes no shared storage
    prune.random_unstructured(model.layers[0].mlp.up_proj, "weight", 0.3)


CHANGED = {
    "in place": lambda p: p.mul_(1.5),
    "behind autograd's back": lambda p: p.data.mul_(1.5),
    "a row": lambda p: p.data[3].mul_(5),
    "other storage": lambda p: setattr(p, "data", p.data * 1.5),
    "columns in another order": lambda p: p.data.copy_(p.data.flip(1)),
    "rows in another order": lambda p: p.data.copy_(p.data.flip(0)),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_the_text_follows_the_parameters(change):
    """What one stream has joined is not what the next one reads."""
    model, tokens = tiny(), text()
    first = written(model, tokens)
    for block in model.layers:
        change(block.mlp.down_proj.weight)
    expected = uncached(model, tokens)
    assert not torch.equal(expected, first)
    assert torch.equal(written(model, tokens), expected)


def test_a_joined_block_is_the_block():
    model, tokens = tiny(), text(3, 1)
    assert all(type(joined(block)) is Joined for block in model.layers)
    x = model.embed_tokens(tokens)
    shared = model.share(1, tokens.device, None)
    for i, (block, spec) in enumerate(zip(model.layers, model.plan)):
        expected = block(x, spec, shared, i)
        torch.testing.assert_close(Joined(block)(x, spec, shared, i), expected, rtol=0, atol=1e-13)


def test_joined_matrices_are_kept_and_go_with_their_model():
    model, tokens = tiny(), text()
    written(model, tokens)
    kept = [JOINED[block][1] for block in model.layers]
    written(model, tokens)
    assert all(JOINED[block][1] is before for block, before in zip(model.layers, kept))
    count = len(JOINED)
    del model, kept
    gc.collect()
    assert len(JOINED) == count - 4


def test_threads_that_share_a_model():
    """Eight of them, each with a prompt and a cache of its own, get what each gets alone."""
    model, results = tiny(dtype=torch.float32), {}
    prompts = [text(1, 5 + i, seed=i) for i in range(8)]
    expected = [written(model, prompt, 40) for prompt in prompts]

    def work(i):
        results[i] = written(model, prompts[i], 40)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(8))


def test_one_text_after_a_change_of_pattern():
    model, tokens = tiny(), text()
    for pattern in ("rrrN", "R", "Nrrr"):
        model.config = replace(model.config, pattern=pattern)
        assert torch.equal(written(model, tokens), uncached(model, tokens))


def test_fill_reads_in_the_precision_of_autocast():
    """As `hidden` does, to the bit: what a question meets was read as the question is."""
    model, tokens = tiny().float(), text(1, 9)
    cache, other = model.new_cache(1, 20), model.new_cache(1, 20)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        fill(model, tokens, cache)
        model.hidden(tokens, other)
    for a, b in zip((*cache.k, *cache.v), (*other.k, *other.v)):
        assert torch.equal(a, b)


def test_prefill_and_fill_are_one_reading():
    model, tokens = tiny(), text(2, 9)
    cache, other = model.new_cache(2, 20), model.new_cache(2, 20)
    logits = prefill(model, tokens, cache)
    fill(model, tokens, other)
    torch.testing.assert_close(logits, model(tokens)[:, -1], rtol=0, atol=1e-12)
    for a, b in zip((*cache.k, *cache.v), (*other.k, *other.v)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
