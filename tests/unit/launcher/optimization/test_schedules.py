"""Schedules compared with torch's, and invalid options."""

from typing import Any

import pytest
import torch

from shardlaunch import Options, UserError
from shardlaunch.launcher.optimization.schedules import scheduled

STEPS = 20


def _torch_rates(make: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"schedule": "cosine"}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS)),
        (
            {"schedule": "cosine", "final_lr_ratio": 0.1},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1),
        ),
        (
            {"schedule": "linear", "final_lr_ratio": 0.2},
            lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=STEPS),
        ),
        # torch's peak is the last step of the rise, counted from 0: 0.35 x 20 - 1 = 6, which is 0.3 x 20 here.
        ({"schedule": "one-cycle"}, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, STEPS, pct_start=0.35)),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_the_rates_are_torchs(options: dict[str, Any], make: Any) -> None:
    found = [scheduled(step, STEPS, Options(**options)) for step in range(STEPS)]
    assert found == pytest.approx(_torch_rates(make), abs=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_rises_evenly_to_the_peak(schedule: str) -> None:
    for options in (
        Options(schedule=schedule, warmup_steps=4, warmup_ratio=0.5),
        Options(schedule=schedule, warmup_ratio=0.2),
    ):
        found = [scheduled(step, STEPS, options) for step in range(STEPS)]
        assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert max(found) == 1.0
        assert found[5:] == sorted(found[5:], reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "sine"},
        {"warmup_steps": -1},
        {"warmup_ratio": 1.0},
        {"schedule": "linear", "final_lr_ratio": 1.5},
        {"schedule": "constant", "final_lr_ratio": 0.5},
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Options(**options)
