"""Continue a prompt with a checkpoint, streamed as it comes.

python sample.py --prompt "def "                    the newest checkpoint under out/
python sample.py --checkpoint DIR --file story.txt --temperature 0.8 --top-k 50 --samples 3
cat story.txt | python sample.py                    the prompt from standard input
"""

import codecs
import sys
import time
from pathlib import Path

from commandline import CommandLine, choose_device, guarded, read_input  # isort: skip
import torch

from data.tokenizer import load_tokenizer
from engine import stream
from model import Transformer, check_settings, require


def command_line() -> CommandLine:
    parser = CommandLine(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="default: the newest under out/")
    add("--prompt", help="text to continue (default: --file, or standard input)")
    add("--file", type=Path, help="a file with the prompt")
    add("--max-new-tokens", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top-k", type=int, help="draw from the k likeliest tokens")
    add("--top-p", type=float, help="draw from the likeliest tokens that make up p")
    add("--samples", type=int, default=1, help="how many at once; the first is streamed")
    add("--seed", type=int, default=1)
    add("--device", help="cuda, cpu or mps (default: cuda where there is one, else cpu)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def newest_checkpoint(root: Path = Path("out")) -> Path:
    """The `last` under `root` written to most recently. FileNotFoundError where there is none."""
    made = [file for file in root.glob("*/last/config.json") if file.is_file()]
    if not made:
        mend = "`python train.py` makes one, or name one with --checkpoint"
        raise FileNotFoundError(f"no checkpoint under {root}/: {mend}")
    return max(made, key=lambda file: file.stat().st_mtime).parent


def read_prompt(args) -> str:
    """The prompt's text. ValueError where there is none, or it is not UTF-8."""
    require(None in (args.prompt, args.file), "--prompt and --file both give a prompt: choose one")
    if args.prompt is not None:
        where, raw = "--prompt", args.prompt.encode(errors="surrogateescape")
    elif args.file is not None:
        where, raw = args.file, read_input(args.file)
    elif sys.stdin is not None and not sys.stdin.isatty():
        where, raw = "standard input", read_input(sys.stdin.buffer)
    else:
        raise ValueError("no prompt: give --prompt TEXT, --file FILE, or text on standard input")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt in {where} is not UTF-8 (bad at byte {error.start})") from None
    require(text != "", "the prompt is empty: give at least one character")
    return text


@guarded
def main(argv: list[str] | None = None) -> None:
    args = command_line().parse(argv)
    require(1 <= args.samples < 2**31, f"--samples {args.samples} must be at least 1, and fewer")
    require(0 <= args.seed < 2**63, f"--seed {args.seed} is not in [0, 2**63)")
    device, _ = choose_device(args.device)
    text = read_prompt(args)
    path = args.checkpoint or newest_checkpoint()
    model = Transformer.from_pretrained(path, device, getattr(torch, args.dtype))
    tokenizer = load_tokenizer(path)
    has, knows = tokenizer.n_vocab, model.config.vocab_size
    require(has <= knows, f"{path}: its tokenizer has {has} tokens and its model {knows}")
    # Tokens begin with their space: one at the end is left off, for the model to write " word".
    ids = [tokenizer.bos_token, *tokenizer.encode_ordinary(text.removesuffix(" ") or text)]
    prompt = torch.tensor([ids], device=device).expand(args.samples, -1)
    settings = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    check_settings(model.config, prompt[:1], args.max_new_tokens, **settings)
    settings["generator"] = torch.Generator(device).manual_seed(args.seed)
    try:
        sample(model, tokenizer, prompt, text, args.max_new_tokens, settings)
    except OSError as error:  # nobody reads what is written, or its disk is full
        raise BrokenPipeError from error


def sample(model, tokenizer, prompt: torch.Tensor, text: str, count: int, settings: dict) -> None:
    """Continue prompt (b t) in all rows at once; print the first as it comes, the others after. A
    space at the end of a longer `text` stands for the one that the first new token begins with."""
    cache, eot = model.new_cache(len(prompt), prompt.shape[1] + count), tokenizer.eot_token
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back half a character
    print(text, end="", flush=True)
    started, times, rows, space = time.perf_counter(), [], [], " " * text[1:].endswith(" ")
    for token in stream(model, prompt, count, stop=eot, cache=cache, **settings):
        times.append(time.perf_counter())
        rows.append(token.tolist())
        if rows[-1][0] != eot:
            piece = decoder.decode(tokenizer.decode_bytes(rows[-1][:1]))
            print(piece if rows[1:] else piece.removeprefix(space), end="", flush=True)
    print(decoder.decode(b"", final=True))
    for row in list(zip(*rows))[1:]:
        ids = row[: row.index(eot)] if eot in row else row
        more = tokenizer.decode_bytes(ids).decode(errors="replace").removeprefix(space)
        print(f"---\n{text}{more}")
    prefill = prompt.numel() / (times[0] - started) if times else 0
    decode = len(prompt) * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0
    samples = f" in {len(prompt)} samples" if len(prompt) > 1 else ""
    print(
        f"[{prompt.shape[1]:,} prompt + {len(times):,} new tokens{samples}; "
        f"prefill {prefill:,.0f} tokens/s, decode {decode:,.0f} tokens/s; cache {cache.nbytes:,} "
        f"bytes, {cache.nbytes / cache.full_nbytes:.2f} of full attention's {cache.full_nbytes:,}]",
        flush=True,
    )


if __name__ == "__main__":
    main()
