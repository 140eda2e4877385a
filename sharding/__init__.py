"""How a model is spread over ranks: one module per strategy, precision, and resolving what was launched."""
