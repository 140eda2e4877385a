"""The settings of a run's strategy: those of its options, of what started it, and of its recipe."""

from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.sharding.environment import LaunchEnvironment
from shardlaunch.sharding.precision import PRECISIONS
from shardlaunch.sharding.strategy import Settings


def settings_of(
    recipe_type: type[Recipe], options: Options, precision_name: str, env: LaunchEnvironment | None = None
) -> Settings:
    """Return the settings. `env`: what started the run; None where nothing has, as for a plan."""
    return Settings(
        compute_dtype=PRECISIONS[precision_name],
        layer_classes=options.layer_classes or (env.layer_classes if env else ()) or recipe_type.layer_classes,
        reshard_after_forward=options.reshard_after_forward and (env is None or env.reshard_after_forward),
        cpu_offload=options.cpu_offload or (env is not None and env.cpu_offload),
        shard_ranks=options.shard_ranks or (env.shard_ranks if env else 0),
        exact=options.exact,
    )
