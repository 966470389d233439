"""The learning rate over a run: linear warm-up, then constant, linear or cosine."""

import math

from distill.config import SchedulerType


def learning_rate_factor(
    step: int,
    *,
    num_steps: int,
    warmup_ratio: float,
    kind: SchedulerType,
    warmup_steps: int | None = None,
) -> float:
    """What the learning rate is multiplied by in a step, in (0, 1].

    Args:
        step: Optimizer steps done so far.
        num_steps: Optimizer steps of the whole run.
        warmup_ratio: Part of the run over which the rate rises.
        kind: What it does afterwards; linear and cosine end near 0.
        warmup_steps: Steps over which the rate rises; None leaves that to ``warmup_ratio``.
    """
    num_warmup = math.ceil(num_steps * warmup_ratio) if warmup_steps is None else warmup_steps
    if step < num_warmup:
        return (step + 1) / num_warmup
    if kind == "constant":
        return 1.0
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    left = max(0.0, 1.0 - done)
    return left if kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
