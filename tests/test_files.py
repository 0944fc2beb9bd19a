"""Files in and out: ordinary ones only, bounded, written whole, temporaries that follow no link and are swept."""

import errno
import json
import os
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from ibqlab.base.cache import cache_folder
from ibqlab.base.checks import memory_bytes, require_at_most, require_memory
from ibqlab.base.escaping import for_html, for_markdown, for_matplotlib, for_terminal, lines_for_terminal
from ibqlab.base.files import (
    RunError,
    UnreadableFile,
    create_new,
    explained,
    nesting,
    parse_json,
    read_bytes,
    read_json,
    read_npz,
    read_text,
    replacing,
    replacing_path,
    sweep,
    temporary_beside,
    write_whole,
)
from ibqlab.runs import runs_root


def dead_process() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# --- reading ---


def make_pipe(path):
    os.mkfifo(path)


def make_loop(path):
    path.symlink_to(path)


def make_folder(path):
    path.mkdir()


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, make_loop, make_folder, make_device])
@pytest.mark.parametrize("read", [read_json, read_text, lambda path: read_bytes(path, 10), lambda p: read_npz(p, 10)])
def test_only_ordinary_files_are_read(tmp_path, make, read):
    path = tmp_path / "odd"
    make(path)
    with pytest.raises(UnreadableFile, match="odd"):
        read(path)


@pytest.mark.parametrize("name", ["zero\0byte", "n" * 5000])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(UnreadableFile, match=r"zero byte|too long"):
        read_text(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000 + "]" * 5000, "nested deeper"),
        ("[" * 100 + "]" * 100, "nested deeper"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("[1, 2]", "an object"),
        ("{", "no JSON"),
    ],
)
def test_json_is_bounded(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UnreadableFile, match=message):
        read_json(tmp_path / "x.json")


def test_json_of_honest_depth(tmp_path):
    value = {"a": [1, {"b": [2.5, None, True, "ü"]}]}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value
    assert parse_json("[1]", "here", list) == [1]


@pytest.mark.parametrize(("value", "depth"), [(1, 0), ([], 1), ({"a": 1}, 1), ([[1], {"b": []}], 3)])
def test_nesting(value, depth):
    assert nesting(value) == depth


def test_size_is_bounded(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(UnreadableFile, match="larger than"):
        read_bytes(tmp_path / "x", 4)


def test_npz_that_unpacks_to_more_than_it_may(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(10_000))
    assert read_npz(tmp_path / "x.npz", 200_000)["a"].shape == (10_000,)
    with pytest.raises(UnreadableFile, match="unpacks to"):
        read_npz(tmp_path / "x.npz", 50_000)


def test_npz_with_objects_or_damage(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UnreadableFile, match="damaged"):
        read_npz(tmp_path / "x.npz", 10**6)
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(UnreadableFile, match="damaged"):
        read_npz(tmp_path / "y.npz", 10**6)


# --- writing ---


def test_a_planted_link_is_not_followed(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "x"
    victim.write_text("untouched")
    file.symlink_to(victim)
    write_whole(file, b"new")
    assert victim.read_text() == "untouched"
    assert file.read_bytes() == b"new"
    assert not file.is_symlink()


def test_new_files_are_exclusive(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create_new(tmp_path / "x")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("writing", [replacing, replacing_path])
def test_what_ends_badly_leaves_nothing(tmp_path, writing):
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "x"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_writing_into_a_missing_folder_is_explained(tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        write_whole(tmp_path / "missing" / "x", b"")


def test_sweeping_takes_what_the_dead_left_and_nothing_else(tmp_path, monkeypatch):
    living = temporary_beside(tmp_path / "x")
    living.write_text("mine")
    monkeypatch.setattr(os, "getpid", dead_process)
    left, folder = temporary_beside(tmp_path / "x"), temporary_beside(tmp_path / "store")
    monkeypatch.undo()
    left.write_text("")
    (folder / "inner").mkdir(parents=True)
    (tmp_path / ".x.part").write_text("somebody else's")
    assert set(sweep(tmp_path)) == {left.name, folder.name}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".x.part", living.name])
    assert sweep(tmp_path / "missing") == []


# --- escaping ---

HOSTILE = "a\x1b[31m\n| $\\frac{1}{0$ <script>\ud800\u202e"


def test_terminal():
    shown = for_terminal(HOSTILE)
    assert shown == "a\\x1b[31m\\x0a| $\\frac{1}{0$ <script>\\ud800\\u202e"
    assert len(for_terminal("x" * 5000)) == 200
    assert lines_for_terminal("a\nb\x1b") == "a\nb\\x1b"


def test_figure():
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - a plain canvas draws nothing
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(for_matplotlib(HOSTILE))
    canvas.draw()
    figure.suptitle(HOSTILE)
    with pytest.raises(ValueError, match="frac"):
        canvas.draw()


def test_html_and_markdown():
    assert "<script>" not in for_html(HOSTILE)
    assert for_html("\"'<&>") == "&quot;&#x27;&lt;&amp;&gt;"
    escaped = for_markdown("![x](figures/../../etc/passwd)\n# heading | <b>")
    assert escaped == r"\!\[x\](figures/../../etc/passwd)\\x0a\# heading \| \<b\>"


# --- bounds ---


def test_bounds():
    require_at_most("steps", 10, 10)
    with pytest.raises(ValueError, match=r"steps must be at most 10 \(why\); got 11"):
        require_at_most("steps", 11, 10, "why")
    assert memory_bytes() > 2**28
    require_memory(1, "x", "y")
    with pytest.raises(ValueError, match=r"a batch needs .* this machine has .*; lower batch_size"):
        require_memory(10**20, "a batch", "lower batch_size")


def test_ctrl_c_while_torch_writes_is_ctrl_c(tmp_path):
    """torch's writer turns whatever happens inside it into an error about positions."""

    class Stopped:
        def __init__(self, stream):
            self.stream = stream

        def write(self, content):
            if self.stream.tell():
                raise KeyboardInterrupt
            return self.stream.write(content)

        def flush(self):
            self.stream.flush()

    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.pt") as stream:
        torch.save({"a": torch.zeros(10_000)}, Stopped(stream))
    assert not list(tmp_path.iterdir())


def test_what_is_too_large_takes_no_memory(tmp_path):
    """A file of 1 TiB, with a limit of 8 GiB: the size is looked at, the file is not read."""
    file = tmp_path / "metrics.jsonl"
    file.touch()
    os.truncate(file, 2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableFile, match="is larger than 8,192 MiB, which no file of its kind is"):
        read_bytes(file, 2**33)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    with pytest.raises(UnreadableFile, match="is larger than 256 KiB"):
        read_text(file)


@pytest.mark.parametrize("name", ["IBQLAB_RUNS", "IBQLAB_CACHE"])
def test_a_home_that_nobody_has(name, monkeypatch):
    monkeypatch.setenv(name, "~nobody-has-this-name/x")
    with pytest.raises(ValueError, match="~nobody-has-this-name/x: there is no such home folder; write the whole path"):
        {"IBQLAB_RUNS": runs_root, "IBQLAB_CACHE": cache_folder}[name]()


def test_a_stop_that_is_being_noted_is_not_what_goes_wrong_in_writing(tmp_path):
    """A full disk under the note of a stop must not turn the stop's own message into a bare Ctrl-C."""
    with pytest.raises(RunError, match="disk or a quota is full"):
        try:
            raise KeyboardInterrupt("stopped at step 4")
        except KeyboardInterrupt:
            with explained(tmp_path / "status"):
                raise OSError(errno.ENOSPC, "No space left on device") from None
