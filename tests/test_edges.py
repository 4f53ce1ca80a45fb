"""The edges of text: what is no text, what never ends, whitespace without end, two at once; and one
tokenizer in our code, in transformers and after a round trip through it."""

import json
import os
import threading

import numpy as np
import pytest
import torch

from data.corpus import load_corpus
from data.needles import NEEDLE, QC, Needles
from data.prepare import main as prepare_main
from data.prepare import prepare, read_text, unfinished
from data.tokenizer import LONGEST_RUN, load_tokenizer, train_tokenizer
from model import ModelConfig, Transformer
from processes import Command

TEXT = "def attend(q, k, v):\n    return softmax(q @ k.T / 8) @ v  # naïve — and slow\n"


# What is no text


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**36)


NO_TEXTS = {
    "zero": (lambda p: p.symlink_to("/dev/zero"), "no regular file"),
    "fifo": (os.mkfifo, "no regular file"),
    "sparse": (sparse, "68,719,476,736 bytes"),
    "nul": (lambda p: p.write_bytes(b"a\0b" * 100), "NUL bytes"),
    "latin": (lambda p: p.write_bytes("Öl\n".encode("latin-1") * 99), "not UTF-8 text (byte 0)"),
}


@pytest.mark.skipif(os.name == "nt", reason="needs fifos and links")
@pytest.mark.parametrize("make,said", NO_TEXTS.values(), ids=NO_TEXTS)
def test_what_is_no_text_is_refused_in_one_line(make, said, tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x.txt")
    assert said in error(prepare_main, "--text", "x.txt", "--out", "made")
    assert sorted(os.listdir()) == ["x.txt"]


def test_a_folder_says_what_it_left_out(tmp_path, monkeypatch, capsys):
    """A latin-1 file among UTF-8 ones, and a link that leads out of the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "secret.txt").write_text("not in the folder " * 300)
    for i in range(12):
        (tmp_path / "notes" / f"{i}.txt").write_text(TEXT * 20, encoding="utf-8")
    (tmp_path / "notes" / "latin.txt").write_bytes("Öl\n".encode("latin-1"))
    (tmp_path / "notes" / "out.txt").symlink_to(tmp_path / "secret.txt")
    prepare_main(["--text", "notes", "--vocab-size", "280", "--out", "made"])
    assert "left out 2 of 14 files, such as notes/latin.txt" in capsys.readouterr().out
    corpus = load_corpus("made")
    text = corpus.tokenizer.decode_bytes([*corpus.train.tolist(), *corpus.val.tolist()])
    assert b"not in the folder" not in text


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_links_as_names(tmp_path, monkeypatch, error):
    """A text whose name is a loop of links, and a corpus whose place is a link: to an empty folder,
    or to nothing yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert "loop not found" in error(prepare_main, "--text", "loop")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nothing"):
        (tmp_path / "link").symlink_to(name)
        prepare([("a", TEXT * 400)], "link", vocab_size=270)
        assert (tmp_path / "link").is_symlink() and load_corpus(name).hash
        (tmp_path / "link").unlink()
    assert sorted(os.listdir()) == ["empty", "loop", "nothing"]


def test_a_module_that_is_frozen_into_the_interpreter(tmp_path):
    prepare_main(["--packages", "os", "--vocab-size", "300", "--out", str(tmp_path / "made")])
    corpus = load_corpus(tmp_path / "made")
    assert b"import abc" in corpus.tokenizer.decode_bytes(corpus.train.tolist())


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_text(tmp_path / "bom.txt") == TEXT


def test_an_address_without_end_is_bounded(tmp_path, monkeypatch, error):
    """A server that never stops sending."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"word " * 10_000)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    monkeypatch.setattr("data.prepare.LARGEST", 2**21)
    monkeypatch.chdir(tmp_path)
    server = HTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/x.txt"
        assert "larger than the 2,097,152 bytes" in error(prepare_main, "--url", url)
    finally:
        server.shutdown()
    assert not os.listdir()


# Whitespace without end


RUNS = {
    "spaces": " ",
    "tabs": "\t",
    "both": " \t",
    "line feeds": "\n",
    "em spaces": "\u2003",
    "all": " \t\n\r\x0b",
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_whitespace_without_end(run, tmp_path):
    """Half a million are one line of ValueError, as a text and as a prompt; as many as are taken
    are read back to the byte."""
    tokenizer = train_tokenizer([TEXT * 9], 270)
    long = f"x{run * (500_000 // len(run))}y"
    with pytest.raises(ValueError, match="in a row.*leave it out"):
        tokenizer.encode_ordinary(long)
    with pytest.raises(ValueError, match="^long.txt has .*in a row"):
        prepare([("long.txt", TEXT * 99 + long)], tmp_path / "made", vocab_size=270)
    assert not (tmp_path / "made").exists()
    short = f"x{run * ((LONGEST_RUN - 1) // len(run))}y"
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary(short)).decode() == short


# Damaged files


def test_mutated_files_are_accepted_or_one_line(tmp_path):
    """300 seeded mutations of a corpus's files: bytes changed, cut, doubled or nested."""
    prepare([("a", TEXT * 400)], tmp_path / "c", vocab_size=270)
    rng, outcomes = np.random.default_rng(0), {"accepted": 0, "refused": 0}
    files = ["meta.json", "tokenizer_meta.json", "tokenizer.tiktoken", "tokenizer.json"]
    whole = {name: (tmp_path / "c" / name).read_bytes() for name in files}
    for _ in range(300):
        name = files[rng.integers(len(files))]
        raw = bytearray(whole[name])
        at, kind = int(rng.integers(len(raw))), rng.integers(4)
        if kind == 0:
            raw[at] = int(rng.integers(256))
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at:at] = raw[at : at + int(rng.integers(1, 40))]
        else:
            raw[at:at] = b"[" * int(rng.integers(1, 9))
        for other in files:
            (tmp_path / "c" / other).write_bytes(raw if other == name else whole[other])
        if name == "tokenizer.json":  # read where it stands alone
            for other in ("tokenizer.tiktoken", "tokenizer_meta.json"):
                (tmp_path / "c" / other).unlink()
        try:
            load_corpus(tmp_path / "c")
            outcomes["accepted"] += 1
        except (ValueError, OSError) as error:
            assert str(error) and "Traceback" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100 and outcomes["accepted"] > 10, outcomes


# Two at once


def test_the_second_first_run_takes_the_winners_corpus(tmp_path):
    """Three processes that find no corpus, as a sweep or a class on a shared disk does."""
    code = (
        "import data.prepare as p; "
        "p.python_sources = lambda root: [(str(i), 'def f(x): return x\\n' * 500) "
        "for i in range(20)]; real = p.prepare_stdlib; "
        "p.prepare_stdlib = lambda out: real(out, 265); "
        "print(p.open_corpus().hash)"
    )
    many = [Command("-c", code, folder=tmp_path) for _ in "123"]
    said = [process.wait(60).out for process in many]
    assert [process.status for process in many] == [0, 0, 0], [process.err for process in many]
    assert len({out.splitlines()[-1] for out in said}) == 1
    assert sum("documents" in out for out in said) == 1
    assert os.listdir(tmp_path / "corpora") == ["stdlib"]


@pytest.mark.parametrize("name", ["made", "another"])
def test_what_a_killed_preparation_left_goes_with_the_next(tmp_path, name):
    left = tmp_path / f".{name}.unfinished"
    left.mkdir()
    (left / "half").write_bytes(b"half")
    (tmp_path / f".{name}.lock").touch()
    prepare([("a", TEXT * 400)], tmp_path / "made", vocab_size=270)
    assert os.listdir(tmp_path) == ["made"] and not (tmp_path / "made" / "half").exists()


def test_a_preparation_that_goes_on_is_left_alone(tmp_path):
    with unfinished(tmp_path / "another") as folder:
        (folder / "half").write_bytes(b"half")
        prepare([("a", TEXT * 400)], tmp_path / "made", vocab_size=270)
        assert (folder / "half").exists()
    assert os.listdir(tmp_path) == ["made"]


def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.prepare.write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([("a", TEXT * 400)], tmp_path / "made", vocab_size=270)
    assert not os.listdir(tmp_path)


# Needles in any text


@pytest.mark.parametrize("task", ["single", "multi-key"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_needles_stand_where_they_are_asked_to_in_text_without_lines(corpus_folder, task, depth):
    """Letters and spaces only: no line ends anywhere, and each needle lands within a tenth."""
    tokenizer = load_corpus(corpus_folder).tokenizer
    words = "the model attends to what stands near it and finds what stands far away " * 2000
    ids = np.array(tokenizer.encode_ordinary(words))
    maker, places = Needles(tokenizer, ids, evaluation=True), []
    for seed in range(20):
        example = maker.task(task, np.random.default_rng(seed), 512, depth)
        hidden, length = example.segment == NEEDLE, len(example.tokens)
        assert length == 512 and example.tokens[0] == tokenizer.eot_token
        question = example.tokens[example.segment == QC]
        for start in np.flatnonzero(hidden):
            if np.array_equal(example.tokens[start : start + len(question)], question):
                before = (~hidden[:start]).sum()
                places.append(before / (~hidden & (example.segment != QC)).sum())
                break
    assert len(places) == 20
    assert max(abs(place - depth) for place in places) < 0.1


def test_needles_anywhere_are_spread_in_text_without_lines(corpus_folder):
    tokenizer = load_corpus(corpus_folder).tokenizer
    ids = np.array(
        tokenizer.encode_ordinary("all that is written here has no end of a line " * 999)
    )
    maker = Needles(tokenizer, ids, evaluation=False)
    example = maker.example(np.random.default_rng(0), 512, 4, 4)
    starts = np.flatnonzero(np.diff((example.segment == NEEDLE).astype(int)) == 1)
    assert len(starts) > 1 and starts.max() - starts.min() > 50


def test_a_text_without_latin_words_says_how_to_train_on_it(tmp_path):
    russian = "Внимание без позиций находит то, что далеко, с позициями то, что рядом.\n"
    prepare([("a", russian * 400)], tmp_path / "c", vocab_size=300)
    corpus = load_corpus(tmp_path / "c")
    with pytest.raises(ValueError, match="--needle-share 0"):
        Needles(corpus.tokenizer, corpus.train, evaluation=False)


# One tokenizer


transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    train_tokenizer([TEXT * 9], 280).save(folder)
    torch.manual_seed(0)
    sizes = dict(n_layer=4, n_head=2, n_kv_head=1, d_model=32, d_ff=48, window=8, vocab_size=280)
    model = Transformer(ModelConfig(**sizes, tie_embeddings=False))
    model.save_pretrained(folder)
    return folder


def test_ragged_prompts_continue_as_each_alone_does(saved):
    """padding_side is left, so that three prompts of other lengths go on from their ends."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    prompts = ["def", "def attend(q, k, v):\n    return", "softmax(q @ k.T"]
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, **how)[:, -12:]
    for prompt, row in zip(prompts, together):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **how)[0, -12:]
        assert torch.equal(row, alone)


def test_what_transformers_saves_again_is_the_same_tokenizer(saved, tmp_path):
    ours = load_tokenizer(saved)
    transformers.AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.tiktoken").exists()
    back = load_tokenizer(tmp_path)
    assert back.hash == ours.hash and back.encode_ordinary(TEXT) == ours.encode_ordinary(TEXT)
    Transformer.from_pretrained(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["model"]["merges"] = raw["model"]["merges"][:-1]  # another vocabulary
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(tmp_path).hash != ours.hash


@pytest.mark.parametrize("kind", ["padding", "truncation"])
def test_a_tokenizer_json_that_pads_or_truncates(saved, tmp_path, kind):
    """The ids are AutoTokenizer's without special tokens."""
    ours = load_tokenizer(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    pad = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 279, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw[kind] = pad if kind == "padding" else cut
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(tmp_path).encode_ordinary(TEXT) == ours.encode_ordinary(TEXT)


def test_an_id_that_the_vocabulary_leaves_free_is_nothing(saved):
    """As `resize_token_embeddings(1088)` leaves them."""
    ours = load_tokenizer(saved)
    ids = ours.encode_ordinary("def")
    assert ours.decode_bytes([*ids, 1000, 1087]) == b"def" and ours.token_bytes(1000) == b""


# Windows, emulated: folders cannot be opened, and a handle must be writable to sync


def test_preparing_where_folders_cannot_be_synced(tmp_path, monkeypatch):
    real_open, real_sync, writable = os.open, os.fsync, set()

    def open_(path, flags, *more, dir_fd=None):
        if os.path.isdir(path) and dir_fd is None:
            raise PermissionError(13, "Permission denied")
        descriptor = real_open(path, flags, *more, dir_fd=dir_fd)
        if flags & os.O_RDWR:
            writable.add(descriptor)
        return descriptor

    def fsync(descriptor):
        if descriptor not in writable:
            raise OSError(9, "Bad file descriptor")
        real_sync(descriptor)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    prepare([("a", TEXT * 400)], tmp_path / "made", vocab_size=270)
    assert load_corpus(tmp_path / "made").hash
