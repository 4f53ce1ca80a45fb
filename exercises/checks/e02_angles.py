"""Fast pairs, slow pairs."""

import math

import torch
from torch import Tensor

from exercises.harness import answer, points, same

NO_LOOPS = ("angles",)


def angles_spec(positions: Tensor, d: int, theta: float) -> Tensor:
    """(t d/2) float32: what pair i of the token at positions[t] is turned by, in radians."""
    rows = []
    for position in positions.tolist():
        rows.append([position * theta ** (-2 * i / d) for i in range(d // 2)])
    return torch.tensor(rows)


def near_misses(positions: Tensor, d: int, theta: float) -> dict[str, Tensor]:
    exact = angles_spec(positions, d, theta)
    i, n = torch.arange(d // 2).double(), positions.double()[:, None]
    shorter = (d // 2 - 1) or 1
    short = positions.bfloat16().double()[:, None]
    miss = {
        "positions in bfloat16: it holds 256, not 257": short * theta ** (-2 * i / d),
        "the exponent counts dimensions: pair i is dimensions 2i and 2i+1": n * theta ** (-i / d),
        "the exponent counts dimensions: pair i is dimensions 2i and 2i+1.": n
        * theta ** (-4 * i / d),
        "pairs get faster: the exponent is negative": n * theta ** (2 * i / d),
        "the slowest pair turns theta^(-(d-2)/d), not 1/theta": n * theta ** (-i / shorter),
        "positions begin at 0: yours begin at 1": (n + 1) * theta ** (-2 * i / d),
        "radians, not degrees": exact.double() * 180 / math.pi,
        "radians, not degrees: yours are divided once more": exact.double() * math.pi / 180,
        "radians, not turns: pair 0 turns one radian a token": exact.double() * 2 * math.pi,
        "the slowest pair stands first: pair 0 turns one radian a token": exact.flip(1),
    }
    return {said: tensor.float() for said, tensor in miss.items()}


def compare(mine, what: str, positions: Tensor, d: int, theta: float) -> None:
    wanted, near = angles_spec(positions, d, theta), near_misses(positions, d, theta)
    # float32 has 7 digits, and a power of theta costs one of them; small angles count as well.
    same(what, mine.angles(positions.clone(), d, theta), wanted, near, 1e-5, floor=1e-12)


@points(1)
def check_first_pair(mine):
    """Pair 0 turns one radian a token, and position 0 by nothing."""
    positions = torch.arange(6)
    got = mine.angles(positions.clone(), 8, 10_000.0)
    near = {said: miss[:, :1] for said, miss in near_misses(positions, 8, 10_000.0).items()}
    same("all angles", got, torch.zeros(6, 4), tolerance=1e9)  # its form alone
    same("pair 0 of the first six tokens", got[:, :1], positions.float()[:, None], near)
    same("position 0", got[:1], torch.zeros(1, 4))


@points(1)
def check_far(mine):
    """Far out neighbours are still told apart."""
    positions = torch.tensor([4000, 4001, 100_000, 100_001])
    got = mine.angles(positions.clone(), 8, 10_000.0)[:, :1]
    near = {said: miss[:, :1] for said, miss in near_misses(positions, 8, 10_000.0).items()}
    same("pair 0 of tokens 4,000 and 4,001", got, positions.float()[:, None], near, 1e-7)


@points(3)
def check_specification(mine):
    """The specification's values: several widths, thetas and positions, to one in 100,000."""
    positions = torch.tensor([0, 7, 4001, 100_000, 3])
    for d, theta in ((8, 10_000.0), (32, 2_000_000.0), (2, 500.0), (6, 10_000.0)):
        compare(mine, "one token", positions[:1] + 5, d, theta)
        compare(mine, f"d = {d}, theta = {theta:,.0f}", positions, d, theta)


@points(1)
def check_answer(mine):
    """At which distance the mean score is below one half first, theta two million."""
    hints = {46: "that is theta 10,000", 53: "that is d = 32"}
    answer(mine.ANSWER, 319, 1, hints)
