"""How a run goes: recipe, options, launch; then commands, runs, training, optimization, reporting, and the toolkit."""
