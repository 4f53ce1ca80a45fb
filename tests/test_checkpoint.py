"""Checkpoints against transformers' own Cohere2, run live on small random models: both directions,
to rounding error.

TOLERANCE, relative to the largest entry: two float32 programs that order their sums differently
stay within some 10 ulp (1.2e-7 each) a layer; the worst measured of everything here, gradients
included, is 4e-6. 2e-5 leaves five times that for other machines, and the smallest planted error
(theta off by 1%) makes 2e-3.
"""

import json
import math
import random
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

import attention
import checkpoint
from data.tokenizer import HuggingFaceTokenizer, load_tokenizer, train_tokenizer
from model import ModelConfig, Transformer, layer_plan

transformers = pytest.importorskip(
    "transformers", reason="the oracle; pip install -r requirements-dev.txt"
)
safetensors_torch = pytest.importorskip("safetensors.torch")
AutoConfig, AutoTokenizer = transformers.AutoConfig, transformers.AutoTokenizer
AutoModelForCausalLM = transformers.AutoModelForCausalLM
Cohere2Config, Cohere2ForCausalLM = transformers.Cohere2Config, transformers.Cohere2ForCausalLM
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
    "R, yarn": dict(
        pattern="R",
        window=None,
        n_layer=2,
        head_dim=32,
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_length=32,
    ),
}
THEIRS = {  # what transformers saves, in Cohere2Config's words
    "sliding_window_pattern": dict(sliding_window_pattern=2),
    "defaults": dict(),
    "layer_types, head_dim, eps": dict(layer_types=list("fsss"), head_dim=16, layer_norm_eps=1e-3),
    "one key head, logit_scale, theta": dict(
        layer_types=list("sffs"), num_key_value_heads=1, logit_scale=1.7, rope_theta=300.0
    ),
    "untied": dict(layer_types=list("ffss"), tie_word_embeddings=False),
    "all full": dict(layer_types=list("ffff")),
    "all sliding, no groups": dict(layer_types=list("ssss"), num_key_value_heads=None),
    "linear": dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=1000.0)),
    "yarn": dict(
        head_dim=32,
        rope_parameters=dict(
            rope_type="yarn", factor=8.0, rope_theta=1000.0, original_max_position_embeddings=64
        ),
    ),
    "sharded": dict(shards="60KB"),
    "bfloat16, sharded": dict(dtype=torch.bfloat16, shards="30KB"),
}


def lively(model: nn.Module) -> nn.Module:
    """Random weights so large that every part of the architecture shows in the logits, norms' gains
    included."""
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
    sizes = dict(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=48,
    )
    # the defaults lie outside this vocabulary
    special = dict(bos_token_id=V - 1, eos_token_id=V - 1, pad_token_id=V - 1)
    return lively(
        Cohere2ForCausalLM(
            Cohere2Config(**sizes | special | dict(vocab_size=V, sliding_window=7) | changes)
        )
    ).to(dtype)


def tokens(t: int = 40, b: int = 2, seed: int = 1) -> torch.Tensor:
    """Without the last id: transformers takes it for padding and keeps its embedding's gradient at
    zero."""
    return torch.randint(0, V - 1, (b, t), generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def check_same_model(ours: Transformer, theirs: Cohere2ForCausalLM) -> None:
    """Logits, every layer's hidden state, loss, gradients, 24 greedy tokens: 40 tokens and 29, over
    windows of 2 and 7."""
    x = tokens()
    layers = []
    hidden = ours.hidden(x, layers=layers)
    out = theirs(x, labels=x, output_hidden_states=True)
    assert difference(ours(x), out.logits) < TOLERANCE
    # their last one is after the final norm
    for mine, other in zip(layers[:-1] + [hidden], out.hidden_states, strict=True):
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
    wanted = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(ours.generate(prompt, 24), wanted)


def equal_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


# ------------------------------------------------------------------------------------------------
# The same model in both programs


@pytest.mark.parametrize("changes", OURS.values(), ids=OURS)
def test_transformers_runs_what_we_save(tmp_path, changes):
    ours = our_model(**changes)
    ours.save_pretrained(tmp_path / "a")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert isinstance(theirs, Cohere2ForCausalLM) and theirs.dtype == torch.float32
    assert not any(report.values()), f"tensors that transformers did not match: {report}"
    assert (
        theirs.config.eos_token_id
        == theirs.config.bos_token_id
        == theirs.generation_config.eos_token_id
        == V - 1
    )
    # before anything is generated: decoding lays matrices out anew, and another layout rounds
    # otherwise
    expected = ours(tokens())
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
        assert torch.equal(back(tokens()), expected)


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
    assert all(
        p.device.type == "cpu" and p.requires_grad and p.dtype == torch.float32
        for p in ours.parameters()
    )
    check_same_model(
        ours, AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    )

    # and back, in the file's dtype
    Transformer.from_pretrained(tmp_path / "a", dtype=dtype).save_pretrained(tmp_path / "b")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert back.dtype == dtype and equal_weights(back.state_dict(), theirs.state_dict())
    for key in (
        "layer_types",
        "sliding_window",
        "head_dim",
        "rope_parameters",
        "logit_scale",
        "layer_norm_eps",
        "tie_word_embeddings",
    ):
        assert getattr(back.config, key) == getattr(theirs.config, key), key


def half_split(x, table):
    """GPT-NeoX's rotation: dimension i is paired with i + d/2."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), (table.real, table.imag)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


PLANTED = {
    "none": {},
    "window + 1": dict(window=8),
    "window - 1": dict(window=6),
    "theta 1%": dict(rope_theta=10_100.0),
    "no logit_scale": dict(logit_scale=1.0),
    "half-split rotation": {},
    "rotation backwards": {},
    "RMS norm": {},
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_exceed_the_tolerance(tmp_path, monkeypatch, error):
    ours = our_model(logit_scale=0.9)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours.config = replace(ours.config, **PLANTED[error])
    if error == "half-split rotation":
        monkeypatch.setattr(attention, "rotate", half_split)
    if error == "rotation backwards":
        monkeypatch.setattr(
            attention, "rotate", lambda x, table, right=attention.rotate: right(x, table.conj())
        )
    if error == "RMS norm":
        rms_norm = lambda n, x: nn.functional.rms_norm(x, n.normalized_shape, n.weight, n.eps)
        monkeypatch.setattr(nn.LayerNorm, "forward", rms_norm)
    d = difference(ours(tokens()), theirs(tokens()).logits)
    assert d < TOLERANCE if error == "none" else d > 50 * TOLERANCE, d


# ------------------------------------------------------------------------------------------------
# Older spellings, the real model's shapes, what only we can read


def older_config(**changes) -> dict:
    """config.json as transformers 4.48 to 4.57 wrote it for Cohere2, with the keys that its first
    checkpoints carry besides."""
    return (
        dict(
            architectures=["Cohere2ForCausalLM"],
            attention_bias=False,
            attention_dropout=0.0,
            bos_token_id=5,
            cache_implementation="hybrid",
            eos_token_id=V - 1,
            head_dim=8,
            hidden_act="silu",
            hidden_size=32,
            initializer_range=0.02,
            intermediate_size=48,
            layer_norm_eps=1e-05,
            layer_switch=4,
            logit_scale=0.25,
            max_position_embeddings=8192,
            model_type="cohere2",
            num_attention_heads=4,
            num_hidden_layers=4,
            num_key_value_heads=2,
            order_of_interleaved_layers="local_attn_first",
            pad_token_id=0,
            position_embedding_type="rope_gptj",
            rope_scaling=None,
            rope_theta=50000,
            rotary_pct=1.0,
            sliding_window=7,
            sliding_window_pattern=4,
            torch_dtype="float32",
            transformers_version="4.48.0",
            use_cache=True,
            use_embedding_sharing=True,
            use_gated_activation=True,
            use_parallel_block=True,
            use_parallel_embedding=True,
            vocab_size=V,
        )
        | changes
    )


OLDER = {
    "4.48": {},
    "period 2": dict(layer_switch=2, sliding_window_pattern=2),
    "4.48's linear": dict(rope_scaling={"type": "linear", "factor": 2.0}),
    "4.57's yarn": dict(
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        max_position_embeddings=128,
    ),
    "yarn from max_position_embeddings": dict(
        rope_scaling={"rope_type": "yarn", "factor": 4.0}, max_position_embeddings=64
    ),
}


@pytest.mark.parametrize("changes", OLDER.values(), ids=OLDER)
def test_older_spellings(tmp_path, changes):
    their_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(older_config(**changes)))
    ours, theirs = (
        Transformer.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
    )
    assert (
        ours.config.logit_scale == 0.25
        and ours.config.rope_theta == 50_000
        and ours.config.head_dim is None
    )
    assert ours.config.pattern == ("rN" if changes.get("layer_switch") == 2 else "rrrN")
    assert difference(ours(tokens()), theirs(tokens()).logits) < TOLERANCE


def test_sliding_window_pattern_that_does_not_tile(tmp_path):
    """Six layers, every fourth full: no period of four divides them, so the pattern is all six
    letters."""
    (tmp_path / "config.json").write_text(json.dumps(older_config(num_hidden_layers=6)))
    assert checkpoint.load_config(tmp_path)["pattern"] == "rrrNrr"


COMMAND_R7B = dict(
    num_hidden_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=256000,
    sliding_window=4096,
    eos_token_id=255001,
    torch_dtype="bfloat16",
)
TINY_AYA = dict(
    num_hidden_layers=36,
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=11008,
    vocab_size=262144,
    sliding_window=4096,
    layer_norm_eps=1e-5,
    rope_theta=50_000.0,
    logit_scale=1.0,
    max_position_embeddings=500_000,
    bos_token_id=2,
    eos_token_id=3,
    pad_token_id=0,
)


@pytest.mark.parametrize(
    "raw, sizes, logit_scale, count",
    [
        (COMMAND_R7B, (32, 32, 8, 4096, 14336, 256000), 0.25, 8_028_033_024),
        (TINY_AYA, (36, 16, 4, 2048, 11008, 262144), 1.0, 3_349_227_520),
    ],
    ids=["Command R7B", "Tiny Aya"],
)
def test_real_models_are_read_planned_and_shaped_on_meta(tmp_path, raw, sizes, logit_scale, count):
    """Every tensor of the real model by name and shape, against transformers' own; no weight is
    made on either side."""
    (tmp_path / "config.json").write_text(json.dumps(older_config(**raw)))
    config = ModelConfig(**checkpoint.load_config(tmp_path))
    positions = dict(pattern="rrrN", window=4096, rope_theta=50_000.0)
    assert config == ModelConfig(*sizes, **positions, logit_scale=logit_scale)
    plan = layer_plan(config)
    assert [spec.window for spec in plan[:4]] == [4096, 4096, 4096, None]
    assert [spec.rope for spec in plan] == [True, True, True, False] * (len(plan) // 4)
    with torch.device("meta"):
        ours = Transformer(config)
        theirs = Cohere2ForCausalLM(AutoConfig.from_pretrained(tmp_path))
    # the tied lm_head once
    wanted = {name.removeprefix("model."): p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == wanted
    assert sum(p.numel() for p in ours.parameters()) == count


@pytest.mark.parametrize(
    "changes",
    [
        dict(pattern="nN"),
        dict(pattern="rR"),
        dict(qk_norm=True),
        dict(length_scale="ssmax"),
        dict(length_scale="swan", length_base=8),
    ],
)
def test_what_cohere2_cannot_express_is_ours_alone(tmp_path, changes):
    ours = our_model(**changes)
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ropenope"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ropenope"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    back = Transformer.from_pretrained(tmp_path)
    assert back.config == ours.config and equal_weights(back.state_dict(), ours.state_dict())

    # AutoTokenizer, which reads config.json too, opens the folder all the same.
    tokenizer = train_tokenizer(["def attend(q, k, v):"], 264)
    tokenizer.save(tmp_path)
    ids = [tokenizer.eot_token, *tokenizer.encode_ordinary("def v")]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("def v").input_ids == ids
    assert theirs.model_input_names == ["input_ids", "attention_mask"]

    # What tools ask of any model is there, and not what makes it.
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    kinds = ["sliding_attention" if spec.window else "full_attention" for spec in ours.plan]
    assert content.pop("layer_types") == kinds and content.pop("dtype") == "float32"
    special = [content.pop(f"{name}_token_id") for name in ("bos", "eos", "pad")]
    assert special == [ours.config.vocab_size - 1] * 3

    # As it was written before.
    content["rope_scaling"] = content.pop("scaling")
    file.write_text(json.dumps(content))
    assert Transformer.from_pretrained(tmp_path).config == ours.config


def test_tokenizer_and_model_in_one_folder(tmp_path):
    """AutoTokenizer and AutoModelForCausalLM open the folder, and text goes in and comes out as it
    does with ours."""
    text = "def attend(q, k, v):\n    return softmax(q @ k.T / 8) @ v  # naïve — and slow\n" * 8
    train_tokenizer([text], 280).save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    our_model(vocab_size=tokenizer.n_vocab).save_pretrained(tmp_path)
    ours, theirs = (
        Transformer.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
    )
    other = AutoTokenizer.from_pretrained(tmp_path)
    prompt = other("def naïve(q):\n", return_tensors="pt")
    first = [tokenizer.eot_token]  # as all training began
    assert prompt.input_ids[0].tolist() == first + tokenizer.encode_ordinary("def naïve(q):\n")
    wanted = other.decode(theirs.generate(**prompt, max_new_tokens=40, do_sample=False)[0])
    got = ours.generate(prompt.input_ids, 40, stop=tokenizer.eot_token)[0]
    assert tokenizer.decode_bytes(got.tolist()).decode(errors="replace") == wanted


def test_tokenizer_json_alone(tmp_path, monkeypatch):
    """Command R7B ships no file of ours: tokenizer.json is read through `tokenizers`, behind the
    same interface."""
    text = "To be, or not to be: 1 2 34 … \n\n\tnaïve 你好 <|endoftext|> 😀"
    train_tokenizer([text * 20], 290).save(tmp_path)
    ours = load_tokenizer(tmp_path)
    for name in ("tokenizer.tiktoken", "tokenizer_meta.json"):
        (tmp_path / name).unlink()
    assert load_tokenizer(tmp_path).hash == ours.hash  # it says the same, so it is the same
    theirs = HuggingFaceTokenizer(tmp_path)
    assert (theirs.n_vocab, theirs.eot_token, theirs.bos_token) == (
        ours.n_vocab,
        ours.eot_token,
        ours.bos_token,
    )
    ids = ours.encode_ordinary(text)
    assert theirs.encode_ordinary(text) == ids and theirs.decode_bytes(ids).decode() == text
    assert theirs.decode_bytes([ours.eot_token, 1000]) == b"<|endoftext|>"
    half = [i for i in ours.encode_ordinary("😀")][:1]
    assert theirs.decode_bytes(half) == ours.decode_bytes(half), "bytes of a character cut in two"

    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="names a bos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": [7, 9]}))
    assert (load_tokenizer(tmp_path).bos_token, load_tokenizer(tmp_path).eot_token) == (5, 7)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)
    monkeypatch.undo()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)


def test_sample_runs_a_hugging_face_folder(tmp_path, capsys):
    """What `python sample.py --checkpoint DIR` meets in Command R7B's folder, small: bf16 shards,
    4.48's config.json, tokenizer.json alone, an embedding with more rows than the tokenizer has
    ids, a begin-of-text other than end-of-text."""
    import sample

    train_tokenizer(["def attend(q, k, v): return softmax(q @ k.T) @ v\n" * 9], 270).save(tmp_path)
    for name in ("tokenizer.tiktoken", "tokenizer_meta.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = dict(bos_token_id=tokenizer["model"]["vocab"]["a"], eos_token_id=269, vocab_size=272)
    their_model(dtype=torch.bfloat16, **ids, pad_token_id=0).save_pretrained(
        tmp_path, max_shard_size="30KB"
    )
    (tmp_path / "config.json").write_text(json.dumps(older_config(torch_dtype="bfloat16", **ids)))
    (tmp_path / "generation_config.json").unlink()
    sample.main(
        [
            "--checkpoint",
            str(tmp_path),
            "--prompt",
            "def q",
            "--max-new-tokens",
            "30",
            "--temperature",
            "0",
            "--device",
            "cpu",
        ]
    )
    shown = capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    read = load_tokenizer(tmp_path)
    prompt = torch.tensor([[ids["bos_token_id"], *read.encode_ordinary("def q")]])
    wanted = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False
    )[0, 1:].tolist()
    wanted = wanted[: wanted.index(269)] if 269 in wanted else wanted
    assert shown.startswith(read.decode_bytes(wanted).decode(errors="replace") + "\n[")


# ------------------------------------------------------------------------------------------------
# Refusals: one line, the key and its value, or the tensors by name


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("model_type", "cohere", "model_type 'cohere'"),
        ("model_type", None, "model_type None"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("attention_bias", True, "attention_bias True"),
        ("attention_dropout", 0.1, "attention_dropout 0.1"),
        ("is_causal", False, "is_causal False"),
        ("use_qk_norm", True, "use_qk_norm True"),
        ("use_parallel_block", False, "use_parallel_block False"),
        ("use_gated_activation", False, "use_gated_activation False"),
        ("rotary_pct", 0.5, "rotary_pct 0.5"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5"),
        ("position_embedding_type", "rope_neox", "position_embedding_type 'rope_neox'"),
        (
            "order_of_interleaved_layers",
            "global_attn_first",
            "order_of_interleaved_layers 'global_attn_first'",
        ),
        (
            "quantization_config",
            {"quant_method": "fp8"},
            "quantization_config {'quant_method': 'fp8'}",
        ),
        ("layer_switch", 2, "layer_switch 2 contradicts"),
        ("layer_switch", 0, "layer_switch 0"),
        ("sliding_window_pattern", 0, "sliding_window_pattern 0"),
        ("layer_types", ["chunked_attention"] * 4, "layer_types ['chunked_attention'"),
        ("layer_types", ["full_attention"] * 3, "each of 4 layers"),
        ("layer_types", "full", "layer_types 'full'"),
        ("sliding_window", None, "sliding_window None contradicts"),
        ("sliding_window", 7.5, "sliding_window 7.5"),
        ("sliding_window", 0, "window 0 is below 1"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_type 'llama3'"),
        ("rope_scaling", {"type": "dynamic"}, "rope_type 'dynamic'"),
        ("rope_scaling", {"rope_type": "linear"}, "rope_type 'linear' needs a factor"),
        ("rope_scaling", 4.0, "rope_parameters 4.0"),
        ("rope_scaling", {"rope_type": ["linear"]}, "rope_type ['linear']"),
        ("rope_scaling", {"type": "linear", "factor": 0.5}, "rope_factor 0.5"),
        (
            "rope_parameters",
            {"sliding_attention": {"rope_type": "default"}},
            "one set of values for all layers",
        ),
        ("rope_theta", "10000", "rope_theta '10000'"),
        ("rope_theta", -1.0, "rope_theta -1.0"),
        ("hidden_size", "32", "hidden_size '32'"),
        ("hidden_size", None, "hidden_size None"),
        ("num_hidden_layers", True, "num_hidden_layers True"),
        ("vocab_size", 0, "vocab_size 0"),
        ("num_hidden_layers", 0, "n_layer 0"),
        ("num_key_value_heads", 3, "n_kv_head 3"),
        ("tie_word_embeddings", None, "tie_word_embeddings None"),
        ("tie_word_embeddings", 1, "tie_word_embeddings 1"),
        ("logit_scale", None, "logit_scale None"),
        ("logit_scale", math.nan, "logit_scale nan"),
        ("rope_theta", math.inf, "rope_theta inf"),
        ("rope_theta", 10**400, "rope_theta 1000"),
        ("vocab_size", 2**64, "vocab_size 18446744073709551616"),
        ("intermediate_size", 2**50, "d_ff 1125899906842624"),
        ("num_hidden_layers", 2**62, "num_hidden_layers 4611686018427387904"),
        ("num_hidden_layers", 2_000_001, "num_hidden_layers 2000001"),
        ("layer_types", [["full_attention"]] * 4, "layer_types [['full_attention']"),
        ("layer_types", ["\x1b[2J" * 9999] * 4, "layer_types ['\\x1b[2J"),
        ("model_type", ["cohere2"], "model_type ['cohere2']"),
    ],
)
def test_config_that_asks_for_another_model_is_refused(tmp_path, key, value, words):
    our_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(older_config(**{key: value})))
    with pytest.raises(ValueError) as refusal:
        Transformer.from_pretrained(tmp_path)
    message = str(refusal.value)
    assert words in message and "config.json" in message and message.isprintable(), message


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("tie_embeddings", "false", "tie_embeddings 'false' is no bool"),
        ("trained_length", 1.5, "trained_length 1.5 is no int"),
        ("trained_length", 2**64, "trained_length 18446744073709551616"),
        ("qk_norm", 1, "qk_norm 1 is no bool"),
        ("n_layer", True, "n_layer True is no int"),
        ("n_layer", 2_000_000, "n_layer 2000000"),
        ("d_ff", 2**50, "d_ff 1125899906842624"),
        ("d_ff", 10**400, "d_ff 1000"),
        ("vocab_size", None, "vocab_size None is no int"),
        ("window", [7], "window [7] is no int"),
        ("pattern", {"a": "\x1b[2J"}, "pattern {'a': '\\x1b[2J'}"),
        ("logit_scale", math.nan, "logit_scale nan is not finite"),
        ("norm_eps", -math.inf, "norm_eps -inf is not finite"),
        ("rope_theta", "1e4", "rope_theta '1e4' is no float"),
        ("rope_factor", 1e300, "rope_factor 1e+300"),
        ("\x1b[2J", 1, "unknown key '\\x1b[2J'"),
    ],
)
def test_our_own_config_is_typed(tmp_path, key, value, words):
    """As strictly as Cohere2's; and what no computer holds is refused before it is built."""
    our_model(qk_norm=True).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"config\.json makes no model: ") as refusal:
        Transformer.from_pretrained(tmp_path)
    message = str(refusal.value)
    assert words in message and message.isprintable() and len(message) < 1000, message
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "key, value",
    [
        ("beta_fast", 64),
        ("beta_slow", 2),
        ("attention_factor", 1.5),
        ("mscale", 1.0),
        ("mscale_all_dim", 1.0),
        ("truncate", False),
        ("truncate", None),  # to transformers that is False
        ("partial_rotary_factor", 0.5),
        ("factor", None),
    ],
)
def test_yarn_with_other_constants_is_refused(tmp_path, key, value):
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    }
    written_out = dict(beta_fast=32, beta_slow=1, truncate=True)
    own = 0.1 * math.log(4) + 1
    for factor in (None, own, float(np.float32(own))):
        accepted = dict(written_out, attention_factor=factor)
        (tmp_path / "config.json").write_text(
            json.dumps(older_config(rope_parameters=rope | accepted))
        )
        assert checkpoint.load_config(tmp_path)["rope_original_length"] == 32
    (tmp_path / "config.json").write_text(
        json.dumps(older_config(rope_parameters=rope | {key: value}))
    )
    with pytest.raises(ValueError, match=key if value is None else f"{key} {value}"):
        checkpoint.load_config(tmp_path)


def test_missing_and_damaged_config(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere.config\.json not found.*python train\.py"
    ):
        Transformer.from_pretrained(tmp_path / "nowhere")
    our_model(qk_norm=True).save_pretrained(tmp_path)
    whole = (tmp_path / "config.json").read_text()
    wrong = ("", whole[: len(whole) // 2], whole[:-3], "[]", "null", "\0" * 40, '"cohere2"')
    for damaged in (*wrong, "[" * 100_000, '{"a":' * 100_000):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.json is damaged") as refusal:
            Transformer.from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value)
    for change in (
        {"n_layers": 4},
        {"n_layer": "4"},
        {"n_layer": 0},
        {"pattern": "rx"},
        {"pattern": None},
        {"window": [7]},
    ):
        (tmp_path / "config.json").write_text(json.dumps(json.loads(whole) | change))
        with pytest.raises(ValueError, match=r"config\.json makes no model: "):
            Transformer.from_pretrained(tmp_path)


def test_tensors_that_are_not_the_models_are_named(tmp_path):
    our_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors_torch.load_file(file)
    del tensors["model.norm.weight"], tensors["model.layers.3.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 16)
    tensors["model.layers.2.self_attn.v_proj.weight"] = torch.zeros(16, 32, dtype=torch.int8)
    safetensors_torch.save_file(tensors, file)
    with pytest.raises(ValueError) as refusal:
        Transformer.from_pretrained(tmp_path)
    message = str(refusal.value)
    for part in (
        "norm.weight is missing",
        "layers.3.mlp.up_proj.weight is missing",
        "layers.0.self_attn.q_proj.bias is not in this model",
        "layers.1.self_attn.k_proj.weight is F32 [32, 16], not floating-point [16, 32]",
        "layers.2.self_attn.v_proj.weight is I8",
    ):
        assert part in message, message
    assert "\n" not in message


def test_control_characters_in_names_are_shown_escaped(tmp_path):
    our_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    strange = {"model.\x1b[31mred\n": torch.zeros(2), "y" * 9999: torch.zeros(2)}
    safetensors_torch.save_file(safetensors_torch.load_file(file) | strange, file)
    with pytest.raises(
        ValueError, match=r"model\.\\x1b\[31mred\\n is not in this model"
    ) as refusal:
        Transformer.from_pretrained(tmp_path)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 1000


def test_frequencies_beside_the_weights(tmp_path):
    """Buffers that older versions of transformers saved."""
    ours = our_model()
    ours.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    frequencies = 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    names = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    more = {name: frequencies.clone() for name in names}
    safetensors_torch.save_file(safetensors_torch.load_file(file) | more, file)
    assert equal_weights(Transformer.from_pretrained(tmp_path).state_dict(), ours.state_dict())


def test_a_tensor_in_two_shards(tmp_path):
    """Twice the same is the same model; twice another is none."""
    their_model().save_pretrained(tmp_path, max_shard_size="60KB")
    whole = Transformer.from_pretrained(tmp_path).state_dict()
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(safetensors_torch.load_file(first).items()))
    others = safetensors_torch.load_file(second)
    safetensors_torch.save_file(others | {name: tensor}, second)
    assert equal_weights(Transformer.from_pretrained(tmp_path).state_dict(), whole)
    safetensors_torch.save_file(others | {name: tensor + 1e-3}, second)
    plain = name.removeprefix("model.")
    with pytest.raises(ValueError, match=f"{plain} is there twice, with different values"):
        Transformer.from_pretrained(tmp_path)


def test_redundant_tied_head(tmp_path):
    """Some writers leave lm_head.weight beside the embeddings it is tied to: a copy is fine,
    another matrix is another model."""
    ours = our_model()
    ours.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors_torch.load_file(file)
    safetensors_torch.save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file
    )
    assert equal_weights(Transformer.from_pretrained(tmp_path).state_dict(), ours.state_dict())
    safetensors_torch.save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file
    )
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        Transformer.from_pretrained(tmp_path)
    safetensors_torch.save_file(tensors | {"lm_head.weight": torch.zeros(3, 32)}, file)
    with pytest.raises(ValueError, match=r"lm_head.weight is F32 \[3, 32\]"):
        Transformer.from_pretrained(tmp_path)


def test_damaged_weights(tmp_path):
    our_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (
        b"",
        whole[:4],
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        b"\xff" * 100,
        whole + b"more",
        b"\x80\x04K\x2a.",
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged") as refusal:
            Transformer.from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value)
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04K\x2a.")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors not found.*pickled"):
        Transformer.from_pretrained(tmp_path)


def test_damaged_shards(tmp_path):
    folder = tmp_path / "inside"
    their_model().save_pretrained(folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    first = sorted(folder.glob("model-*.safetensors"))[0]
    first.rename(tmp_path / "outside.safetensors")
    with pytest.raises(FileNotFoundError, match=f"{first.name} not found"):
        Transformer.from_pretrained(folder)
    name = "\x1b[2J\n.safetensors"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FileNotFoundError, match=r"\\x1b\[2J\\n.safetensors not found"):
        Transformer.from_pretrained(folder)
    for name in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "..",
        "",
        "weights.bin",
    ):
        index.write_text(whole.replace(first.name, name))
        with pytest.raises(ValueError, match="same folder"):
            Transformer.from_pretrained(folder)
    wrong = ("{}", whole[:50], '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000)
    for damaged in wrong:
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            Transformer.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------
# Anything at all

VALUES = [0, 1, -1, 2, 7, 63, 10**400, 2**62, 2**63, 1.5, 1e300, 1e-320, math.nan, -math.inf]
VALUES += [True, None, "", "rN", "x" * 999, "\x1b[2J", [], [[1]] * 4, {}, {"rope_type": "yarn"}]
VALUES += [{"rope_type": "linear", "factor": 1e300}, ["full_attention"] * 4, "yarn", "\ud800"]


def mutated_object(raw: dict, rng: random.Random) -> bytes:
    """A JSON object with some values changed, some keys gone; or with some bytes changed."""
    raw = dict(raw)
    for key in rng.sample(list(raw), rng.randrange(1, 4)):
        raw[key] = rng.choice(VALUES)
        if rng.random() < 0.1:
            del raw[key]
    content = json.dumps(raw).encode()
    return mutated_bytes(content, rng) if rng.random() < 0.3 else content


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes replaced, cut off, doubled, or nested."""
    at, n = rng.randrange(len(content)), rng.randrange(1, 20)
    middle = [rng.randbytes(n), b"", content[at : at + n] * 2, b"[" * n, b"9" * n][rng.randrange(5)]
    return content[:at] + middle + (content[at + n :] if rng.random() < 0.8 else b"")


def check_accepted_or_one_line(folder) -> bool:
    """The folder is a model, or one printable line of ValueError or OSError, at once."""
    started = time.perf_counter()
    try:
        model = Transformer.from_pretrained(folder)
        model.rotary_table(torch.arange(9))
        model.save_pretrained(folder / "again")
        return True
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.isprintable() and len(message) < 3000, message
        return False
    finally:
        assert time.perf_counter() - started < 3


@pytest.mark.parametrize("kind", ["ours", "Cohere2", "4.48"])
def test_mutated_configs_are_accepted_or_one_line(tmp_path, kind):
    our_model(qk_norm=kind == "ours").save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    whole = older_config() if kind == "4.48" else whole
    rng, accepted = random.Random(kind), 0
    for _ in range(100):
        (tmp_path / "config.json").write_bytes(mutated_object(whole, rng))
        accepted += check_accepted_or_one_line(tmp_path)
    assert 0 < accepted < 80


def test_mutated_headers_are_accepted_or_one_line(tmp_path):
    """Of safetensors: eight bytes of length, then JSON; its text, or anything in it."""
    our_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, rng, accepted = json.loads(whole[8 : 8 + length]), random.Random(3), 0
    others = [{"dtype": "F8_E4M3"}, {"dtype": "BOOL"}, {"shape": []}, {"shape": [2**62, 2]}]
    others += [{"data_offsets": [0, 4]}, {"shape": [-1]}, {"dtype": "BF16"}, {}, {"more": 1}]
    for _ in range(120):
        changed = dict(header)
        name = rng.choice(list(header))
        tensor = changed.pop(name) if rng.random() < 0.3 else changed[name]
        key = rng.choice([name, "lm_head.weight", "\x1b[2J", "", "inv_freq"])
        changed[key] = rng.choice([tensor | rng.choice(others), rng.choice(VALUES)])
        text = json.dumps(changed).encode()
        text = mutated_bytes(text, rng) if rng.random() < 0.3 else text
        size = len(text).to_bytes(8, "little") if rng.random() < 0.9 else rng.randbytes(8)
        file.write_bytes(size + text + whole[8 + length :])
        accepted += check_accepted_or_one_line(tmp_path)
    assert 0 < accepted < 96


# ------------------------------------------------------------------------------------------------
# Files whole or absent


def test_save_leaves_the_former_file_when_it_fails(tmp_path, monkeypatch):
    ours = our_model()
    ours.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == ["config.json", "model.safetensors"]

    def half(tensors, file, metadata):
        file.write_bytes(before["model.safetensors"][:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        our_model(logit_scale=2.0).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_atomic_folder_and_point(tmp_path):
    with checkpoint.atomic_folder(tmp_path / "run" / "a") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("1")
        assert not (tmp_path / "run" / "a").exists()
    with pytest.raises(RuntimeError), checkpoint.atomic_folder(tmp_path / "run" / "b") as partial:
        (partial / "file").write_text("2")
        raise RuntimeError
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["a"]
    (tmp_path / "run" / ".b.partial").mkdir()  # what a killed process left
    (tmp_path / "run" / ".b.partial" / "stale").write_text("")
    with checkpoint.atomic_folder(tmp_path / "run" / "b") as partial:
        (partial / "file").write_text("2")
    assert [f.name for f in (tmp_path / "run" / "b").iterdir()] == ["file"]
    link = tmp_path / "run" / "last"
    for name in "ab":
        checkpoint.point(link, tmp_path / "run" / name)
        assert str(link.readlink()) == name  # relative: the run's folder can be moved
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["a", "b", "last"]


def test_config_round_trip_through_plain_dicts():
    """Every pattern of up to four letters, tiled over four layers: Cohere2's config reads back as
    the same plan, or there is none."""
    from itertools import product

    for n in (1, 2, 4):
        for letters in map("".join, product("RrNn", repeat=n)):
            config = ModelConfig(pattern=letters, window=7)
            content = checkpoint.to_cohere2(asdict(config), "float32")
            assert (content is None) == ("n" in letters or {"r", "R"} <= set(letters)), letters
            if content is not None:
                # transformers makes its mask even where no layer slides
                assert content["sliding_window"] is not None
                assert layer_plan(
                    ModelConfig(**checkpoint._from_cohere2(json.loads(json.dumps(content))))
                ) == layer_plan(config)
