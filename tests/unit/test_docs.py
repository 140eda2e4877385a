"""The messages, options and code on the pages of docs/ are those of the program."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

from shardlaunch.launcher.command_line.other_trainers import _ADVICE as ADVICE
from shardlaunch.launcher.option_fields import flag

ROOT = Path(__file__).parents[2]
SOURCES = ("recipes", "launcher", "sharding", "checkpoints")
VARIES = "…"  # stands for what a message fills in


def _texts_of_source() -> str:
    """Return all string literals, one per line, with … for the values in f-strings."""
    texts = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                if all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
                    texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else VARIES for p in parts))
    return "\n".join(texts)


def test_messages_of_troubleshooting_are_those_of_the_source() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"```text\n(.*)\n```", page)
    assert len(messages) > 20
    source = _texts_of_source()
    # A page may leave out a variable beginning or end.
    missing = [message for message in messages if message.removeprefix("error: ").strip(f"{VARIES} ") not in source]
    assert not missing, "\n".join(missing)


def test_words_of_other_trainers_stand_on_their_page_with_ours() -> None:
    rows = (ROOT / "docs" / "porting" / "words.md").read_text().splitlines()
    for name, text in ADVICE.items():
        of_name = [row for row in rows if row.startswith("|") and f"`{flag(name)}`" in row.split("|")[1]]
        assert len(of_name) == 1, name
        meant = re.findall(r"--[a-z0-9-]+", text.partition("?")[0])
        assert "did you mean" not in text or all(f"`{one}`" in of_name[0].split("|")[2] for one in meant), name


def test_python_on_the_pages_is_python() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    blocks = [
        (page, block) for page in pages for block in re.findall(r"```python.*?\n(.*?)```", page.read_text(), re.S)
    ]
    assert len(blocks) > 5
    for page, block in blocks:
        compile(block, str(page), "exec")


def test_examples_stand_on_a_page() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    examples = [f'\n--8<-- "docs/examples/{path.name}"\n' for path in (ROOT / "docs" / "examples").glob("*.py")]
    assert examples
    assert not [line for line in examples if line not in pages]


def _check_tables(root: Path) -> subprocess.CompletedProcess[str]:
    words = (sys.executable, str(root / "benchmarks" / "tables.py"), "--check")
    return subprocess.run(words, capture_output=True, text=True)


def test_tables_and_cells_of_the_pages_are_made_from_results_and_notebook(tmp_path: Path) -> None:
    ended = _check_tables(ROOT)
    assert ended.returncode == 0, ended.stderr
    for name in ("benchmarks", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    result = tmp_path / "benchmarks" / "results" / "mnist_mlp.json"
    text = result.read_text()
    assert '"training_s": 397.6' in text
    result.write_text(text.replace('"training_s": 397.6', '"training_s": 297.6'))
    notebook = tmp_path / "docs" / "notebook.ipynb"
    text = notebook.read_text()
    assert "width: int = 32" in text
    notebook.write_text(text.replace("width: int = 32", "width: int = 64"))
    ended = _check_tables(tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "in docs/python.md, docs/results.md:" in ended.stderr
