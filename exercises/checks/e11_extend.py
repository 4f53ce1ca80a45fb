"""Extend a context."""

import math
from dataclasses import fields, replace

import torch
from torch import Tensor

from attention import scaled_frequencies
from exercises.harness import Wrong, answer, plain, points, same
from model import ModelConfig

IMPORTS = {"model": ("layer_plan", "LayerSpec", "ModelConfig")}
# Exact with NTK minus exact without, R at 2,048. Seeds 1 to 3 of `python train.py --pattern R`:
# .79, 1.00, .88 (as trained it finds .08, 0, .12 there); an R that has learned less gains less.
BAND = (0.05, 1.0)


def frequencies_spec(d: int, theta: float, method: str, factor: float) -> Tensor:
    """(d/2) float32, radians a token: "none" is RoPE; "pi" divides every distance by the factor;
    "ntk" raises theta so that the slowest pair turns slower by the factor, the fastest as ever."""
    if method == "ntk":
        theta = theta * math.pow(factor, d / (d - 2))
    turns = []
    for i in range(d // 2):
        turn = math.pow(theta, -2 * i / d)
        turns.append(turn / factor if method == "pi" else turn)
    return torch.tensor(turns)


SLOWEST = "the slowest pair is stretched too little: factor^(d/(d-2))"


def near_misses(d: int, theta: float, method: str, factor: float) -> dict[str, Tensor]:
    i = torch.arange(d // 2).double()

    def turns(theta: float) -> Tensor:
        return theta ** (-2 * i / d)

    ntk = turns(theta * factor ** (d / (d - 2)))
    miss = {
        "nothing is extended": turns(theta),
        "PI divides distances by the factor: yours are multiplied": turns(theta) * factor,
        SLOWEST: turns(theta * factor),
        "upside down: a larger theta turns slower": turns(theta / factor ** (d / (d - 2))),
        "upside down: the exponent is d/(d-2)": turns(theta * factor ** ((d - 2) / d)),
        "d/(d-2), not d/(d-1): the slowest pair is i = d/2 - 1": turns(
            theta * factor ** (d / (d - 1))
        ),
        "stretched twice: NTK is instead of PI": ntk / factor,
        "that is PI: NTK leaves the fastest pair alone": turns(theta) / factor,
        "that is NTK: PI divides every pair alike": ntk,
        "d is the head width: yours takes the number of pairs": turns(
            theta * factor ** (d / (d - 4))
        )
        if d > 4
        else turns(theta),
    }
    return {said: value.float() for said, value in miss.items()}


def compare(mine, method: str, d: int, theta: float, factor: float) -> None:
    got = mine.frequencies(d, theta, method, factor)
    wanted = frequencies_spec(d, theta, method, factor)
    what = f"d = {d}, theta = {theta:,.0f}, {method} by {factor:g}"
    same(what, got, wanted, near_misses(d, theta, method, factor), 1e-5, floor=1e-12)


CASES = ((8, 10_000.0, 4.0), (32, 10_000.0, 16.0), (64, 500_000.0, 2.5), (4, 100.0, 2.0))


@points(2)
def check_pi(mine):
    """Without a method RoPE's frequencies; PI divides all of them."""
    for d, theta, factor in CASES:
        compare(mine, "none", d, theta, factor)
        compare(mine, "pi", d, theta, factor)


@points(3)
def check_ntk(mine):
    """The fastest pair stays, the slowest is divided by the factor, those between by less."""
    for d, theta, factor in CASES:
        compare(mine, "ntk", d, theta, factor)
    compare(mine, "ntk", 16, 10_000.0, 1.0)


RAISED = "theta raise applied to "
TREATMENT = ("rope_theta", "rope_scaling", "rope_factor", "rope_original_length")


def extended(mine, config: ModelConfig, factor: float, wanted: ModelConfig, near: dict) -> None:
    """Wrong unless the student's configuration turns its pairs as the wanted one's, and is the
    given one in all else: a scaling by name, or a theta that does the same."""
    before = replace(config)
    got = mine.extend(config, factor)
    what = f"extend(pattern {config.pattern!r}, {factor:g})"
    plain(what, got, ModelConfig)
    for field in fields(ModelConfig):
        old, new = getattr(before, field.name), getattr(got, field.name)
        if field.name in TREATMENT:
            plain(f"{what}: {field.name}", new, int, float, str, type(None))
        elif type(new) is not type(old) or new != old:
            raise Wrong(f"{what} changes {field.name} to {new}; positions alone are stretched")
    if config != before:
        raise Wrong(f"{what} changed the configuration that was given")

    def turns(c: ModelConfig) -> Tensor:
        scaling = (c.rope_scaling, c.rope_factor, c.rope_original_length)
        made, amplitude = scaled_frequencies(c.head_width, c.rope_theta, *scaling)
        return made * amplitude

    misses = {said: turns(replace(before, **change)) for said, change in near.items()}
    same(f"{what}: its frequencies", turns(got), turns(wanted), misses, 1e-5, floor=1e-12)


def wrong_ways(config: ModelConfig, factor: float, said: str) -> dict[str, dict]:
    theta, d = config.rope_theta, config.head_width
    return {
        said: {"rope_scaling": "ntk", "rope_factor": factor},
        said + ".": {"rope_theta": theta * factor},
        said + "..": {"rope_scaling": "pi", "rope_factor": factor},
        said + "...": {"rope_theta": theta * factor ** ((d - 2) / d)},
    }


@points(2)
def check_rope(mine):
    """Where every layer is rotated, NTK by the factor."""
    for pattern, sizes, factor in (
        ("R", {}, 4.0),
        ("rrrR", {"rope_theta": 5e5}, 8.0),
        ("r", {"d_model": 256, "window": 16}, 2.5),
        ("R", {"head_dim": 16}, 4.0),
    ):
        config = ModelConfig(pattern=pattern, **sizes)
        wanted = replace(config, rope_scaling="ntk", rope_factor=factor)
        d, theta = config.head_width, config.rope_theta
        near = {
            "nothing is extended: every layer of this pattern is rotated": {},
            "theta times the factor stretches the slowest pair too little": {
                "rope_theta": theta * factor
            },
            "that is PI: NTK is asked for": {"rope_scaling": "pi", "rope_factor": factor},
            "NTK twice: by rope_scaling or by theta, not both": {
                "rope_theta": theta * factor ** (d / (d - 2)),
                "rope_scaling": "ntk",
                "rope_factor": factor,
            },
        }
        extended(mine, config, factor, wanted, near)


@points(2)
def check_hybrid(mine):
    """A hybrid is left as it is: its NoPE layers need no stretching, its RoPE layers no theta."""
    said = RAISED + "a hybrid: its RoPE layers lose recency"
    for pattern, factor in (("rrrN", 4.0), ("RN", 8.0), ("Rnrr", 2.0)):
        config = ModelConfig(pattern=pattern)
        extended(mine, config, factor, config, wrong_ways(config, factor, said))


@points(1)
def check_nope(mine):
    """So is a model without positions."""
    said = RAISED + "NoPE layers: there is nothing to turn"
    for pattern in ("N", "nN"):
        config = ModelConfig(pattern=pattern)
        extended(mine, config, 4.0, config, wrong_ways(config, 4.0, said))


@points(2)
def check_answer(mine):
    """What NTK gives your own R at four times its length."""
    answer(mine.ANSWER, BAND)
