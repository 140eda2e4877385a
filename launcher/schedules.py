"""Learning-rate schedules: factors on the peak rate, functions of the step alone."""


def constant(step: int, num_steps: int) -> float:
    """Return 1."""
    return 1.0


def linear(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Rise from 0 to 1 over the warm-up, then fall to 0 at the end of the run."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps))
