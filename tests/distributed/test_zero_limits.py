"""What ZeRO cannot do is refused: models, states and optimizers."""

import os
from datetime import timedelta
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from shardlaunch import UserError
from shardlaunch.sharding import lockstep
from shardlaunch.sharding import zero as zero_module
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.strategy import BuildOptimizer
from shardlaunch.sharding.world import World, connect, disconnect
from shardlaunch.sharding.zero import Zero2, Zero3
from tests.distributed.ranks import run_on_ranks
from tests.distributed.zero_net import STAGES, Reader, adamw, initial_state, make_net

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason='needs pip install "shardlaunch[deepspeed]"')


class Choosy(nn.Module):
    """Use a module on rank 1 only, from the second micro-batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(4, 4)
        self.sometimes = nn.Linear(4, 4)
        self.uses = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.uses += 1
        hidden = self.always(inputs)
        if os.environ["RANK"] == "1" and self.uses > 1:
            hidden = self.sometimes(hidden)
        return hidden


def _choose(stage: str) -> tuple[list[float], str]:
    torch.set_num_threads(1)
    zero_module.PERSISTENT_ELEMENTS = 0
    lockstep.PATIENCE = timedelta(seconds=2)
    torch.manual_seed(0)
    world = connect(read_environment(os.environ))
    with torch.device("meta" if STAGES[stage].starts_empty else "cpu"):
        model = Choosy()
    strategy = STAGES[stage](model, adamw, world=world)
    strategy.restore(Reader({(n, ""): torch.rand(p.shape) for n, p in Choosy().named_parameters()}))
    norms = []
    try:
        for _ in range(3):
            strategy.backward(model(torch.ones(2, 4)).square().sum(), factor=1.0, last=True)
            norms.append(strategy.finish_gradients(unscale=1.0, max_norm=0.0))
            strategy.optimizer_step()
    except UserError as error:
        return norms, str(error)
    except RuntimeError:
        return norms, "the other rank is gone"
    disconnect(world)
    return norms, ""


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_that_only_one_rank_uses(stage: str) -> None:
    """Stages 1 and 2 support it; stage 3, where running a module is a collective, ends with a message."""
    (norms, error), (other_norms, other_error) = run_on_ranks(2, _choose, stage)
    if stage != "zero3":
        assert (error, other_error) == ("", "")
        assert norms == other_norms
        assert len(norms) == 3
    else:
        assert "do not run the same modules" in error + other_error
        assert error
        assert other_error
        assert len(norms) == len(other_norms) == 1


def _restore_odd() -> list[str]:
    world = connect(read_environment(os.environ))
    strategy = Zero2(make_net(), adamw, world=world)
    weights = initial_state()
    name = "hidden.weight"
    trained = [key for key, p in make_net().named_parameters() if p.requires_grad]
    steps = {(key, "step"): torch.tensor(3.0) for key in trained}
    errors = []
    for state in (
        steps | {(name, "step"): torch.tensor(4.0)},
        {key: value for key, value in steps.items() if key[0] != name},
        steps | {(name, "rows"): torch.ones(13)},
        steps | {("frozen.weight", "step"): torch.tensor(3.0)},
    ):
        with pytest.raises(UserError) as caught:
            strategy.restore(Reader(weights | state))
        errors.append(str(caught.value))
    disconnect(world)
    return errors


def test_state_that_does_not_fit_is_refused() -> None:
    errors, others = run_on_ranks(2, _restore_odd)
    assert errors == others
    for error, expected in zip(errors, ["'step' of hidden.weight", "not of hidden", "shape", "not train"], strict=True):
        assert expected in error


@pytest.mark.parametrize(
    ("build_optimizer", "complaint"),
    [
        (lambda named: torch.optim.Adagrad([p for _, p in named]), "Adagrad is not supported with ZeRO.*AdamW"),
        (lambda named: torch.optim.Adafactor([p for _, p in named]), "Adafactor.*fsdp2"),
        (lambda named: torch.optim.SGD([p for _, p in list(named)[1:]], lr=0.1), "rare is missing"),
        (lambda named: torch.optim.SGD([{"params": [p for _, p in named]}, {"params": []}], lr=0.1), "without param"),
    ],
)
def test_optimizers_that_cannot_be(build_optimizer: BuildOptimizer, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Zero2(make_net(), build_optimizer, world=World())


def test_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"zero3 needs DeepSpeed.*shardlaunch\[deepspeed\]"):
        Zero3.check_available()
