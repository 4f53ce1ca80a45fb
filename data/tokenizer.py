"""A byte-level BPE vocabulary: trained by rustbpe, run by tiktoken, readable by transformers.

Four files hold one. tokenizer.tiktoken (token bytes and ranks) and tokenizer_meta.json (pattern,
end of text, hash) are ours; tokenizer.json and tokenizer_config.json let AutoTokenizer open the
same folder. They lie in every corpus and checkpoint.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import tiktoken

EOT = "<|endoftext|>"  # joins documents and begins every sequence; always the last id
# Cuts text into the words inside which BPE merges: contractions, letters with one leading mark,
# single digits (so that a number is as many tokens as it has digits), punctuation, line ends,
# spaces. To the letter Qwen2's, which llama.cpp and Hugging Face know by name.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's own. tiktoken writes it with possessive quantifiers and `$`, which Oniguruma reads as the
# end of a line; this cuts alike.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Both patterns begin a new word between a letter or digit and a single space or newline before
# another word: text cut there encodes as it does whole.
SAFE_CUT = re.compile(r"(?<=[^\W_])(?=[ \n]\w)")
# The regex engines backtrack through whitespace, and panic after a million steps. Without the
# lookbehind the search would start again at each character of a run.
LONGEST_RUN = 500_000
LONG_RUN = re.compile(rf"(?<!\s)\s{{{LONGEST_RUN}}}")


class Tokenizer:
    """Text <-> token ids. `ranks` maps token bytes to ids 0..n-1, a lower id merging first; id n is
    end of text. Raises ValueError for ranks or a pattern that make no tokenizer."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN):
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("the ranks are not 0, 1, 2, ...")
        if b"" in ranks or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("a byte is missing, or a token is empty")
        self.ranks, self.pattern = ranks, pattern
        self.eot_token = self.bos_token = len(ranks)
        self.n_vocab = len(ranks) + 1
        with engine_errors("the pattern does not compile"):
            self.encoding = tiktoken.Encoding(
                "ropenope",
                pat_str=pattern,
                mergeable_ranks=ranks,
                special_tokens={EOT: self.eot_token},
            )

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of text. No end of text is added, and one that is spelled out is ordinary text.
        Raises ValueError for a text that the regex engine cannot take."""
        check_runs(text, "this text")
        with engine_errors("this text cannot be encoded"):
            return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """encode_ordinary of each text, in threads."""
        with engine_errors("one of the texts cannot be encoded"):
            return self.encoding.encode_ordinary_batch(list(texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids: UTF-8, unless ids begin or end inside a character. End of text is
        spelled out; an id that the vocabulary leaves free is nothing."""
        return self.encoding.decode_bytes([i for i in ids if i < self.n_vocab])

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for: b"" for end of text, so that bits per byte does not
        count it, and for an id that the vocabulary leaves free."""
        if token >= self.eot_token:
            return b""
        return self.encoding.decode_single_token_bytes(token)

    @cached_property
    def ordered(self) -> list[bytes]:
        """The tokens by rank."""
        return sorted(self.ranks, key=self.ranks.__getitem__)

    @cached_property
    def rank_file(self) -> bytes:
        """tokenizer.tiktoken: a line for each token, its bytes in base64 and its rank."""
        lines = [b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(self.ordered)]
        return b"".join(lines)

    @cached_property
    def hash(self) -> str:
        """sha256, in hex, of everything that decides an encoding: ranks, pattern, end of text."""
        rest = json.dumps([self.pattern, {EOT: self.eot_token}])
        return hashlib.sha256(self.rank_file + rest.encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write the four files into an existing folder."""
        meta = {
            "pattern": self.pattern,
            "special_tokens": {EOT: self.eot_token},
            "n_vocab": self.n_vocab,
            "hash": self.hash,
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOT,
            "eos_token": EOT,
            "pad_token": EOT,
            "add_bos_token": True,
            "model_input_names": ["input_ids", "attention_mask"],  # for `generate` of 4.57
            "padding_side": "left",  # so that ragged prompts go on where they end
            "clean_up_tokenization_spaces": False,
        }
        (Path(folder) / "tokenizer.tiktoken").write_bytes(self.rank_file)
        write_json(Path(folder) / "tokenizer_meta.json", meta)
        write_json(Path(folder) / "tokenizer.json", self.huggingface())
        write_json(Path(folder) / "tokenizer_config.json", config)

    def huggingface(self) -> dict:
        """The same tokenizer in the words of Hugging Face's tokenizer.json.

        tiktoken joins whichever adjacent pair makes the token of lowest rank; Hugging Face wants
        the pairs listed. So each token lists every split of it into two tokens. The pairs of one
        token should be ties, won by the leftmost; listed, the longer left half wins, as it does in
        the runs of one character where such ties occur."""
        letter = byte_letters()
        spell = {token: "".join(letter[byte] for byte in token) for token in self.ranks}
        merges = [
            f"{spell[token[:cut]]} {spell[token[cut:]]}"
            for token in self.ordered
            for cut in range(len(token) - 1, 0, -1)
            if token[:cut] in self.ranks and token[cut:] in self.ranks
        ]
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell[token]: rank for token, rank in self.ranks.items()},
            "merges": merges,
        }
        split = dict(
            type="Split", pattern={"Regex": self.pattern}, behavior="Isolated", invert=False
        )
        byte_level = dict(
            type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False
        )
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        end = {"id": self.eot_token, "content": EOT, "special": True, **plain}
        # Every sequence of training began with end of text, so a text that is encoded does too.
        first = {"SpecialToken": {"id": EOT, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        template = {
            "type": "TemplateProcessing",
            "single": [first, a],
            "pair": [first, a, b],
            "special_tokens": {EOT: {"id": EOT, "ids": [self.eot_token], "tokens": [EOT]}},
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": template,
            "decoder": byte_level,
            "model": model,
        }


def write_json(path: Path, content: dict) -> None:
    """Write JSON, the same bytes on every system."""
    path.write_bytes((json.dumps(content, indent=1) + "\n").encode())


def byte_letters() -> dict[int, str]:
    """GPT-2's alphabet: a visible character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(unprintable)}


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """A ValueError in place of whatever an engine in Rust raises: an exception of no class of its
    own, or a panic, which is no Exception at all."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} ({' '.join(str(error).split())})") from None


def check_runs(text: str, name: str) -> None:
    """ValueError for a text with more whitespace in a row than the regex engines can take."""
    if len(text) >= LONGEST_RUN and LONG_RUN.search(text):
        raise ValueError(
            f"{name} has {LONGEST_RUN:,} spaces, tabs or line ends in a row, which no tokenizer "
            "takes: leave it out"
        )


# training ---------------------------------------------------------------------------------------


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Cut text where both patterns do, so that a long document encodes piece by piece to the same
    ids (text without such places stays whole). `size` is the least length of a piece, in
    characters."""
    start = 0
    while (cut := SAFE_CUT.search(text, start + size)) is not None:
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a vocabulary of vocab_size ids, end of text included. Raises ValueError when texts hold
    too few pairs to merge."""
    import rustbpe

    if not 257 <= vocab_size <= 1_000_000:
        raise ValueError(
            f"a vocabulary of {vocab_size} ids is out of range; choose 257 (256 bytes and end of "
            "text) to 1,000,000"
        )
    # Two different pairs can spell the same bytes, which tiktoken knows once: train a few more and
    # keep the first of each spelling.
    wanted = vocab_size - 1
    spare = wanted // 16 + 16
    short = (piece for text in texts for piece in pieces(text))
    trainer = rustbpe.Tokenizer()
    with engine_errors("no vocabulary can be learned from this text"):
        trainer.train_from_iterator(short, wanted + spare, buffer_size=32, pattern=PATTERN)
    ranks: dict[bytes, int] = {}
    for token, _ in trainer.get_mergeable_ranks():
        if len(ranks) < wanted:
            ranks.setdefault(bytes(token), len(ranks))
    if len(ranks) < wanted:
        raise ValueError(
            f"the text is too small for a vocabulary of {vocab_size:,}: it gives "
            f"{len(ranks) + 1:,}; add text or lower --vocab-size"
        )
    return Tokenizer(ranks)


def gpt2_tokenizer() -> Tokenizer:
    """tiktoken's `gpt2` (50,257 ids). Raises OSError when its files are neither cached nor to be
    had."""
    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except (OSError, ValueError) as error:  # no network, or a damaged download
        raise OSError(
            "cannot fetch vocab.bpe and encoder.json of tiktoken's gpt2 encoding "
            f"({type(error).__name__}); connect to the network once, or set TIKTOKEN_CACHE_DIR to "
            "a folder that holds them, or leave out --encoding"
        ) from error
    return Tokenizer(ranks, GPT2_PATTERN)


# reading ----------------------------------------------------------------------------------------


def load_tokenizer(path: Path | str) -> "Tokenizer | HuggingFaceTokenizer":
    """The tokenizer of a corpus or checkpoint folder: ours, else a tokenizer.json alone, as in
    Hugging Face's checkpoints. Raises FileNotFoundError or ValueError, each naming the file and
    the mend."""
    folder = Path(path)
    rank_path, meta_path = folder / "tokenizer.tiktoken", folder / "tokenizer_meta.json"
    absent = [file for file in (rank_path, meta_path) if not file.is_file()]
    if len(absent) == 2 and (folder / "tokenizer.json").is_file():
        return from_huggingface(folder)
    if absent:
        raise FileNotFoundError(
            f"{absent[0]} not found; `python -m data.prepare` makes a corpus, with its tokenizer"
        )
    mend = (
        "copy the tokenizer's files again from the corpus that this model was trained on, or "
        "prepare the corpus anew"
    )
    try:
        meta = json.loads(meta_path.read_bytes())
        pattern, specials, digest = meta["pattern"], meta["special_tokens"], meta["hash"]
        if not isinstance(pattern, str):
            raise TypeError(f"the pattern is {pattern!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{meta_path} is damaged ({type(error).__name__}: {error}); {mend}"
        ) from error
    try:
        rows = [line.split() for line in rank_path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
        Tokenizer(ranks)
    except ValueError as error:
        raise ValueError(f"{rank_path} is damaged ({error}); {mend}") from error
    if specials != {EOT: len(ranks)}:
        raise ValueError(
            f"{meta_path} says special tokens {specials}, {rank_path.name} leaves {{'{EOT}': "
            f"{len(ranks)}}}; {mend}"
        )
    try:
        tokenizer = Tokenizer(ranks, pattern)
    except ValueError as error:
        raise ValueError(f"{meta_path} is damaged ({error}); {mend}") from error
    if tokenizer.hash != digest:
        raise ValueError(
            f"{meta_path} says hash {str(digest)[:12]}, its files have {tokenizer.hash[:12]}; "
            f"{mend}"
        )
    return tokenizer


def from_huggingface(folder: Path) -> "Tokenizer | HuggingFaceTokenizer":
    """The tokenizer of a folder with a tokenizer.json alone. One that says the same as one of ours,
    as transformers writes it back, is ours again, with its hash."""
    ours = same_as_ours(folder / "tokenizer.json")
    if ours is not None:
        find = {EOT: ours.eot_token}.get
        specials = {special_token(folder, name, find) for name in ("bos_token", "eos_token")}
        if specials == {ours.eot_token}:
            return ours
    return HuggingFaceTokenizer(folder)


def same_as_ours(file: Path) -> Tokenizer | None:
    """Our tokenizer that encodes as a tokenizer.json does; None where there is none."""
    byte = {letter: byte for byte, letter in byte_letters().items()}
    try:
        raw = json.loads(file.read_bytes())
        pattern = raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        vocab = raw["model"]["vocab"].items()
        ours = Tokenizer({bytes(byte[c] for c in word): rank for word, rank in vocab}, pattern)
        same = what_encodes(raw) == what_encodes(ours.huggingface())
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return ours if same else None


def what_encodes(raw: dict) -> list:
    """The parts of a tokenizer.json that decide an encoding without special tokens, merges written
    one way. Padding, truncation and what is added around a text are not among them."""
    model = {key: value for key, value in raw["model"].items() if value not in (None, False)}
    pairs = model.get("merges", [])
    model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    return [raw.get("normalizer"), raw.get("pre_tokenizer"), model, raw.get("added_tokens")]


def special_token(folder: Path, name: str, find: Callable[[str], int | None]) -> int:
    """The id of a special token, from tokenizer_config.json, which spells it, or config.json, which
    has the id (the first, if several). `find` knows the id of a token that is spelled."""
    for file, key in (("tokenizer_config.json", name), ("config.json", f"{name}_id")):
        try:
            value = json.loads((folder / file).read_bytes()).get(key)
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError, RecursionError) as error:
            mend = "copy it again from where it came"
            raise ValueError(f"{folder / file} is damaged ({error}); {mend}") from error
        if isinstance(value, dict):
            value = value.get("content")
        elif isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str):
            value = find(value)
        if isinstance(value, int):
            return value
    raise ValueError(
        f"{folder}: neither tokenizer_config.json nor config.json names a {name} that "
        "tokenizer.json has"
    )


class HuggingFaceTokenizer:
    """A Hugging Face checkpoint's tokenizer.json (Command R7B's, say) behind our interface, run by
    the optional package `tokenizers`."""

    def __init__(self, folder: Path):
        file = folder / "tokenizer.json"
        try:
            from tokenizers import Tokenizer as Engine
        except ImportError as error:
            raise ValueError(
                f"{file} needs a package that is not here: `pip install tokenizers`"
            ) from error
        with engine_errors(f"{file} is damaged; copy it again from where it came"):
            self.engine = Engine.from_buffer(file.read_bytes())
        if type(self.engine.decoder).__name__ != "ByteLevel":
            raise ValueError(
                f"{file} has the decoder {type(self.engine.decoder).__name__}; only byte-level "
                "vocabularies are implemented"
            )
        # Special tokens that are spelled out are ordinary text; ids are those of the text alone.
        self.engine.encode_special_tokens = True
        self.engine.no_truncation()
        self.engine.no_padding()
        self.n_vocab = max(self.engine.get_vocab().values(), default=-1) + 1
        added = self.engine.get_added_tokens_decoder()
        self.added = {i: token.content.encode() for i, token in added.items()}
        self.byte = {letter: byte for byte, letter in byte_letters().items()}
        find = self.engine.token_to_id
        self.bos_token = special_token(folder, "bos_token", find)
        self.eot_token = special_token(folder, "eos_token", find)
        decides = [*what_encodes(json.loads(file.read_bytes())), self.bos_token, self.eot_token]
        self.hash = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of text, with no special tokens."""
        check_runs(text, "this text")
        with engine_errors("this text cannot be encoded"):
            return self.engine.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special tokens are spelled out, and an id that the vocabulary leaves
        free is nothing."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for."""
        if token in self.added:
            return self.added[token]
        letters = self.engine.id_to_token(token) or ""
        if any(letter not in self.byte for letter in letters):  # a word that is no string of bytes
            return letters.encode()
        return bytes(self.byte[letter] for letter in letters)
