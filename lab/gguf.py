"""A checkpoint as GGUF, which llama.cpp runs, and with it Ollama and LM Studio.

    pip install gguf
    python -m lab.gguf out/laptop-r64r64r64N-s1/last model.gguf [--f16]

The architecture is llama.cpp's "cohere2". Its tokenizers cut words by rules that go by name, so the
pattern has to be one that it knows: ours, which is Qwen2's, or GPT-2's.
"""

from pathlib import Path

import checkpoint
from commandline import CommandLine, guarded
from data.tokenizer import EOT, GPT2_PATTERN, PATTERN, Tokenizer, load_tokenizer
from model import ModelConfig, Transformer, layer_plan, require

LONGEST = 2**24  # a window: llama.cpp multiplies it by its slots, in 32 bits
PRETOKENIZERS = {PATTERN: "qwen2", GPT2_PATTERN: "gpt-2"}  # llama.cpp's names


def check(c: ModelConfig, tokenizer) -> None:
    """ValueError for what llama.cpp cannot express, naming it."""
    cannot = "llama.cpp's cohere2 cannot express"
    letters = "n" in c.pattern or {"r", "R"} <= set(c.pattern)
    require(not letters, f"{cannot} pattern {c.pattern!r}: give r with N, or R with N")
    require(set(c.pattern) & {"r", "R"}, f"{cannot} pattern {c.pattern!r}: it wants a RoPE layer")
    require(not c.qk_norm, f"{cannot} qk_norm")
    require(c.length_scale == "none", f"{cannot} length_scale {c.length_scale!r}")
    heads = f"n_head {c.n_head} x head_dim {c.head_width}, which is not d_model {c.d_model}"
    require(c.n_head * c.head_width == c.d_model, f"{cannot} {heads}")
    require(c.tie_embeddings, f"{cannot} an output matrix of its own (tie_embeddings false)")
    named = isinstance(tokenizer, Tokenizer) and tokenizer.pattern in PRETOKENIZERS
    require(named, "llama.cpp has no name for this tokenizer's pattern: only for ours and GPT-2's")
    require(tokenizer.n_vocab > 257, "llama.cpp reads no vocabulary of bytes alone, without merges")
    counts = f"{tokenizer.n_vocab:,} ids and the model {c.vocab_size:,}"
    require(tokenizer.n_vocab == c.vocab_size, f"the tokenizer has {counts}")


def write(model: Transformer, tokenizer: Tokenizer, out: Path, f16: bool = False) -> None:
    """Write the file `out`, whole or not at all: weights in float32, or matrices in float16.
    ValueError for what llama.cpp cannot express, or where the package gguf is not here."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("lab.gguf needs a package that is not here: `pip install gguf`") from error
    check(model.config, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.COHERE2, model.config.n_layer)

    def fill(partial: Path) -> None:
        writer = gguf.GGUFWriter(partial, "cohere2")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if f16 else gguf.LlamaFileType.ALL_F32)
        add_config(writer, model.config)
        add_tokenizer(writer, tokenizer)
        for name, p in model.state_dict().items():
            dtype = "float16" if f16 and p.ndim == 2 else "float32"
            array = p.float().cpu().numpy().astype(dtype)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    checkpoint.replace_file(out, fill)


def add_config(writer, c: ModelConfig) -> None:
    """The sizes, which layers have a window, and how those are rotated; the others are not."""
    from gguf import RopeScalingType

    cohere2 = checkpoint.to_cohere2(vars(c), "float32")
    writer.add_vocab_size(c.vocab_size)
    writer.add_block_count(c.n_layer)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_layer_norm_eps(c.norm_eps)
    writer.add_logit_scale(c.logit_scale)
    writer.add_context_length(cohere2["max_position_embeddings"])

    writer.add_sliding_window(min(cohere2["sliding_window"], LONGEST))
    writer.add_sliding_window_pattern(sliding_pattern(c))
    writer.add_rope_dimension_count(c.head_width)
    writer.add_rope_freq_base(cohere2["rope_theta"])  # "ntk" is a theta
    scaling = {"pi": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}.get(c.rope_scaling)
    writer.add_rope_scaling_type(scaling or RopeScalingType.NONE)
    if scaling is not None:
        writer.add_rope_scaling_factor(c.rope_factor)
    if c.rope_scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(c.rope_original_length)


def sliding_pattern(c: ModelConfig) -> int | list[bool]:
    """n, where all layers but each n-th are rotated and so sliding ones (0: all are); else a value
    a layer. llama.cpp reads numbers from b9873 on at the latest, values from b11063; builds before
    these take 4, in silence."""
    sliding = [spec.rope for spec in layer_plan(c)]
    every = lambda n: [n == 0 or i % n < n - 1 for i in range(len(sliding))]
    return next((n for n in (0, *range(2, len(sliding) + 1)) if every(n) == sliding), sliding)


def add_tokenizer(writer, tokenizer: Tokenizer) -> None:
    """The tokens as Hugging Face spells them, and the merges."""
    from gguf import TokenType

    said = tokenizer.huggingface()["model"]
    words = sorted(said["vocab"], key=said["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRETOKENIZERS[tokenizer.pattern])
    writer.add_token_list([*words, EOT])
    writer.add_token_types([TokenType.NORMAL] * len(words) + [TokenType.CONTROL])
    writer.add_token_merges(said["merges"])
    writer.add_bos_token_id(tokenizer.eot_token)
    writer.add_eos_token_id(tokenizer.eot_token)
    writer.add_pad_token_id(tokenizer.eot_token)
    writer.add_add_bos_token(True)  # every sequence of training began with it


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(prog="python -m lab.gguf", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    out = "where to (default: the run's name, here)"
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.gguf", help=out)
    parser.add_argument("--f16", action="store_true", help="matrices in float16: half the size")
    args = parser.parse(argv)
    folder = args.checkpoint.absolute()
    run = folder.parent if (folder.parent / "run.json").is_file() else folder
    out = args.out or Path(f"{run.name}.gguf")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: OUT.gguf begins with one that exists")
    model = Transformer.from_pretrained(args.checkpoint)
    write(model, load_tokenizer(args.checkpoint), out, args.f16)
    print(f"written to {out}: try llama-cli --model {out} --prompt 'def ' --flash-attn off")
    pattern = sliding_pattern(model.config)
    if pattern != 4:
        since = "b9873, and perhaps before," if isinstance(pattern, int) else "b11063"
        print(f"pattern {model.config.pattern}: llama.cpp reads it from {since} on; else as rrrN")


if __name__ == "__main__":
    main()
