"""The notebook docs/tour.ipynb: its form, and whether its outputs are what the program gives now.

`PYTHONPATH=. python docs/test_tour.py` runs it and writes its outputs again.
"""

import json
import re
from pathlib import Path

import pytest

from show import figure

DOCS = Path(__file__).resolve().parent
NOTEBOOK = DOCS / "tour.ipynb"
NOT_COMPARED = {"passes"}  # a dozen optimizer steps, in which roundings grow
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def written(notebook):
    """The notebook as a file: sorted keys, and nothing that differs from run to run."""
    for cell in notebook["cells"]:
        cell["metadata"] = {}  # when it was executed
        if isinstance(cell["source"], str):
            cell["source"] = cell["source"].splitlines(keepends=True)
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def executed(folder, cells=None):
    """The notebook after a run that starts in `folder`, of the first so many cells."""
    missing = "the notebook needs nbclient and ipykernel: pip install -r requirements-dev.txt"
    nbclient = pytest.importorskip("nbclient", reason=missing)
    pytest.importorskip("ipykernel", reason=missing)
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = notebook.cells[:cells]
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return json.loads(nbformat.writes(notebook))


def shown(cell):
    """The text of a cell's outputs: what it printed, its HTML, or its value."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        text = output.get("text", data.get("text/html", data.get("text/plain", "")))
        texts.append(text if isinstance(text, str) else "".join(text))
    return "".join(texts)


def alike(stored, new):
    """Whether two outputs have the same words, and numbers that differ by rounding alone."""
    if NUMBER.sub("#", stored) != NUMBER.sub("#", new):
        return False
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(new))
    values = [[float(x.replace("−", "-")) for x in pair] for pair in pairs]
    return all(abs(a - b) <= 0.01 + 0.02 * abs(a) for a, b in values)


def test_the_notebook_is_small_and_holds_nothing_of_a_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    assert text == written(json.loads(text)), "run PYTHONPATH=. python docs/test_tour.py"
    outputs = "".join(shown(cell) for cell in cells())
    found = re.findall(r"/home/|/tmp/|/root/|/usr/|C:\\|Warning|Traceback", outputs)
    assert not found
    kinds = {output["output_type"] for cell in cells() for output in cell.get("outputs", [])}
    assert kinds == {"stream", "execute_result"}
    assert not [o for c in cells() for o in c.get("outputs", []) if o.get("name") == "stderr"]
    numbers = [cell["execution_count"] for cell in cells() if cell["cell_type"] == "code"]
    assert numbers == list(range(1, len(numbers) + 1))  # run once, from top to bottom


def test_every_link_leads_to_a_file():
    text = "".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert len(targets) >= 5
    assert [target for target in targets if not (DOCS / target).exists()] == []


def test_the_picture_is_told_in_the_words_of_the_figure():
    text = " ".join("".join(cell["source"]) for cell in cells() if cell["id"] == "run")
    assert figure.description(figure.curves("demonstration")) in " ".join(text.split())


def test_outputs_are_compared_by_words_and_by_numbers():
    assert alike("w = 0.9312, γ = −0.5", "w = 0.9313, γ = −0.5")
    assert not alike("w = 0.93", "w = 0.83") and not alike("w = 0.93", "v = 0.93")


@pytest.mark.slow
def test_the_stored_outputs_are_what_the_program_gives():
    stored, again = cells(), executed(DOCS)["cells"]
    assert [cell["id"] for cell in stored] == [cell["id"] for cell in again]
    compared = [pair for pair in zip(stored, again) if pair[0]["id"] not in NOT_COMPARED]
    for old, new in compared:
        assert alike(shown(old), shown(new)), f"cell {old['id']}:\n{shown(new)[:2000]}"


@pytest.mark.slow
def test_the_notebook_starts_from_the_repositorys_folder_too():
    executed(DOCS.parent, cells=2)  # the imports


if __name__ == "__main__":
    NOTEBOOK.write_text(written(executed(DOCS)), encoding="utf-8")
