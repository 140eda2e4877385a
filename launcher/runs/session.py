"""State of the process that a run changes, and how it is restored."""

import os
import random
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from shardlaunch.errors import UserError

_IN_USE = threading.Lock()
# Libraries are silent during a run unless the user sets these variables.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "critical",
    "TOKENIZERS_PARALLELISM": "true",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def set_quiet_variables() -> None:
    """Silence libraries that are not imported yet, unless the environment says otherwise."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Silence progress bars and logs of libraries, imported or not, unless the environment says otherwise."""
    with ExitStack() as stack:
        set_quiet_variables()
        if "transformers" in sys.modules:
            from transformers.utils import logging

            if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
                stack.callback(logging.set_verbosity, logging.get_verbosity())
                logging.set_verbosity_error()
            if logging.is_progress_bar_enabled():
                stack.callback(logging.enable_progress_bar)
                logging.disable_progress_bar()
        if "datasets" in sys.modules:
            datasets = sys.modules["datasets"]
            if not datasets.are_progress_bars_disabled():
                stack.callback(datasets.enable_progress_bars)
                datasets.disable_progress_bars()
        yield


@contextmanager
def preserved_process() -> Iterator[None]:
    """Restore afterwards: environment, threads, random generators, grad mode, accelerate's shared state.

    Raises UserError within another such context of this process: two runs would change the same state.
    """
    if not _IN_USE.acquire(blocking=False):
        raise UserError(
            "another run is in progress in this process: call fit() again when it has ended, or use start()"
        )
    try:
        with _restored():
            yield
    finally:
        _IN_USE.release()


@contextmanager
def _restored() -> Iterator[None]:
    environment = dict(os.environ)
    num_threads = torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    has_grad = torch.is_grad_enabled()
    accelerate_state = _accelerate_state()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(num_threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        torch.set_grad_enabled(has_grad)
        _restore_accelerate_state(accelerate_state)


def _accelerate_state() -> Mapping[str, Any]:
    if "accelerate" not in sys.modules:
        return {}
    from accelerate import PartialState

    return dict(PartialState._shared_state)


def _restore_accelerate_state(state: Mapping[str, Any]) -> None:
    if "accelerate" in sys.modules:
        from accelerate import PartialState

        PartialState._shared_state.clear()
        PartialState._shared_state.update(state)
