"""How a model is spread: one small module a strategy, precision, resolving what was launched."""
