"""A run on disk: read, claim, save, resume, log.jsonl."""

import torch

from parallel import LOCAL_RANK, LOCAL_RANKS, RANKS


def choose_device(name: str | None) -> tuple[torch.device, bool]:
    """The device, and whether it is a GPU that multiplies bfloat16 natively: of several processes each takes a GPU of its own.
    Raises ValueError where there is no such device."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is unknown: use cuda, cpu or mps") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }.get(device.type, False)
    if not there:
        raise ValueError(
            f"--device {name}: this machine (or this build of torch) has none; use --device cpu"
        )
    if RANKS > 1 and device.type != "cpu":
        if device.type != "cuda" or LOCAL_RANKS > torch.cuda.device_count():
            raise ValueError(
                f"--device {name}: this machine has {torch.cuda.device_count()} GPUs for {LOCAL_RANKS} processes; start no more with --nproc-per-node, or use --device cpu"
            )
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    return device, device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
