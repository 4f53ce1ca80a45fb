from torch import Tensor


def prepare(x: Tensor, gain: Tensor, turn) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    normed = (centred / (variance + 1e-5).sqrt() * gain).to(x.dtype)
    return normed if turn is None else turn(normed)


ANSWER = 0.0207
