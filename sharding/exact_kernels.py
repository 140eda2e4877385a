"""Kernels that compute the same twice, for runs whose bits may not depend on anything else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic

from shardlaunch.errors import UserError

_settings: Any = deterministic
_NO_KERNEL = "does not have a deterministic implementation"


def kernel_settings(device: torch.device) -> str:
    """Return what the bits of kernels on a device depend on, beside their threads and torch's version."""
    precision = f"products of fp32 in {torch.get_float32_matmul_precision()} precision"
    if device.type == "cpu":
        is_mkldnn = torch.backends.mkldnn.enabled
        return f"CPU {torch.backends.cpu.get_cpu_capability()}, oneDNN {'on' if is_mkldnn else 'off'}, {precision}"
    return (
        f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"cuBLAS workspace {os.environ.get('CUBLAS_WORKSPACE_CONFIG')}, {precision}"
    )


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Use deterministic kernels only. Raises UserError for an operation that has none."""
    is_set = torch.are_deterministic_algorithms_enabled()
    is_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = _settings.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    # cuBLAS has a workspace per stream then, and does not choose an algorithm by what is free of it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    _settings.fill_uninitialized_memory = False  # else each new tensor is written once more
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if _NO_KERNEL not in str(error):
            raise
        operation = str(error).partition(_NO_KERNEL)[0].strip()
        raise UserError(
            f"--exact: {operation} has no kernel that computes the same bits each time on this device; use another "
            f"operation in the model or the loss, or train without --exact"
        ) from error
    finally:
        torch.use_deterministic_algorithms(is_set, warn_only=is_warning)
        _settings.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = benchmark
