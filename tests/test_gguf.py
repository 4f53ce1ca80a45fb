"""lab.gguf: what llama.cpp reads. The real program was tried by hand."""

import sys

import numpy as np
import pytest

from data.tokenizer import EOT, Tokenizer, load_tokenizer
from lab import gguf
from model import ModelConfig, Transformer


def read_gguf(path):
    """(fields, tensors by name) of a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


@pytest.mark.parametrize(
    "changes, windowed, window",
    [
        ({}, 4, 16),
        ({"pattern": "RN"}, 2, 2**24),
        ({"pattern": "r"}, 0, 16),
        ({"pattern": "rrrNrr", "n_layer": 6}, 4, 16),
        ({"pattern": "Nr"}, [False, True] * 2, 16),
        ({"pattern": "Nrrr"}, [False, True, True, True], 16),
        ({"pattern": "R", "rope_scaling": "ntk", "rope_factor": 4.0}, 0, 2**24),
        ({"rope_scaling": "pi", "rope_factor": 2.0}, 4, 16),
    ],
)
def test_a_gguf_file_says_what_the_checkpoint_says(
    tmp_path, corpus_folder, changes, windowed, window, capsys
):
    """The pattern as a number where it can be one: builds before b11063 read no list, and their own
    default is 4. A window without end times 4 slots stays below 2^32."""
    tokenizer = load_tokenizer(corpus_folder)
    sizes = dict(n_layer=4, n_head=4, n_kv_head=2, d_model=32, d_ff=48, logit_scale=0.5)
    config = ModelConfig(vocab_size=tokenizer.n_vocab, window=16, **sizes | changes)
    model = Transformer(config)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    gguf.main([str(tmp_path), str(tmp_path / "m.gguf")])
    fields, tensors = read_gguf(tmp_path / "m.gguf")

    said = {name.removeprefix("cohere2."): value for name, value in fields.items()}
    assert said["general.architecture"] == "cohere2"
    assert said["attention.sliding_window_pattern"] == windowed
    said_of = {"4": False}.get(str(windowed), "b11063" if isinstance(windowed, list) else "b9873")
    out = capsys.readouterr().out
    assert said_of in out if said_of else "llama.cpp reads it" not in out
    assert said["attention.sliding_window"] == window
    assert said["attention.head_count_kv"] == 2 and said["logit_scale"] == 0.5
    theta = 10_000 * (4 ** (8 / 6) if config.rope_scaling == "ntk" else 1)
    assert said["rope.freq_base"] == pytest.approx(theta)
    if config.rope_scaling == "pi":
        assert (said["rope.scaling.type"], said["rope.scaling.factor"]) == ("linear", 2.0)
    else:
        assert said["rope.scaling.type"] == "none"

    # The tokenizer, by name and by its merges.
    assert said["tokenizer.ggml.pre"] == "qwen2" and said["tokenizer.ggml.add_bos_token"]
    assert said["tokenizer.ggml.bos_token_id"] == tokenizer.eot_token
    spelled = tokenizer.huggingface()["model"]
    assert said["tokenizer.ggml.tokens"] == [*spelled["vocab"], EOT]
    assert said["tokenizer.ggml.merges"] == spelled["merges"]

    # Every weight, to the bit.
    weights = {
        "token_embd": model.embed_tokens,
        "output_norm": model.norm,
        "blk.2.attn_q": model.layers[2].self_attn.q_proj,
        "blk.3.attn_output": model.layers[3].self_attn.o_proj,
        "blk.0.ffn_gate": model.layers[0].mlp.gate_proj,
        "blk.0.ffn_up": model.layers[0].mlp.up_proj,
        "blk.1.attn_norm": model.layers[1].input_layernorm,
    }
    assert len(tensors) == len(model.state_dict())
    for name, module in weights.items():
        assert np.array_equal(tensors[f"{name}.weight"], module.weight.detach().numpy()), name


def test_a_gguf_file_in_float16(tmp_path, corpus_folder):
    tokenizer = load_tokenizer(corpus_folder)
    model = Transformer(ModelConfig(n_layer=4, d_model=32, vocab_size=tokenizer.n_vocab))
    gguf.write(model, tokenizer, tmp_path / "m.gguf", f16=True)
    _, tensors = read_gguf(tmp_path / "m.gguf")
    half = model.layers[0].mlp.up_proj.weight.detach().half().numpy()
    assert np.array_equal(tensors["blk.0.ffn_up.weight"], half)
    assert tensors["output_norm.weight"].dtype == np.float32


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"pattern": "n"}, "pattern 'n'"),
        ({"pattern": "N"}, "pattern 'N': it wants a RoPE layer"),
        ({"pattern": "rR"}, "pattern 'rR'"),
        ({"qk_norm": True}, "qk_norm"),
        ({"length_scale": "swan", "length_base": 64}, "length_scale 'swan'"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"tie_embeddings": False}, "tie_embeddings"),
        ({"vocab_size": 2048}, "the tokenizer has 1,024 ids and the model 2,048"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_by_name(
    tmp_path, corpus_folder, changes, said, error
):
    tokenizer = load_tokenizer(corpus_folder)
    sizes = dict(n_layer=4, n_head=4, n_kv_head=2, d_model=32, d_ff=48)
    config = ModelConfig(**{**sizes, "vocab_size": tokenizer.n_vocab, **changes})
    Transformer(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert said in error(gguf.main, tmp_path, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_vocabulary_of_bytes_alone(tmp_path, error):
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    Transformer(ModelConfig(vocab_size=257)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert "without merges" in error(gguf.main, tmp_path, tmp_path / "m.gguf")


def test_a_tokenizer_that_llama_cpp_has_no_name_for(tmp_path, corpus_folder, error):
    tokenizer = Tokenizer(load_tokenizer(corpus_folder).ranks, r"\s+|\S+")
    Transformer(ModelConfig(vocab_size=tokenizer.n_vocab)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert "no name for this tokenizer's pattern" in error(gguf.main, tmp_path, tmp_path / "m.gguf")


def test_without_the_package_gguf(tmp_path, corpus_folder, error, monkeypatch):
    load_tokenizer(corpus_folder).save(tmp_path)
    Transformer(ModelConfig(vocab_size=1024)).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in error(gguf.main, tmp_path, tmp_path / "m.gguf")
