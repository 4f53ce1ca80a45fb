"""Recipes: every value that a file or a flag may bring is a recipe or one line of ValueError.

That recipes train is shown in test_train.py; here nothing is trained.
"""

import random
import time
from pathlib import Path

import pytest

import recipe as recipes
from model import ModelConfig

ROOT = Path(__file__).parent.parent
MODEL = "batch_tokens = 512\n[model]\nwindow = 16\n"
PHASE = "[[phase]]\nsteps = 1\nlengths = { 128 = 1 }\n"
ENORMOUS = "1" + "0" * 400


def read(folder, content: str | bytes, flags=()) -> recipes.Recipe:
    """The recipe that a file and flags make."""
    path = folder / "recipe.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = vars(recipes.command_line("").parse([str(path), *flags]))
    return recipes.build(recipes.read_toml(given.pop("recipe")), given, None, path.name)


def phase(line: str) -> str:
    """A recipe with a line more in its only phase."""
    return MODEL + PHASE + line


def lengths(table: str) -> str:
    """A recipe with other lengths."""
    return MODEL + f"[[phase]]\nsteps = 1\nlengths = {table}\n"


def check_refused(make, *words: str) -> None:
    """make() ends in a ValueError whose message is one printable line of a size to read, with
    these words in it."""
    started = time.perf_counter()
    with pytest.raises(ValueError) as refusal:
        make()
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert message.isprintable() and len(message) < 1500, message
    assert time.perf_counter() - started < 2


# ------------------------------------------------------------------------------------------------
# Values: type, finite, in range, named


REFUSED = {
    "seed of 401 digits": (f"seed = {ENORMOUS}\n" + MODEL + PHASE, ["seed 1000", "64 bits"]),
    "seed of 5,001 digits": (f"seed = 1{'0' * 5000}\n" + MODEL + PHASE, ["recipe.toml"]),
    "seed 2**64": (f"seed = {2**64}\n" + MODEL + PHASE, ["seed 18446744073709551616"]),
    "seed -1": ("seed = -1\n" + MODEL + PHASE, ["seed -1"]),
    "seed 1.0": ("seed = 1.0\n" + MODEL + PHASE, ["seed 1.0", "int"]),
    "seed, a date": ("seed = 1979-05-27\n" + MODEL + PHASE, ["seed datetime.date", "int"]),
    "seed, true": ("seed = true\n" + MODEL + PHASE, ["seed True", "int"]),
    "lr of 401 digits": (f"lr = {ENORMOUS}\n" + MODEL + PHASE, ["lr 1000"]),
    "lr 1e400": ("lr = 1e400\n" + MODEL + PHASE, ["lr inf", "finite"]),
    "lr nan": ("lr = nan\n" + MODEL + PHASE, ["lr nan", "finite"]),
    "lr 0": ("lr = 0\n" + MODEL + PHASE, ["lr 0", "above 0"]),
    "clip nan": ("clip = nan\n" + MODEL + PHASE, ["clip nan"]),
    "needle_share 2": ("needle_share = 2\n" + MODEL + PHASE, ["needle_share 2", "from 0 to 1"]),
    "weight_decay -1": ("weight_decay = -1\n" + MODEL + PHASE, ["weight_decay -1"]),
    "eval_every 0": ("eval_every = 0\n" + MODEL + PHASE, ["eval_every 0"]),
    "eval_tokens 2**60": (f"eval_tokens = {2**60}\n" + MODEL + PHASE, [f"eval_tokens {2**60}"]),
    "bf16, a string": ("bf16 = 'true'\n" + MODEL + PHASE, ["bf16 'true'", "bool"]),
    "tie_embeddings, a string": (MODEL + "tie_embeddings = 'false'\n" + PHASE, ["tie_embeddings"]),
    "logit_scale nan": (MODEL + "logit_scale = nan\n" + PHASE, ["logit_scale nan", "[model]"]),
    "n_layer 2000000": (MODEL + "n_layer = 2_000_000\n" + PHASE, ["n_layer 2000000"]),
    "d_ff 2**31": (MODEL + f"d_ff = {2**31}\n" + PHASE, [f"d_ff {2**31}"]),
    "yarn with theta 1": (
        MODEL
        + "rope_theta = 1.0\nrope_scaling = 'yarn'\nrope_factor = 2.0\nrope_original_length = 8\n"
        + PHASE,
        ["yarn", "theta"],
    ),
    "a phase's yarn with theta 1": (
        MODEL + PHASE + PHASE + "rope_theta = 1\nrope_scaling = 'yarn'\nrope_factor = 2\n",
        ["phase 2", "yarn", "theta"],
    ),
    "a phase's answer_weight nan": (phase("answer_weight = nan\n"), ["phase 1", "answer_weight"]),
    "a phase's answer_weight -1": (phase("answer_weight = -1\n"), ["phase 1", "answer_weight -1"]),
    "a phase's lr 2**64": (phase(f"lr = {2**64}\n"), ["phase 1", f"lr {2**64}"]),
    "a phase's warmup -1": (phase("warmup = -1\n"), ["phase 1", "warmup -1"]),
    "a phase's needle_share inf": (phase("needle_share = inf\n"), ["phase 1", "needle_share inf"]),
    "a phase's steps 2**63": (phase("").replace("= 1\n", f"= {2**63}\n", 1), [f"steps {2**63}"]),
    "a length twice": (lengths("{ 64 = 1, 064 = 2 }"), ["lengths has 64 twice"]),
    "a share of 401 digits": (lengths(f"{{ 64 = {ENORMOUS} }}"), ["lengths.64 1000"]),
    "a share of 0": (lengths("{ 64 = 0 }"), ["64 = 0"]),
    "a share of 0.5": (lengths("{ 64 = 0.5 }"), ["lengths.64 0.5", "int"]),
    "a length of 401 digits": (lengths(f"{{ {ENORMOUS} = 1 }}"), ["lengths: '1000"]),
    "a length of -64": (lengths("{ -64 = 1 }"), ["'-64'"]),
    "a length in other digits": (lengths("{ '\u0666\u0664' = 1 }"), ["no length"]),
    "no lengths": (lengths("{}"), ["lengths is empty"]),
    "an escape sequence as a key": ('"\\u001b[31mred" = 1\n' + MODEL + PHASE, ["\\x1b[31mred"]),
    "an escape sequence as a length": (lengths('{ "\\u001b[2J" = 1 }'), ["\\x1b[2J"]),
    "a key of 9,000 letters": ("a" * 9000 + " = 1\n" + MODEL + PHASE, ["unknown key 'aaa"]),
    "nested brackets": ("seed = " + "[" * 100_000, ["recipe.toml", "TOML"]),
    "nested tables": (f"seed.{'a.' * 3000}b = 1\n" + MODEL + PHASE, ["seed {'a': {", "int"]),
    "nested lengths": (phase("").replace("128", "128." + "a." * 3000 + "b"), ["lengths.128 {"]),
    "latin-1": ("# Öl\n".encode("latin-1"), ["recipe.toml", "TOML", "utf-8"]),
    "model, a list": ("model = [1]\n" + PHASE, ["[model]"]),
    "phase, a number": ("phase = 3\n", ["[[phase]]"]),
}


@pytest.mark.parametrize("content,words", REFUSED.values(), ids=REFUSED)
def test_a_value_that_makes_no_recipe_is_refused(tmp_path, content, words):
    check_refused(lambda: read(tmp_path, content), *words)


@pytest.mark.parametrize(
    "flag,value",
    [
        ("--logit-scale", "nan"),
        ("--logit-scale", "-inf"),
        ("--rope-theta", "1e400"),
        ("--lr", ENORMOUS),
        ("--lr", "fast"),
        ("--seed", str(2**64)),
        ("--seed", "-1"),
        ("--seed", "9" * 5000),
        ("--seed", "1.0"),
        ("--n-layer", "2000000"),
        ("--d-ff", "2147483648"),
        ("--batch-tokens", "0"),
        ("--batch-tokens", str(2**62)),
        ("--batch-tokens", str(2**27)),
        ("--eval-questions", "-1"),
        ("--eval-questions", str(2**17)),
        ("--stretch", "0"),
        ("--max-steps", ENORMOUS),
        ("--micro-batch", "many"),
        ("--rope-scaling", "\x1b[31mred"),
    ],
)
def test_a_flag_that_makes_no_recipe_is_refused(tmp_path, flag, value):
    name = flag.removeprefix("--")
    with pytest.raises(ValueError) as refusal:
        read(tmp_path, MODEL + PHASE, (f"{flag}={value}",))
    message = str(refusal.value)
    assert name in message or name.replace("-", "_") in message, message
    assert "is no" in message or value[:4] in message or repr(value) in message, message
    assert message.isprintable() and len(message) < 1500


@pytest.mark.parametrize(
    "content,values",
    [
        (b"\xef\xbb\xbfseed = 7\n" + (MODEL + PHASE).encode(), {"seed": 7}),
        (("seed = 7\n" + MODEL + PHASE).replace("\n", "\r\n"), {"seed": 7}),
        (f"seed = {2**63 - 1}\n" + MODEL + PHASE, {"seed": 2**63 - 1}),
        ("lr = 1\n" + MODEL + PHASE, {"lr": 1.0}),
        ("needle_share = 1\nanswer_weight = 0\n" + MODEL + PHASE, {"needle_share": 1.0}),
    ],
    ids=["a byte order mark", "Windows' line ends", "the largest seed", "an int rate", "bounds"],
)
def test_a_value_at_the_edge_is_taken(tmp_path, content, values):
    made = read(tmp_path, content)
    for name, value in values.items():
        found = getattr(made, name)
        assert found == value and type(found) is type(value)


# ------------------------------------------------------------------------------------------------
# What a recipe decides


def test_lengths_alternate_as_often_as_their_shares_say(tmp_path):
    """Against the cycle written out, and with shares whose cycle no memory holds."""
    made = read(tmp_path, lengths("{ 64 = 6, 128 = 2, 32 = 4 }"))
    cycle = [64, 64, 64, 128, 32, 32]
    assert [made.stages()[0].length(step) for step in range(18)] == cycle * 3
    started = time.perf_counter()
    stage = read(tmp_path, lengths("{ 64 = 1000000000, 128 = 1 }")).stages()[0]
    assert [stage.length(step) for step in (0, 999_999_999, 10**9, 10**9 + 1)] == [64, 64, 128, 64]
    assert time.perf_counter() - started < 1


def test_a_recipe_comes_back_from_its_tables(tmp_path):
    """As run.json keeps it."""
    later = "[[phase]]\nsteps = 2\nlengths = { 64 = 3, 256 = 1 }\nlr = 0.001\npattern = 'R'\n"
    made = read(tmp_path, "bf16 = false\nseed = 3\n" + MODEL + PHASE + later)
    tables = recipes.to_tables(made)
    assert recipes.build(tables) == made
    assert made.model == ModelConfig(window=16) and len(made.stages()) == 2


def test_a_flag_takes_the_place_of_a_schedule_from_the_first_step(tmp_path):
    """The default recipe's windows grow; --window says one for all. What only a later phase sets is
    the recipe's."""
    grows = MODEL + PHASE + "window = 8\n" + PHASE + "window = 16\n"
    made = read(tmp_path, grows)
    assert [stage.config.window for stage in made.stages()] == [8, 16]
    tables = recipes.read_toml(tmp_path / "recipe.toml")
    made = recipes.build(tables, {"window": 4})
    assert [stage.config.window for stage in made.stages()] == [4, 4]
    tables["phase"][0].pop("window")
    with pytest.raises(ValueError, match="--window would be overruled by phase 2"):
        recipes.build(tables, {"window": 4})
    tables["phase"][1]["needle_share"] = 0.5
    with pytest.raises(ValueError, match="--needle-share would be overruled by phase 2"):
        recipes.build(tables, {"needle_share": 0.1})
    none = recipes.build(tables, {"needle_share": 0.0})  # off is off
    assert [stage.needle_share for stage in none.stages()] == [0, 0]


def test_a_pattern_without_windows_begins_with_them(tmp_path):
    """Up to its last layer, while `windowed` holds; one that has windows is left as it is; a flag
    takes the place of all phases; without a window there is nothing to begin with."""
    begins = phase("windowed = true\n") + PHASE + PHASE + "windowed = false\n"
    patterns = lambda *flags: [stage.config.pattern for stage in read_stages(*flags)]
    read_stages = lambda *flags: read(tmp_path, begins, flags).stages()
    for pattern, first in (("R", "rrrR"), ("N", "nnnN"), ("RN", "rrrN"), ("RRRN", "rrrN")):
        assert patterns("--pattern", pattern) == [first, first, pattern]
    for pattern in ("rrrN", "Nrrr", "rN", "n"):
        assert patterns("--pattern", pattern) == [pattern] * 3
    assert patterns("--pattern", "R", "--n-layer", "6")[0] == "rrrrrR"
    assert patterns("--pattern", "R", "--no-windowed") == ["R"] * 3
    assert patterns("--pattern", "R", "--windowed") == ["rrrR"] * 3
    assert read_stages("--pattern", "R")[0].config.window == 16
    tables = recipes.read_toml(tmp_path / "recipe.toml")
    flags = {"pattern": "R", "window": None}
    check_refused(lambda: recipes.build(tables, flags), "phase 1", "window")


def test_recipes_that_continue_laptop_are_its_phases():
    """As their comments say."""
    phases = lambda name: recipes.read_toml(ROOT / "recipes" / f"{name}.toml")["phase"]
    assert phases("drope-laptop")[:3] == phases("laptop")
    for name in ("ssmax-laptop", "swan-laptop", "llama4-laptop"):  # patterns that have windows
        mine = [{k: v for k, v in phase.items() if k != "windowed"} for phase in phases("laptop")]
        assert phases(name) == mine


# ------------------------------------------------------------------------------------------------
# Anything at all


WHOLE = f"""seed = 3
lr = 0.006
bf16 = false
{MODEL}pattern = "rrrN"
[[phase]]
steps = 6
lengths = {{ 128 = 3, 256 = 1 }}
needle_share = 0.5
rope_scaling = "yarn"
rope_factor = 2.0
rope_original_length = 64
"""
VALUES = f"""
0 -1 1 2 63 007 0x10 1_000 {2**40} {2**63} {2**64} {ENORMOUS} 1.5 1e300 -1e300 1e-320 nan inf -inf
true "" "x" "rrrN" "none" "ntk" "\\u001b[2J" [] [1] [[[]]] {{}} {{a={{a=1}}}} 1979-05-27
""".split()


def mutated(text: str, rng: random.Random) -> str:
    """A text with a value replaced, a line dropped, doubled or moved, or a character changed."""
    lines = text.splitlines()
    i, kind = rng.randrange(len(lines)), rng.randrange(5)
    if kind < 3 and "=" in lines[i]:
        lines[i] = lines[i].split("=")[0] + "= " + rng.choice(VALUES)
    elif kind == 3:
        lines[i:i] = [lines.pop(i)] * rng.randrange(3)
    else:
        at = rng.randrange(len(lines[i]))
        lines[i] = lines[i][:at] + rng.choice("[]{}=\"'\\\x1b\0é9-.") + lines[i][at + 1 :]
    return "\n".join(lines)


def outcome(make) -> bool:
    """Was it accepted? Else it is one printable line of ValueError or OSError, at once."""
    started = time.perf_counter()
    try:
        make()
        return True
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 3000, error
        return False
    finally:
        assert time.perf_counter() - started < 2


def test_mutated_recipes_are_accepted_or_one_line(tmp_path):
    rng, accepted = random.Random(1), 0
    for _ in range(300):
        text = mutated(WHOLE, rng)
        text = mutated(text, rng) if rng.random() < 0.3 else text
        accepted += outcome(lambda: read(tmp_path, text).stage_at(3).rate(3))
    assert 30 < accepted < 270


def test_mutated_flags_are_accepted_or_one_line(tmp_path):
    rng, accepted = random.Random(2), 0
    known = recipes.command_line("")._option_string_actions
    not_fields = {"--help", "--resume", "--init", "--out", "--device", "--backend", "--compile"}
    not_fields |= {"--no-compile", "--max-steps", "--micro-batch"}
    flags = [flag for flag in known if flag.startswith("--") and flag not in not_fields]
    for _ in range(200):
        value = rng.choice(VALUES).strip('"')
        accepted += outcome(lambda: read(tmp_path, MODEL + PHASE, [f"{rng.choice(flags)}={value}"]))
    assert 20 < accepted < 180
