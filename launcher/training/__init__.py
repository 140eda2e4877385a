"""Steps: batches, forward passes, the training loop, evaluation."""
