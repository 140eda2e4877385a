"""The notebook of the documentation, run from top to bottom in its own kernel."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"
LAUNCH_CELL = """
from shardlaunch import launch
try:
    launch(RingRecipe)
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are made when the pages are built"
    notebook.cells.append(nbformat.v4.new_code_cell(LAUNCH_CELL))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=dict(os.environ))
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert all(f"{lr:<7} accuracy 0." in printed[4] for lr in (0.0003, 0.003, 0.03))
    assert printed[7].startswith("20 steps, accuracy 0.")
    assert "cannot resume outputs/ring-0.003: it holds another run (--lr: 0.003 -> 0.1)" in printed[9]
    assert "--run-name ring-0.003-2" in printed[9]
    assert printed[10].startswith("refused: launch(RingRecipe) reads a command line")
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == [
        "digits",
        "ring-0.0003",
        "ring-0.003",
        "ring-0.03",
    ]
