"""What to train: one file per recipe, each runnable with `accelerate launch recipes/NAME.py`."""
