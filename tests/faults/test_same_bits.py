"""A short form of the campaign that trains under --exact on other ranks and strategies."""

from tests.faults.same_bits import chain


def test_a_run_that_is_killed_twice_and_goes_on_with_other_ranks() -> None:
    said: list[str] = []
    assert chain("mnist_mlp", 2, say=said.append) == 0, said
