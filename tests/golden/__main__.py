"""Record the losses anew: for a change that is meant to move them, or new versions of the libraries below."""

import json
import tempfile
from pathlib import Path

from tests.golden.demos import ARGV, COMMAND, RECIPES, RECORD, demo_losses, versions


def main() -> None:
    """Run the demos and write the record beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        losses = {recipe: demo_losses(recipe, Path(folder) / recipe) for recipe in RECIPES}
    record = {"command": COMMAND, "options": " ".join(ARGV), "versions": versions(), "losses": losses}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{RECORD}: {len(losses)} recipes")


if __name__ == "__main__":
    main()
