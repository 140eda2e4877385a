"""Imports of the fork server from which ranks are forked."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401 - DeepSpeed loads it as it is set up
import torchmetrics.classification  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import shardlaunch  # noqa: F401
