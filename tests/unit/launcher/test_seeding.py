"""Seeds derived from a run's position."""

import torch

from shardlaunch.launcher.seeding import derive_seed, seed_model_stream


def test_seeds_differ_in_every_part_and_their_order() -> None:
    seeds = {derive_seed(s, t, j) for s in range(10) for t in range(50) for j in range(10)}
    assert len(seeds) == 5000
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(1, "a") != derive_seed(1, "b")
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_model_stream_is_a_function_of_step_and_micro_batch() -> None:
    cpu = torch.device("cpu")

    def draw(step: int, micro_batch: int) -> list[float]:
        seed_model_stream(0, step, micro_batch, cpu)
        return torch.rand(3).tolist()

    first = draw(4, 1)
    assert draw(4, 2) != first
    assert draw(5, 1) != first
    assert draw(4, 1) == first
