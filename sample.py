"""Continue a prompt with a checkpoint, streamed as it comes.

python sample.py --prompt "def "                    the newest checkpoint under out/
python sample.py --checkpoint DIR --file story.txt --temperature 0.8 --top-k 50 --samples 3
cat story.txt | python sample.py                    the prompt from standard input
"""

import argparse
import codecs
import os
import sys
import time
from pathlib import Path

import torch

from commandline import CommandLine, fail
from data.tokenizer import load_tokenizer
from model import Transformer
from run import choose_device


def command_line() -> CommandLine:
    """The flags."""
    parser = CommandLine(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="default: the newest under out/"
    )
    parser.add_argument(
        "--prompt",
        help="text to continue (default: --file, or standard input where it is not a terminal)",
    )
    parser.add_argument("--file", type=Path, help="a file with the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up p")
    parser.add_argument(
        "--samples", type=int, default=1, help="how many, decoded together; the first is streamed"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--device", help="cuda, cpu or mps (default: cuda where there is one, else cpu)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def newest_checkpoint(root: Path = Path("out")) -> Path:
    """The `last` of the run under `root` that was written to most recently. Raises FileNotFoundError where there is none."""
    found = [link for link in root.glob("*/last") if (link / "config.json").is_file()]
    if not found:
        raise FileNotFoundError(
            f"no checkpoint under {root}/: `python train.py` makes one, or name one with --checkpoint"
        )
    return max(found, key=lambda link: (link / "config.json").stat().st_mtime)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text. Raises ValueError where there is none, or it is not UTF-8."""
    if args.prompt is not None and args.file is not None:
        raise ValueError("--prompt and --file both give a prompt: choose one")
    if args.prompt is not None:
        text = args.prompt
    elif args.file is not None or not sys.stdin.isatty():
        try:
            text = (
                args.file.read_text(encoding="utf-8")
                if args.file
                else sys.stdin.buffer.read().decode("utf-8")
            )
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the prompt in {args.file or 'standard input'} is not UTF-8 ({error.reason} at byte {error.start})"
            ) from None
    else:
        raise ValueError("no prompt: give --prompt TEXT, --file FILE, or text on standard input")
    if not text:
        raise ValueError("the prompt is empty: give at least one character")
    return text


def main(argv: list[str] | None = None) -> None:
    """The command."""
    try:
        args = command_line().parse(argv)
        if args.samples < 1:
            raise ValueError(f"--samples {args.samples} must be at least 1")
        device, _ = choose_device(args.device)
        text = read_prompt(args)
        path = args.checkpoint or newest_checkpoint()
        tokenizer = load_tokenizer(path)
        model = Transformer.from_pretrained(path, device, getattr(torch, args.dtype))
        if tokenizer.n_vocab > model.config.vocab_size:
            raise ValueError(
                f"{path}: its tokenizer has {tokenizer.n_vocab} tokens and its model {model.config.vocab_size}"
            )
        prompt = torch.tensor(
            [[tokenizer.bos_token, *tokenizer.encode_ordinary(text)]], device=device
        )
        settings = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        model.check_settings(prompt, args.max_new_tokens, **settings)
    except (ValueError, OSError) as error:
        fail(error)
    generator = torch.Generator(device).manual_seed(args.seed)
    try:
        sample(
            model,
            tokenizer,
            prompt.expand(args.samples, -1),
            text,
            args.max_new_tokens,
            generator,
            settings,
        )
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except (
        BrokenPipeError
    ):  # the reader of our output has gone; nothing is left to say, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sample(
    model: Transformer,
    tokenizer,
    prompt: torch.Tensor,
    text: str,
    new_tokens: int,
    generator,
    settings: dict,
) -> None:
    """Continue prompt (b t) in all rows at once: print the first as it comes, the others after it, then a line of what it took."""
    cache = model.new_cache(len(prompt), prompt.shape[1] + new_tokens)
    decoder = codecs.getincrementaldecoder("utf-8")(
        "replace"
    )  # holds back the bytes of an unfinished character
    print(text, end="", flush=True)
    started, times, rows = time.perf_counter(), [], []
    for token in model.stream(
        prompt, new_tokens, stop=tokenizer.eot_token, generator=generator, cache=cache, **settings
    ):
        times.append(time.perf_counter())
        rows.append(token.tolist())
        if rows[-1][0] != tokenizer.eot_token:
            print(decoder.decode(tokenizer.decode_bytes(rows[-1][:1])), end="", flush=True)
    print(decoder.decode(b"", final=True))
    for row in list(zip(*rows))[1:]:
        ids = row[: row.index(tokenizer.eot_token)] if tokenizer.eot_token in row else row
        print("---\n" + text + tokenizer.decode_bytes(ids).decode("utf-8", "replace"))
    prefill = prompt.numel() / (times[0] - started) if times else 0
    decode = len(prompt) * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0
    print(
        f"[{prompt.shape[1]:,} prompt + {len(times):,} new tokens"
        + (f" in {len(prompt)} samples" if len(prompt) > 1 else "")
        + "; "
        f"prefill {prefill:,.0f} tokens/s, decode {decode:,.0f} tokens/s; "
        f"cache {cache.nbytes:,} bytes, {cache.nbytes / cache.full_nbytes:.2f} of full attention's {cache.full_nbytes:,}]"
    )


if __name__ == "__main__":
    main()
