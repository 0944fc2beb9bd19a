"""Executed copies of notebooks: whole at every moment, their names taken once, what the killed left swept."""

import json
import os

import nbformat
import pytest
from test_files import dead_process

from ibqlab.config import ConfigError
from ibqlab.notebooks.execution import execute, prepare_copy


@pytest.fixture
def source(tmp_path):
    """A notebook of two cells."""
    tagged = nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[tagged, nbformat.v4.new_code_cell("print(a)")])
    nbformat.write(notebook, tmp_path / "tiny.ipynb")
    return tmp_path / "tiny.ipynb"


def test_names_of_living_runs_stay_and_those_of_dead_ones_are_swept(source):
    first = prepare_copy(source, None)
    dead = first.with_name("tiny-1.ipynb")
    dead.write_text(first.read_text().replace(str(os.getpid()), str(dead_process())))
    second = prepare_copy(source, None)
    assert {path.name for path in first.parent.iterdir()} == {first.name, second.name}


def test_a_copy_is_whole_and_a_half_written_one_is_replaced(source, tmp_path):
    target = tmp_path / "out.ipynb"
    assert execute(source, target, {"a": 5}).failure is None
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
