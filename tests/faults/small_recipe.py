"""A recipe file whose run takes half a second, for the campaigns."""

from shardlaunch import launch
from tests.recipes import NetRecipe

launch(NetRecipe)
