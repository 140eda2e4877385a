"""A short form of the campaign that interrupts a run again and again."""

from tests.faults.chaos import run


def test_six_faults() -> None:
    said: list[str] = []
    assert run(6, seed=3, strategy="fsdp2", say=said.append), said
