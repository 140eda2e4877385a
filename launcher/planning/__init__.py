"""What a run will need, before any GPU is taken: its own steps on tensors without values."""
