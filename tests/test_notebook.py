"""tools/quickstart.ipynb runs from its first cell to its last, and was committed as it ran."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "tools/quickstart.ipynb"


def outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs/digits_lt/model/config.json").is_file() and (tmp_path / "runs/mine/model").is_dir()
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_it_is_committed_as_it_ran_and_tells_nothing_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    text = "".join(
        str(output.get("text", "")) + output.get("data", {}).get("text/plain", "") for output in outputs(notebook)
    )
    assert not re.search(r"/(home|root|work|tmp|usr)/", text), "no path of the machine that it ran on"
    assert "Warning" not in text
