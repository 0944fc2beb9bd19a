"""Trainings in processes of their own: what a view shows of them, and what its buttons and the notebook's cell do."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from registry import SMALL_DIGITS

from ibqlab.losses.errors import TrainingError, TrainingInterrupted
from ibqlab.runs import Run, RunError
from ibqlab.studies import StudyParameters, open_study
from ibqlab.training import recipe_config, train
from ibqlab.views import training_process
from ibqlab.views.live_plane import LEAST_SHARE, LivePlane
from ibqlab.views.study_process import StudyProcess
from ibqlab.views.subject import ViewError
from ibqlab.views.training_process import TrainingProcess, describe_rows
from ibqlab.widgets import (
    TrainingView,
    finished_run,
    require_finished,
    train_and_watch,
    train_study,
    training_cell,
    training_view,
)
from ibqlab.widgets.training_pictures import RunPictures
from ibqlab.widgets.training_view import NEWEST, SHARE_OF_TIME

SETTINGS = {**SMALL_DIGITS, "tokenizer.quantizer.name": "vq", "steps": 4, "record.validate_every": 2}
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from ibqlab.base.locking import FileLock
folder = Path(sys.argv[1])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
lock = FileLock(folder / "lock")
lock.acquire(patience=5)
print("training", flush=True)
file, facts = folder / "metrics.jsonl", json.loads((folder / "provenance.json").read_text())
rows = file.read_text().count("\\n")
ended = time.monotonic() + 30
while not asked and time.monotonic() < ended:
    with file.open("a") as stream:
        stream.write(json.dumps({"step": rows, "loss": 1 / (rows + 1), "seconds": float(rows)}) + "\\n")
    rows += 1
    time.sleep(0.02)
(folder / "checkpoints" / f"step_{rows - 1:08d}.pt").write_bytes(b"")
(folder / "provenance.json").write_text(json.dumps(facts | {"status": "stopped"}))
print("saved", flush=True)
"""
"""A training in miniature: it holds the run's lock, logs rows, and stops with a checkpoint when it is asked to. Imports
little, so that it is there at once."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps."""
    return train(
        recipe_config("builtin/smoke", SETTINGS), tmp_path_factory.mktemp("live") / "done", progress=False
    ).path


@pytest.fixture
def config():
    return recipe_config("builtin/smoke", SETTINGS | {"steps": 1000})


@pytest.fixture
def begun(config, tmp_path, monkeypatch):
    """A run whose process is a training in miniature."""
    command = [sys.executable, "-c", WORKER, str(tmp_path / "mine")]
    monkeypatch.setattr(TrainingProcess, "command", lambda _: command)
    process = TrainingProcess.begin(config, tmp_path / "mine")
    yield process
    process.stop(10)


@pytest.fixture
def no_maps(monkeypatch):
    """Views draw curves alone: a map takes a second."""
    monkeypatch.setattr(RunPictures, "snapshot", lambda *_: ("", ""))


def until(condition, patience=30.0):
    ended = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < ended, "it did not happen"
        time.sleep(0.02)


def rows_of(process):
    return len(process.run.rows)


@pytest.mark.usefixtures("no_maps")
class TestButtons:
    def test_start_pause_and_go_on(self, begun):
        view = TrainingView(begun)
        assert (view.start.description, view.start.disabled, view.stop.disabled) == ("start", False, True)
        assert "nothing is trained yet" in view.said.value

        view.start.click()
        until(lambda: rows_of(begun) > 5)
        view.refresh(force=True)
        assert (view.start.disabled, view.stop.disabled) == (True, False)
        assert "up to step" in view.curves.value
        assert "step" in view.said.value and "of 1,000" in view.said.value and "left" in view.said.value
        begun.start()  # there is one already
        assert begun.holder.process == begun._child.pid

        view.stop.click()
        assert view.stop.disabled and "is being finished" in view.said.value
        until(lambda: not begun.is_running)
        view.refresh()
        step = begun.run.step
        assert step == rows_of(begun) - 1
        assert f"paused at step {step:,} of 1,000; everything up to there is saved" in view.said.value
        assert (view.start.description, view.start.disabled, view.stop.disabled) == ("go on", False, True)

        view.start.click()
        until(lambda: rows_of(begun) > step + 3)

    @pytest.mark.parametrize("error", [RunError("snapshot 3 is damaged"), RuntimeError("unforeseen")])
    def test_what_cannot_be_drawn_leaves_the_buttons_alone(self, begun, monkeypatch, error):
        view = TrainingView(begun)
        view.start.click()
        until(lambda: rows_of(begun) > 2)

        def fail(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(RunPictures, "snapshot", fail)
            view.refresh(force=True)
        assert str(error) in view.said.value and "of 1,000" in view.said.value
        assert not view.stop.disabled
        view.refresh(force=True)
        assert str(error) not in view.said.value, "drawn again, it is no longer told"
        view.stop.click()
        until(lambda: not begun.is_running)

    def test_an_error_is_told_by_the_last_words(self, begun, monkeypatch):
        command = [sys.executable, "-c", "import sys; sys.exit('Error: no images under pictures')"]
        monkeypatch.setattr(TrainingProcess, "command", lambda _: command)
        view = TrainingView(begun)
        view.start.click()
        until(lambda: not begun.is_running)
        view.refresh()
        assert "its process said last: Error: no images under pictures" in view.said.value
        assert not view.start.disabled
        with pytest.raises(TrainingError, match="no images under pictures"):
            training_cell.check_end(begun)

    def test_what_cannot_be_started_says_so(self, finished, tmp_path, monkeypatch):
        shutil.copytree(finished, tmp_path / "watched")
        (tmp_path / "watched" / "config.yaml").write_text("kind: monitored\nsteps: 10\n")
        view = TrainingView(tmp_path / "watched")
        monkeypatch.setattr(training_process.BackgroundProcess, "is_running", property(lambda _: False))
        facts = json.loads((tmp_path / "watched" / "provenance.json").read_text()) | {"status": "stopped"}
        (tmp_path / "watched" / "provenance.json").write_text(json.dumps(facts))
        view.start.click()
        assert "cannot be started from here: your own training goes on with it" in view.said.value

    def test_a_training_of_another_machine_is_stopped_there(self, begun, monkeypatch):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(training_process, "find_holder", lambda _: SimpleNamespace(host="node7", process=1))
            with pytest.raises(ViewError, match="trains on node7; stop it there"):
                begun.stop()
            view = TrainingView(begun)
            view.stop.click()
            assert "trains on node7" in view.said.value


class TestRuns:
    @pytest.mark.usefixtures("warm_start")
    def test_the_real_process_trains_to_the_same_end(self, finished, tmp_path):
        process = TrainingProcess.begin(recipe_config("builtin/smoke", SETTINGS), tmp_path / "apart")
        process.start()
        until(lambda: not process.is_running, patience=300)
        assert process.is_finished, process.last_words()
        ours, theirs = Run(finished), process.run
        assert [row["loss"] for row in ours.rows[1:]] == [row["loss"] for row in theirs.rows[1:]]
        assert "resumed" not in theirs.provenance  # it was begun once
        assert process.command()[1:3] == ["-m", "ibqlab"]

    def test_begin_finds_the_run_that_is_there_as_it_is(self, finished):
        before = (finished / "provenance.json").read_bytes()
        process = TrainingProcess.begin(recipe_config("builtin/smoke", SETTINGS), finished)
        process.start()
        assert not process.is_running and (finished / "provenance.json").read_bytes() == before

    def test_several_processes_are_torchruns(self, config, tmp_path):
        process = TrainingProcess.begin(recipe_config("builtin/smoke", SETTINGS | {"processes": 2}), tmp_path / "two")
        assert process.command()[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    @pytest.mark.parametrize(
        ("rows", "line"),
        [
            ([], "x: step 0 of 100 · the first steps are coming"),
            ([{"step": 0, "seconds": 0.0}], "x: step 0 of 100 · the first steps are coming"),
            (
                [{"step": 0, "seconds": 0.0}, {"step": 10, "loss": 0.5, "usage": 0.25, "seconds": 20.0}],
                "x: step 10 of 100 · loss 0.500 · window usage 25.0% · 3 min 0 s left",
            ),
            ([{"step": 5, "loss": None}], "x: step 5 of 100 · the first steps are coming"),
        ],
    )
    def test_where_it_stands_in_words(self, rows, line):
        assert describe_rows("x", rows, 100) == line


@pytest.mark.usefixtures("no_maps")
class TestView:
    def test_a_finished_run_is_shown_and_not_watched(self, finished, monkeypatch):
        monkeypatch.undo()
        view = TrainingView(finished)
        assert view.start.disabled and view.stop.disabled
        assert "up to step 4" in view.curves.value
        assert "done, step 4: map of codes and features" in view.code_map.value
        assert "done, step 4: hits per code" in view.histogram.value
        assert not view.is_watched
        data = view._repr_mimebundle_()
        assert "up to step 4" in data["text/html"] and "finished at step 4" in data["text/plain"]

    def test_watching_ends_with_the_run_and_with_the_view(self, begun):
        """In a kernel's loop: a task per view, which ends by itself."""

        async def watched(end):
            view = TrainingView(begun, every=0.2)
            begun.start()
            await asyncio.sleep(0.5)
            assert not view._watching.done()
            end(view)
            await asyncio.wait_for(asyncio.shield(view._watching), 20)

        def leave(view):
            view._view_count = 1
            view._view_count = 0

        asyncio.run(watched(lambda view: view.close()))
        asyncio.run(watched(leave))

        def finish(_):
            begun.stop(10)
            facts = begun.run.provenance | {"status": "finished"}
            (begun.path / "provenance.json").write_text(json.dumps(facts))

        asyncio.run(watched(finish))

    def test_a_folder_that_is_deleted_meanwhile(self, finished, tmp_path):
        shutil.copytree(finished, tmp_path / "gone")
        view = TrainingView(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
        view.refresh(force=True)
        assert "there is no such run folder" in view.said.value and "Traceback" not in view.said.value
        assert "opacity" in view.curves.value and view.start.disabled
        assert not view.is_watched

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda folder: folder, "holds no config.yaml"),
            (lambda folder: folder / "nowhere", "nowhere"),
            (lambda folder: (folder / "config.yaml").write_text("a: [") and folder, "damaged run"),
        ],
    )
    def test_what_is_no_run_is_told_in_a_sentence(self, make, says, tmp_path):
        view = TrainingView(str(make(tmp_path)))
        assert says in view.said.value and view.start.disabled and view.stop.disabled
        view.start.click()
        assert says in view.said.value

    def test_names_from_outside_are_text(self, finished, tmp_path):
        shutil.copytree(finished, tmp_path / "<b>x")
        view = TrainingView([tmp_path / "<b>x", finished])
        assert "<b>x" not in view.static_html()

    def test_an_alarm_is_told_where_the_run_collapses(self, finished, tmp_path):
        shutil.copytree(finished, tmp_path / "collapsed")
        event = {
            "step": 3,
            "rule": "few_codes",
            "title": "few codes",
            "seen": "2 of 64 codes",
            "cause": "c",
            "remedy": "r",
        }
        (tmp_path / "collapsed" / "alarms.jsonl").write_text(json.dumps(event) + "\n")
        view = TrainingView(tmp_path / "collapsed")
        assert "alarm at step 3, few codes: 2 of 64 codes. Likely cause: c. Try: r" in view.alarms.value

    def test_looks_get_rarer_where_drawing_takes_long(self, finished, monkeypatch):
        view = TrainingView(finished)
        clock = {"wall": 100.0, "cpu": 0.0}
        fake = SimpleNamespace(monotonic=lambda: clock["wall"], thread_time=lambda: clock["cpu"])
        monkeypatch.setattr("ibqlab.widgets.training_view.time", fake)
        drawn = []

        def slow(name):
            drawn.append(name)
            clock["cpu"] += 1.0

        monkeypatch.setattr(view, "_draw", slow)
        monkeypatch.setattr(view, "_state", lambda _: len(drawn))  # always something new
        view._due = 0.0
        for later, pictures in ((0, 1), (1 / SHARE_OF_TIME - 0.1, 1), (1 / SHARE_OF_TIME + 0.1, 2)):
            clock["wall"] = 100 + later
            view.refresh()
            assert len(drawn) == pictures

    def test_several_runs_share_a_chart(self, finished, tmp_path):
        shutil.copytree(finished, tmp_path / "other")
        view = TrainingView([finished, tmp_path / "other"])
        assert "validation usage of 2 runs, up to step 4" in view.together.value
        view.measure.value = "loss"
        assert "loss of 2 runs, up to step 4" in view.together.value
        view.choice.value = "other"
        assert "curves of other" in view.curves.value
        view.measure.value = "gradient_reach"
        assert "gradient reach" in view.together.value

    @pytest.mark.parametrize(("runs", "every"), [([], 2), ("x", 0.1)])
    def test_what_cannot_be_is_refused(self, runs, every):
        with pytest.raises(ValueError, match="at least"):
            TrainingView(runs, every=every)


class TestPlane:
    def shot(self, scale=1.0, turn=False, codes=30, dim=6, seed=0):
        draw = np.random.default_rng(seed)
        widths = np.array([5.0, 3.0, *[0.1] * (dim - 2)])
        widths = widths[::-1] if turn else widths
        features = draw.normal(size=(40, dim)) * widths * scale
        return {"codebook": features[:codes] * 0.5, "features": features, "counts": np.arange(codes)}

    def test_stays_while_points_move(self):
        plane, first, second = LivePlane(), self.shot(), self.shot(scale=1.5)
        plane.add(0, first)
        places = plane.projection.codes[0].copy()
        plane.add(10, second)
        assert plane.fitted_at == 0 and plane.steps == [0, 10]
        projection = plane.projection
        np.testing.assert_array_equal(projection.codes[0], places)
        # One straight map of all snapshots: what grows by half in the full space does so in the plane.
        moved = projection.features[1] - 1.5 * projection.features[0]
        np.testing.assert_allclose(moved, np.broadcast_to(moved[0], moved.shape), atol=1e-4)
        assert "plane is that of step 0" in plane.describe() and "100 %" in plane.describe()

    def test_is_fitted_again_where_it_shows_too_little(self):
        plane = LivePlane()
        plane.add(0, self.shot())
        plane.add(10, self.shot(turn=True))
        assert plane.fitted_at == 10 and plane.steps == [10]
        assert LEAST_SHARE == 0.5 and "50 %" not in plane.describe()

    def test_another_codebook_is_another_plane(self):
        plane = LivePlane()
        plane.add(0, self.shot())
        plane.add(10, self.shot(codes=20))
        assert plane.steps == [10] and plane.projection.codebook_sizes == (20,)

    def test_nan_is_told(self):
        shot = self.shot()
        shot["features"][0, 0] = np.nan
        with pytest.raises(ViewError, match="step 5: its snapshot holds NaN"):
            LivePlane().add(5, shot)


@pytest.mark.usefixtures("no_maps")
class TestCell:
    """What the cell of a notebook does in JupyterLab."""

    @pytest.fixture(autouse=True)
    def before_a_person(self, monkeypatch):
        shown = []
        monkeypatch.setattr(training_cell, "somebody_looks_on", lambda: True)
        monkeypatch.setattr("IPython.display.display", shown.append)
        return shown

    def test_without_waiting_the_kernel_is_free_at_once(self, begun, config, before_a_person):
        asyncio.run(train_and_watch(config, begun.path, wait=False))
        (view,) = before_a_person
        assert view.process.is_running
        with pytest.raises(
            training_cell.NotFinished, match="is not finished, which this part of the notebook needs"
        ) as error:
            finished_run(begun.path)
        assert error.value._render_traceback_() == [str(error.value)]
        view.process.stop(10)

    @pytest.mark.parametrize("how", ["stopped elsewhere", "interrupt"])
    def test_a_stopped_cell_says_how_to_go_on(self, how, begun, config, before_a_person):
        async def run():
            cell = asyncio.ensure_future(caught(train_and_watch(config, begun.path)))
            while not before_a_person or rows_of(begun) < 3:
                await asyncio.sleep(0.02)
            cell.cancel() if how == "interrupt" else TrainingProcess(begun.path).stop()
            return await cell

        async def caught(work):  # as the kernel does: an error that ends asyncio's own task would end the loop
            try:
                await work
            except TrainingInterrupted as error:
                return error

        error = asyncio.run(run())
        assert str(error) == (
            f"stopped at step {begun.run.step} of 1000, everything is saved; go on with the same command"
        )
        assert begun.run.status == "stopped"

    @pytest.mark.parametrize("then", ["goes on", "freed", "interrupted"])
    def test_a_pause_is_waited_through(self, then, begun, config, before_a_person):
        """Cells below run when the training is finished, however often it was paused."""

        async def run():
            cell = asyncio.ensure_future(caught(train_and_watch(config, begun.path)))
            while not before_a_person or rows_of(begun) < 3:
                await asyncio.sleep(0.02)
            view = before_a_person[0]
            view.stop.click()
            while view.process.is_running:
                await asyncio.sleep(0.02)
            await asyncio.sleep(2 * training_view._POLL)
            assert not cell.done() and view.free.layout.display == ""
            if then == "interrupted":
                cell.cancel()
            elif then == "freed":
                view.free.click()
            else:
                paused_at = begun.run.step
                view.start.click()
                while rows_of(begun) <= paused_at:
                    await asyncio.sleep(0.02)
                assert not cell.done()
                TrainingProcess(begun.path).stop()  # by somebody else, which ends the wait
            return await cell

        async def caught(work):
            try:
                await work
            except TrainingInterrupted as error:
                return error

        error = asyncio.run(run())
        assert (error is None) == (then == "freed")

    def test_the_button_frees_the_kernel(self, begun, config, before_a_person):
        async def run():
            cell = asyncio.ensure_future(train_and_watch(config, begun.path))
            while not before_a_person:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0)
            view = before_a_person[0]
            while view.free.layout.display == "none":
                await asyncio.sleep(0.02)
            view.free.click()
            await cell
            return view

        view = asyncio.run(run())
        assert view.process.is_running and view.free.layout.display == "none"
        view.process.stop(10)

    def test_a_finished_run_is_shown_and_returned(self, finished, before_a_person):
        asyncio.run(train_and_watch(recipe_config("builtin/smoke", SETTINGS), finished))
        assert "finished at step 4" in before_a_person[0].said.value
        assert finished_run(finished).path == finished


@pytest.mark.usefixtures("no_maps", "warm_start")
class TestStudies:
    @pytest.fixture
    def study(self, tmp_path):
        settings = {"methods": ("vq", "ibq"), "initialisations": ("published",), "steps": 1}
        return open_study(
            "explore_collapse", StudyParameters(preset="smoke", output=str(tmp_path / "study"), **settings)
        )

    def test_its_process_trains_every_run(self, study, tmp_path, monkeypatch):
        process = StudyProcess(study)
        assert "0 of 2 runs are finished; " in process.describe() and not process.is_running
        with pytest.raises(training_cell.NotFinished, match="0 of 2 runs are finished"):
            require_finished(study)
        done = subprocess.run(process.command(), capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert process.is_finished and "2 of 2 runs are finished" in process.describe()
        require_finished(study)
        view = TrainingView(study)
        assert view.choice.value == NEWEST and "of 2 runs, up to step 1" in view.together.value
        assert [label for label, _ in view.paths.items()] == list(process.labels.values())
        assert view.chosen in view.paths and f"curves of {view.chosen}" in view.curves.value
        shown = []
        monkeypatch.setattr("IPython.display.display", shown.append)
        asyncio.run(train_study(study))  # nothing is left to train, so the page without a hand shows what there is
        assert "of 2 runs, up to step 1" in shown[0].together.value


def test_snapshots_without_hits_are_told_of(tmp_path):
    run = Run.start(tmp_path / "old", {"kind": "monitored", "codebook_size": 4})
    run.log({"step": 1, "loss": 0.5})
    run.save_snapshot(1, codebook=np.ones((4, 2), np.float32), features=np.ones((5, 2), np.float32))
    view = TrainingView(run.path)
    assert "no hits per code: the snapshots of old hold none" in view.histogram.value and "<img" in view.curves.value


def test_a_view_of_nothing_says_what_to_pass():
    for nothing in (None, []):
        with pytest.raises(ValueError, match="pass a run's name or folder"):
            TrainingView(nothing)
