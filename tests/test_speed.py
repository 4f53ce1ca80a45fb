"""lab.speed in miniature: every section through the same code as at full size, the check that stops
it, and what it writes."""

import re
from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attention
import fast.loss as loss_module
from attention import attend
from lab import speed
from lab.gpt2 import GPT2
from model import ModelConfig, Transformer

transformers = pytest.importorskip(
    "transformers", reason="the oracle; pip install -r requirements-dev.txt"
)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

TINY = {
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 2,
    "d_model": 32,
    "d_ff": 48,
    "vocab_size": 96,
    "window": 8,
}
SETUP = speed.Setup("cpu", compiled=False, threads=1, repeats=1, new_tokens=4)


def rows(text):
    """The cells of all Markdown tables' rows, by the first."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells if row[0] not in ("", "---", "window", "part")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small matrices, and no process for each peak: test_memory_of_a_step has them."""
    monkeypatch.setattr(speed, "matmul", lambda setup: (lambda: 0.0, 1.0))
    monkeypatch.setattr(speed, "alone", lambda setup, work, *args: 7 * 2**20)


# The peers


def test_gpt2_is_transformers_gpt2():
    """The same weights, with the biases that nanoGPT leaves out at zero and its exact GELU: the
    same logits to rounding."""
    torch.manual_seed(0)
    ours = GPT2(n_layer=2, n_head=4, d_model=32, vocab_size=96, length=24)
    config = transformers.GPT2Config(
        vocab_size=96,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
        activation_function="gelu",
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    names = {
        "ln_1": "ln_1",
        "ln_2": "ln_2",
        "c_attn": "attn.c_attn",
        "attn_proj": "attn.c_proj",
        "c_fc": "mlp.c_fc",
        "mlp_proj": "mlp.c_proj",
    }
    for p in ours.parameters():  # larger than at the start, so that each part matters
        p.data.add_(0.2 * torch.randn_like(p))
    state = {name: torch.zeros_like(p) for name, p in theirs.state_dict().items()}
    for name, p in ours.state_dict().items():
        layer = re.fullmatch(r"layers\.(\d)\.(\w+)\.weight", name)
        if layer:
            # Conv1D is transposed
            state[f"transformer.h.{layer[1]}.{names[layer[2]]}.weight"] = (
                p.t() if p.ndim == 2 else p
            )
        else:
            state[f"transformer.{name}"] = p
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state)
    tokens = torch.randint(96, (2, 24))
    with torch.no_grad():
        # float32 sums of 32 to 128 terms
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_shapes_compared_are_as_large_as_they_say():
    for size, (theirs, ours, _) in speed.PEERS.items():
        with torch.device("meta"):
            peer, model = GPT2(**theirs), Transformer(ModelConfig(**ours))
        assert peer.matmul_parameters() == pytest.approx(float(size[:-1]) * 1e6, rel=0.02)
        assert model.matmul_parameters() == pytest.approx(peer.matmul_parameters(), rel=0.02)


def test_gpt2_flops_are_counted_right(monkeypatch):
    """6 N a token by PyTorch's counter with attention taken out, and 6 N + 12 L d T in the job's
    other count."""
    job = speed.Job("", "gpt2", {"n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 96}, 1, 24)
    model = GPT2(**job.shape, length=24)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: q + k + v)
    tokens = torch.randint(96, (1, 24))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert counter.get_total_flops() == 6 * model.matmul_parameters() * 24
    visible, everything = job.flops()
    assert everything - 6 * model.matmul_parameters() == 12 * 2 * 32 * 24
    # on average half of the keys and one half
    assert visible - 6 * model.matmul_parameters() == pytest.approx(12 * 2 * 32 * 25 / 2)


# Losses


@pytest.mark.parametrize("length", [15, 16, 40])
def test_losses_agree_between_backends_and_with_transformers(length):
    """float32, the same sums in other orders: 2^-24 a term, over four layers."""
    _, cohere2 = speed.Job("", "cohere2", TINY, 1, length).build("cpu")
    ours, loss = speed.Job("", "ours", TINY, 1, length).build("cpu")
    tokens, targets = torch.randint(95, (2, 2, length))
    expected = cohere2(tokens, targets).item()
    for ours.backend in ("reference", "sdpa", "banded", "auto"):
        assert loss(tokens, targets).item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        ours.backend = "flex"
        assert loss(tokens, targets).item() == pytest.approx(expected, rel=1e-5)


def test_a_loss_goes_by_chunks_by_itself(monkeypatch):
    """No (b t v) tensor stands in memory beyond the limit, a chunk's least rows allowed; below it
    all goes at once."""

    class Largest(TorchDispatchMode):
        elements = calls = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **kwargs or {})
            if "log_softmax" in str(op):
                self.elements, self.calls = max(self.elements, out.numel()), self.calls + 1
            return out

    assert max(loss_module.LOGITS_AT_ONCE.values()) <= 2**26
    monkeypatch.setattr(loss_module, "LEAST_ROWS", 16)
    model, tokens = (
        Transformer(ModelConfig(**TINY | {"vocab_size": 2**14})),
        torch.randint(96, (2, 64)),
    )
    for limit, calls in ((2**20, 2), (2**21, 1), (2**10, 8)):
        monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", limit)
        with Largest() as largest:
            model.loss(tokens, tokens)
        assert largest.calls == calls and largest.elements == max(limit, 16 * 2**14)


# The sections


def test_training_table():
    text = speed.train_section(SETUP, TINY, 2, 24)
    assert text.startswith("2 x 24 tokens a step")
    found = rows(text)
    assert list(found) == ["ours", "Cohere2, SDPA, eager"]
    assert (
        all(row[2] == "1.00" and row[6] == "7" for row in found.values())
        and found["Cohere2, SDPA, eager"][1] == "1.00"
    )


def test_medians_by_turns():
    order, clock = [], iter(range(100))
    assert speed.alternate(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b") or next(clock)},
        3,
        lambda: next(clock),
    ) == {"a": 1, "b": 2}
    assert order == ["a", "b"] * 3


def test_memory_table(monkeypatch):
    """The four losses agree, and the switches are what they are called."""
    built = []
    monkeypatch.setattr(
        speed,
        "training_step",
        lambda job, setup, make=speed.training_step: built.append(job) or make(job, setup),
    )
    found = rows(speed.memory_section(SETUP, TINY, 2, 24))
    assert [(job.whole, job.recompute) for job in built] == [
        (False, True),
        (False, False),
        (True, True),
        (True, False),
    ]
    assert list(found) == [job.name for job in built]
    model, loss = built[2].build("cpu")
    assert model.recompute and loss != model.loss


def test_memory_of_a_step():
    """A step whose whole logits take 64 MiB and more is seen to take it; one by chunks takes
    less."""
    job = lambda whole: speed.Job("", "ours", TINY | {"vocab_size": 2**15}, 1, 512, whole=whole)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        by_chunks, at_once = (
            pool.apply(speed.step_memory, (job(whole), SETUP)) for whole in (False, True)
        )
    assert at_once > 2**27 and by_chunks < 0.9 * at_once


@pytest.mark.parametrize(
    "section", ["forward", "decode", "gpt2", "contexts", "long-decode", "kernels", "long"]
)
def test_sections(section):
    peer = {"n_layer": 2, "n_head": 2, "d_model": 32, "vocab_size": 96}
    arguments = {
        "forward": (TINY, 2, 24),
        "decode": (TINY, 12),
        "gpt2": ({"124M": (peer, TINY, (1, 1))}, 24),
        "contexts": (TINY, (16, 32), (4, 8)),
        "long-decode": (TINY, 40),
        "kernels": (96, (8, 33), (4, 2, 16)),
        "long": (TINY, 64),
    }[section]
    found = rows(speed.SECTIONS[section][1](SETUP, *arguments))
    both = ["ours", "Cohere2, SDPA, eager"]
    assert (
        list(found)
        == {
            "forward": both,
            "decode": both,
            "gpt2": ["ours, 124M", "GPT-2, 124M"],
            "contexts": ["rrrN, window 4", "rrrN, window 8", "R"],
            "long-decode": ["rrrN", "R"],
            "kernels": ["8", "33"],
            "long": both,
        }[section]
    )


def test_contexts_have_as_many_tokens_and_their_flops(monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "training", lambda jobs, *_, **__: seen.append(jobs) or "")
    speed.contexts_section(SETUP, TINY, (16, 64), (4, 8))
    assert [
        [(job.shape["pattern"], job.batch * job.length, job.recompute) for job in jobs]
        for jobs in seen
    ] == [[("rrrN", 64, True)] * 2 + [("R", 64, True)]] * 2
    assert seen[1][0].flops()[0] < seen[1][1].flops()[0] < seen[1][2].flops()[0]


def test_varlen_means_our_window(monkeypatch):
    """Against a stand-in that counts as PyTorch documents: `left` keys before the query's own, no
    grouping."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def stand_in(q, k, v, ends_q, ends_k, max_q, max_k, *, window_size):
        assert q.shape == k.shape == v.shape and torch.equal(ends_q, ends_k) and window_size[1] == 0
        out = []
        for start, end in zip(ends_q[:-1], ends_q[1:]):
            t = torch.arange(end - start)
            seen = (t[:, None] >= t) & (t[:, None] - t <= window_size[0])
            out.append(
                F.scaled_dot_product_attention(
                    *(x[start:end].transpose(0, 1) for x in (q, k, v)), attn_mask=seen
                ).transpose(0, 1)
            )
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    for window in (1, 5, 20):
        torch.testing.assert_close(
            speed.varlen(q, k, v, window), attend(q, k, v, window, "reference")
        )


def test_where_the_time_goes(corpus_folder):
    argv = (
        "--data",
        str(corpus_folder),
        "--eval-questions",
        "4",
        "--eval-tokens",
        "512",
        "--batch-tokens",
        "1024",
    )
    found = rows(speed.job_section(SETUP, argv))
    assert {
        "forward",
        "backward",
        "Muon",
        "AdamW",
        "clipping",
        "evaluation: loss",
        "evaluation: needles",
        "the final needle table",
        "all",
    } < set(found)
    parts = [float(row[0].replace(",", "")) for name, row in found.items() if name != "all"]
    assert sum(parts) == pytest.approx(
        float(found["all"][0].replace(",", "")), abs=0.06 * len(parts)
    )


# The check, and the command


def test_peers_that_disagree_are_not_timed(monkeypatch, capsys):
    """A window that is one key off changes the loss in the fourth digit or so: it must be seen."""
    monkeypatch.setattr(speed, "alternate", lambda *_: pytest.fail("it timed them"))
    real = attention.visible
    monkeypatch.setattr(
        attention, "visible", lambda q, k, window=None: real(q, k, window and window + 1)
    )
    for section in (speed.train_section, speed.forward_section):
        with pytest.raises(ValueError, match="do not say the same.*mean nothing"):
            section(SETUP, TINY, 2, 24)
    monkeypatch.setitem(
        speed.SECTIONS,
        "train",
        ("Training step", lambda setup: speed.train_section(setup, TINY, 2, 24)),
    )
    with pytest.raises(SystemExit) as stop:
        speed.main(["train", "--device", "cpu"])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and "Cohere2" in error[0]


def test_tokens_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(speed, "alternate", lambda *_: pytest.fail("it timed them"))
    real = speed.engine.stream
    other = lambda *args, **more: ((token + 1) % 96 for token in real(*args, **more))
    monkeypatch.setattr(speed.engine, "stream", other)
    with pytest.raises(ValueError):
        speed.decode_section(SETUP, TINY, 12)


def test_nan_agrees_with_nothing():
    with pytest.raises(ValueError):
        speed.agree({"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))}, 1)


def test_the_file_keeps_its_other_sections(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "machine", lambda setup: "AMD EPYC (TM) 9")
    for text in ("first", "second"):
        monkeypatch.setattr(
            speed,
            "SECTIONS",
            {
                "kernels": ("Kernels", lambda setup: text),
                "job": ("Job", lambda setup: f"job\n{text}"),
            },
        )
        speed.main(
            [
                *(["kernels", "job"] if text == "first" else ["kernels"]),
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
            ]
        )
    written = (tmp_path / "speed-amd-epyc-tm-9.md").read_text()
    assert written.startswith("# Speed on AMD EPYC (TM) 9\n") and written.count("\n## ") == 2
    assert (
        "second\n" in written
        and "job\nfirst\n" in written
        and "`python -m lab.speed kernels --device cpu --out" in written
    )


@pytest.mark.parametrize(
    "argv,word",
    [
        (["nonsense"], "'nonsense'"),
        (["--repeats", "0"], "--repeats 0"),
        (["--out", "/proc/none"], "/proc/none"),
        (["--treads", "1"], "--threads"),
    ],
)
def test_errors_are_one_line(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        speed.main(argv)
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and word in error[0]
