"""A byte-level BPE vocabulary: trained by rustbpe, run by tiktoken, readable by transformers.

Four files hold one: tokenizer.tiktoken (token bytes and ranks) and tokenizer_meta.json (pattern,
end of text, hash) are ours, tokenizer.json and tokenizer_config.json let AutoTokenizer open the
same folder. They lie in every corpus and checkpoint."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tiktoken

LONGEST_RUN = 100_000  # characters of whitespace
LONG_RUN = re.compile(rf"\s{{{LONGEST_RUN}}}")
EOT = "<|endoftext|>"  # joins documents and begins every sequence; always the last id
# Cuts text into the words inside which BPE merges: letters with one leading mark, single digits (so
# that a number is as many tokens as it has digits), punctuation, line ends, spaces. No possessive
# quantifiers: fancy-regex (rustbpe, tiktoken) and Oniguruma (Hugging Face) read it alike.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT-2's own. tiktoken writes it with possessive quantifiers and `$`, which Oniguruma reads as the
# end of a line; this cuts alike.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Both patterns begin a new word between a letter or digit and a single space or newline before
# another word: text cut there encodes as it does whole.
SAFE_CUT = re.compile(r"(?<=[^\W_])(?=[ \n]\w)")


class Tokenizer:
    """Text <-> token ids. `ranks` maps token bytes to ids 0..n-1, a lower id merging first; id n is
    end of text."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN):
        self.ranks, self.pattern = ranks, pattern
        self.eot_token = self.bos_token = len(ranks)
        self.n_vocab = len(ranks) + 1
        self.encoding = tiktoken.Encoding(
            "ropenope", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: self.eot_token}
        )

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of text. No end of text is added, and one that is spelled out is ordinary text.
        Raises ValueError for a text that `check_runs` refuses."""
        check_runs(text, "this text")
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """encode_ordinary of each text, in threads."""
        return self.encoding.encode_ordinary_batch(list(texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids: UTF-8, unless ids begin or end inside a character. End of text is
        spelled out; an id that the vocabulary leaves free is nothing."""
        return self.encoding.decode_bytes([i for i in ids if i < self.n_vocab])

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for: none for end of text, so that bits per byte does not
        count it, nor for an id that the vocabulary leaves free."""
        if token >= self.eot_token:
            return b""
        return self.encoding.decode_single_token_bytes(token)

    @cached_property
    def rank_file(self) -> bytes:
        ordered = sorted(self.ranks, key=self.ranks.__getitem__)
        return b"".join(
            base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ordered)
        )

    @cached_property
    def hash(self) -> str:
        """sha256, in hex, of everything that decides an encoding: ranks, pattern, end of text."""
        return hashlib.sha256(
            self.rank_file + json.dumps([self.pattern, {EOT: self.eot_token}]).encode()
        ).hexdigest()

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
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        (Path(folder) / "tokenizer.tiktoken").write_bytes(self.rank_file)
        for name, content in [
            ("tokenizer_meta", meta),
            ("tokenizer", self.huggingface()),
            ("tokenizer_config", config),
        ]:
            (Path(folder) / f"{name}.json").write_text(
                json.dumps(content, indent=1) + "\n", encoding="utf-8"
            )

    def huggingface(self) -> dict:
        """The same encoding in the vocabulary of Hugging Face's tokenizer.json.

        tiktoken joins whichever adjacent pair makes the token of lowest rank; Hugging Face wants
        the pairs listed. So each token lists every split of it into two tokens. The pairs of one
        token should be ties, won by the leftmost; listed, the longer left half wins, as it does in
        the runs of one character where such ties occur."""
        letter = byte_letters()
        spell = {token: "".join(letter[byte] for byte in token) for token in self.ranks}
        merges = [
            f"{spell[token[:cut]]} {spell[token[cut:]]}"
            for token in sorted(self.ranks, key=self.ranks.__getitem__)
            for cut in range(len(token) - 1, 0, -1)
            if token[:cut] in self.ranks and token[cut:] in self.ranks
        ]
        special = {
            "id": self.eot_token,
            "content": EOT,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        # Every sequence of training began with end of text, so what is encoded begins with it too.
        first, a, b = (
            {"SpecialToken": {"id": EOT, "type_id": 0}},
            *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
        )
        begin = {
            "type": "TemplateProcessing",
            "single": [first, a],
            "pair": [first, a, b],
            "special_tokens": {EOT: {"id": EOT, "ids": [self.eot_token], "tokens": [EOT]}},
        }
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        split = {
            "type": "Split",
            "pattern": {"Regex": self.pattern},
            "behavior": "Isolated",
            "invert": False,
        }
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
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [special],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": begin,
            "decoder": byte_level,
            "model": model,
        }


def check_runs(text: str, name: str) -> None:
    """ValueError for a text with so much whitespace in a row that the regex engines, which
    backtrack through it, run out of stack."""
    if len(text) >= LONGEST_RUN and LONG_RUN.search(text):
        raise ValueError(
            f"{name} has {LONGEST_RUN:,} spaces, tabs or line ends in a row, which no tokenizer "
            "takes: leave it out"
        )


def byte_letters() -> dict[int, str]:
    """GPT-2's alphabet: a visible character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(unprintable)
    }


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Cut text where both patterns do, so that a long document encodes piece by piece to the same
    ids (text without such places stays whole). size is the least length of a piece, in
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
    wanted = vocab_size - 1
    trainer = rustbpe.Tokenizer()
    # Two different pairs can spell the same bytes, which tiktoken knows once: train a few more and
    # keep the first of each spelling.
    short = (piece for text in texts for piece in pieces(text))
    trainer.train_from_iterator(short, wanted + wanted // 16 + 16, buffer_size=32, pattern=PATTERN)
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
    except (
        OSError,
        ValueError,
    ) as error:  # requests' errors are OSErrors; a damaged download is a ValueError
        raise OSError(
            "cannot fetch vocab.bpe and encoder.json of tiktoken's gpt2 encoding "
            f"({type(error).__name__}); connect to the "
            "network once, or set TIKTOKEN_CACHE_DIR to a folder that holds them, or leave out "
            "--encoding"
        ) from error
    return Tokenizer(ranks, GPT2_PATTERN)


def load_tokenizer(path: Path | str) -> "Tokenizer | HuggingFaceTokenizer":
    """The tokenizer of a corpus or checkpoint folder: ours, else a tokenizer.json alone, as in
    Hugging Face's checkpoints.

    Raises FileNotFoundError or ValueError, each naming the file and the mend."""
    rank_path, meta_path = Path(path) / "tokenizer.tiktoken", Path(path) / "tokenizer_meta.json"
    theirs = Path(path) / "tokenizer.json"
    if theirs.is_file() and not rank_path.exists() and not meta_path.exists():
        ours, other = from_huggingface(theirs), HuggingFaceTokenizer(Path(path))
        same = ours and {other.bos_token, other.eot_token} == {ours.eot_token}
        return ours if same else other
    for file in (rank_path, meta_path):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} not found; `python -m data.prepare` makes a corpus, with its tokenizer"
            )
    mend = (
        "copy the tokenizer's files again from the corpus that this model was trained on, or "
        "prepare the corpus anew"
    )
    try:
        meta = json.loads(meta_path.read_bytes())
        pattern, specials, digest = meta["pattern"], meta["special_tokens"], meta["hash"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{meta_path} is damaged ({type(error).__name__}: {error}); {mend}"
        ) from error
    try:
        rows = [line.split() for line in rank_path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
        if list(ranks.values()) != list(range(len(rows))) or not all(
            bytes([byte]) in ranks for byte in range(256)
        ):
            raise ValueError("the ranks are not 0, 1, 2, ... or a byte is missing")
    except ValueError as error:
        raise ValueError(f"{rank_path} is damaged ({error}); {mend}") from error
    if not isinstance(pattern, str) or specials != {EOT: len(ranks)}:
        raise ValueError(
            f"{meta_path} says special tokens {specials}, {rank_path.name} leaves {{'{EOT}': "
            f"{len(ranks)}}}; {mend}"
        )
    try:
        tokenizer = Tokenizer(ranks, pattern)
    except ValueError as error:  # a pattern that does not compile
        raise ValueError(f"{meta_path} is damaged ({error}); {mend}") from error
    if tokenizer.hash != digest:
        raise ValueError(
            f"{meta_path} says hash {str(digest)[:12]}, its files have {tokenizer.hash[:12]}; "
            f"{mend}"
        )
    return tokenizer


def from_huggingface(file: Path) -> Tokenizer | None:
    """Our tokenizer from a tokenizer.json that says the same as one of ours, as transformers writes
    it back; None where it says something else."""
    letters = {letter: byte for byte, letter in byte_letters().items()}
    try:
        raw = json.loads(file.read_bytes())
        model, (split, _) = raw["model"], raw["pre_tokenizer"]["pretokenizers"]
        vocab = sorted(model["vocab"].items(), key=lambda entry: entry[1])
        ranks = {bytes(letters[c] for c in word): i for word, i in vocab if word != EOT}
        tokenizer = Tokenizer(ranks, split["pattern"]["Regex"])
        ours = tokenizer.huggingface()
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        special = [(token["content"], token["id"]) for token in raw["added_tokens"]]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    same = merges == ours["model"]["merges"] and special == [(EOT, tokenizer.eot_token)]
    return tokenizer if same and list(ranks.values()) == list(range(len(ranks))) else None


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
        try:
            self.engine = Engine.from_buffer(file.read_bytes())
        except Exception as error:  # tokenizers raises nothing more special
            raise ValueError(
                f"{file} is damaged ({error}); copy it again from where it came"
            ) from error
        if type(self.engine.decoder).__name__ != "ByteLevel":
            raise ValueError(
                f"{file} has the decoder {type(self.engine.decoder).__name__}; only byte-level "
                "vocabularies are implemented"
            )
        self.engine.encode_special_tokens = True  # one that is spelled out is ordinary text
        self.engine.no_truncation()
        self.engine.no_padding()
        self.hash = hashlib.sha256(file.read_bytes()).hexdigest()
        self.n_vocab = max(self.engine.get_vocab().values()) + 1
        self.added = {
            id: token.content.encode()
            for id, token in self.engine.get_added_tokens_decoder().items()
        }
        self.byte = {letter: byte for byte, letter in byte_letters().items()}
        self.bos_token, self.eot_token = (
            self._special(folder, "bos_token"),
            self._special(folder, "eos_token"),
        )

    def _special(self, folder: Path, name: str) -> int:
        """Its id, from tokenizer_config.json, which spells it, or config.json, which has the id
        (the first, if several)."""
        for file, key in (
            (folder / "tokenizer_config.json", name),
            (folder / "config.json", f"{name}_id"),
        ):
            try:
                value = json.loads(file.read_bytes()).get(key) if file.is_file() else None
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{file} is damaged ({error}); copy it again from where it came"
                ) from error
            value = (
                value.get("content")
                if isinstance(value, dict)
                else value[0]
                if isinstance(value, list) and value
                else value
            )
            value = self.engine.token_to_id(value) if isinstance(value, str) else value
            if isinstance(value, int):
                return value
        raise ValueError(
            f"{folder}: neither tokenizer_config.json nor config.json names a {name} that "
            "tokenizer.json has"
        )

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of text, with no special tokens."""
        check_runs(text, "this text")
        return self.engine.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special tokens are spelled out, and an id that the vocabulary leaves
        free is nothing."""
        return b"".join(
            self.added[i]
            if i in self.added
            else bytes(self.byte[c] for c in self.engine.id_to_token(i) or "")
            for i in ids
        )
