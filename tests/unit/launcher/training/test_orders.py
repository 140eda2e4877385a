"""Orders of training samples: what they draw, and that any part of them is a function of seed and epoch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from shardlaunch import UserError, orders
from shardlaunch.launcher.training.batches import slots_of_rank
from shardlaunch.launcher.training.ordered_plan import OrderedPlan
from shardlaunch.launcher.training.orders import digest_of

CLASSES = np.repeat([0, 1, 2, 7], [100, 10, 50, 3])
N = len(CLASSES)
ORDERS: dict[str, orders.Order] = {
    "sequential": orders.sequential(N),
    "weighted": orders.weighted(np.arange(N) % 5, num_samples=400),
    "balanced": orders.balanced(CLASSES, num_samples=402),
    "per_class": orders.per_class(CLASSES, num_classes=2, samples_per_class=4),
    "repeated": orders.repeated(CLASSES + 1),
    "curriculum": orders.curriculum(-np.arange(N), epochs=2, start=0.25),
    "own": orders.own(lambda seed, epoch: np.random.default_rng((seed, epoch)).permutation(N)[:99], num_samples=99),
}


def _all(order: orders.Order, epoch: int = 0, seed: int = 5) -> np.ndarray:
    return order.samples(seed, epoch, np.arange(order.num_samples))


@pytest.mark.parametrize("name", ORDERS)
def test_any_part_is_the_same_however_it_is_asked_for(name: str) -> None:
    order = ORDERS[name]
    whole = _all(order, 1)
    assert whole.dtype == np.int64
    assert whole.min() >= 0
    assert whole.max() < N
    other = _all(order, 0)
    assert np.array_equal(whole, other) == (name == "sequential"), "another one in each epoch"
    at = np.array([7, 3, 90, 3])
    assert np.array_equal(order.samples(5, 1, at), whole[at])
    assert np.array_equal(_all(order, 1, seed=6), whole) == (name == "sequential")


def test_what_each_draws() -> None:
    assert _all(ORDERS["sequential"]).tolist() == list(range(N))
    many = orders.weighted([0, 1, 3, 0, 0.5, 0], num_samples=90_000)
    counts = np.bincount(_all(many), minlength=6)
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    assert counts[[1, 2, 4]] == pytest.approx([20_000, 60_000, 10_000], rel=0.03)
    per_class = Counter(CLASSES[_all(ORDERS["balanced"])].tolist())
    assert sorted(per_class.values()) == [100, 100, 101, 101]
    in_balanced = Counter(_all(ORDERS["balanced"]).tolist())
    assert {in_balanced[sample] for sample in range(100)} <= {1, 2}, "all of the large class"
    assert {in_balanced[sample] for sample in range(160, 163)} <= {33, 34}
    groups = _all(ORDERS["per_class"]).reshape(-1, 2, 4)
    assert ORDERS["per_class"].num_samples == 160
    for first, second in groups:
        assert len(set(CLASSES[first].tolist())) == len(set(CLASSES[second].tolist())) == 1
        assert CLASSES[first[0]] != CLASSES[second[0]]
        assert len(set(first.tolist())) == (3 if CLASSES[first[0]] == 7 else 4)
    assert Counter(_all(ORDERS["repeated"]).tolist()) == {sample: CLASSES[sample] + 1 for sample in range(N)}
    sizes = [len(set(_all(ORDERS["curriculum"], epoch).tolist())) for epoch in (0, 1, 2, 3)]
    assert sizes == [41, 102, N, N]
    assert min(_all(ORDERS["curriculum"])) == N - 41, "the easiest"


def test_an_order_that_follows_from_something_else_has_another_digest() -> None:
    several = [
        *ORDERS.values(),
        orders.weighted(np.arange(N) % 5),
        orders.weighted(np.arange(N) % 4, num_samples=400),
        orders.curriculum(-np.arange(N), epochs=3, start=0.25),
        orders.per_class(CLASSES, num_classes=4, samples_per_class=2),
        orders.own(lambda seed, epoch: np.arange(99) + epoch, num_samples=99),
    ]
    assert len({digest_of(order, 5) for order in several}) == len(several)
    again = orders.own(lambda seed, epoch: np.random.default_rng((seed, epoch)).permutation(N)[:99], num_samples=99)
    assert digest_of(again, 5) == digest_of(ORDERS["own"], 5) != digest_of(again, 6)


@pytest.mark.parametrize("lengths", [None, np.arange(N) % 13])
def test_ranks_divide_an_epoch_and_repeated_samples_have_other_seeds(lengths: np.ndarray | None) -> None:
    plan = OrderedPlan(
        num_samples=400,
        num_in_data=N,
        chosen=ORDERS["weighted"],
        global_batch_size=32,
        micro_batch_size=8,
        seed=5,
        lengths=lengths,
    )
    plan.check()
    assert plan.steps_per_epoch == 13

    def taken(num_ranks: int) -> list[tuple[int, int, int]]:
        slots = [
            slot
            for step in range(13, 26)
            for rank in range(num_ranks)
            for slot in slots_of_rank(plan, step, rank=rank, num_ranks=num_ranks)
        ]
        of_slots = [
            (slot.step, slot.micro_batch, key, sample)
            for slot in slots
            if slot.weight and slot.keys is not None
            for key, sample in zip(slot.keys.tolist(), slot.samples.tolist(), strict=True)
        ]
        return sorted((key, sample, step) for step, _, key, sample in of_slots)

    one = taken(1)
    assert [key for key, _, _ in one] == list(range(400))
    assert taken(2) == taken(3) == one
    assert sorted(sample for _, sample, _ in one) == sorted(_all(ORDERS["weighted"], 1).tolist())


class Keeps:
    """An order that draws from a generator of its own."""

    num_samples = 20

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        return self.rng.integers(0, N, len(positions))


class Far(Keeps):
    """An order of samples that are not there."""

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        return positions + 150


class Fractional(Keeps):
    """An order of fractions."""

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        return positions / 2


class Global(Keeps):
    """An order that draws from the global generator: seeded."""

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        return np.random.permutation(N)[positions]


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (Keeps(), "is no function of seed and epoch: asked again, position 0 of epoch 0 has sample"),
        (Far(), "position 13 of epoch 0 has sample 163, but the training data has samples 0 to 162"),
        (Fractional(), r"must return one whole number per position; for 20 positions it returned float64"),
        (orders.own(lambda seed, epoch: np.arange(9), num_samples=8), "must return 8 whole numbers per epoch"),
        (Global(), ""),
    ],
)
def test_what_is_no_order_of_the_data(chosen: Any, text: str) -> None:
    plan = OrderedPlan(
        num_samples=chosen.num_samples, num_in_data=N, chosen=chosen, global_batch_size=4, micro_batch_size=4, seed=0
    )
    if text:
        with pytest.raises(UserError, match=text):
            plan.check()
    else:
        plan.check()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: orders.weighted([1, -1]), "that of sample 1 is -1.0"),
        (lambda: orders.weighted([1, np.nan]), "that of sample 1 is nan"),
        (lambda: orders.weighted([0, 0]), "at least one must be above 0"),
        (lambda: orders.weighted([[1, 2]]), "must be given one number per sample"),
        (lambda: orders.weighted([1, 2], num_samples=0), "must be from 1, not 0"),
        (lambda: orders.balanced(np.ones((2, 2), int)), "must be given one class per sample"),
        (
            lambda: orders.per_class([0, 1], num_classes=3, samples_per_class=1),
            "3 classes per group, but",
        ),
        (lambda: orders.per_class([0, 1], num_classes=2, samples_per_class=2), "an epoch has fewer"),
        (lambda: orders.repeated([0.5]), "one whole number from 0 per sample"),
        (lambda: orders.repeated([0, 0]), "not all 0"),
        (lambda: orders.curriculum([1, 2], epochs=1, start=0), "start must be above 0"),
        (lambda: orders.own([2, 1, 0], num_samples=3), "takes a function of seed and epoch, not list"),  # type: ignore[arg-type]
    ],
)
def test_what_an_order_cannot_be_made_of(make: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make()
