"""Weights from files: what does not fit is refused, in the words of the option that named them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardlaunch import UserError
from shardlaunch.data import stored_weights


def test_messages_name_the_option_of_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    save_file({"weight": torch.ones(2, 3)}, file)
    assert torch.equal(stored_weights(str(file), {"weight": torch.zeros(2, 3)})["weight"], torch.ones(2, 3))
    with pytest.raises(UserError, match=r"^--weights .*weight is \[2, 3\] and must be \[3, 3\]"):
        stored_weights(str(file), {"weight": torch.zeros(3, 3)})
    with pytest.raises(UserError, match=r"^--teacher .*bias is missing and must be \[3\]"):
        stored_weights(str(file), {"bias": torch.zeros(3)}, option="--teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^--teacher .*empty"):
        stored_weights(str(tmp_path / "empty"), {}, option="--teacher")
