"""What to train: one file a recipe, each runnable by `accelerate launch recipes/NAME.py`."""
