"""device.py: what a GPU is given at once, and whether it is compiled, by arithmetic. None is needed
here; tests/test_gpu.py holds the arithmetic to the allocator."""

import operator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import device
import recipe as recipes
from checkpoint import shapes_only
from model import ModelConfig, Transformer
from run import Run

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
H100 = 79 * 2**30  # bytes


def run_of(name, device_type="cuda", vocab_size=8192, **more):
    tables = recipes.read_toml(RECIPES / f"{name}.toml")
    recipe = recipes.build(tables, {})
    with shapes_only():
        config = replace(recipe.model, vocab_size=vocab_size)
        model = Transformer(config)
    where = torch.device(device_type)
    run = Run(recipe, name, Path(name), None, None, model, where, bf16=True)
    run.max_steps = recipe.steps
    vars(run).update(more)
    return run


@pytest.fixture
def memory(monkeypatch):
    """memory(bytes) makes so many of the GPU's free."""

    def free(size):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (size, 2 * size))

    free(H100)
    return free


@pytest.mark.parametrize("name", [path.stem for path in RECIPES.glob("*gpu*.toml")])
def test_every_recipe_fits(name, memory):
    run = run_of(name)
    said = device.settle(run)
    share = run.recipe.batch_tokens / run.micro_batch
    assert share == int(share) and f"{run.micro_batch:,} tokens" in said
    assert run.micro_batch <= 2**17
    longest = max(max(phase.lengths) for phase in run.recipe.phase)
    fits = device.fitting(run.recipe, run.model.matmul_parameters(), H100, False, True)
    assert fits >= min(longest, 2**14), "eager, too"


def test_less_memory_wider_numbers_and_eager_code_take_fewer_tokens():
    recipe = run_of("gpu-124m").recipe
    tokens = lambda gib, compiled=True, bf16=True, recipe=recipe: device.fitting(
        recipe, 124_000_000, gib * 2**30, compiled, bf16
    )
    # .37 GiB for 1,024 tokens, compiled, was counted by torch's allocator
    assert tokens(79) == 2**17 and tokens(39) == 2**16
    assert tokens(23) == 2**15 and tokens(4) == 1
    assert tokens(39, compiled=False) <= tokens(39) / 2 or tokens(39, compiled=False) == 2**16
    assert tokens(39, bf16=False) == tokens(39) / 2
    assert tokens(23, recipe=replace(recipe, recompute=True)) == 2**17


def test_a_small_step_goes_through_at_once(memory):
    run = run_of("laptop", vocab_size=2048)
    device.settle(run)
    assert run.micro_batch == run.recipe.batch_tokens


def test_compiling_is_decided_by_the_work_ahead(memory):
    for name, compiled in (("laptop", False), ("gpu-30m", True), ("gpu-base", True)):
        run = run_of(name)
        said = device.settle(run)
        assert run.compile is compiled, name
        assert said.startswith("compiled (" if compiled else "not compiled ("), said
    near_its_end = run_of("gpu-30m", step=1499)
    device.settle(near_its_end)
    assert near_its_end.compile is False
    on_cpu = run_of("gpu-30m", "cpu")
    device.settle(on_cpu)
    assert on_cpu.compile is False and on_cpu.micro_batch == on_cpu.recipe.batch_tokens


def test_what_the_command_line_says_stands(memory):
    for compiled in (True, False):
        run = run_of("gpu-30m", compile=compiled, micro_batch=4096)
        device.settle(run)
        assert run.compile is compiled and run.micro_batch == 4096


def test_processes_share_the_step(memory, monkeypatch):
    monkeypatch.setattr(device, "RANKS", 4)
    run = run_of("gpu-30m")
    device.settle(run)
    assert run.micro_batch == run.recipe.batch_tokens // 4


JOINING = [
    dict(pattern="rrrN"),
    dict(pattern="R", qk_norm=True, tie_embeddings=False, logit_scale=0.5),
    dict(pattern="N", length_scale="ssmax"),
]


def loss_and_gradients(model, loss):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(64, (2, 25), generator=generator)
    weights = torch.rand(2, 24, dtype=torch.float64, generator=generator).round(decimals=1)
    model.zero_grad()
    value = loss(text[:, :-1], text[:, 1:], weights)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters())]


def small(pattern="rrrN", **more):
    torch.manual_seed(0)
    sizes = dict(n_layer=4, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=64, window=8)
    return Transformer(ModelConfig(**sizes, pattern=pattern, **more)).double()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", JOINING, ids=lambda config: config["pattern"])
def test_the_joined_loss_is_the_loss(config, recompute):
    model = small(**config)
    expected = loss_and_gradients(model, model.loss)
    model.recompute = recompute
    joined = device.training_loss(model, torch.device("cuda"))
    assert joined != model.loss == device.training_loss(model, torch.device("cpu"))
    got = loss_and_gradients(model, joined)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # float64, sums in another order


def test_the_joined_loss_calls_what_is_not_plain():
    """A wrapped or hooked matrix acts on training too."""
    model = small()
    model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)
    expected = loss_and_gradients(model, model.loss)
    got = loss_and_gradients(model, device.training_loss(model, torch.device("cuda")))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # float64, sums in another order


def test_the_joined_loss_is_one_graph_in_fewer_products():
    """Traced, not compiled: two products of the blocks' matrices instead of seven."""

    def products(loss):
        seen = []

        def count(graph, inputs):
            seen.extend(node.target for node in graph.graph.nodes)
            return graph

        torch._dynamo.reset()
        traced = torch.compile(loss, fullgraph=True, dynamic=False, backend=count)
        loss_and_gradients(model, traced)
        linear = (torch.nn.functional.linear, torch.matmul, operator.matmul)
        return sum(target in linear for target in seen)

    model = small()
    separate = products(model.loss)
    joined = products(device.training_loss(model, torch.device("cuda")))
    assert separate - joined == 5 * 4
