"""Wrong answers as edits of the solutions, other right answers, and cheats: what
tests/test_exercises.py holds the checks to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A wrong answer: `old`, which the solution (or another right answer) has exactly once, becomes
    `new`; the first check that fails, and words of its message."""

    exercise: str
    name: str
    old: str
    new: str
    check: str
    words: str
    of: str = ""  # of ALSO_RIGHT; empty is the solution


MUTANTS: list[Mutant] = []


def mutants(exercise: str, *rows: tuple[str, ...], of: str = "") -> None:
    """Rows of name, check, words, old, new."""
    for name, check, words, old, new in rows:
        MUTANTS.append(Mutant(exercise, name, old, new, check, words, of))


TURNED = "torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)"
mutants(
    "e01_rotate",
    (
        "half-split rotation",
        "quarter_turn",
        "half-split rotation",
        "(-1, 2)).unbind(-1)\n    cos, sin = angles.cos(), angles.sin()\n    turned = " + TURNED,
        "(2, -1)).unbind(-2)\n    cos, sin = angles.cos(), angles.sin()\n    turned = "
        + TURNED.replace("dim=-1", "dim=-2"),
    ),
    ("the wrong way", "quarter_turn", "wrong way", "angles.sin()", "-angles.sin()"),
    ("unzipped", "quarter_turn", "unzipped", TURNED, TURNED.replace("dim=-1", "dim=-2")),
    (
        "sine and cosine exchanged",
        "quarter_turn",
        "sine and cosine are exchanged",
        "cos, sin = angles.cos(), angles.sin()",
        "sin, cos = angles.cos(), angles.sin()",
    ),
    (
        "second from the new first",
        "quarter_turn",
        "overwritten too early",
        f"turned = {TURNED}",
        "first = first * cos - second * sin\n    second = first * sin + second * cos\n"
        "    turned = torch.stack((first, second), dim=-1)",
    ),
    (
        "one angle for all pairs",
        "quarter_turn",
        "each has its own",
        "cos, sin = angles.cos(), angles.sin()",
        "cos, sin = angles[:, :1].cos(), angles[:, :1].sin()",
    ),
    (
        "view of a transposed tensor",
        "specification",
        "view size",
        "x.float().unflatten(-1, (-1, 2))",
        "x.float().view(-1).view(*x.shape[:3], -1, 2)",
    ),
    (
        "in place",
        "untouched",
        "x itself was changed",
        "return turned.flatten(-2).to(x.dtype)",
        "return x.copy_(turned.flatten(-2))",
    ),
    ("angles in x's dtype", "precision", "too early", "= angles.cos", "= angles.to(x.dtype).cos"),
    (
        "tables in x's dtype",
        "precision",
        "too early",
        "angles.cos(), angles.sin()",
        "angles.cos().to(x.dtype), angles.sin().to(x.dtype)",
    ),
    ("float32 comes out", "precision", "float32; it should be bfloat16", ".to(x.dtype)", ""),
    ("no return", "quarter_turn", "is there a `return`", "return turned", "turned"),
    ("counted to the first gap", "answer", "beyond", "769", "256"),
)

VISIBLE = "seen & (distance < window)"
mutants(
    "e04_window",
    ("one more", "window", "window + 1 keys", "(distance < window)", "(distance <= window)"),
    ("one fewer", "window", "window - 1 keys", "(distance < window)", "(distance < window - 1)"),
    ("no causality with a window", "window", "sees the future", VISIBLE, "distance < window"),
    ("both sides", "window", "to both sides", VISIBLE, "distance.abs() < window"),
    (
        "chunks",
        "window",
        "chunks, not a sliding window",
        "(distance < window)",
        "(q_pos[:, None] // window == k_pos // window)",
    ),
    (
        "no causality",
        "full",
        "sees the future",
        "(distance >= 0) & (k_pos >= 0)",
        "distance == distance",
    ),
    (
        "top left",
        "cache",
        "aligned to the top left",
        "distance = q_pos[:, None] - k_pos[None, :]",
        "distance = torch.arange(len(q_pos))[:, None] - torch.arange(len(k_pos))",
    ),
    (
        "top left by tril",
        "cache",
        "aligned to the top left",
        "seen = (distance >= 0) & (k_pos >= 0)",
        "seen = torch.ones(len(q_pos), len(k_pos), dtype=torch.bool).tril()",
    ),
    ("empty slots seen", "cache", "empty slots seen", " & (k_pos >= 0)", ""),
    ("its own key hidden", "full", "sees itself", "(distance >= 0)", "(distance > 0)"),
    (
        "a normalised vector summed",
        "field",
        "summed a normalised vector",
        "(last * torch.randn_like(last)).sum()",
        "last.sum()",
    ),
    ("last token not counted", "field", "the last token counts", "- earliest", "- earliest - 1"),
    (
        "tokens with a gradient counted",
        "holes",
        "counted the tokens that matter",
        "inputs.shape[1] - earliest",
        "int((gradient[0].abs().sum(-1) > 0).sum())",
    ),
    ("a window counted whole", "answer", "63 back", "190", "193"),
)

mutants(
    "e08_ring",
    (
        "positions restart",
        "one_by_one",
        "positions restart",
        "return k, v, positions",
        "return k, v, positions - positions[0]",
    ),
    (
        "forgets one too early",
        "one_by_one",
        "forgets too early",
        "w = self.window",
        "w = self.window - 2",
    ),
    (
        "zeros at position 0",
        "one_by_one",
        "empty slots are seen",
        "        return k, v, positions",
        "        empty = torch.zeros_like(k[:, :, :1])\n"
        "        k, v = torch.cat((empty, k), dim=2), torch.cat((empty, v), dim=2)\n"
        "        return k, v, torch.cat((torch.zeros(1, dtype=torch.int64), positions))",
    ),
    (
        "values of another token",
        "one_by_one",
        "values of another token",
        "return k, v, positions",
        "return k, v.roll(1, 2), positions",
    ),
    (
        "stored before it was read",
        "all_at_once",
        "a key of this chunk is gone",
        "return k, v, positions",
        "return self.held",
    ),
    (
        "stored before it was read, long prompts apart",
        "any_chunks",
        "forgets too early",
        "return k, v, positions",
        "return (k, v, positions) if first == 0 else self.held",
    ),
    ("remembers everything", "bounded", "remembers", "w = self.window", "w = 10**6"),
    (
        "a slice keeps the chunk alive",
        "bounded",
        "clone() what you keep",
        "k[:, :, -w:].clone(), v[:, :, -w:].clone()",
        "k[:, :, -w:], v[:, :, -w:]",
    ),
    ("one layer", "answer", "a windowed layer", "0.256", "0.008"),
)

mutants(
    "e08_ring",
    (
        "masked by slot",
        "one_by_one",
        "masked by slot",
        "        return met",
        "        return self.k, self.v, torch.arange(self.window)",
    ),
    (
        "a prompt laid at slot 0",
        "prompt_then_tokens",
        "forgets too early",
        "slots = last % self.window",
        "slots = last % self.window if self.length else torch.arange(len(last))",
    ),
    of="a ring of slots",
)

# Other right answers ------------------------------------------------------------------------------

HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor\n\n\n"
ALSO_RIGHT: dict[str, dict[str, str]] = {}

ALSO_RIGHT["e01_rotate"] = {
    "complex numbers": HEAD
    + """
def rotate(x, angles):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


ANSWER = 769
""",
    "matrices": HEAD
    + """
def rotate(x, angles):
    c, s = torch.cos(angles), torch.sin(angles)
    matrix = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)
    turned = torch.einsum("tiac,bhtic->bhtia", matrix, x.float().unflatten(-1, (-1, 2)))
    return turned.reshape(x.shape).to(x.dtype)


ANSWER = 769.0
""",
    "repeated tables and a swap of signs": HEAD
    + """
from einops import rearrange


def swapped(x):
    a, b = x[..., ::2], x[..., 1::2]
    return rearrange([-b, a], "two b h t i -> b h t (i two)")


def rotate(x, angles):
    angles = angles.repeat_interleave(2, dim=-1)
    return (x.double() * angles.cos() + swapped(x.double()) * angles.sin()).to(x.dtype)


ANSWER = 769
""",
    "written into an empty tensor": HEAD
    + """
def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    cos, sin = angles.cos(), angles.sin()
    a, b = (x[..., i::2].float() for i in (0, 1))
    out[..., ::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


ANSWER = 769
""",
}

ALSO_RIGHT["e04_window"] = {
    "a jacobian's worth of rows": HEAD
    + """
def visible(q_pos, k_pos, window):
    q, k = torch.meshgrid(q_pos, k_pos, indexing="ij")
    if window is None:
        window = int(q_pos.max()) + 1
    return (k >= 0) & (k <= q) & (k > q - window)


def receptive_field(last, inputs):
    rows = [torch.autograd.grad(y, inputs, retain_graph=True)[0] for y in last]
    reached = torch.stack(rows).abs().amax((0, 1, 3)) > 0
    return len(reached) - int(reached.int().argmax())


ANSWER = 190
""",
    "backward, a threshold and logical functions": HEAD
    + """
def visible(q_pos, k_pos, window):
    behind = torch.sub(q_pos.unsqueeze(1), k_pos.unsqueeze(0))
    seen = torch.logical_and(behind.ge(0), k_pos.unsqueeze(0).ne(-1))
    return seen if window is None else torch.logical_and(seen, behind.lt(window))


def receptive_field(last, inputs):
    torch.manual_seed(1)
    (last @ torch.randn(len(last))).backward()
    field = 0
    for back, gradient in enumerate(reversed(inputs.grad[0])):
        if gradient.norm() > 1e-6:
            field = back + 1
    return field


ANSWER = 190.0
""",
    "the first entry alone": HEAD
    + """
import math


def visible(q_pos, k_pos, window):
    window = math.inf if window is None else window
    behind = q_pos[:, None] - k_pos
    return behind.clamp(min=0).eq(behind) & behind.lt(window) & ~k_pos.lt(0)


def receptive_field(last, inputs):
    gradient = torch.autograd.grad(last[0], inputs)[0].squeeze(0)
    places = torch.where(gradient.ne(0).any(-1))[0]
    return int(gradient.shape[0] - places.min())


ANSWER = 190
""",
}

ALSO_RIGHT["e08_ring"] = {
    "a ring of slots": HEAD
    + """
class Ring:
    def __init__(self, window):
        self.window, self.length = window, 0
        self.positions = torch.full((window,), -1)

    def extend(self, k, v):
        if self.length == 0:
            b, h, _, d = k.shape
            self.k = torch.zeros(b, h, self.window, d, dtype=k.dtype)
            self.v = torch.zeros_like(self.k)
        t = k.shape[2]
        new = torch.arange(self.length, self.length + t)
        met = (
            torch.cat((self.k, k), 2),
            torch.cat((self.v, v), 2),
            torch.cat((self.positions, new)),
        )
        last = new[-self.window :]
        slots = last % self.window
        self.k[:, :, slots] = k[:, :, -self.window :]
        self.v[:, :, slots] = v[:, :, -self.window :]
        self.positions[slots] = last
        self.length += t
        return met


ANSWER = 0.2559
""",
    "a deque of tokens": HEAD
    + """
from collections import deque


class Ring:
    __slots__ = ("tokens", "length")

    def __init__(self, window):
        self.tokens, self.length = deque(maxlen=window), 0

    def extend(self, k, v):
        held = list(self.tokens)
        for i in range(k.shape[2]):
            held.append((self.length, k[:, :, i].clone(), v[:, :, i].clone()))
            self.tokens.append(held[-1])
            self.length += 1
        places, keys, values = zip(*held)
        return torch.stack(keys, 2), torch.stack(values, 2), torch.tensor(places)


ANSWER = 0.26
""",
    "one tensor, newest first, window - 1 tokens": HEAD
    + """
from dataclasses import dataclass


@dataclass
class Ring:
    window: int
    seen: int = 0
    both: Tensor | None = None

    def extend(self, k, v):
        new = torch.stack((k, v)).flip(3)
        all = new if self.both is None else torch.cat((new, self.both), dim=3)
        self.seen += k.shape[2]
        positions = torch.arange(self.seen - 1, self.seen - 1 - all.shape[3], -1)
        self.both = all[:, :, :, : self.window - 1].clone()
        return all[0], all[1], positions


ANSWER = 0.2549
""",
    "a module that returns only what is needed": HEAD
    + """
class Ring(torch.nn.Module):
    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.step = 0
        self.old = None

    def extend(self, k, v):
        s = self.step
        self.step = s + k.size(2)
        keep = max(0, self.step - self.window)
        if self.old:
            k, v = torch.cat([self.old[0], k], 2), torch.cat([self.old[1], v], 2)
        start = self.step - k.size(2)
        needed = max(start, s - self.window + 1)
        self.old = [x[:, :, max(0, keep - start) :].clone() for x in (k, v)]
        k, v = k[:, :, needed - start :], v[:, :, needed - start :]
        return [k, v, torch.arange(needed, self.step, dtype=torch.int32)]


ANSWER = 0.256
""",
}

# Cheats: an exercise, a file, and words of what is said of it. None gets a point ------------------

CHEATS: dict[str, tuple[str, str, str]] = {}


def cheats(exercise: str, **files: tuple[str, str]) -> None:
    for name, (text, words) in files.items():
        CHEATS[name] = exercise, text, words


ROTATE = "\n\ndef rotate(x, angles):\n    "
cheats(
    "e01_rotate",
    imports_the_reference=("from attention import rotate\n", "line 1 imports attention"),
    imports_a_solution=("from exercises.solutions.e01_rotate import rotate\n", "line 1 imports"),
    imports_a_neighbour=("from .solutions.e01_rotate import rotate\n", "line 1 imports"),
    imports_late=(ROTATE + "import importlib", "imports importlib"),
    through_sys=(
        "import torch"
        + ROTATE
        + "m = torch.sys.modules\n    return m['attention'].rotate(x, angles)",
        "uses torch.sys",
    ),
    through_dataclasses=("import dataclasses as d\nm = d.sys.modules\n", "uses d.sys"),
    from_torch_sys=("from torch import sys\n", "imports sys from torch"),
    through_an_alias=("import torch\nt = torch\nrotate = t.hub.sys\n", "uses t.hub"),
    through_a_pattern=(
        "import torch\nmatch torch:\n    case object(sys=s):\n        m = s\n",
        "uses sys",
    ),
    through_an_argument=(
        "import torch\nf = lambda module: module.sys.modules\nm = f(torch)\n",
        "uses module.sys",
    ),
    through_a_frame=("g = (i for i in 'a')\nf = g.gi_frame.f_back\n", "uses g.gi_frame"),
    through_a_dunder=("f = (lambda: 0).__globals__\n", "uses __globals__"),
    calls_the_specification=(
        ROTATE.replace("rotate", "rotate") + "return rotate_spec(x, angles)",
        "uses rotate_spec",
    ),
    names_the_specification=("rotate = rotate_spec\n", "uses rotate_spec"),
    replaces_allclose=(
        "import torch\ntorch.allclose = lambda *a, **k: True\n",
        "assigns to torch.allclose",
    ),
    replaces_a_method=(
        "import torch\nT = torch.Tensor\nT.double = lambda x: torch.zeros(1)\n",
        "assigns to T.double",
    ),
    replaces_by_argument=(
        "import torch\n\n\ndef f(module):\n    module.equal = lambda a, b: True\n\n\nf(torch)\n",
        "the file changes torch.equal",
    ),
    opens_a_file=("text = open('solutions/e01_rotate.py').read()\n", "uses open"),
    evaluates=("rotate = eval('1')\n", "uses eval"),
    asks_for_an_attribute=("import torch\ns = getattr(torch, 's' + 'ys')\n", "uses getattr"),
    loops=(ROTATE + "for i in range(3): pass\n    return x", "loops"),
    loops_in_a_helper=(
        "\n\ndef help(x):\n    return [i for i in x]\n" + ROTATE + "return help(x)",
        "loops",
    ),
    calls_itself=(ROTATE + "return rotate(x[:-1], angles)", "from itself"),
    exits=("raise SystemExit(0)\n", "line 1: SystemExit"),
    hides_in_main=(
        "__name__ = '__main__'\nif __name__ == '__main__':\n    import attention\n",
        "uses __name__",
    ),
)
