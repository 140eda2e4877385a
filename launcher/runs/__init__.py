"""One run from its data to its last line: identity, folder, model, saving."""
