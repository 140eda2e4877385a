"""Imports of the fork server from which ranks are forked."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import torchmetrics.classification  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import shardlaunch  # noqa: F401
