"""10. Ask for a needle                                                20 minutes, 8 points

Does a model find what stands far back? RULER's question in small: `# parse_buffer is 48213` is
hidden in real text, and the text ends with `# parse_buffer is`. An answer counts when every token
of it is the likeliest one. A mean over few examples is not sure of itself: its standard error says
how much.

        tokens    .. is   4   8   2   1   3  \\n       the logits at place i
        answer    .. -1   0   0   0   0   0  -1       speak of token i + 1
        logits at     |-> 4
                          |-> 8

Hint: logits[:-1].argmax(-1) against tokens[1:]. Which questions are there? answer.unique().
"""

import math

from torch import Tensor


def exact_spec(logits: Tensor, tokens: Tensor, answer: Tensor) -> float:
    """The share of questions whose whole answer is the likeliest: answer[i] is the question whose
    answer token i belongs to, -1 none; the logits at place i - 1 speak of token i."""
    right = {}
    for i in range(1, len(tokens)):
        question = int(answer[i])
        if question >= 0:
            likeliest = max(range(logits.shape[1]), key=lambda token: float(logits[i - 1, token]))
            right[question] = right.get(question, True) and likeliest == int(tokens[i])
    return sum(right.values()) / len(right)


def error_spec(values: list[float]) -> float:
    """The standard error of the mean of n values: their deviation (which divides by n - 1) over the
    root of n."""
    total = 0.0
    for value in values:
        total += value
    squares = 0.0
    for value in values:
        squares += (value - total / len(values)) ** 2
    return math.sqrt(squares / (len(values) - 1)) / math.sqrt(len(values))


def exact(logits: Tensor, tokens: Tensor, answer: Tensor) -> float:
    """The same in fewer lines: logits (t v), tokens (t), answer (t). About 4 lines."""
    raise NotImplementedError


def error(values: list[float]) -> float:
    """The same in fewer lines; there are two values at least. About 3 lines."""
    raise NotImplementedError


# Question: exact of your own rrrN minus exact of your own R at 2,048 tokens, four times the trained
# length? A share: 0.25 where one finds half and the other a quarter.
#     python -m exercises.e10_needle out/laptop-r64r64r64N-s1/last out/laptop-R-s1/last
ANSWER = None


if __name__ == "__main__":
    from exercises import measure

    measure.needles(exact, error)
