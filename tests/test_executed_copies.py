"""Executed copies of notebooks: whole at every moment, each with a name of its own, what the killed left swept."""

import json
import os
import sys

import nbformat
import pytest
from test_files import dead_process

from ibqlab.base.files import temporary_beside
from ibqlab.config import ConfigError
from ibqlab.notebooks.execution import execute, prepare_copy


@pytest.fixture
def source(tmp_path):
    """A notebook of two cells."""
    tagged = nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[tagged, nbformat.v4.new_code_cell("print(a)")])
    nbformat.write(notebook, tmp_path / "tiny.ipynb")
    return tmp_path / "tiny.ipynb"


def test_a_dated_copy_has_a_name_of_its_own_and_its_folder_is_swept(source):
    first = prepare_copy(source, None)
    part = first.with_name(f".{first.name}.{dead_process()}-{temporary_beside(first).name[-21:]}")
    part.touch()
    assert first.name.startswith("tiny-2") and prepare_copy(source, None) != first
    assert list(first.parent.iterdir()) == []


def test_what_a_notebook_trains_notes_what_was_typed_to_run_it(tmp_path, monkeypatch):
    cell = "from ibqlab.runs.provenance_record import command_line\nprint(command_line())"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), tmp_path / "said.ipynb")
    for argv, says in ((["ibqlab", "run", "said", "a=1"], "ibqlab run said a=1"), (["pytest"], "pytest")):
        monkeypatch.setattr(sys, "argv", argv)
        assert execute(tmp_path / "said.ipynb", tmp_path / "out.ipynb", {})[0] is None
        assert says in (tmp_path / "out.ipynb").read_text()
    assert "IBQLAB_COMMAND" not in os.environ


def test_a_copy_is_whole_and_a_half_written_one_is_replaced(source, tmp_path):
    target = tmp_path / "out.ipynb"
    assert execute(source, target, {"a": 5})[0] is None
    content = target.read_bytes()
    assert json.loads(content)["cells"][-1]["outputs"][0]["text"] in ("5\n", ["5\n"])
    assert sorted(path.name for path in tmp_path.glob("*.ipynb")) == ["out.ipynb", "tiny.ipynb"]
    for half in (content[:-200], b"", content):
        target.write_bytes(half)
        assert prepare_copy(source, target) == target
    for other in (source.read_bytes(), b"text", source.read_bytes()[:-20]):
        target.write_bytes(other)
        with pytest.raises(ConfigError, match="is not an executed copy"):
            prepare_copy(source, target)
        assert target.read_bytes() == other
