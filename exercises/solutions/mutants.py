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
        "remembers in a default argument",
        "bounded",
        "remembers",
        "v: Tensor) -> tuple[Tensor, Tensor, Tensor]:\n",
        "v: Tensor, all=[]) -> tuple[Tensor, Tensor, Tensor]:\n        all.append(k.clone())\n",
    ),
    (
        "remembers as numbers",
        "bounded",
        "remembers everything",
        "positions = torch.arange(first, first + k.shape[2])\n",
        "positions = torch.arange(first, first + k.shape[2])\n"
        "        self.all = (k.tolist(), self.all if first else None)\n",
    ),
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

ANGLES = "theta ** (-2 * torch.arange(d // 2) / d)"
mutants(
    "e02_angles",
    ("the exponent counts dimensions", "specification", "counts dimensions", "-2 * t", "-1 * t"),
    ("a positive exponent", "specification", "pairs get faster", "-2 * t", "2 * t"),
    (
        "linspace to one",
        "specification",
        "the slowest pair turns theta^(-(d-2)/d)",
        ANGLES,
        "theta ** -torch.linspace(0, 1, d // 2)",
    ),
    (
        "the table upside down",
        "first_pair",
        "the slowest pair stands first",
        "None] * frequencies",
        "None] * frequencies.flip(0)",
    ),
    (
        "positions from 1",
        "first_pair",
        "positions begin at 0",
        "positions.float()",
        "(positions + 1)",
    ),
    ("degrees", "first_pair", "radians", "None] * freq", "None] * 180 / torch.pi * freq"),
    ("turns", "first_pair", "radians", "None] * freq", "None] * 2 * torch.pi * freq"),
    ("positions in bfloat16", "far", "positions in bfloat16", ".float()", ".bfloat16().float()"),
    (
        "float64 comes out",
        "first_pair",
        "is float64; it should be float32",
        ".float()",
        ".double()",
    ),
    (
        "transposed",
        "first_pair",
        "has the shape (4, 6)",
        "positions.float()[:, None] * frequencies",
        "positions.float() * frequencies[:, None]",
    ),
    ("theta ten thousand", "answer", "that is theta 10,000", "319", "46"),
)

SCALED = " / math.sqrt(q.shape[-1])"
mutants(
    "e03_weights",
    ("no sqrt(d)", "two_keys", "not divided by sqrt(d)", SCALED, ""),
    ("divided by d", "two_keys", "divided by d", SCALED, " / q.shape[-1]"),
    ("over queries", "two_keys", "over the keys of a query", "dim=-1)", "dim=-2)"),
    ("mask upside down", "two_keys", "True means visible", "~mask", "mask"),
    (
        "masked after the softmax",
        "rows",
        "rows no longer sum to one",
        "scores = scores.masked_fill(~mask, -math.inf)\n    return torch.softmax(scores, dim=-1)",
        "return (torch.softmax(scores, dim=-1) * mask)",
    ),
    ("zero instead of -inf", "rows", "a score of zero is not invisible", "-math.inf", "0"),
    ("a small number for -inf", "rows", "hidden keys weigh", "-math.inf", "-20.0"),
    ("a smaller one", "large", "minus infinity is below all", "-math.inf", "-1e4"),
    (
        "heads tiled",
        "specification",
        "query head h reads key head h // group",
        "k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)",
        "k.repeat(1, q.shape[1] // k.shape[1], 1, 1)",
    ),
    (
        "exp without the maximum",
        "large",
        "overflows",
        "torch.softmax(scores, dim=-1)",
        "(scores.exp() / scores.exp().sum(-1, keepdim=True))",
    ),
    (
        "the maximum of what is hidden",
        "large",
        "overflows",
        "scores = scores.masked_fill(~mask, -math.inf)\n    return torch.softmax(scores, dim=-1)",
        "w = (scores - scores.amax(-1, keepdim=True)).exp() * mask\n"
        "    return (w / w.sum(-1, keepdim=True))",
    ),
    (
        "softmax in bfloat16",
        "precision",
        "float32",
        "softmax(scores,",
        "softmax(scores.to(q.dtype),",
    ),
    (
        "softmax written out in bfloat16",
        "precision",
        "float32",
        "return torch.softmax(scores, dim=-1)",
        "scores = scores.to(q.dtype)\n"
        "    w = math.e ** (scores - scores.amax(-1, keepdim=True))\n"
        "    return (w / w.sum(-1, keepdim=True))",
    ),
    ("float32 comes out", "precision", "is float32; it should be bfloat16", ".to(q.dtype)", ""),
    ("without the scale", "answer", "without the scale", "7.86", "1.18"),
)

PAIRS = "w * length - w * (w - 1) // 2"
mutants(
    "e05_pattern",
    (
        "window in every layer",
        "letters",
        "a capital sees all",
        "window if letter.islower() else None",
        "window",
    ),
    (
        "capitals exchanged",
        "letters",
        "are exchanged",
        "if letter.islower()",
        "if letter.isupper()",
    ),
    ("N rotated", "letters", "R and r are rotated", 'letter in "Rr"', 'letter in "Nn"'),
    (
        "letters stretched",
        "tiles",
        "a pattern is repeated, its letters are not",
        "letters = pattern * (n_layer // len(pattern))",
        'letters = "".join(x * (n_layer // len(pattern)) for x in pattern)',
    ),
    (
        "cut instead of tiled",
        "refuses",
        "nothing is cut off",
        "if n_layer % len(pattern):",
        "if len(pattern) > n_layer:",
    ),
    (
        "unknown letter taken for N",
        "refuses",
        "a letter other than",
        'if not pattern or set(pattern) - set("RrNn"):',
        "if not pattern:",
    ),
    (
        "no window asked",
        "refuses",
        "a small letter needs a window",
        "if window is None and pattern != pattern.upper():",
        "if False:",
    ),
    (
        "an assert",
        "refuses",
        "it should be ValueError",
        'raise ValueError(f"pattern {pattern!r} has an',
        'raise TypeError(f"pattern {pattern!r} has an',
    ),
    (
        "no pattern in the message",
        "refuses",
        "does not quote the pattern",
        "{pattern!r} does not tile",
        "does not tile",
    ),
    ("no corner", "pairs", "no corner", PAIRS, "w * length"),
    ("both triangles", "pairs", "both triangles", PAIRS, "length * length"),
    (
        "window beyond the length",
        "pairs",
        "beyond the length",
        "min(window, length)\n    return w",
        "window\n    return w",
    ),
    ("a float", "pairs", "it should be a plain int", "(w - 1) // 2", "(w - 1) / 2"),
    (
        "cache grows past the length",
        "cache",
        "cannot hold more than there is",
        "else min(window, length) for",
        "else window for",
    ),
    (
        "windowed layers forgotten",
        "cache",
        "full layers hold all",
        "[length if window is None",
        "[0 if window is None",
    ),
    ("at 8,192", "answer", "that is 8,192", "0.341", "0.812"),
)

STATISTICS = """wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)"""
mutants(
    "e06_qk_norm",
    (
        "after the rotation",
        "order",
        "QK-Norm comes before the rotation",
        "wide = x.float()",
        "x = x if turn is None else turn(x)\n    turn, wide = None, x.float()",
    ),
    ("RMSNorm", "by_hand", "takes the mean out", "wide - wide.mean(-1, keepdim=True)", "wide"),
    (
        "all heads together",
        "specification",
        "over the head width",
        STATISTICS,
        STATISTICS.replace("-1", "(1, 3)"),
    ),
    (
        "over heads",
        "by_hand",
        "yours runs over heads",
        STATISTICS,
        STATISTICS.replace("-1", "1"),
    ),
    (
        "over time",
        "specification",
        "over the head width",
        STATISTICS,
        STATISTICS.replace("-1", "2"),
    ),
    (
        "gain after the rotation",
        "order",
        "the gain belongs to the norm",
        "* gain).to(x.dtype)\n    return normed if turn is None else turn(normed)",
        ").to(x.dtype)\n    return (normed if turn is None else turn(normed)) * gain",
    ),
    (
        "n - 1",
        "by_hand",
        "divides by n",
        "centred.square().mean(-1, keepdim=True)",
        "x.float().var(-1, keepdim=True)",
    ),
    ("no gain", "specification", "no gain", " * gain", ""),
    (
        "epsilon outside of the root",
        "specification",
        "epsilon",
        "(variance + 1e-5).sqrt()",
        "(variance.sqrt() + 1e-5)",
    ),
    ("no epsilon", "specification", "epsilon", " + 1e-5", ""),
    ("turn forgotten", "order", "`turn` is not called", "turn(normed)", "normed"),
    ("statistics in bfloat16", "precision", "in bfloat16", "x.float()", "x"),
    ("float32 to turn", "precision", "is float32; it should be bfloat16", ".to(x.dtype)", ""),
    ("at 131,072", "answer", "that is 131,072", "0.0207", "0.0013"),
)

SPENT = "w[:, segment == 3].mean((0, 1))"
mutants(
    "e07_masses",
    ("all queries", "by_hand", "the question's queries only", SPENT, "w.mean((0, 1))"),
    ("mean over keys", "by_hand", "a mass is a sum over keys", "== kind].sum()", "== kind].mean()"),
    (
        "attention received",
        "by_hand",
        "rows are queries",
        SPENT,
        "w[:, :, segment == 3].mean((0, 2))",
    ),
    ("heads added", "one", "average over heads", SPENT, "w[:, segment == 3].mean(1).sum(0)"),
    ("nats", "bits", "entropy in nats", " / 0.6931471805599453", ""),
    ("negative", "bits", "not negative", "return torch.special", "return -torch.special"),
    ("0 log 0", "zeros", "0 log 0 is 0", "torch.special.entr(rows)", "-(rows * rows.log())"),
    (
        "entropy of the mean",
        "specification",
        "average the entropies, not the weights",
        "rows = w[:, segment == 3]",
        "rows = w[:, segment == 3].mean((0, 1))",
    ),
    (
        "entropy of the mean of heads",
        "specification",
        "average the entropies, not the weights",
        "rows = w[:, segment == 3]",
        "rows = w[:, segment == 3].mean(0)",
    ),
    (
        "entropy of all queries",
        "specification",
        "the question's queries only",
        "rows = w[:, segment == 3]",
        "rows = w",
    ),
    ("a tensor", "bits", "is of type Tensor", ".mean().item()", ".mean()"),
    ("a RoPE layer", "answer", "a RoPE layer", "0.46", "0.0"),
)

SUM = 'x = x + linear(y.flatten(2), "self_attn.o") + mlp'
HEADS = "(y.unflatten(-1, (-1, d)).transpose(1, 2) for y in (q, k, v))"
mutants(
    "e09_model",
    (
        "one after the other",
        "one_layer",
        "the block is parallel: one norm, two readers",
        '        mlp = linear(F.silu(linear(h, "mlp.gate")) * linear(h, "mlp.up"), "mlp.down")\n'
        '        x = x + linear(y.flatten(2), "self_attn.o") + mlp\n',
        '        x = x + linear(y.flatten(2), "self_attn.o")\n'
        '        h = norm(x, w[f"layers.{i}.input_layernorm.weight"])\n'
        '        x = x + linear(F.silu(linear(h, "mlp.gate")) * linear(h, "mlp.up"), "mlp.down")\n',
    ),
    ("NoPE layers rotated", "hybrid", "capital N has no position", "if rotated:", "if True:"),
    ("nothing rotated", "one_layer", "nothing is rotated", "if rotated:", "if False:"),
    (
        "values rotated",
        "one_layer",
        "values are not rotated",
        "if rotated:\n",
        "if rotated:\n            v = parts.rotate(v, angles)\n",
    ),
    (
        "window in every layer",
        "hybrid",
        "a layer's window is its own",
        "positions, window)",
        "positions, layers[0][1])",
    ),
    ("no window", "hybrid", "the windows are missing", "positions, window)", "positions, None)"),
    ("no logit scale", "hybrid", "no logit scale", ' * sizes["logit_scale"]', ""),
    ("no last norm", "one_layer", "the last norm", 'norm(x, w["norm.weight"])', "x"),
    (
        "no gains",
        "one_layer",
        "the gains",
        "F.layer_norm(x, gain.shape, gain)",
        "F.layer_norm(x, gain.shape)",
    ),
    ("no residual", "one_layer", "no residual", SUM, SUM.replace("x + ", "", 1)),
    (
        "head width first",
        "grouped",
        "(h d), heads first",
        HEADS,
        HEADS.replace("(-1, d)).transpose(1, 2)", "(d, -1)).permute(0, 3, 1, 2)"),
    ),
    (
        "values in turns",
        "grouped",
        "query head h reads value head",
        "v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)",
        "v.repeat(1, q.shape[1] // k.shape[1], 1, 1)",
    ),
    (
        "gate and up exchanged",
        "one_layer",
        "gate and up",
        'F.silu(linear(h, "mlp.gate")) * linear(h, "mlp.up")',
        'F.silu(linear(h, "mlp.up")) * linear(h, "mlp.gate")',
    ),
    ("an untrained model", "answer", "knows nothing", "4.17", "7.62"),
)

RIGHT = "right = logits[:-1].argmax(-1) == tokens[1:]"
mutants(
    "e10_needle",
    (
        "one place late",
        "by_hand",
        "the logits at place i speak of token i + 1",
        RIGHT,
        "right = logits[1:].argmax(-1) == tokens[1:]",
    ),
    (
        "more than half of the probability",
        "specification",
        "whatever its probability",
        RIGHT,
        "right = (logits[:-1].softmax(-1) > 0.5)[torch.arange(len(tokens) - 1), tokens[1:]]",
    ),
    ("share of digits", "by_hand", "a value half right is wrong", "].all()", "].float().mean()"),
    ("any digit", "by_hand", "a value half right is wrong", "].all()", "].any()"),
    ("counts -1", "by_hand", "-1 is no question", "asked[asked >= 0].unique()", "asked.unique()"),
    (
        "every token",
        "by_hand",
        "every token",
        RIGHT + "\n    asked = answer[1:]",
        RIGHT + "\n    return right.float().mean().item()\n    asked = answer[1:]",
    ),
    (
        "the first question only",
        "specification",
        "every question counts",
        ".unique()]",
        ".unique()[:1]]",
    ),
    (
        "all or nothing",
        "specification",
        "right together or not",
        "whole).float().mean()",
        "whole).all().float()",
    ),
    (
        "a count",
        "specification",
        "a share, not a number",
        "whole).float().mean()",
        "whole).float().sum()",
    ),
    ("divides by n", "error", "n - 1", ".std()", ".std(correction=0)"),
    ("deviation, not error", "error", "divided by the root of n", " / len(values) ** 0.5", ""),
    ("forgets the root", "error", "divided by the root of n: yours by n", " ** 0.5", ""),
    (
        "variance",
        "error",
        "the root is missing",
        ".std().item() / len(values) ** 0.5",
        ".var().item() / len(values)",
    ),
    ("R minus rrrN", "answer", "rrrN minus R", "0.8", "-0.7"),
)

NTK = "theta * factor ** (d / (d - 2))"
mutants(
    "e11_extend",
    ("PI multiplies", "pi", "yours are multiplied", "turns / factor if", "turns * factor if"),
    ("PI always", "pi", "PI", 'turns / factor if method == "pi" else turns', "turns / factor"),
    ("theta times the factor", "ntk", "factor^(d/(d-2))", NTK, "theta * factor"),
    ("NTK upside down", "ntk", "upside down", NTK, "theta / factor ** (d / (d - 2))"),
    ("d/(d-1)", "ntk", "d/(d-2), not d/(d-1)", NTK, "theta * factor ** (d / (d - 1))"),
    (
        "a straight line between the ends",
        "ntk",
        "the specification says",
        '    if method == "ntk":\n',
        '    if method == "ntk":\n'
        "        turns = theta ** (-torch.arange(0, d, 2) / d)\n"
        "        return turns / torch.linspace(1, factor, d // 2)\n",
    ),
    (
        "NTK and PI together",
        "ntk",
        "stretched twice",
        'if method == "pi" else',
        'if method != "none" else',
    ),
    (
        "theta raised in a hybrid",
        "hybrid",
        "theta raise applied to a hybrid: its RoPE layers lose recency",
        "    return config\n",
        "    if any(spec.rope for spec in layer_plan(config)):\n"
        "        return replace(config, rope_theta=config.rope_theta * factor)\n"
        "    return config\n",
    ),
    (
        "any RoPE layer will do",
        "hybrid",
        "theta raise applied to a hybrid",
        "if all(spec.rope",
        "if any(spec.rope",
    ),
    (
        "the factor left at 1",
        "rope",
        "nothing is extended",
        "rope_factor=factor",
        "rope_factor=1.0",
    ),
    ("PI instead", "rope", "that is PI", 'rope_scaling="ntk"', 'rope_scaling="pi"'),
    (
        "NoPE given a scaling",
        "nope",
        "theta raise applied to NoPE layers: there is nothing to turn",
        "if all(spec.rope for spec in layer_plan(config)):",
        "if len({spec.rope for spec in layer_plan(config)}) == 1:",
    ),
    (
        "the window stretched as well",
        "rope",
        "changes window",
        "rope_factor=factor",
        "rope_factor=factor, window=256",
    ),
    ("the share itself", "answer", "not what the measurement prints", "0.4", "50.0"),
)

EARLIER = """\
    before = lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    q, k, v = blocks(q), blocks(k), blocks(v)
    k, v = (torch.cat((before(x), x), dim=3) for x in (k, v))
    distance = torch.arange(w)[:, None] + w - torch.arange(2 * w)
    seen = (distance >= 0) & (distance < w)
    first = torch.arange(q.shape[2])[:, None, None] == 0
    seen = seen & ~(first & (torch.arange(2 * w) < w))  # (n w 2w)
"""
mutants(
    "e12_banded",
    (
        "dense with a mask",
        "cost",
        "right, and as expensive as full attention",
        "    t, d, w = q.shape[2], q.shape[3], window\n",
        "    t, d, w = q.shape[2], q.shape[3], window\n"
        "    far = torch.arange(t)[:, None] - torch.arange(t)\n"
        "    scores = (q @ k.transpose(-1, -2) / math.sqrt(d))\n"
        "    scores = scores.masked_fill((far < 0) | (far >= w), -math.inf)\n"
        "    return scores.softmax(-1) @ v\n",
    ),
    (
        "dense in a fused kernel",
        "cost",
        "right, and as expensive as full attention",
        "    t, d, w = q.shape[2], q.shape[3], window\n",
        "    t, d, w = q.shape[2], q.shape[3], window\n"
        "    far = torch.arange(t)[:, None] - torch.arange(t)\n"
        "    return F.scaled_dot_product_attention(q, k, v, (far >= 0) & (far < w))\n",
    ),
    (
        "dense without a product",
        "cost",
        "right, and as expensive as full attention",
        "    t, d, w = q.shape[2], q.shape[3], window\n",
        "    t, d, w = q.shape[2], q.shape[3], window\n"
        "    far = torch.arange(t)[:, None] - torch.arange(t)\n"
        "    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) / math.sqrt(d)\n"
        "    w = scores.masked_fill((far < 0) | (far >= w), -math.inf).softmax(-1)\n"
        "    return (w[..., None] * v[:, :, None]).sum(3)\n",
    ),
    (
        "wraps around",
        "future",
        "wrap around",
        EARLIER,
        EARLIER.replace("F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1]", "x.roll(1, 2)").replace(
            "seen & ~(first & (torch.arange(2 * w) < w))", "seen.expand(len(first), w, 2 * w)"
        ),
    ),
    (
        "own block only",
        "specification",
        "a window reaches into the block before",
        "(distance >= 0) & (distance < w)",
        "(distance >= 0) & (distance < w) & (torch.arange(2 * w) >= w)",
    ),
    (
        "padding seen",
        "specification",
        "padding seen",
        "    seen = seen & ~(first & (torch.arange(2 * w) < w))  # (n w 2w)\n",
        "",
    ),
    (
        "two whole blocks",
        "specification",
        "two whole blocks",
        "(distance >= 0) & (distance < w)",
        "distance >= 0",
    ),
    (
        "last block dropped",
        "specification",
        "has the shape",
        "F.pad(x, (0, 0, 0, -t % w)).unflatten",
        "x[:, :, : t // w * w].unflatten",
    ),
)

# Other right answers ------------------------------------------------------------------------------

mutants(
    "e02_angles",
    (
        "one token squeezed",
        "specification",
        "it should be (1, 4)",
        "return positions.float()[:, None] * frequencies",
        "return (positions.float()[:, None] * frequencies).squeeze(0)",
    ),
)
mutants(
    "e03_weights",
    ("hidden by -500", "large", "scores of 1,000: at (0, 0, 0, 0)", "-math.inf", "-500.0"),
    (
        "exponentials without their maximum",
        "large",
        "subtract the row's maximum first",
        "torch.softmax(scores, dim=-1)",
        "(scores.double().exp() / scores.double().exp().sum(-1, keepdim=True))",
    ),
)
EARLIEST = "gradient[0].abs().sum(-1).nonzero()[0]"
mutants(
    "e04_window",
    (
        "channels that cancel",
        "holes",
        "a difference of channels, 7 back is 1",
        EARLIEST,
        "gradient[0].sum(-1).nonzero()[0]",
    ),
    (
        "the first channel",
        "holes",
        "a difference of channels, 7 back is 1",
        EARLIEST,
        "gradient[0, :, 0].nonzero()[0]",
    ),
    (
        "a share of the largest gradient",
        "holes",
        "a token that matters little matters",
        EARLIEST,
        "(gradient[0].abs().sum(-1) > 0.01 * gradient.abs().max()).nonzero()[0]",
    ),
    (
        "from a threshold on",
        "holes",
        "a token that matters little matters",
        EARLIEST,
        "(gradient[0].abs().sum(-1) > 1e-3).nonzero()[0]",
    ),
    (
        "the first entry of last",
        "holes",
        "looked at some entries of `last` only",
        "(last * torch.randn_like(last)).sum()",
        "last[0]",
    ),
    (
        "the largest entry of last",
        "holes",
        "looked at some entries of `last` only",
        "(last * torch.randn_like(last)).sum()",
        "last.max()",
    ),
)
mutants(
    "e05_pattern",
    (
        "a window that no layer has",
        "letters",
        "has a small letter and no window",
        "if window is None and pattern != pattern.upper():",
        "if (window is None) != (pattern == pattern.upper()):",
    ),
)
mutants(
    "e08_ring",
    (
        "one memory for all",
        "one_by_one",
        "forgets too early",
        "self.window = window",
        "Ring.window = window",
    ),
)
mutants(
    "e10_needle",
    (
        "ids counted up to the last",
        "specification",
        "yours looks at every token",
        "asked[asked >= 0].unique()",
        "range(int(asked.max()) + 1)",
    ),
)
mutants(
    "e12_banded",
    ("d is 8", "specification", "13 tokens, window 4", "math.sqrt(d)", "math.sqrt(8)"),
    (
        "query by query",
        "cost",
        "small operations: take all blocks at once",
        "    t, d, w = q.shape[2], q.shape[3], window\n",
        "    t, d, w, rows = q.shape[2], q.shape[3], window, []\n"
        "    for i in range(t):\n"
        "        near = slice(max(0, i + 1 - w), i + 1)\n"
        "        scores = q[:, :, i : i + 1] @ k[:, :, near].mT / d**0.5\n"
        "        rows.append(scores.softmax(-1) @ v[:, :, near])\n"
        "    return torch.cat(rows, dim=2)\n",
    ),
)

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
    "an entry after the other": HEAD
    + """
import math


def visible(q_pos, k_pos, window):
    window = math.inf if window is None else window
    behind = q_pos[:, None] - k_pos
    return behind.clamp(min=0).eq(behind) & behind.lt(window) & ~k_pos.lt(0)


def receptive_field(last, inputs):
    fields = []
    for entry in last.unbind():
        gradient = torch.autograd.grad(entry, inputs, retain_graph=True)[0].squeeze(0)
        places = torch.where(gradient.ne(0).any(-1))[0]
        fields.append(int(gradient.shape[0] - places.min()))
    return max(fields)


ANSWER = 190
""",
}

ALSO_RIGHT["e08_ring"] = {
    "a method called save": HEAD
    + """
class Ring:
    def __init__(self, window):
        self.window, self.parts, self.length = window, [], 0

    def save(self, *parts):
        self.parts = [part[..., -self.window :, :].clone() for part in parts]

    def extend(self, k, v):
        new = torch.arange(self.length, self.length + k.shape[2])[:, None]
        self.length += k.shape[2]
        parts = [k, v, new]
        if self.parts:
            parts = [torch.cat(pair, dim=-2) for pair in zip(self.parts, parts)]
        self.save(*parts)
        return parts[0], parts[1], parts[2][:, 0]


ANSWER = 0.256
""",
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

ALSO_RIGHT["e02_angles"] = {
    "an outer product of powers": HEAD
    + """
import math


def angles(positions, d, theta):
    i = torch.arange(0, d, 2, dtype=torch.float64)
    return torch.outer(positions.double(), torch.exp(-math.log(theta) * i / d)).float()


ANSWER = 320
""",
    "einsum, one over a power": HEAD
    + """
def angles(positions, d, theta):
    turns = 1.0 / (theta ** (torch.arange(0, d, 2).float() / d))
    return torch.einsum("t,i->ti", positions.float(), turns)


ANSWER = 319.0
""",
    "a running product": HEAD
    + """
def angles(positions, d, theta):
    step = torch.full((d // 2,), theta ** (-2 / d), dtype=torch.float64)
    step[0] = 1
    return (positions.unsqueeze(-1) * step.cumprod(0)).to(torch.float32)


ANSWER = 318
""",
}

ALSO_RIGHT["e03_weights"] = {
    "a variable of the function's name": HEAD
    + """
def weights(q, k, mask):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q * q.shape[-1] ** -0.5).float() @ k.mT.float()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(q.dtype)


ANSWER = 7.86
""",
    "einsum over groups": HEAD
    + """
def weights(q, k, mask):
    b, h, t, d = q.shape
    q = q.float().unflatten(1, (k.shape[1], -1)) * d**-0.5
    scores = torch.einsum("bkgtd,bksd->bkgts", q, k.float())
    scores = torch.where(mask, scores, torch.tensor(float("-inf")))
    return scores.softmax(-1).flatten(1, 2).to(k.dtype)


ANSWER = 7.8
""",
    "the softmax by hand, scores in the dtype of q": HEAD
    + """
def weights(q, k, mask):
    k = torch.repeat_interleave(k, q.size(1) // k.size(1), 1)
    scores = (q @ k.mT * q.size(-1) ** -0.5).float()
    scores = scores + torch.zeros_like(scores).masked_fill(~mask, -1e9)
    w = (scores - scores.max(-1, keepdim=True).values).exp()
    return (w / w.sum(-1, keepdim=True)).type_as(q)


ANSWER = 7.9
""",
    "through logarithms": HEAD
    + """
from einops import repeat


def weights(q, k, mask):
    k = repeat(k, "b k s d -> b (k g) s d", g=q.shape[1] // k.shape[1])
    scores = torch.matmul(q.double(), k.double().transpose(2, 3)).div(q.shape[3] ** 0.5)
    scores = scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min)
    return scores.sub(scores.logsumexp(-1, keepdim=True)).exp().to(q.dtype)


ANSWER = 7.86
""",
}

ALSO_RIGHT["e05_pattern"] = {
    "a table of letters and sums": """
LAYERS = {"R": (True, False), "r": (True, True), "N": (False, False), "n": (False, True)}


def plan(pattern, n_layer, window):
    layers = []
    for i in range(n_layer):
        if not pattern or pattern[i % len(pattern)] not in LAYERS:
            raise ValueError(f"{pattern}: use R, r, N and n")
        rotated, small = LAYERS[pattern[i % len(pattern)]]
        if small and window is None:
            raise ValueError("a window is wanted by " + pattern)
        layers.append((rotated, window if small else None))
    if n_layer % len(pattern) != 0:
        raise ValueError("%s does not tile %d" % (pattern, n_layer))
    return layers


def pairs(length, window):
    return sum(min(i + 1, window or length) for i in range(length))


def cache_share(layers, length):
    total = 0
    for _, window in layers:
        total += length if window is None or window > length else window
    return total / length / len(layers)


ANSWER = 0.3408
""",
    "two triangles": """
from itertools import cycle, islice


class PatternError(ValueError):
    pass


def plan(pattern, n_layer, window):
    unknown = [letter for letter in pattern if letter.upper() not in ("R", "N")]
    small = any(letter == letter.lower() for letter in pattern)
    if unknown or pattern == "" or n_layer % len(pattern) or (small and window is None):
        raise PatternError(f"no model: {pattern=}, {n_layer=}, {window=}")
    see = {"R": None, "N": None, "r": window, "n": window}
    return [(x.upper() == "R", see[x]) for x in islice(cycle(pattern), n_layer)]


def pairs(length, window):
    triangle = lambda n: n * (n + 1) // 2
    return triangle(length) - (0 if window is None else triangle(max(0, length - window)))


def cache_share(layers, length):
    return sum(min(w or length, length) / length for _, w in layers) / len(layers)


ANSWER = 0.34
""",
}

ALSO_RIGHT["e06_qk_norm"] = {
    "a norm of its own name": HEAD
    + """
def layer_norm(x, gain):
    x = x - x.mean(-1, keepdim=True)
    return gain * x / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def prepare(x, gain, turn):
    y = layer_norm(x.float(), gain).type_as(x)
    return y if turn is None else turn(y)


ANSWER = 0.0207
""",
    "torch's variance, heads last": HEAD
    + """
def prepare(x, gain, turn):
    y = x.double().transpose(1, 2)
    variance, mean = torch.var_mean(y, dim=-1, correction=0, keepdim=True)
    y = ((y - mean) * torch.rsqrt(variance + 1e-5)).to(torch.float32) * gain
    y = y.transpose(1, 2).to(x.dtype)
    if turn:
        y = turn(y)
    return y


ANSWER = 0.0206
""",
    "the mean of squares": HEAD
    + """
def prepare(x, gain, turn=None):
    y = x.to(torch.float32)
    y = y - y.sum(dim=3, keepdim=True) / y.shape[3]
    y = y / torch.sqrt(torch.einsum("bhtd,bhtd->bht", y, y)[..., None] / y.shape[3] + 1e-5)
    y = (y.type_as(x) * gain.type_as(x)) if x.dtype == gain.dtype else (y * gain).type_as(x)
    return y if turn is None else turn(y)


ANSWER = 0.021
""",
    "a loop over heads": HEAD
    + """
def prepare(x, gain, turn):
    heads = []
    for head in x.float().unbind(1):
        mean = head.mean(-1, keepdim=True)
        heads.append((head - mean) / (head.var(-1, keepdim=True, unbiased=False) + 1e-5) ** 0.5)
    y = torch.stack(heads, 1).mul(gain).to(x.dtype)
    return (turn or torch.clone)(y)


ANSWER = 0.0207
""",
}

ALSO_RIGHT["e07_masses"] = {
    "one-hot segments": HEAD
    + """
def masses(w, segment):
    kinds = F.one_hot(segment, 4).to(w.dtype)
    asked = kinds[:, 3] / kinds[:, 3].sum()
    return torch.einsum("hqk,q,kc->c", w, asked, kinds) / len(w)


def entropy(w, segment):
    p = w.transpose(0, 1)[segment.eq(3)].flatten(0, 1)
    return float(torch.xlogy(p, p).sum().neg() / p.shape[0] / torch.log(torch.tensor(2.0)))


ANSWER = 0.46
""",
    "bincount, and a small number in the logarithm": HEAD
    + """
def masses(w, segment):
    rows = torch.index_select(w, 1, torch.where(segment == 3)[0]).flatten(0, 1)
    return torch.zeros(4).index_add(0, segment, rows.mean(0))


def entropy(w, segment):
    bits = []
    for head in w:
        for row in head[segment == 3]:
            bits.append(-(row * torch.log2(row + 1e-12)).sum())
    return torch.stack(bits).mean().item()


ANSWER = 0.46
""",
    "a distribution's entropy": HEAD
    + """
import math


def masses(w, segment):
    spent = w[:, segment == 3, :]
    total = spent.shape[0] * spent.shape[1]
    return torch.tensor([float(spent[:, :, segment == i].sum()) / total for i in range(4)])


def entropy(w, segment):
    rows = w[:, segment == 3].double()
    seen = torch.where(rows > 0, rows, 1.0)
    return -(seen * seen.log()).sum(2).mean().item() / math.log(2)


ANSWER = 0.46
""",
}

ALSO_RIGHT["e09_model"] = {
    "heads by einops, scale on the embeddings": HEAD
    + """
from einops import rearrange, repeat


def logits(tokens, w, layers, sizes, parts):
    pos = torch.arange(tokens.size(1))
    table = parts.angles(pos, sizes["head_dim"], sizes["theta"])
    x = F.embedding(tokens, w["embed_tokens.weight"])
    for layer in range(len(layers)):
        rotated, window = layers[layer]
        p = {n.removeprefix(f"layers.{layer}."): m for n, m in w.items()}
        h = F.layer_norm(x, x.shape[-1:], p["input_layernorm.weight"], eps=1e-5)
        q = F.linear(h, p["self_attn.q_proj.weight"])
        q = rearrange(q, "b t (h d) -> b h t d", h=sizes["n_head"])
        k = F.linear(h, p["self_attn.k_proj.weight"])
        k = rearrange(k, "b t (k d) -> b k t d", k=sizes["n_kv_head"])
        v = F.linear(h, p["self_attn.v_proj.weight"])
        v = rearrange(v, "b t (k d) -> b k t d", k=sizes["n_kv_head"])
        if rotated:
            q = parts.rotate(q, table)
            k = parts.rotate(k, table)
        a = parts.weights(q, k, parts.visible(pos, pos, window))
        v = repeat(v, "b k t d -> b (k g) t d", g=sizes["n_head"] // sizes["n_kv_head"])
        y = rearrange(a @ v, "b h t d -> b t (h d)")
        x = x + F.linear(y, p["self_attn.o_proj.weight"])
        gate = F.linear(h, p["mlp.gate_proj.weight"])
        up = gate * torch.sigmoid(gate) * F.linear(h, p["mlp.up_proj.weight"])
        x = x + F.linear(up, p["mlp.down_proj.weight"])
    x = F.layer_norm(x, x.shape[-1:], w["norm.weight"])
    return F.linear(x, w["embed_tokens.weight"] * sizes["logit_scale"])


ANSWER = 4.17
""",
    "a row of the batch at a time, norms by hand": HEAD
    + """
class Layer:
    def __init__(self, w, i):
        self.w, self.prefix = w, "layers." + str(i) + "."

    def __call__(self, name, x):
        return torch.einsum("...i,oi->...o", x, self.w[self.prefix + name + "_proj.weight"])


def norm(x, gain):
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain


def row(tokens, w, layers, s, parts):
    t, d = len(tokens), s["head_dim"]
    x = w["embed_tokens.weight"].index_select(0, tokens)
    for i, (rotated, window) in enumerate(layers):
        layer = Layer(w, i)
        h = norm(x, w[f"layers.{i}.input_layernorm.weight"])
        q = layer("self_attn.q", h).reshape(1, t, s["n_head"], d).permute(0, 2, 1, 3)
        k = layer("self_attn.k", h).reshape(1, t, s["n_kv_head"], d).permute(0, 2, 1, 3)
        v = layer("self_attn.v", h).reshape(1, t, s["n_kv_head"], 1, d).permute(0, 2, 3, 1, 4)
        if rotated:
            q, k = (parts.rotate(z, parts.angles(torch.arange(t), d, s["theta"])) for z in (q, k))
        mask = parts.visible(torch.arange(t), torch.arange(t), window)
        a = parts.weights(q, k, mask).unflatten(1, (s["n_kv_head"], -1))
        heads = (a @ v).flatten(1, 2)[0].transpose(0, 1).reshape(t, -1)
        x = layer("self_attn.o", heads) + layer(
            "mlp.down", F.silu(layer("mlp.gate", h)) * layer("mlp.up", h)
        ) + x
    return s["logit_scale"] * norm(x, w["norm.weight"]) @ w["embed_tokens.weight"].t()


def logits(tokens, w, layers, sizes, parts):
    return torch.stack([row(line, w, layers, sizes, parts) for line in tokens])


ANSWER = 4.17
""",
}

ALSO_RIGHT["e10_needle"] = {
    "sets of wrong questions, and squares": HEAD
    + """
import math


def exact(logits, tokens, answer):
    wrong = {
        int(q)
        for q, guess, token in zip(answer[1:], logits.argmax(-1)[:-1], tokens[1:])
        if guess != token
    }
    asked = set(answer.tolist()) - {-1}
    return len(asked - wrong) / len(asked)


def error(values):
    n, mean = len(values), sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (n * (n - 1)))


ANSWER = 0.8
""",
    "least of each question by scatter": HEAD
    + """
def exact(logits, tokens, answer):
    top = logits[:-1].topk(1).indices[:, 0]
    right = top.eq(tokens[1:]).float()
    at = answer[1:] >= 0
    names, which = torch.unique(answer[1:][at], return_inverse=True)
    worst = torch.ones(len(names)).scatter_reduce(0, which, right[at], "amin")
    return worst.mean().item()


def error(values):
    x = torch.tensor(values, dtype=torch.float64)
    return float((x.var() / x.numel()).sqrt())


ANSWER = 0.8
""",
}

ALSO_RIGHT["e11_extend"] = {
    "a specification of a layer": HEAD
    + """
from dataclasses import replace

from model import ModelConfig, layer_plan


def frequencies(d, theta, method, factor):
    base = theta * factor ** (d / (d - 2)) if method == "ntk" else theta
    turns = 1 / base ** (torch.arange(0, d, 2) / d)
    return turns * (1 / factor if method == "pi" else 1)


def extend(config: ModelConfig, factor: float) -> ModelConfig:
    if not all(layer_spec.rope for layer_spec in layer_plan(config)):
        return config
    return replace(config, rope_scaling="ntk", rope_factor=factor)


ANSWER = 0.4
""",
    "a raised theta": HEAD
    + """
import dataclasses
import math


def frequencies(d, theta, method, factor):
    i = torch.arange(d // 2, dtype=torch.float64)
    turns = torch.exp(-2 * i / d * math.log(theta))
    if method == "ntk":
        turns = turns * factor ** (-i / (d // 2 - 1))
    elif method == "pi":
        turns = turns / factor
    return turns.float()


def extend(config, factor):
    if set(config.pattern) & set("Nn"):
        return config
    d = config.head_width
    return dataclasses.replace(config, rope_theta=config.rope_theta * factor ** (d / (d - 2)))


ANSWER = 0.4
""",
    "a copy of the hybrid": HEAD
    + """
from dataclasses import replace

from model import layer_plan as layers


def frequencies(d: int, theta: float, method: str, factor: float):
    base = {"none": theta, "pi": theta, "ntk": theta * factor ** (d / (d - 2))}[method]
    scale = {"none": 1, "pi": factor, "ntk": 1}[method]
    return 1 / (scale * base ** (torch.arange(0, d, 2).float() / d))


def extend(config, factor: float):
    rotated = [layer.rope for layer in layers(config)]
    if False in rotated:
        return replace(config)
    return replace(config, rope_factor=factor, rope_scaling="ntk")


ANSWER = 0.4
""",
}

ALSO_RIGHT["e12_banded"] = {
    "a loop over blocks": HEAD
    + """
def banded(q, k, v, window):
    parts = []
    for start in range(0, q.shape[2], window):
        end, first = min(start + window, q.shape[2]), max(0, start - window + 1)
        scores = q[:, :, start:end] @ k[:, :, first:end].mT * q.shape[3] ** -0.5
        far = torch.arange(start, end)[:, None] - torch.arange(first, end)
        scores = scores.masked_fill((far < 0) | (far >= window), float("-inf"))
        parts.append(scores.softmax(-1) @ v[:, :, first:end])
    return torch.cat(parts, dim=2)
""",
    "windows of keys by unfold": HEAD
    + """
def banded(q, k, v, window):
    pad = lambda x: F.pad(x, (0, 0, window - 1, 0)).unfold(2, window, 1)  # (b h t d w)
    scores = torch.einsum("bhtd,bhtdw->bhtw", q, pad(k)) / q.shape[-1] ** 0.5
    places = torch.arange(q.shape[2])[:, None] - torch.arange(window - 1, -1, -1)
    w = scores.masked_fill(places < 0, -torch.inf).softmax(-1)
    return torch.einsum("bhtw,bhtdw->bhtd", w, pad(v))
""",
    "blocks through torch's fused attention": HEAD
    + """
def banded(q, k, v, window):
    t, w = q.shape[2], window
    n = -(-t // w)
    fill = lambda x, front: F.pad(x, (0, 0, front, n * w - t))
    rows = fill(q, 0).unflatten(2, (n, w))
    keys = fill(k, w).unfold(2, 2 * w, w).transpose(-1, -2)
    values = fill(v, w).unfold(2, 2 * w, w).transpose(-1, -2)
    q_pos = torch.arange(n * w).view(n, w, 1)
    k_pos = torch.arange(-w, n * w).unfold(0, 2 * w, w).unsqueeze(1)
    seen = (k_pos >= 0) & (k_pos <= q_pos) & (q_pos - k_pos < w)
    flat = lambda x: x.flatten(0, 1)
    y = F.scaled_dot_product_attention(flat(rows), flat(keys), flat(values), seen)
    return y.view_as(rows).flatten(2, 3)[:, :, :t]
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
    through_an_annotation=(
        "import typing\n\n\nclass A:\n    x: \"__import__('attention').rotate\"\n\n\n"
        "rotate = typing.get_type_hints(A)['x']\n",
        "uses typing.get_type_hints",
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
    fakes_a_tensor=(
        "import torch\n\n\nclass Sure(torch.Tensor):\n    def __torch_function__(self, *a): ...\n",
        "uses __torch_function__",
    ),
    subclasses=(
        "import torch\n\n\nclass Sure(torch.Tensor):\n    pass\n"
        + ROTATE
        + "return x.as_subclass(Sure)",
        "is of type Sure",
    ),
    moves_the_seed=(
        "from torch import set_default_dtype\n",
        "imports set_default_dtype from torch",
    ),
    hides_in_main=(
        "__name__ = '__main__'\nif __name__ == '__main__':\n    import attention\n",
        "uses __name__",
    ),
)

SDPA = "import torch.nn.functional as F\n\n\ndef weights(q, k, mask):\n    "
cheats(
    "e03_weights",
    asks_torch=(
        SDPA + "return F.scaled_dot_product_attention(q, k, torch.eye(4), mask)",
        "uses scaled_dot_product_attention",
    ),
    asks_torch_by_another_name=(
        "from torch.nn.functional import scaled_dot_product_attention as look\n",
        "uses scaled_dot_product_attention",
    ),
    asks_torch_underground=("import torch\nf = torch._C._nn\n", "uses torch._C"),
)
cheats(
    "e06_qk_norm",
    takes_the_layer=(
        "import torch\nnorm = torch.nn.LayerNorm\n",
        "uses LayerNorm",
    ),
    copies_the_specification=(
        """import torch
import math


def prepare(a, weight, f):
    out = torch.zeros(a.shape)
    n = a.shape[3]
    for i, j, k in torch.cartesian_prod(*map(torch.arange, a.shape[:3])).tolist():
        row = a[i, j, k].tolist()
        middle = sum(row) / n
        spread = sum((number - middle) ** 2 for number in row) / n
        for at, number in enumerate(row):
            out[i, j, k, at] = (number - middle) / math.sqrt(spread + 1e-5) * float(weight[at])
    out = out.to(a.dtype)
    return out if f is None else f(out)
""",
        "copies prepare_spec",
    ),
    copies_it_with_a_pass=(
        """import torch
import math


def prepare(a, weight, f):
    out = torch.zeros(a.shape)
    n = a.shape[3]
    for i, j, k in torch.cartesian_prod(*map(torch.arange, a.shape[:3])).tolist():
        pass
        row = a[i, j, k].tolist()
        middle = sum(row) / n
        spread = sum((number - middle) ** 2 for number in row) / n
        for at, number in enumerate(row):
            out[i, j, k, at] = float(weight[at]) * (number - middle) / math.sqrt(1e-5 + spread)
    out = out.to(a.dtype)
    return out if f is None else f(out)
""",
        "copies prepare_spec",
    ),
    torchs_other_norm=("import torch\nnorm = torch.nn.RMSNorm\n", "uses RMSNorm"),
    torchs_norm_through_a_pattern=(
        "import torch.nn.functional as F\nmatch F:\n    case object(layer_norm=f):\n        pass\n",
        "uses layer_norm",
    ),
    a_private_part_through_a_pattern=(
        "import torch\nmatch torch:\n    case object(_C=c):\n        pass\n",
        "uses _C",
    ),
)
cheats(
    "e05_pattern",
    always_equal=(
        "class Sure(list):\n    pass\n\n\nplan = lambda *a: Sure()\n",
        "is of type Sure",
    ),
)
cheats(
    "e11_extend",
    asks_the_project=("from model import Transformer\n", "imports Transformer from model"),
    asks_all_of_it=("import model\n", "imports model"),
)
