"""Imports of the fork server from which ranks are forked: what a run loads, so that each rank need not."""

import gc
import importlib.util
import os
import warnings

import accelerate  # noqa: F401
import datasets  # noqa: F401
import torch._inductor.compile_fx
import torch.profiler
import torch.utils.cpp_extension
import torch.utils.tensorboard
import torchmetrics.classification  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401
import tyro  # noqa: F401

import shardlaunch.launcher.command_line.parsing
import shardlaunch.launcher.runs.run  # noqa: F401

if importlib.util.find_spec("deepspeed") is not None and not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # as the strategy sets it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: F401
    del os.environ["DS_ACCELERATOR"]

gc.collect()
gc.freeze()  # what is loaded stays: a rank need not look through it, nor copy its pages
