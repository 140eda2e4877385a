"""How a run goes: recipe, options, batches, trainer, evaluation, metrics, tracking, command line."""
