"""Names of the files and folders of checkpoints. Imports no torch."""

import re
from collections.abc import Iterable

STAGING_PREFIX = ".staging-"
TRASH_PREFIX = ".trash-"
REPLACED_PREFIX = ".replaced-"  # until the checkpoint that replaces it is there
CHECKPOINTS = "checkpoints"  # folder of a run, with one folder per saved step
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
RECIPE = "recipe.json"

# Sections of a run's state, each in separate files: weights and buffers, optimizer state, and the average of weights
# and buffers of a run that keeps one (--ema, --swa-from).
MODEL = "model"
OPTIMIZER = "optimizer"
EMA = "ema"
SECTIONS = (MODEL, OPTIMIZER, EMA)

# A checkpoint of a run that trains adapters alone holds no base model. peft knows its weights by these names.
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_PREFIX = "base_model.model."
BASE = "base.json"  # which base model that is

NUM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per element, by the name of a dtype in safetensors files."""

_STEP_DIR = re.compile(r"step-([0-9]{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@ -]*")


def step_dir_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of_dir_name(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, None for other names."""
    match = _STEP_DIR.fullmatch(name)
    return int(match[1]) if match and step_dir_name(int(match[1])) == name else None


def index_file_name(section: str) -> str:
    """Return the name of the index file of a section, which maps each tensor to its file."""
    return f"{section}.safetensors.index.json"


def are_of_adapter(names: Iterable[str]) -> bool:
    """Return whether weights are those of a LoRA adapter alone, by the names that peft saves them under."""
    return any(name.startswith(ADAPTER_PREFIX) and name.endswith(".lora_A.weight") for name in names)


def is_plain_file_name(name: str) -> bool:
    """Return whether a name read from a file is safe to append to a folder: no separators, not hidden."""
    return _FILE_NAME.fullmatch(name) is not None


def is_listed_file_name(name: str) -> bool:
    """Return whether a name may be one of a manifest's files: a plain one, or FOLDER/NAME of two plain ones."""
    return name.count("/") <= 1 and all(map(is_plain_file_name, name.split("/")))
