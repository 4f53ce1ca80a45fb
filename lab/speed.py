"""This code beside transformers' Cohere2 with the same weights, alternating in one process: medians, and their ratio.

    python -m lab.speed            one CPU thread, greedy decoding of 256 tokens after a prompt of 64
    python -m lab.speed --compile  ours compiled
"""

import argparse
import statistics
import tempfile
import time

import torch

from data.commandline import CommandLine, fail
from model import ModelConfig, Transformer

SHAPE = {"n_layer": 8, "n_head": 8, "n_kv_head": 2, "d_model": 256, "d_ff": 704, "vocab_size": 512, "window": 256}


def decoding(repeats: int, new_tokens: int, compiled: bool) -> tuple[float, float]:
    """Median milliseconds a token, (ours, transformers'), after checking that both say the same."""
    from transformers import AutoModelForCausalLM  # the oracle; only here

    torch.manual_seed(0)
    ours = Transformer(ModelConfig(**SHAPE)).eval()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    prompt = torch.randint(SHAPE["vocab_size"] - 1, (1, 64))
    if compiled:
        ours.compile_decoding()
    run_ours = lambda: ours.generate(prompt, new_tokens)
    run_theirs = lambda: theirs.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    assert torch.equal(run_ours(), run_theirs()), "the two do not say the same: their times mean nothing"
    times: dict = {run_ours: [], run_theirs: []}
    for _ in range(repeats):
        for run, seen in times.items():
            started = time.perf_counter()
            run()
            seen.append((time.perf_counter() - started) / new_tokens * 1e3)
    return statistics.median(times[run_ours]), statistics.median(times[run_theirs])


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(prog="python -m lab.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--compile", action="store_true", help="compile our decode step")
    try:
        args = parser.parse(argv)
        for name in ("threads", "repeats", "new_tokens"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
        try:
            import transformers
        except ImportError:
            raise ValueError("lab.speed compares with transformers, which is not installed: pip install -r requirements-dev.txt") from None
    except (ValueError, OSError) as error:
        fail(error)
    torch.set_num_threads(args.threads)
    ours, theirs = decoding(args.repeats, args.new_tokens, args.compile)
    print(f"{SHAPE}, float32, {args.threads} thread(s), torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"decoding: ours {ours:.2f} ms a token, Cohere2 {theirs:.2f}, ratio {ours / theirs:.2f} (medians of {args.repeats} alternating runs)")


if __name__ == "__main__":
    main()
