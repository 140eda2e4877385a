"""Training data that can only be read in order: the same samples wherever it is begun, in workers, over its end."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from shardlaunch import Options, Recipe, UserError
from shardlaunch.launcher.runs import bookmarks
from shardlaunch.launcher.runs.folds import checked_splits
from shardlaunch.launcher.runs.identity import data_fingerprint
from shardlaunch.launcher.runs.iterables import Stream
from shardlaunch.launcher.runs.second_look import check_second_look
from shardlaunch.launcher.training.batches import Batches, slots_of_rank
from shardlaunch.launcher.training.ordered_plan import OrderedPlan


class Numbers(IterableDataset[tuple[int, float]]):
    """Numbers with noise from the global generators; others in each epoch; shared among workers, as is usual."""

    def __init__(self, count: int = 10, fails_at: int = -1) -> None:
        self.epoch = 0
        self.count = count
        self.fails_at = fails_at

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, float]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, self.count, step):
            if number == self.fails_at:
                self.fails_at = -1
                raise OSError(5, "for a moment")
            yield 100 * self.epoch + number, float(torch.rand(())) + random.random()


def _stream(**keywords: Any) -> Stream:
    return Stream(Numbers(**keywords), Options(max_steps=6, global_batch_size=4, micro_batch_size=2))


def test_samples_are_the_same_wherever_reading_begins_and_over_the_end() -> None:
    stream = _stream()
    assert len(stream) == 24
    whole = [stream[n] for n in range(24)]
    assert [number for number, _ in whole] == [*range(10), *range(100, 110), *range(200, 204)]
    assert len({noise for _, noise in whole}) == 24
    for places in ([3, 7, 23], [22], [9, 10, 2, 2, 19]):
        other = _stream()
        assert [other[n] for n in places] == [whole[n] for n in places]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_no_rank_reads_a_row_twice(num_ranks: int) -> None:
    """Also where the seven micro-batches of a step are not divisible, so that a rank runs one without effect."""
    num_read = 0

    class Counted:
        def __iter__(self) -> Iterator[int]:
            nonlocal num_read
            for number in range(1000):
                num_read += 1
                yield number

    options = Options(max_steps=10, global_batch_size=14, micro_batch_size=2)
    stream = Stream(Counted(), options)
    plan = OrderedPlan(
        num_samples=140,
        num_in_data=140,
        global_batch_size=14,
        micro_batch_size=2,
        seed=0,
        chosen=stream.shuffled_order(options),
    )
    for step in range(10):
        for slot in slots_of_rank(plan, step, rank=num_ranks - 1, num_ranks=num_ranks):
            assert [stream[int(sample)] for sample in slot.samples] == slot.samples.tolist()
    assert num_read <= 140


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_read_all_of_it(num_workers: int) -> None:
    def batches(num_workers: int, rank: int = 0, num_ranks: int = 1, first: int = 0) -> list[Any]:
        stream = _stream()
        stream[1]  # the main process has read, as at the start of a run
        order = stream.shuffled_order(Options())
        sizes = {"global_batch_size": 4, "micro_batch_size": 2}
        loaded = Batches(
            stream,
            OrderedPlan(num_samples=24, num_in_data=24, chosen=order, seed=0, **sizes),
            collate=lambda samples, seeds: samples,
            num_targets=len,
            num_tokens=len,
            rank=rank,
            num_ranks=num_ranks,
            training=True,
            num_workers=num_workers,
        )
        return [one.inputs for step in loaded.steps(first, 6) for one in step.micro_batches]

    alone = batches(0)
    assert len(alone) == 12
    assert batches(num_workers) == alone
    assert batches(num_workers, first=2) == alone[4:]
    assert batches(num_workers, rank=1, num_ranks=2) == alone[1::2]


def test_an_error_that_passes_is_no_end() -> None:
    stream = _stream(fails_at=4)
    with pytest.raises(OSError, match="for a moment"):
        stream[5]
    assert stream[5] == _stream()[5]


def test_the_fingerprint_and_a_second_look_are_at_the_first_rows() -> None:
    assert data_fingerprint(_stream()) == data_fingerprint(_stream()) != data_fingerprint(_stream(count=11))
    check_second_look(_stream(), "train", seed=3)
    own = random.Random(0)

    class Unseeded(Numbers):
        def __iter__(self) -> Iterator[Any]:
            yield from ((number, own.random()) for number in range(10))

    stream = Stream(Unseeded(), Options(max_steps=3))
    with pytest.raises(UserError, match="not the same at a second look"):
        check_second_look(stream, "train", seed=3)


class _Streamed(Recipe):
    splits: dict[str, Any] = {}

    def datasets(self) -> dict[str, Any]:
        return self.splits


@pytest.mark.parametrize(
    ("splits", "options", "expected"),
    [
        ({"train": Numbers()}, {}, r"the train data is a Numbers, which has no length: say with --max-steps"),
        ({"train": iter([1])}, {"max_steps": 3}, "a list_iterator, an iterator that can be read once only"),
        ({"train": (n for n in [1])}, {"max_steps": 3}, "a generator, an iterator that can be read once only"),
        ({"train": map(str, [1])}, {"max_steps": 3}, "a map, an iterator that can be read once only"),
        ({"train": Numbers()}, {"max_steps": 3, "extend_to_steps": 9}, "--extend-to-steps: not with training data"),
        ({"train": [1], "eval": Numbers()}, {}, r"the eval data is a Numbers, .*islice"),
        ({"train": Numbers(0)}, {"max_steps": 3}, "the train data has no rows"),
        ({"train": 3}, {"max_steps": 3}, "the train data is a int"),
    ],
)
def test_what_cannot_be_is_refused(splits: dict[str, Any], options: dict[str, Any], expected: str) -> None:
    recipe = _Streamed(Options(**options))
    recipe.splits = splits
    with pytest.raises(UserError, match=expected):
        checked_splits(recipe, None)["train"][0]


def test_orders_that_would_go_back_are_refused() -> None:
    with pytest.raises(UserError, match="can only be read in order"):
        _stream().hold_samples(object(), 1)
    with pytest.raises(UserError, match="--shuffle-window: has no effect"):
        _stream().shuffled_order(Options(shuffle_window=3))


@pytest.mark.parametrize("buffer_size", [0, 7])
def test_a_resume_goes_on_at_a_bookmark_if_that_is_the_right_place(
    buffer_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(bookmarks, "EVERY_ROWS", 25)
    given: list[int] = []

    def numbered(shards: list[int]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            for number in range(10 * shard, 10 * shard + 10):
                given.append(number)
                yield {"number": number}

    def stream() -> Stream:
        rows = datasets.IterableDataset.from_generator(numbered, gen_kwargs={"shards": list(range(6))})
        rows = rows.shuffle(seed=3, buffer_size=buffer_size) if buffer_size else rows
        return Stream(rows, Options(max_steps=40, global_batch_size=4, micro_batch_size=2), folder=tmp_path)

    first = stream()
    whole = [first[n] for n in range(150)]
    assert len({row["number"] for row in whole[:60]}) == 60
    names = sorted(path.name for path in tmp_path.glob("*/*.json"))
    assert names == [f"{row:012}.json" for row in range(25, 150, 25)]
    again = stream()
    given.clear()
    assert [again[n] for n in range(140, 150)] == whole[140:150]
    assert (len(given) < 70) == (not buffer_size), "a shuffle buffer is no part of the state"
    for path in tmp_path.glob("*/*.json"):
        path.write_text("{")
    assert [stream()[n] for n in (140, 149)] == [whole[140], whole[149]]


def test_streams_of_the_datasets_library() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"number": list(range(40))}).to_iterable_dataset(num_shards=4)
    options = Options(max_steps=20, global_batch_size=4, micro_batch_size=2)
    stream = Stream(rows.shuffle(seed=3, buffer_size=7), options)
    check_second_look(stream, "train", seed=0)
    whole = [stream[n]["number"] for n in range(80)]
    assert sorted(whole[:40]) == sorted(whole[40:]) == list(range(40))
    assert whole[:40] != whole[40:], "shuffled anew when it begins anew"
    assert np.abs(np.diff(whole[:40])).max() > 1
    assert [stream[n]["number"] for n in (5, 47, 79)] == [whole[n] for n in (5, 47, 79)]
