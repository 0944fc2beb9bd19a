"""Commands as processes on a disk that is full, and several at once: one message, nothing half written, then recovery.

The disk is a limit on the size of files: whatever is written beyond it fails as on a full disk, at that very byte.
"""

import os
import subprocess
import sys

import nbformat
import pytest

from ibqlab.base.files import is_temporary
from ibqlab.training import recipe_config, train

LIMITED = """if True:
    import resource, signal, sys
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    most = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    from ibqlab.cli import main
    main(sys.argv[2:])
"""
pytestmark = pytest.mark.usefixtures("warm_start")
ROOM = 2**30
BUSY_STOP = """import atexit, logging
atexit.register(logging.getLogger("tornado.general").error, "Traceback of sockets that are closed")
print("x" * 3000)
"""
"""A cell after which its kernel complains while it stops, as it may on a busy machine."""


def start(folder, room, *words):
    """A command in a process of its own, in a folder whose files may have so many bytes."""
    return subprocess.Popen(
        [sys.executable, "-c", LIMITED, str(room), *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"IBQLAB_RUNS": str(folder / "runs")},
    )


def done(process):
    """Exit code, and all that the command said."""
    output, errors = process.communicate(timeout=600)
    assert "Traceback" not in output + errors, errors
    return process.returncode, output + errors


def require_full(process):
    code, said = done(process)
    assert code == 2, said
    (message,) = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert "the disk or a quota is full" in message and "Make room" in message


def temporaries(folder):
    return [path for path in folder.rglob("*") if is_temporary(path.name)]


def test_reports_on_a_full_disk_and_three_at_once(tmp_path):
    run = train(recipe_config("builtin/smoke", {"steps": 2}), tmp_path / "runs" / "one", progress=False).path
    code, said = done(start(tmp_path, ROOM, "report", "one"))
    assert code == 0, said
    page = (run / "report.html").read_bytes()
    # The first file does not fit, then the page alone, by its last byte.
    for room in (1000, len(page) - 1):
        require_full(start(tmp_path, room, "report", "one"))
        assert (run / "report.html").read_bytes() == page
        assert temporaries(run) == []
    together = [start(tmp_path, ROOM, "report", "one") for _ in range(3)]
    assert [done(process)[0] for process in together] == [0, 0, 0]
    written = (run / "report.html").read_text(encoding="utf-8")
    assert written.endswith("</html>\n") and written.count("data:image/png;base64,") == page.count(b"data:image/png")
    assert temporaries(run) == []


@pytest.mark.parametrize("room", [1500, 6000])
def test_an_executed_copy_on_a_full_disk_is_whole_and_the_next_start_recovers(tmp_path, room):
    """Room for the copy before its first cell, and for the output of one cell of two."""
    parameters, *others = map(nbformat.v4.new_code_cell, ["steps: int = 3  # steps", BUSY_STOP, "print('x' * 3000)"])
    parameters.metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, *others]), tmp_path / "tiny.ipynb")
    copy = tmp_path / "copy.ipynb"
    require_full(start(tmp_path, room, "run", "tiny.ipynb", "--output", copy))
    if copy.exists():
        nbformat.validate(nbformat.read(copy, 4))
    assert temporaries(tmp_path) == []
    code, said = done(start(tmp_path, ROOM, "run", "tiny.ipynb", "--output", copy))
    assert code == 0, said
    outputs = [cell.outputs for cell in nbformat.read(copy, 4).cells if cell.cell_type == "code"]
    assert sum(len(one) for one in outputs) == 2


def test_a_dated_copy_on_a_full_disk_leaves_nothing_in_the_way(tmp_path):
    cell = nbformat.v4.new_code_cell("steps: int = 3  # steps", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "tiny.ipynb")
    require_full(start(tmp_path, 600, "run", "tiny.ipynb"))
    code, said = done(start(tmp_path, ROOM, "run", "tiny.ipynb"))
    assert code == 0, said
    (copy,) = (tmp_path / "runs" / "notebooks" / "tiny").iterdir()
    assert nbformat.read(copy, 4).cells[-1].execution_count == 1
