"""lab.speed in miniature: every section through the same code as at full size, the check that stops
it, and what it writes."""

import re
from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attention
import fast.loss as loss_module
from attention import visible_pairs
from lab import speed
from lab.gpt2 import GPT2
from model import ModelConfig, Transformer
from processes import forks

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
alone = speed.in_own_process  # before `quick` replaces it
PEER = {"n_layer": 2, "n_head": 2, "d_model": 32, "vocab_size": 96}
CPU = torch.device("cpu")
ARGS = Namespace(device=CPU, compile=False, repeats=1, new_tokens=4)
BOTH = ["ours", "Cohere2, SDPA"]


def rows(text):
    """The cells of all Markdown tables' rows, by the first."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells if row[0] not in ("", "---", "window", "part")}


def section(name, device="cpu", **changes):
    """A section of lab/speed.toml, changed."""
    return speed.SECTIONS[name] | speed.SECTIONS[name].get(device, {}) | changes


def tables(batch, length):
    return [{"batch": batch, "length": length}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small models, and no process for each peak: test_memory_of_a_step has them."""
    peak = lambda work, *args: 7 * 2**20 if work is speed.step_memory else alone(work, *args)
    monkeypatch.setattr(speed, "in_own_process", peak)
    shapes = {"small": TINY, "laptop": TINY, "ours-124M": TINY, "gpt2-124M": PEER}
    monkeypatch.setattr(speed, "SHAPES", shapes)


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
    shapes = speed.DATA["shapes"]
    for size in ("124M", "350M"):
        with torch.device("meta"):
            peer = GPT2(**shapes[f"gpt2-{size}"])
            model = Transformer(ModelConfig(**shapes[f"ours-{size}"]))
        assert peer.matmul_parameters() == pytest.approx(float(size[:-1]) * 1e6, rel=0.02)
        assert model.matmul_parameters() == pytest.approx(peer.matmul_parameters(), rel=0.02)


def test_gpt2_flops_are_counted_right(monkeypatch):
    """6 N a token by PyTorch's counter with attention taken out; attention by its visible pairs."""
    shape = {"n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 96}
    job = speed.Job("", shape, 1, 24, kind="gpt2")
    model = GPT2(**job.shape, length=24)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: q + k + v)
    tokens = torch.randint(96, (1, 24))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert counter.get_total_flops() == 6 * model.matmul_parameters() * 24
    # on average half of the keys and one half
    attention = job.flops() - 6 * model.matmul_parameters()
    assert attention == pytest.approx(12 * 2 * 32 * 25 / 2)


# Losses


@pytest.mark.parametrize("length", [15, 16, 40])
def test_losses_agree_between_backends_and_with_transformers(length):
    """float32, the same sums in other orders: 2^-24 a term, over four layers."""
    _, _, cohere2 = speed.Job("", TINY, 1, length, kind="cohere2").build(CPU)
    ours, _, loss = speed.Job("", TINY, 1, length).build(CPU)
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

    assert max(loss_module.LOGITS_AT_ONCE.values()) <= 2**27
    monkeypatch.setattr(loss_module, "LEAST_ROWS", 16)
    model = Transformer(ModelConfig(**TINY | {"vocab_size": 2**14}))
    tokens = torch.randint(96, (2, 64))
    for limit, calls in ((2**20, 2), (2**21, 1), (2**10, 8)):
        monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", limit)
        with Largest() as largest:
            model.loss(tokens, tokens)
        assert largest.calls == calls and largest.elements == max(limit, 16 * 2**14)


# The sections


def test_training_table():
    text = speed.measured(section("train", tables=tables(2, 24)), ARGS)
    assert text.startswith("2 x 24 tokens a step, forward and backward; medians of 1 turns")
    found = rows(text)
    assert list(found) == BOTH
    for _, _, _, flops, *_, peak in found.values():
        assert flops == "1.00" and peak == "7"
    assert found["Cohere2, SDPA"][1] == "1.00"


def test_medians_by_turns():
    order, clock = [], iter(range(100))
    works = {
        "a": lambda: order.append("a"),
        "b": lambda: order.append("b") or next(clock),
    }
    assert speed.alternate(works, range(3), lambda: next(clock)) == {"a": 1, "b": 2}
    assert order == ["a", "b"] * 3


def test_memory_table(monkeypatch):
    """The four losses agree, and the switches are what they are called."""
    built, work = [], speed.Job.work
    monkeypatch.setattr(
        speed.Job, "work", lambda job, device: built.append(job) or work(job, device)
    )
    text = speed.measured(section("memory", tables=tables(2, 24)), ARGS)
    assert text.startswith("A vocabulary of 16,384. 2 x 24 tokens")
    assert {job.shape["vocab_size"] for job in built} == {16384}
    switches = [(job.loss == "whole", job.recompute) for job in built]
    assert switches == [(False, True), (False, False), (True, True), (True, False)]
    assert list(rows(text)) == [job.name for job in built]
    for job in built:
        named = ("whole" in job.name, "recompute" in job.name)
        assert named == (job.loss == "whole", job.recompute)
    model, _, loss = built[2].build(CPU)
    assert model.recompute and loss != model.loss


def test_memory_of_a_step(monkeypatch):
    """A step whose whole logits take 64 MiB and more is seen to take it; one by chunks takes
    less."""
    monkeypatch.setattr(speed.multiprocessing, "get_context", lambda _: forks)  # torch is there
    job = speed.Job("", TINY | {"vocab_size": 2**15}, 1, 512)
    by_chunks, at_once = (
        alone(speed.step_memory, replace(job, loss=loss), CPU) for loss in ("training", "whole")
    )
    assert at_once > 2**27 and by_chunks < 0.9 * at_once


def test_a_long_prompt_takes_little_memory(monkeypatch):
    """16k tokens through the laptop model: the (t v) logits alone would be 134 MB, a (t s) mask 268
    MB."""
    monkeypatch.setattr(speed.multiprocessing, "get_context", lambda _: forks)
    job = speed.Job("", speed.DATA["shapes"]["laptop"], 1, 16384, task="prefill")
    assert 0 < alone(speed.step_memory, job, CPU) < 200 * 2**20


def test_cost_is_what_arithmetic_promises(monkeypatch):
    """Cache bytes and FLOPs are exact; times are only there (what they are is the machine's
    affair)."""
    shape = {"n_layer": 4, "n_head": 2, "n_kv_head": 1, "d_model": 16, "d_ff": 16}
    monkeypatch.setitem(speed.SHAPES, "laptop", shape | {"vocab_size": 32, "window": 8})
    data = section("cost", new_tokens=3, tables=[{"task": "continue", "length": 64}])
    jobs = {job.name: job for job in speed.jobs_of(data | data["tables"][0], ARGS)}
    # rows x head width x (k, v) x float32, and a position each
    full, promised = jobs["R"].cache()
    assert full == 4 * 64 * 8 * 2 * 4 + 8 * 64 and promised == jobs["RN"].cache()[1] == 1
    hybrid, promised = jobs["rrrN"].cache()
    assert hybrid == (64 + 3 * 8) * 8 * 2 * 4 + 8 * (64 + 8)
    assert promised == pytest.approx((1 + 3 * 8 / 64) / 4)
    # 6 N a token, and 12 x width a visible pair
    n = jobs["R"].model().matmul_parameters()
    pairs = visible_pairs(64) + 3 * visible_pairs(64, 8)
    assert jobs["rrrN"].flops() == pytest.approx(6 * n + 12 * 16 * pairs / 64)
    assert jobs["R"].flops() == pytest.approx(6 * n + 12 * 16 * 4 * visible_pairs(64) / 64)
    text = speed.measured(data, ARGS)
    assert text.startswith("3 tokens after 1 x 64 tokens of context") and list(rows(text)) == [
        *jobs
    ]
    assert rows(text)["rrrN"][-3:] == [f"{hybrid:,}", f"{hybrid / full:.3f}", f"{promised:.3f}"]


def test_a_context_is_continued_as_a_stream_is():
    """Every turn goes on with the text, and what the first says is what `decode` says."""
    shape = TINY | {"vocab_size": 2**10}
    job = speed.Job("", shape, 1, 40, task="continue", new_tokens=4)
    work = job.work(CPU)
    said = torch.cat([work(), work()], dim=1)
    assert torch.equal(said, replace(job, task="decode", new_tokens=8).work(CPU)())


NARROW = {"name": "rrrN, window 4", "config": {"window": 4}}
WIDE = {"name": "rrrN, window 8", "config": {"window": 8}}
FULL = {"name": "R", "config": {"pattern": "R"}}
COSTS = {"tables": [{"task": task, "length": 40} for task in ("train", "prefill", "continue")]}
CONTEXTS = {"models": [NARROW, WIDE, FULL], "tables": tables(2, 16) + tables(1, 32)}


@pytest.mark.parametrize(
    "name,changes,expected",
    [
        ("forward", {"tables": tables(2, 24)}, BOTH),
        ("decode", {"tables": tables(1, 12)}, BOTH),
        ("long", {"tables": tables(1, 64)}, BOTH),
        ("gpt2", {"length": 24}, ["ours, 124M", "ours, 124M, R", "GPT-2, 124M"]),
        ("joined", {"tables": tables(2, 24)}, ["joined", "one by one"]),
        ("cost", COSTS, ["rrrN", "RN", "R"]),
        ("contexts", CONTEXTS, ["rrrN, window 4", "rrrN, window 8", "R"]),
    ],
)
def test_sections_that_compare_models(name, changes, expected):
    data = section(name, **changes)
    text = speed.measured(data, ARGS)
    assert list(rows(text)) == expected
    assert text.count("GFLOP/s") == len(data["tables"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_are_what_the_rows_say(device, monkeypatch):
    """Each window by every kernel, which agree; their names say what runs."""
    data = section("kernels", device, tables=tables(1, 96))
    jobs = speed.jobs_of(data | data["tables"][0], ARGS)
    assert {job.backend for job in jobs} >= {"banded", "sdpa"}
    for job in jobs:
        assert job.name == f"{job.backend}, window {ModelConfig(**job.shape).window:,}"
        assert job.build(CPU)[0].backend == job.backend
    if device == "cpu":  # FlexAttention has no backward pass there
        assert list(rows(speed.measured(data, ARGS))) == [job.name for job in jobs]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_contexts_have_as_many_tokens_and_their_flops(device):
    data = section("contexts", device)
    for table in data["tables"]:
        jobs = speed.jobs_of(data | table, ARGS)
        assert len({job.batch * job.length for job in jobs}) == 1
        assert all(job.recompute for job in jobs)
        patterns = [ModelConfig(**job.shape).pattern for job in jobs]
        assert patterns == ["rrrN", "rrrN", "R"]
        for job in jobs[:-1]:
            assert job.name == f"rrrN, window {job.shape['window']:,}"
        narrow, wide, full = (job.flops() for job in jobs)
        assert narrow < wide <= full
    assert wide < full  # of the longest


def test_what_is_compiled():
    """--compile is for all, and the names say so."""
    compiled = Namespace(**vars(ARGS) | {"compile": True})
    jobs = speed.jobs_of(section("train", **tables(2, 24)[0]), compiled)
    assert [(job.name, job.compiled) for job in jobs] == [
        ("ours, compiled", True),
        ("Cohere2, SDPA, compiled", True),
    ]


@pytest.mark.parametrize("kind", ["ours", "cohere2"])
def test_every_compiled_job_is_one_graph_of_its_own_lengths(monkeypatch, kind):
    """From the second length on lengths were symbols, and the ninth job ran uncompiled."""
    graphs = []
    trace = lambda graph, inputs: graphs.append(inputs) or graph
    monkeypatch.setattr(speed, "one_graph", partial(speed.one_graph, backend=trace))
    shape, lengths = TINY | {"n_layer": 1, "pattern": "R"}, (4, 5, 6)
    for length in lengths:
        speed.Job("", shape, 1, length, kind=kind, compiled=True).work(CPU)()
    assert len(graphs) == 3
    assert not any(isinstance(thing, torch.SymInt) for inputs in graphs for thing in inputs)
    torch._dynamo.reset()


def test_cohere2_decodes_compiled_with_its_static_cache(monkeypatch):
    """The strongest that transformers has: the same tokens, and after the first turn no graph.
    Traced only: what inductor would make of it is torch's."""
    config = speed.compiled_anywhere()
    config.backend, config.mode = "aot_eager", None
    monkeypatch.setattr(speed, "compiled_anywhere", lambda: config)
    small = TINY | {"vocab_size": 64, "n_layer": 2, "pattern": "rN"}
    job = speed.Job("", small, 1, 12, task="decode", new_tokens=6)
    theirs = replace(job, kind="cohere2", compiled=True).work(CPU)
    counters.clear()
    assert torch.equal(theirs(), job.work(CPU)())
    assert counters["stats"]["unique_graphs"] > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        theirs()
    torch._dynamo.reset()


# The check, and the command


def test_peers_that_disagree_are_not_timed(monkeypatch, capsys):
    """A window that is one key off changes the loss in the fourth digit or so: it must be seen."""
    monkeypatch.setattr(speed, "alternate", lambda *_: pytest.fail("it timed them"))
    real = attention.visible
    wrong = lambda q, k, window=None: real(q, k, window and window + 1)
    monkeypatch.setattr(attention, "visible", wrong)
    for name in ("train", "forward"):
        monkeypatch.setitem(speed.SECTIONS, name, section(name, tables=tables(2, 24)))
        with pytest.raises(ValueError, match="do not say the same.*mean nothing"):
            speed.measured(section(name), ARGS)
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
        speed.measured(section("decode", tables=tables(1, 12)), ARGS)


def test_nan_agrees_with_nothing():
    with pytest.raises(ValueError):
        speed.agree({"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))}, 1)


def test_sections_are_printed_as_markdown(monkeypatch, capsys):
    monkeypatch.setattr(speed, "machine", lambda device: "AMD EPYC (TM) 9")
    monkeypatch.setattr(speed, "measured", lambda section, args: section["shape"])
    speed.main(["memory", "forward", "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.startswith("Speed on AMD EPYC (TM) 9: torch ") and out.count("\n## ") == 2
    assert "1 thread(s), CPU time.\n\n## Activation" in out
    assert "\n## Forward\n\nLoad " in out and out.endswith(" before it. small\n")


@pytest.mark.parametrize(
    "argv,word",
    [
        (["nonsense"], "'nonsense'"),
        (["--repeats", "0"], "--repeats 0"),
        (["--treads", "1"], "--threads"),
    ],
)
def test_errors_are_one_line(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        speed.main(argv)
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and word in error[0]
