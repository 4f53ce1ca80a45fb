"""Checkpoints against transformers' own Cohere2, run live on small random models: both directions, to rounding error.

TOLERANCE, relative to the largest entry: two float32 programs that order their sums differently stay within some 10 ulp
(1.2e-7 each) a layer; measured, the worst of everything here is 2e-6. 2e-5 leaves ten times that, and test_planted_errors
shows that the errors one really makes lie above it.
"""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import attention
import checkpoint
from data.tokenizer import load_tokenizer, train_tokenizer
from model import ModelConfig, Transformer, layer_plan

transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")
safetensors_torch = pytest.importorskip("safetensors.torch")
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cohere2Config, Cohere2ForCausalLM  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TOLERANCE = 2e-5
V = 97
SIZES = dict(n_layer=4, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=V, window=7)

OURS = {  # what we save: every pattern of r and N, R, N, RN, and every way to stretch a rotation
    "rrrN": {},
    "Nrrr, head_dim, trained_length": dict(pattern="Nrrr", head_dim=12, trained_length=48),
    "rN, one key head, logit_scale": dict(pattern="rN", n_kv_head=1, logit_scale=0.3),
    "NNr, window 2, untied": dict(pattern="NNr", n_layer=3, window=2, tie_embeddings=False),
    "rrNrN, no two layers alike": dict(pattern="rrNrN", n_layer=5, n_kv_head=4, norm_eps=1e-3),
    "r": dict(pattern="r", n_layer=2, rope_theta=500.0),
    "R": dict(pattern="R", n_layer=2, window=None),
    "N": dict(pattern="N", n_layer=2),
    "RN, pi": dict(pattern="RN", window=None, rope_scaling="pi", rope_factor=3.0),
    "rrrN, ntk": dict(rope_scaling="ntk", rope_factor=4.0),
    "R, yarn": dict(pattern="R", window=None, n_layer=2, head_dim=32, rope_scaling="yarn", rope_factor=4.0, rope_original_length=32),
}
THEIRS = {  # what transformers saves, in Cohere2Config's words
    "sliding_window_pattern": dict(sliding_window_pattern=2),
    "defaults": dict(),
    "layer_types, head_dim, eps": dict(layer_types=list("fsss"), head_dim=16, layer_norm_eps=1e-3),
    "one key head, logit_scale, theta": dict(layer_types=list("sffs"), num_key_value_heads=1, logit_scale=1.7, rope_theta=300.0),
    "untied": dict(layer_types=list("ffss"), tie_word_embeddings=False),
    "all full": dict(layer_types=list("ffff")),
    "all sliding, no groups": dict(layer_types=list("ssss"), num_key_value_heads=None),
    "linear": dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=1000.0)),
    "yarn": dict(head_dim=32, rope_parameters=dict(rope_type="yarn", factor=8.0, rope_theta=1000.0, original_max_position_embeddings=64)),
    "sharded": dict(shards="60KB"),
    "bfloat16, sharded": dict(dtype=torch.bfloat16, shards="30KB"),
}


def lively(model: nn.Module) -> nn.Module:
    """Random weights so large that every part of the architecture shows in the logits, norms' gains included."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise * 1.5 * p.shape[1] ** -0.5)
    return model.eval()


def our_model(**changes) -> Transformer:
    return lively(Transformer(ModelConfig(**SIZES | changes)))


def their_model(dtype=torch.float32, **changes) -> Cohere2ForCausalLM:
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    if "layer_types" in changes:
        changes["layer_types"] = [kinds[letter] for letter in changes["layer_types"]]
    sizes = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=48)
    special = dict(bos_token_id=V - 1, eos_token_id=V - 1, pad_token_id=V - 1)  # the defaults lie outside this vocabulary
    return lively(Cohere2ForCausalLM(Cohere2Config(**sizes | special | dict(vocab_size=V, sliding_window=7) | changes))).to(dtype)


def tokens(t: int = 40, b: int = 2, seed: int = 1) -> torch.Tensor:
    """Without the last id: transformers takes it for padding and keeps its embedding's gradient at zero."""
    return torch.randint(0, V - 1, (b, t), generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def check_same_model(ours: Transformer, theirs: Cohere2ForCausalLM) -> None:
    """Logits, every layer's hidden state, loss, gradients, 64 greedy tokens: 40 tokens and 69, over windows of 2 and 7."""
    x = tokens()
    layers = []
    hidden = ours.hidden(x, layers=layers)
    out = theirs(x, labels=x, output_hidden_states=True)
    assert difference(ours(x), out.logits) < TOLERANCE
    for mine, other in zip(layers[:-1] + [hidden], out.hidden_states, strict=True):  # their last one is after the final norm
        assert difference(mine, other) < TOLERANCE
    loss = ours.loss(x[:, :-1], x[:, 1:])
    assert difference(loss, out.loss) < TOLERANCE
    loss.backward()
    out.loss.backward()
    other = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    mine = {name: p.grad for name, p in ours.named_parameters()}
    assert mine.keys() == other.keys()
    for name in mine:
        assert difference(mine[name], other[name]) < TOLERANCE, name
    prompt = tokens(5, seed=2)
    wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(prompt, 64), wanted)


def equal_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# The same model in both programs


@pytest.mark.parametrize("changes", OURS.values(), ids=OURS)
def test_transformers_runs_what_we_save(tmp_path, changes):
    ours = our_model(**changes)
    ours.save_pretrained(tmp_path / "a")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert isinstance(theirs, Cohere2ForCausalLM) and theirs.dtype == torch.float32
    assert not any(report.values()), f"tensors that transformers did not match: {report}"
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == theirs.generation_config.eos_token_id == V - 1
    check_same_model(ours, theirs.eval())

    theirs.save_pretrained(tmp_path / "b")  # and back, through their writer
    for folder in "ab":
        back = Transformer.from_pretrained(tmp_path / folder)
        assert equal_weights(back.state_dict(), ours.state_dict())
        assert layer_plan(back.config) == layer_plan(ours.config)
        if "ntk" in changes.values():
            assert back.config.rope_theta == 10_000 * 4 ** (8 / 6)
        elif ours.config.window is None or "r" in ours.config.pattern:
            assert back.config == ours.config
        assert torch.equal(back(tokens()), ours(tokens()))


@pytest.mark.parametrize("changes", THEIRS.values(), ids=THEIRS)
def test_we_run_what_transformers_saves(tmp_path, changes):
    changes = dict(changes)
    shards = changes.pop("shards", "1GB")
    theirs = their_model(**changes)
    theirs.save_pretrained(tmp_path / "a", max_shard_size=shards)
    files = list((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2 if shards != "1GB" else len(files) == 1
    dtype = theirs.dtype
    ours = Transformer.from_pretrained(tmp_path / "a")
    assert all(p.device.type == "cpu" and p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())
    check_same_model(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval())

    Transformer.from_pretrained(tmp_path / "a", dtype=dtype).save_pretrained(tmp_path / "b")  # and back, in the file's dtype
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert back.dtype == dtype and equal_weights(back.state_dict(), theirs.state_dict())
    for key in ("layer_types", "sliding_window", "head_dim", "rope_parameters", "logit_scale", "layer_norm_eps", "tie_word_embeddings"):
        assert getattr(back.config, key) == getattr(theirs.config, key), key


def half_split(x, table):
    """The other convention: dimension i is paired with i + d/2 (GPT-NeoX, Llama)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = table.real[:, None], table.imag[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@pytest.mark.parametrize("error", ["none", "window + 1", "window - 1", "theta 1%", "half-split rotation", "RMS norm", "rotation swapped", "no logit_scale"])
def test_planted_errors_exceed_the_tolerance(tmp_path, monkeypatch, error):
    ours = our_model(logit_scale=0.9)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    c = ours.config
    planted = {"window + 1": dict(window=8), "window - 1": dict(window=6), "theta 1%": dict(rope_theta=10_100.0), "no logit_scale": dict(logit_scale=1.0)}
    ours.config = replace(c, **planted.get(error, {}))
    if error == "half-split rotation":
        monkeypatch.setattr(attention, "rotate", half_split)
    if error == "rotation swapped":  # q turned the other way round: a wrong sign
        monkeypatch.setattr(attention, "rotate", lambda x, table, right=attention.rotate: right(x, table.conj()))
    if error == "RMS norm":
        monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps))
    d = difference(ours(tokens()), theirs(tokens()).logits)
    if error in ("none", "rotation swapped"):
        return
    assert d > 5 * TOLERANCE, d
