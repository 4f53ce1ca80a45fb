"""The tokenizer against transformers, and corpora against everything that can go wrong with them.
tests/test_edges.py goes on: what is no text, two at once, a round trip through transformers."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import types
from contextlib import suppress
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import tiktoken.load
import tiktoken.registry

import data.prepare as prepare_module
from commandline import CommandLine
from data.corpus import load_corpus
from data.needles import BEGIN, CONTEXT, NEEDLE, TASKS, Needles
from data.prepare import (
    from_package,
    from_text,
    from_url,
    main,
    prepare,
    python_sources,
    read_text,
    split_documents,
)
from data.tokenizer import (
    EOT,
    GPT2_PATTERN,
    LONGEST_RUN,
    PATTERN,
    HuggingFaceTokenizer,
    Tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    pieces,
    train_tokenizer,
)

STDLIB = Path(sysconfig.get_path("stdlib"))
FILES = [
    "argparse.py",
    "ast.py",
    "bdb.py",
    "calendar.py",
    "codecs.py",
    "dis.py",
    "enum.py",
    "heapq.py",
    "inspect.py",
    "json/decoder.py",
    "logging/handlers.py",
    "os.py",
    "shutil.py",
    "statistics.py",
    "turtle.py",
    "typing.py",
    "html/entities.py",
]
DOCUMENTS = [(name, read_text(STDLIB / name)) for name in FILES]
AWKWARD = [
    "",
    " ",
    "\t\tx = 1\t\n",
    "a\r\nb\r\n\r\n  c\r",
    "x\n\n\n\n    y\n \n\t\n",
    "trailing   \n   ",
    "naïve café, Ünïcödé: Ωμέγα, 中文字符, עברית",
    "😀👩‍👩‍👧 🇫🇷",
    "0 12 345 6789 ²½٣",
    "\u00a0\u2003\u3000 x\x0b\x0c\x1c\x85y\u2028z",
    "don't I'LL",
    "e\u0301\u0327",
    "-" * 77 + "=" * 33,
    "\0\x7f\xad",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((text for _, text in DOCUMENTS), 1024)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpora") / "some"
    prepare(DOCUMENTS, out, 512, source="test")
    return out


@pytest.fixture
def copy(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture
def refused(capsys):
    """Calls main, which must exit with status 2 after exactly one line on stderr, and returns that
    line."""

    def call(*argv):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
        return captured.err

    return call


# ---- tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN], ids=["ours", "gpt2"])
def test_transformers_opens_the_folder_and_encodes_alike(tokenizer, pattern, tmp_path):
    from transformers import AutoTokenizer

    ours = Tokenizer(tokenizer.ranks, pattern)
    ours.save(tmp_path)
    # A checkpoint's model_type must not make AutoTokenizer choose a class with rules of its own.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cohere2"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.n_vocab
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == ours.eot_token
    for text in AWKWARD + [text for _, text in DOCUMENTS]:
        ids = ours.encode_ordinary(text)
        assert theirs(text)["input_ids"] == [ours.eot_token, *ids], repr(text[:60])
        assert theirs.decode(ids) == text
        assert ours.decode_bytes(ids).decode() == text
        assert b"".join(map(ours.token_bytes, ids)).decode() == text
    for text in AWKWARD:
        ids = ours.encode_ordinary(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, repr(text)


def test_random_text_encodes_alike_in_transformers(tokenizer, tmp_path):
    from tokenizers import Tokenizer as HuggingFace

    tokenizer.save(tmp_path)
    theirs = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(0)
    alphabet = list("aabsTlL''_-=  \n\n\r\t09'éΩ中🙂\u2003\x0b\u0301")
    for _ in range(1000):  # runs of one character, where several splits of a token compete
        text = "".join(rng.choice(alphabet) * int(rng.integers(1, 20)) for _ in range(12))
        ids = tokenizer.encode_ordinary(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, repr(text)


def test_the_pattern_is_qwen2s():
    """To the letter: other programs know it by name (llama.cpp: "qwen2") and bring their own."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PATTERN == PRETOKENIZE_REGEX


def test_every_digit_is_one_token_and_end_of_text_is_last(tokenizer):
    without, digits = map(tokenizer.encode_ordinary, ("x ", "x 1234567890"))
    assert len(digits) == len(without) + 10
    assert tokenizer.n_vocab == 1024 and tokenizer.eot_token == 1023
    assert tokenizer.token_bytes(1023) == b"" and tokenizer.decode_bytes([1023]) == EOT.encode()
    spelled = tokenizer.encode_ordinary(EOT)
    assert tokenizer.eot_token not in spelled and tokenizer.decode_bytes(spelled) == EOT.encode()


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN], ids=["ours", "gpt2"])
def test_pieces_encode_like_the_whole(tokenizer, pattern):
    ours = Tokenizer(tokenizer.ranks, pattern)
    text = "\n\n".join(text for _, text in DOCUMENTS[:4]) + "a1_\n_b  c \n d\n\ne's 'S f'LL " * 300
    parts = list(pieces(text, 50))
    assert len(parts) > 1000 and "".join(parts) == text
    assert [token for ids in ours.encode_batch(parts) for token in ids] == ours.encode_ordinary(
        text
    )


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN], ids=["ours", "gpt2"])
@pytest.mark.parametrize("run", [" ", "\x85\t"])
def test_a_long_run_of_whitespace_is_encoded_in_linear_time(tokenizer, tmp_path, pattern, run):
    """Just short of what is refused, and text behind it: a search that begins again at each of its
    characters takes hours. The engine of Hugging Face gives the same."""
    ours = Tokenizer(tokenizer.ranks, pattern)
    ours.save(tmp_path)
    text = "x" + (run * LONGEST_RUN)[: LONGEST_RUN - 1] + "y" * 10_000
    ids = ours.encode_ordinary(text)
    assert ours.decode_bytes(ids).decode() == text
    assert HuggingFaceTokenizer(tmp_path).encode_ordinary(text) == ids


@pytest.mark.parametrize("pattern", ["", "a*", "(?=a)"])
def test_a_panic_of_the_regex_engine_is_a_value_error(tokenizer, pattern):
    """These patterns match nothing at all, somewhere."""
    with pytest.raises(ValueError, match="^this text cannot be encoded .*"):
        Tokenizer(tokenizer.ranks, pattern).encode_ordinary("baa")


@pytest.mark.parametrize(
    "change",
    [
        lambda ranks: ranks.pop(b"a"),
        lambda ranks: ranks.update({b"a": ranks[b"b"]}),
        lambda ranks: ranks.update({b"": len(ranks)}),
        lambda ranks: ranks.update({b"a new token": 2**64}),
    ],
)
def test_ranks_that_make_no_tokenizer(tokenizer, change):
    ranks = dict(tokenizer.ranks)
    change(ranks)
    with pytest.raises(ValueError, match="ranks are not|byte is missing"):
        Tokenizer(ranks)


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.hash == tokenizer.hash and loaded.ranks == tokenizer.ranks
    assert Tokenizer(tokenizer.ranks, GPT2_PATTERN).hash != tokenizer.hash
    assert train_tokenizer((text for _, text in DOCUMENTS), 1024).hash == tokenizer.hash


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("tokenizer_meta.json", lambda text: text[:40], "damaged"),
        ("tokenizer_meta.json", lambda text: text.replace('"pattern"', '"patern"'), "damaged"),
        ("tokenizer_meta.json", lambda text: text.replace("p{N}", "p{L}"), "hash"),
        ("tokenizer_meta.json", lambda text: text.replace("p{N}", "p{"), "damaged"),
        ("tokenizer_meta.json", lambda text: "[1]", "damaged"),
        ("tokenizer.tiktoken", lambda text: "*" + text, "damaged"),
        ("tokenizer.tiktoken", lambda text: text[:-9], "damaged"),
        ("tokenizer.tiktoken", lambda text: text[text.index("\n") + 1 :], "damaged"),
        ("tokenizer.tiktoken", lambda text: text[: text.rindex("\n", 0, -1) + 1], "special tokens"),
    ],
)
def test_damaged_tokenizer_is_refused(tokenizer, tmp_path, file, change, message):
    tokenizer.save(tmp_path)
    (tmp_path / file).write_text(change((tmp_path / file).read_text()))
    with pytest.raises(ValueError, match=message) as refusal:
        load_tokenizer(tmp_path)
    assert file in str(refusal.value) and "\n" not in str(refusal.value)


def test_missing_tokenizer_names_the_file_and_the_command(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="tokenizer.tiktoken not found.*python -m data.prepare"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 1_000_001])
def test_vocabulary_size_out_of_range(vocab_size):
    with pytest.raises(ValueError, match=f"{vocab_size} ids.*257"):
        train_tokenizer(["text"], vocab_size)


def test_smallest_vocabulary_and_too_little_text():
    assert train_tokenizer(["any text"], 257).encode_ordinary("any") == list(b"any")
    with pytest.raises(ValueError, match=r"too small .* 5,000: it gives \d+"):
        train_tokenizer(["abc abd"], 5000)


# ---- tokenizer.json alone: another's, or ours after a round trip ---------------------------------


@pytest.fixture
def theirs(tokenizer, tmp_path):
    """theirs(change) -> a folder with our tokenizer.json, changed, and tokenizer_config.json."""

    def folder(change) -> Path:
        tokenizer.save(tmp_path)
        (tmp_path / "tokenizer.tiktoken").unlink()
        (tmp_path / "tokenizer_meta.json").unlink()
        raw = json.loads((tmp_path / "tokenizer.json").read_bytes())
        change(raw)
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        return tmp_path

    return folder


PAD = {
    "strategy": {"Fixed": 32},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1023,
    "pad_type_id": 0,
    "pad_token": EOT,
}
CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}


def swap_two_ids(raw):
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: None,
        lambda raw: raw.update(padding=PAD),
        lambda raw: raw.update(truncation=CUT),
        lambda raw: raw.update(post_processor=None),
        lambda raw: raw["model"].update(merges=[m.split(" ") for m in raw["model"]["merges"]]),
        lambda raw: raw["model"].pop("byte_fallback"),
    ],
    ids=["as saved", "pads", "truncates", "adds nothing", "merges as pairs", "an older writer"],
)
def test_what_does_not_change_an_encoding_does_not_change_the_hash(tokenizer, theirs, change):
    loaded = load_tokenizer(theirs(change))
    assert loaded.hash == tokenizer.hash
    assert loaded.encode_ordinary(AWKWARD[4]) == tokenizer.encode_ordinary(AWKWARD[4])


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(normalizer={"type": "NFC"}),
        lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "a+"}),
        lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
        lambda raw: raw["model"].update(ignore_merges=False),
        lambda raw: raw["model"]["merges"].pop(),
        swap_two_ids,
    ],
)
def test_what_changes_an_encoding_changes_the_hash(tokenizer, theirs, change):
    assert load_tokenizer(theirs(change)).hash != tokenizer.hash


def test_another_tokenizer_gives_what_transformers_gives_without_special_tokens(theirs, tmp_path):
    """One that is not of our form, that pads and truncates, before and after transformers saves
    it again."""
    from transformers import AutoTokenizer

    nfc = lambda raw: raw.update(normalizer={"type": "NFC"}, padding=PAD, truncation=CUT)
    folder = theirs(nfc)
    ours, oracle = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, HuggingFaceTokenizer)
    for text in AWKWARD:
        ids = oracle(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        assert ours.encode_ordinary(text) == ids
    assert ours.decode_bytes([*ours.encode_ordinary("def"), ours.n_vocab, 2**20]) == b"def"
    oracle.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").hash == ours.hash


@pytest.mark.parametrize(
    "file, alone",
    [
        ("meta.json", False),
        ("tokenizer_meta.json", False),
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("config.json", True),
    ],
)
def test_nested_json_is_damaged(copy, file, alone):
    if alone:
        (copy / "tokenizer.tiktoken").unlink()
        (copy / "tokenizer_meta.json").unlink()
    if file == "config.json":
        (copy / "tokenizer_config.json").unlink()
    (copy / file).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"/{file} is damaged") as refusal:
        load_corpus(copy)
    assert "\n" not in str(refusal.value)


# ---- gpt2: tiktoken fetches two files once and caches them -------------------------------------


@pytest.fixture
def no_gpt2(monkeypatch, tmp_path):
    """tiktoken as on a machine that never fetched anything."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))


def test_gpt2_offline_is_one_clear_line(no_gpt2, monkeypatch, tmp_path, refused):
    def unreachable(address):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken.load, "read_file", unreachable)
    line = refused("--encoding", "gpt2", "--out", tmp_path / "out")
    assert "vocab.bpe" in line and "TIKTOKEN_CACHE_DIR" in line and "--encoding" in line
    assert not (tmp_path / "out").exists()


def test_gpt2_is_fetched_cached_and_saved(no_gpt2, monkeypatch, tmp_path, server):
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    # in the order of GPT-2's first ids
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    pairs = [(a, b) for a in letters for b in letters][:50_000]
    server.pages["/vocab.bpe"] = (
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs)
    ).encode()
    server.pages["/encoder.json"] = json.dumps(
        {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs), EOT])}
    ).encode()
    fetch = tiktoken.load.read_file
    monkeypatch.setattr(
        tiktoken.load,
        "read_file",
        lambda address: fetch(server.address + "/" + address.rsplit("/", 1)[1]),
    )
    # the made-up merges are not OpenAI's
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda data, expected: True)
    first = gpt2_tokenizer()
    assert first.n_vocab == 50257 and first.eot_token == 50256
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    server.pages.clear()  # now only the cache has them
    assert gpt2_tokenizer().hash == first.hash
    prepare(DOCUMENTS, tmp_path / "out", tokenizer=first)
    corpus = load_corpus(tmp_path / "out")
    assert corpus.tokenizer.hash == first.hash and corpus.train.dtype == np.uint16
    assert corpus.tokenizer.encode_ordinary(AWKWARD[3]) == first.encode_ordinary(AWKWARD[3])
    from tokenizers import Tokenizer as HuggingFace

    theirs = HuggingFace.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert all(
        theirs.encode(text, add_special_tokens=False).ids == first.encode_ordinary(text)
        for text in AWKWARD
    )


# ---- the split and the files -------------------------------------------------------------------


def test_corpus_holds_the_documents_in_order_each_after_end_of_text(prepared):
    corpus = load_corpus(prepared)
    train, val = split_documents(DOCUMENTS)
    assert set(train).isdisjoint(val) and len(train) + len(val) == len(DOCUMENTS)
    whole = sum(len(text.encode()) for _, text in DOCUMENTS)
    assert 0.1 <= corpus.meta["val"]["bytes"] / whole < 0.2
    for ids, texts, said in [
        (corpus.train, train, corpus.meta["train"]),
        (corpus.val, val, corpus.meta["val"]),
    ]:
        ends = ids == corpus.tokenizer.eot_token
        decoded = corpus.tokenizer.decode_bytes(ids.tolist()).decode()
        assert decoded == "".join(EOT + text for text in texts)
        assert ends[0] and ends.sum() == len(texts) == said["documents"]
        assert said["tokens"] == len(ids)
        assert said["bytes"] == sum(len(text.encode()) for text in texts)
    # not a byte of validation in the vocabulary
    assert corpus.tokenizer.hash == train_tokenizer(train, 512).hash
    assert len(corpus.hash) == 12


def test_documents_that_spell_end_of_text_do_not_end(tmp_path):
    prepare([(str(i), f"a {EOT} b\n" * 9) for i in range(20)], tmp_path / "out", 260)
    corpus = load_corpus(tmp_path / "out")
    ends = (corpus.train == corpus.tokenizer.eot_token).sum()
    assert ends == corpus.meta["train"]["documents"] == 18


def test_preparing_twice_in_any_order_gives_equal_bytes(prepared, tmp_path):
    prepare(DOCUMENTS[::-1], tmp_path / "again", 512, source="test")
    assert sorted(os.listdir(prepared)) == sorted(os.listdir(tmp_path / "again")) and os.listdir(
        tmp_path
    ) == ["again"]
    for file in os.listdir(prepared):
        assert (prepared / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_few_documents_give_their_last_tenth_at_a_line():
    text = "".join(f"line {i}\n" for i in range(1000))
    train, val = split_documents([("a", text), ("b", text), ("empty", "")])
    assert len(train) == len(val) == 2 and train[0] + val[0] == text
    assert val[0].startswith("line ") and 0.09 < len(val[0]) / len(text) < 0.11
    train, val = split_documents([("no line ends", "x" * 100)])
    assert (len(train[0]), len(val[0])) == (90, 10)


def test_one_document_larger_than_all_others_still_trains():
    documents = [("giant", "word\n" * 10_000)] + [(f"small {i}", "text\n") for i in range(20)]
    train, val = split_documents(documents)
    sizes = [sum(map(len, split)) for split in (train, val)]
    assert 0.09 < sizes[1] / sum(sizes) < 0.11


def test_large_vocabulary_takes_four_bytes_an_id(tmp_path, tokenizer):
    extra = [
        bytes([a, b])
        for a in range(256)
        for b in range(256)
        if bytes([a, b]) not in tokenizer.ranks
    ]
    large = Tokenizer(
        tokenizer.ranks | {token: len(tokenizer.ranks) + i for i, token in enumerate(extra)}
    )
    assert large.n_vocab > 65536
    prepare(DOCUMENTS[:3], tmp_path / "out", tokenizer=large)
    corpus = load_corpus(tmp_path / "out")
    assert corpus.train.dtype == np.uint32 and corpus.train[0] == large.eot_token


# ---- damaged corpora ---------------------------------------------------------------------------


def edit(change):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta))

    return damage


def foreign_tokenizer(folder):
    train_tokenizer(["other text, other pairs " * 9 + text for _, text in DOCUMENTS[:2]], 512).save(
        folder
    )


def id_outside(folder):
    ids = np.fromfile(folder / "val.bin", dtype=np.uint16)
    ids[5] = 512
    ids.tofile(folder / "val.bin")
    edit(lambda meta: meta["val"].update(sha256=hashlib.sha256(ids.tobytes()).hexdigest()))(folder)


def flip_a_byte(folder):
    content = bytearray((folder / "train.bin").read_bytes())
    content[1000] ^= 1
    (folder / "train.bin").write_bytes(content)


@pytest.mark.parametrize(
    "damage, parts",
    [
        (lambda folder: os.truncate(folder / "train.bin", 1001), ["train.bin", "size", "1001"]),
        (lambda folder: os.truncate(folder / "val.bin", 0), ["val.bin", "size", "is 0"]),
        (flip_a_byte, ["train.bin", "sha256"]),
        (
            lambda folder: os.truncate(folder / "meta.json", 50),
            ["meta.json", "damaged", "not JSON"],
        ),
        (lambda folder: (folder / "meta.json").write_text("[]"), ["meta.json", "list", "dict"]),
        (edit(lambda meta: meta.pop("n_vocab")), ["meta.json", "n_vocab", "int"]),
        (edit(lambda meta: meta["train"].pop("sha256")), ["meta.json", "sha256", "str"]),
        (edit(lambda meta: meta.update(val=3)), ["meta.json", "val", "int", "dict"]),
        (edit(lambda meta: meta.update(format=1)), ["the format of its rule is 1, not 2"]),
        (
            edit(lambda meta: meta.update(dtype="uint32")),
            ["meta.json", "dtype", "uint32", "uint16"],
        ),
        (
            edit(lambda meta: meta.update(dtype="float99")),
            ["meta.json", "dtype", "float99", "uint16"],
        ),
        (edit(lambda meta: meta.update(n_vocab=511)), ["meta.json", "n_vocab", "511", "512"]),
        (edit(lambda meta: meta["val"].update(tokens=0)), ["val.bin", "size"]),
        (foreign_tokenizer, ["meta.json", "tokenizer hash"]),
        (id_outside, ["val.bin", "token id 512", "vocabulary of 512"]),
    ],
)
def test_damaged_corpus_is_refused(copy, damage, parts):
    damage(copy)
    with pytest.raises(ValueError) as refusal:
        load_corpus(copy)
    message, mend = str(refusal.value), f"python -m data.prepare --out {copy}"
    assert all(part in message for part in [*parts, mend]) and "\n" not in message


STRANGE = [None, True, 0, -1, 2**31, 10**30, 1.5, float("nan"), "", "\ud800", EOT, "(", "a*"]
STRANGE += ["(\\p{L}{1000}){1000}", [], {}, [[1]], {"content": 3}]


def mutated(raw, rng):
    """JSON with one value replaced by a strange one, left out, or copied to another place."""
    at, path = raw, []
    while isinstance(at, dict | list) and at and (not path or rng.random() < 0.7):
        path.append((at, list(at)[rng.integers(len(at))] if isinstance(at, dict) else -1))
        at = at[path[-1][1]]
    above, key = path[-1]
    kind = rng.integers(3)
    if kind == 0:
        above[key] = STRANGE[rng.integers(len(STRANGE))]
    elif kind == 1:
        del above[key]
    elif isinstance(above, dict):
        above[list(above)[0]] = above[key]
    else:
        above.append(above[key])
    return raw


@pytest.mark.parametrize("alone", [False, True], ids=["ours", "tokenizer.json alone"])
def test_mutated_values_are_accepted_or_one_line(copy, alone):
    """A hundred corpora with a strange value in one of their JSON files: ValueError or OSError in
    one line, or a tokenizer that encodes, or refuses a text in one line."""
    files = ["meta.json", "tokenizer_meta.json"]
    if alone:
        files = ["tokenizer.json", "tokenizer_config.json"]
        (copy / "tokenizer.tiktoken").unlink()
        (copy / "tokenizer_meta.json").unlink()
    rng, refused = np.random.default_rng(0), 0
    whole = {file: (copy / file).read_bytes() for file in files}
    for _ in range(100):
        file = files[rng.integers(2)]
        (copy / file).write_text(json.dumps(mutated(json.loads(whole[file]), rng)))
        try:
            loaded = load_tokenizer(copy)
            loaded.encode_ordinary(AWKWARD[4] + AWKWARD[6])
            loaded.decode_bytes(range(600))
            load_corpus(copy)
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
        (copy / file).write_bytes(whole[file])
    assert 15 < refused < 95


@pytest.mark.parametrize("file", ["meta.json", "train.bin", "val.bin", "tokenizer.tiktoken"])
def test_missing_file_is_named_with_the_command(copy, file):
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} not found.*python -m data.prepare"):
        load_corpus(copy)


def test_missing_folder_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="^corpora/stdlib not found; `python -m data.prepare` makes"
    ):
        load_corpus()


# ---- the command -------------------------------------------------------------------------------


def test_files_folders_and_packages_combine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes/.hidden").mkdir(parents=True)
    Path("notes/.hidden/x.txt").write_text("unseeable")
    Path("notes/a.txt").write_text("ein Text über Öl\n" * 50, encoding="utf-8")
    Path("notes/b.bin").write_bytes(b"\xff\xfe\x00")
    Path("book.txt").write_bytes(b"a line\r\n" * 50)
    main(["--text", "notes", "book.txt", "--packages", "tqdm", "json", "--vocab_size=300"])
    corpus = load_corpus("corpora/notes")
    text = corpus.tokenizer.decode_bytes([*corpus.train.tolist(), *corpus.val.tolist()]).decode()
    assert "über Öl" in text and "a line\r\n" in text and "class JSONDecoder" in text
    assert "unseeable" not in text
    assert corpus.tokenizer.n_vocab == 300 and "bytes per token" in capsys.readouterr().out
    assert os.listdir("corpora") == ["notes"]


def test_packages_are_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "explosive" / "tests").mkdir(parents=True)
    (tmp_path / "explosive" / "__init__.py").write_text("raise SystemError('imported')")
    (tmp_path / "explosive" / "tests" / "t.py").write_text("left out")
    (tmp_path / "lonely.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert [name for name, _ in from_package("explosive")] == ["explosive/__init__.py"]
    assert [name for name, _ in from_package("lonely")] == ["lonely.py"]


def test_a_package_says_which_of_its_files_are_no_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "__init__.py").write_text("x = 1")
    (tmp_path / "mixed" / "old.py").write_bytes("# Öl".encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path)
    assert [name for name, _ in from_package("mixed")] == ["mixed/__init__.py"]
    said = capsys.readouterr().out
    assert "left out 1 of 2 files" in said and "old.py is not UTF-8" in said


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_links_that_lead_out_of_a_folder_are_counted(tmp_path, capsys):
    """As a download cache has them; a package's are followed."""
    (tmp_path / "blob").write_text("x = 1")
    for name in ("notes", "linked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").symlink_to("../blob")
    with pytest.raises(ValueError, match="holds no UTF-8 text file"):
        from_text(tmp_path / "notes")
    (tmp_path / "notes" / "own.txt").write_text("y = 1")
    assert [name for name, _ in from_text(tmp_path / "notes")] == ["own.txt"]
    assert capsys.readouterr().out.count("__init__.py is a link that leads out: copy") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert len(from_package("linked")) == 1


TABLE = "X = [\n" + "    (0x1F, 'a', -1.5e3),\n    [b'\\'', \"#\"],  # why\n" * 3 + "]\n"


@pytest.mark.parametrize(
    "text, table",
    [
        (TABLE, True),
        ("CODES = {\n    'a': 'b',\n    'c': None,\n    'd': 'e',\n}\nx = 1\n", False),  # 2 of 6
        ("x = 1\n\n\n'a'\n'b'\n", True),  # empty lines do not count
        ("def f(x):\n    return x + 1\n" * 3 + TABLE, False),  # half is not most
        ("# 1, 2, 3\n" * 9, False),
        ('"""' + "A page of words, such as these.\n" * 9 + '"""\n', False),
        ("", False),
        ("('" * 20_000 + "\n" + "'\\" * 20_000, False),  # in linear time
    ],
)
def test_a_file_of_tables_is_no_code(tmp_path, text, table):
    (tmp_path / "some.py").write_text(text)
    assert [name for name, _ in python_sources(tmp_path)] == ["some.py"] * (not table)


def test_the_standard_librarys_tables_are_left_out(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(prepare_module, "prepare", lambda *args: made.append(args))
    prepare_module.prepare_stdlib(tmp_path / "corpus")
    [(documents, _, _, _, source)] = made
    names = {name for name, _ in documents}
    assert {"argparse.py", "json/decoder.py", "html/parser.py"} < names
    assert not {"html/entities.py", "encodings/cp037.py", "pydoc_data/topics.py"} & names
    assert not [name for name in names if name.split("/")[0] in ("encodings", "pydoc_data", "test")]
    assert "encodings" in source and "literals" in source  # meta.json says so, and --help
    assert "literals" in prepare_module.command_line().description


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--vocab-sise", "9"], ["--vocab-sise", "--vocab-size"]),
        (["--vocab_sise=9"], ["--vocab-sise", "--vocab-size"]),
        (["--zzzz"], ["--zzzz", "--help"]),
        (["-q"], ["-q"]),
        (["book.txt"], ["book.txt", "unexpected"]),
        (["--vocab-size", "many"], ["--vocab-size", "many"]),
        (["--vocab-size"], ["--vocab-size"]),
        (["--encoding", "gpt9"], ["gpt9", "gpt2"]),
        (["--encoding", "gpt2", "--vocab-size", "300"], ["gpt2", "--vocab-size 300"]),
        (["--text", "absent.txt"], ["absent.txt", "not found"]),
        (["--text", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--text", "binaries"], ["binaries", "UTF-8"]),
        (["--text", "empty.txt"], ["empty.txt", "no text"]),
        (["--text", "small.txt"], ["2,048", "--vocab-size"]),
        (["--text", "small.txt", "--vocab-size", "0"], ["0 ids", "257"]),
        (["--text", "small.txt", "--vocab-size", "1000001"], ["1000001", "257"]),
        (["--text", "spaces.txt"], ["spaces.txt", "in a row"]),
        (["--packages", "no_such_package"], ["no_such_package", "not installed"]),
        (["--packages", "sys"], ["sys", "no Python source"]),
        (["--packages", "nowhere"], ["nowhere", "not installed"]),
        (["--packages", "namespace"], ["namespace", "no Python source"]),
        (["--packages", "os.path"], ["os.path", "top-level"]),
        (["--sha256", "0" * 64], ["--sha256", "--url"]),
        (["--text", "small.txt", "small.txt"], ["small.txt", "name it once"]),
        (["--text", ".", "binaries"], ["binaries", "name it once"]),
        (["--packages", "json", "json"], ["json json", "name each once"]),
        (["--text", "stdlib"], ["stdlib", "--out"]),
        (["--url", "http://["], ["http://[", "no path or address"]),
        (["--url", "http://[", "--out", "x"], ["http://[", "check the address"]),
        (["--url", "http://127.0.0.1:1/%00"], ["%00", "no path or address"]),
        (["--url", ""], ["--url", "http"]),
        (["--url", "ftp://127.0.0.1/x"], ["ftp://127.0.0.1/x", "http"]),
        (["--url", "http://127.0.0.1:99999/x"], ["127.0.0.1:99999"]),
        (["--url", "http://127.0.0.1/x", "--sha256", "12"], ["12", "64 hex"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, refused, argv, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # a module without a spec
    monkeypatch.setitem(sys.modules, "nowhere", types.ModuleType("nowhere"))
    Path("latin.txt").write_bytes("Öl".encode("latin-1"))
    Path("small.txt").write_text("abc abd abe\n" * 9)
    Path("empty.txt").touch()
    Path("spaces.txt").write_text("a" + " " * 500_000)
    Path("binaries").mkdir()
    Path("binaries/x").write_bytes(b"\0\0")
    Path("namespace").mkdir()
    before = sorted(os.listdir())
    line = refused(*argv)
    assert all(part in line for part in parts), line
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "out, part",
    [
        ("holds", "already holds a corpus"),
        ("full", "not empty"),
        ("file", "cannot make"),
        ("file/below", "cannot make"),
    ],
)
def test_out_that_cannot_be_is_refused_before_any_work(tmp_path, refused, out, part):
    for folder, file in [("holds", "meta.json"), ("full", "thesis.tex")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("precious")
    (tmp_path / "file").write_text("precious")
    line = refused("--out", tmp_path / out)
    assert part in line and str(tmp_path / out) in line and "--out" in line
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "holds"]
    assert (tmp_path / "file").read_text() == "precious"


def test_as_a_process():
    process = subprocess.run(
        [sys.executable, "-m", "data.prepare", "--text", "absent\n.txt"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: absent .txt not found")
    assert process.stderr.count("\n") == 1


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoint.sync", full)
    with pytest.raises(OSError, match="No space left on device.*--out"):
        prepare(DOCUMENTS, tmp_path / "out", 300)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "step",
    [
        "data.prepare.train_tokenizer",
        "data.prepare.write_split",
        "data.prepare.write_json",
        "checkpoint.sync",
        "os.replace",
    ],
)
def test_an_interrupt_at_any_step_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, refused, step
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("a line of the book\n" * 99)
    monkeypatch.setattr(step, interrupt)
    assert "interrupted" in refused("--text", "book.txt", "--vocab-size", "260")
    assert os.listdir() == ["book.txt"]


def test_command_line_keeps_values_that_look_like_flags():
    line = CommandLine()
    line.add_argument("--some-prompt")
    line.add_argument("rest", nargs="*")
    assert line.parse(["--some_prompt=--a_b"]).some_prompt == "--a_b"
    assert line.parse(["--some-prompt", "--- a_title"]).some_prompt == "--- a_title"
    assert line.parse(["--", "--x_y"]).rest == ["--x_y"]


# ---- two at once ---------------------------------------------------------------------------------


@pytest.fixture
def first(monkeypatch):
    """first(out) prepares in a thread and stops in the midst of it; first.go() lets it go on, or
    end in an error."""
    write, midst, onward, threads = prepare_module.write_split, Event(), Event(), []

    def slow(file, *more):
        if threading.current_thread() in threads:
            midst.set()
            assert onward.wait(30)
            if slow.error is not None:
                raise slow.error
        return write(file, *more)

    def work(out):
        with suppress(KeyboardInterrupt):
            prepare(DOCUMENTS, out, 300)

    def start(out):
        threads.append(threading.Thread(target=work, args=[out]))
        threads[0].start()
        assert midst.wait(30)

    def go(error=None):
        slow.error = error
        onward.set()
        threads[0].join(30)

    slow.error, start.go = None, go
    monkeypatch.setattr("data.prepare.write_split", slow)
    yield start
    go()


def second(out, documents=DOCUMENTS, vocab_size=300):
    """A thread that prepares the same folder, and what it returns or raises."""
    outcome = []

    def work():
        try:
            outcome.append(prepare(documents, out, vocab_size))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not outcome, "it does not wait"
    return thread, outcome


def test_the_second_takes_the_corpus_of_the_first(first, tmp_path, capsys):
    first(tmp_path / "out")
    thread, outcome = second(tmp_path / "out")
    first.go()
    thread.join()
    assert outcome == [load_corpus(tmp_path / "out").meta]
    assert capsys.readouterr().out.count("bytes per token") == 1
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("other", [{"vocab_size": 301}, {"documents": DOCUMENTS[1:]}])
def test_the_second_refuses_another_corpus(first, tmp_path, other):
    first(tmp_path / "out")
    thread, outcome = second(tmp_path / "out", **other)
    first.go()
    thread.join()
    assert "already holds a corpus" in str(outcome[0])
    assert load_corpus(tmp_path / "out").tokenizer.n_vocab == 300
    assert os.listdir(tmp_path) == ["out"]


def test_the_second_goes_on_where_the_first_fails(first, tmp_path):
    """The first takes the folders away that it made, under the waiting second."""
    first(tmp_path / "new" / "out")
    thread, outcome = second(tmp_path / "new" / "out")
    first.go(error=KeyboardInterrupt())
    thread.join()
    assert outcome == [load_corpus(tmp_path / "new" / "out").meta]
    assert os.listdir(tmp_path / "new") == ["out"]


def test_a_killed_preparation_holds_nobody_up_and_leaves_nothing(tmp_path):
    code = (
        "import sys, time; import data.prepare as p; p.sync = lambda _: time.sleep(60); "
        "p.prepare([('a', 'some text\\n' * 99)], sys.argv[1], 257)"
    )
    out = tmp_path / "out"
    killed = subprocess.Popen([sys.executable, "-c", code, out], cwd=Path(__file__).parents[1])
    while not (tmp_path / ".out.unfinished" / "meta.json").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    thread, outcome = second(out)
    killed.kill()
    killed.wait()
    thread.join()
    assert outcome == [load_corpus(out).meta] and os.listdir(tmp_path) == ["out"]


# ---- needles in any text -------------------------------------------------------------------------

WORDS = "the model attends to what stands near it and finds what stands far away "
HAYSTACKS = {
    "code": "def near(x):\n    return x * 9  # what stands near\n",
    "words without lines": WORDS,
    "long lines": WORDS * 30 + "\n",
    "neither words nor lines": "abcdefghijklmnopqrstuvwxyz",
    "characters of three bytes": "近くのものも遠くのものも見つける",
    "lines alone": "\n",
}


def haystack(tokenizer, kind) -> np.ndarray:
    """20,000 ids of one of HAYSTACKS."""
    ids = tokenizer.encode_ordinary(HAYSTACKS[kind])
    return np.tile(np.array(ids), 20_000 // len(ids) + 1)


def depth_of_answer(example) -> float:
    """The share of the text that stands before the needle with the first question's answer."""
    answer, needle = example.tokens[example.answer == 0], example.segment == NEEDLE
    found = [
        start
        for start in np.flatnonzero(needle)
        if np.array_equal(example.tokens[start : start + len(answer)], answer)
    ]
    text = (example.segment == CONTEXT) | (example.segment == BEGIN)
    text[0] = False  # end of text
    return text[: found[0]].sum() / text.sum()


@pytest.mark.parametrize("kind", HAYSTACKS)
@pytest.mark.parametrize("task", [task for task in TASKS if task != "aggregation"])
def test_needles_land_where_they_are_asked_to_in_any_text(tokenizer, kind, task):
    """Within a tenth of the text, at 512 tokens, never inside of a character."""
    maker = Needles(tokenizer, haystack(tokenizer, kind), evaluation=True)
    for depth in (0.0, 0.1, 0.35, 0.5, 0.8, 1.0):
        for seed in range(5):
            example = maker.task(task, np.random.default_rng(seed), 512, depth)
            assert abs(depth_of_answer(example) - depth) <= 0.1, (depth, seed)
            change = np.diff((example.segment == NEEDLE).astype(int))
            begins, ends = (1 + np.flatnonzero(change == step) for step in (1, -1))
            # the window itself may begin inside of a character, and a needle before all of it
            behind = map(tokenizer.token_bytes, example.tokens[ends[begins > 1]])
            assert not any(0x80 <= piece[0] < 0xC0 for piece in behind)


@pytest.mark.parametrize("depth", [None, 0.0, 0.3, 1.0])
def test_in_text_of_short_lines_every_needle_stands_between_lines(tokenizer, monkeypatch, depth):
    """To the bit as if nothing else were known."""
    maker = Needles(tokenizer, haystack(tokenizer, "code"), evaluation=False)
    make = lambda: [
        maker.task(task, np.random.default_rng(3), length, depth).tokens
        for task in TASKS
        for length in (300, 512, 2048)
    ]
    made = make()
    monkeypatch.setattr("data.needles.NEAR", 10**9)
    assert all(map(np.array_equal, made, make()))


# ---- downloads, from this machine --------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = self.server.pages.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header(
                "Content-Length", str(len(content or b"") + 9 * (self.path == "/short"))
            )
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.pages = {
            "/book.txt": "eine Zeile über nichts\n".encode() * 99,
            "/latin": b"\xd6l",
            "/nul": b"a\0b\0",
            "/mark.txt": b"\xef\xbb\xbf" + b"a line\n" * 99,
            "/short": b"cut",
        }
        running.address = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(
            target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        yield running
        running.shutdown()


def test_download(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    digest = hashlib.sha256(server.pages["/book.txt"]).hexdigest()
    main(["--url", server.address + "/book.txt", "--sha256", digest.upper(), "--vocab-size", "270"])
    corpus = load_corpus("corpora/book")
    assert "über nichts" in corpus.tokenizer.decode_bytes(corpus.train.tolist()).decode()
    assert "error" not in capsys.readouterr().err


def test_a_byte_order_mark_is_skipped_in_a_download_and_in_a_folder(server, tmp_path):
    assert from_url(server.address + "/mark.txt")[0][1].startswith("a line")
    (tmp_path / "marked.txt").write_bytes(server.pages["/mark.txt"])
    assert from_text(tmp_path)[0][1].startswith("a line")


@pytest.mark.parametrize(
    "page, argv, parts",
    [
        ("/book.txt", ["--sha256", "0" * 64], ["sha256", "0" * 64]),
        ("/absent", [], ["404", "cannot download"]),
        ("/latin", [], ["UTF-8"]),
        ("/nul", [], ["NUL bytes"]),
        ("/short", [], ["3 of 12 bytes"]),
    ],
)
def test_bad_download_is_one_line_and_leaves_nothing(
    server, tmp_path, monkeypatch, refused, page, argv, parts
):
    monkeypatch.chdir(tmp_path)
    line = refused("--url", server.address + page, *argv)
    assert all(part in line for part in [*parts, server.address + page]) and os.listdir() == []


def test_refused_and_silent_servers(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        # bound, but not listening: refused
        assert address in refused("--url", address) and os.listdir() == []
        silent.listen()
        with pytest.raises(OSError, match="timed out"):
            from_url(address, timeout=0.2)
