"""The lab without images: its worlds, features out of files, what a run records, and every picture of it."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ibqlab.base.measures import is_measure
from ibqlab.diagnostics.lab import (
    FeatureFile,
    FeaturesLabParameters,
    LabSettings,
    PlaygroundParameters,
    World,
    feature_files,
    laboratory,
    prepare_lab,
    run_lab,
)
from ibqlab.diagnostics.lab.methods import lab_methods, read_methods
from ibqlab.diagnostics.recorder import Recorder
from ibqlab.plots import plot_run_curves
from ibqlab.plots.lab import (
    lab_curve_table,
    lab_plane_table,
    plot_lab_curves,
    plot_lab_plane,
    save_lab_figure,
    show_lab_table,
    write_lab_animation,
)
from ibqlab.plots.printing import draw
from ibqlab.quantizers import LookupFreeQuantizer, VectorQuantizer, available_quantizers, build_quantizer, composite
from ibqlab.quantizers.composite import stored_codebook_numbers
from ibqlab.runs import Run, RunError, list_runs
from ibqlab.runs.metrics import read_rows
from ibqlab.studies import write_lab_report
from ibqlab.studies.figures import map_run
from ibqlab.studies.run_report import write_run_report
from ibqlab.widgets import explore_lab

COUNTED = {"step", "step_tokens", "usage_tokens", "validation_tokens"}
SMALL = {"codebook_size": 16, "steps": 12, "batch_size": 64, "snapshots": 4, "progress": False}
METHODS = {"vq": {"name": "vq"}, "ibq, U(±1/K)": {"name": "ibq", "codebook_init": "uniform"}, "lfq": {"name": "lfq"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab") / "small"


@pytest.fixture(scope="module")
def result(folder):
    return run_lab(World(encoder="drifting"), METHODS, folder=folder, **SMALL)


class TestWorld:
    def test_points_depend_on_seed_and_step_alone(self):
        world = World(dim=3, seed=4)
        assert torch.equal(world.points(50, 7), World(dim=3, seed=4).points(50, 7))
        others = [world.points(50, 8), world.points(50, 7, validation=True), World(dim=3, seed=5).points(50, 7)]
        assert not any(torch.equal(world.points(50, 7), other) for other in others)

    def test_points_lie_in_the_clusters(self):
        world = World(dim=4, clusters=5, width=0.1)
        distances = torch.cdist(world.points(2000, 0), torch.from_numpy(world.centres)).min(1)
        assert len(distances.indices.unique()) == 5
        # The mean norm of four numbers of N(0, 0.1²) is 0.188.
        assert distances.values.mean() == pytest.approx(0.188, rel=0.05)

    def test_a_drifting_encoder_turns_and_shifts_and_stretches_nothing(self):
        points = World().points(100, 0)
        assert torch.equal(World().features(points, 0.7), points)
        drifting = World(encoder="drifting", spread=1.5)
        assert torch.allclose(drifting.features(points, 0.0), points)
        moved = drifting.features(points, 1.0)
        assert torch.allclose(moved, torch.stack([3.0 - points[:, 0], -points[:, 1]], 1), atol=1e-5)
        assert torch.allclose(torch.pdist(moved), torch.pdist(points), atol=1e-4)

    def test_a_learning_encoder_is_moved_by_what_the_codes_cannot_say(self):
        torch.manual_seed(0)
        encoder, _ = World(dim=3, encoder="learning").networks(3)
        assert (encoder(torch.eye(3)) - torch.eye(3)).abs().max() < 1
        learned = run_lab(World(encoder="learning"), ["vq"], **SMALL | {"steps": 60})
        assert learned.snapshot("vq", 0)["features"].shape == learned.snapshot("vq")["features"].shape
        assert np.abs(learned.snapshot("vq", 0)["features"] - learned.snapshot("vq")["features"]).max() > 0.1

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"encoder": "drifing"}, "did you mean 'drifting'"),
            ({"dim": 0}, "dim must be at least 1"),
            ({"clusters": 0}, "clusters must be at least 1"),
            ({"spread": 0.0}, "spread is a standard deviation and must be > 0"),
            ({"width": -1.0}, "width .* must be ≥ 0"),
            ({"drift": float("nan")}, "drift must be a finite number"),
        ],
    )
    def test_impossible_worlds_are_refused(self, settings, says):
        with pytest.raises(ValueError, match=says):
            World(**settings)


class TestRun:
    def test_rows_are_the_recorders_with_losses_and_error(self, result):
        quantizer = build_quantizer("vq", codebook_size=16, code_dim=2)
        reported = set(Recorder(quantizer, 10, 4).report(torch.zeros(2, 2, 1, 1), 0))
        rows = result.runs["vq"].rows
        assert [row["step"] for row in rows] == list(range(13))
        assert all(set(row) >= reported | {"loss", "quantizer_loss", "quantization_error"} for row in rows[1:])
        assert {"validation_usage", "validation_quantization_error"} <= set(rows[0]) & set(rows[-1])
        assert {key for row in rows for key in row if not is_measure(key)} <= COUNTED

    def test_the_first_step_by_hand(self, result):
        torch.manual_seed(0)
        quantizer = build_quantizer("vq", codebook_size=16, code_dim=2)
        points = World().points(64, 1)
        distances = torch.cdist(points, quantizer.codebook.detach())
        row = result.runs["vq"].rows[1]
        assert row["step_usage"] == len(distances.argmin(1).unique()) / 16
        error = float(distances.min(1).values.square().mean()) / 2
        assert row["quantization_error"] == pytest.approx(error, rel=1e-5)
        # Reconstruction, commitment, and a quarter on the codes' side: three times the same number.
        assert row["loss"] == pytest.approx(2.25 * error, rel=1e-5)

    def test_all_methods_see_the_same_features_from_the_same_start(self, result):
        for step in result.snapshot_steps:
            shown = [result.snapshot(label, step)["features"] for label in METHODS]
            assert all(np.array_equal(shown[0], other) for other in shown[1:])
        first = [result.snapshot(label, 0)["codebook"] for label in METHODS]
        assert np.array_equal(first[0], first[1])  # both U(±1/K)
        assert not np.array_equal(result.snapshot("vq")["codebook"], first[0])

    def test_snapshots_count_what_the_validation_hit(self, result):
        for label, run in result.runs.items():
            last = run.snapshots[12]
            assert last["counts"].sum() == 160 == run.rows[-1]["validation_tokens"], label
            assert (last["counts"] > 0).mean() == run.rows[-1]["validation_usage"]
            assert last["assignments"].max() < len(last["codebook"]) == run.config.codebook_size
        assert result.runs["lfq"].config.codebook_size == 4

    def test_made_again_it_is_the_same_and_disturbs_nobody(self, result):
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        again = run_lab(World(encoder="drifting"), METHODS, **SMALL)
        assert torch.equal(torch.rand(3), expected)
        for label, run in again.runs.items():
            assert run.rows == result.runs[label].rows
        assert np.array_equal(again.snapshot("vq")["codebook"], result.snapshot("vq")["codebook"])

    @pytest.mark.parametrize("encoder", ["fixed", "learning"])
    def test_every_registered_quantizer_runs(self, encoder):
        every = run_lab(World(dim=4, encoder=encoder), available_quantizers(), **SMALL | {"steps": 3})
        table = every.table()
        assert list(table["method"]) == available_quantizers()
        assert np.isfinite(table.drop(columns=["method", "quantizer", "start", "failed"]).astype(float)).all(axis=None)

    def test_codes_that_no_feature_chooses_stay_and_revival_moves_them(self):
        methods = read_methods(["vq codebook_init=normal", "vq codebook_init=normal revive_after=5"])
        moved = run_lab(World(encoder="drifting"), methods, **SMALL | {"codebook_size": 64, "steps": 60})
        plain, revived = (result_of["counts"] > 0 for result_of in (moved.snapshot(label) for label in methods))
        assert revived.mean() > plain.mean() + 0.2
        start, end = (moved.snapshot("vq, N(0, 1)", step) for step in (0, 60))
        never = end["last_hit"] < 0
        assert never.any() and np.array_equal(start["codebook"][never], end["codebook"][never])

    def test_a_grid_of_many_codes_costs_no_more_than_it_teaches(self, monkeypatch):
        monkeypatch.setattr(laboratory, "MOST_VALIDATED", 200)
        wide = run_lab(World(dim=10), ["lfq"], **SMALL | {"steps": 1})
        assert wide.table()[["codebook_size", "tokens"]].iloc[0].tolist() == [1024, 200]
        assert "fewer than 10·K = 10,240" in plot_lab_curves(wide.metrics).get_supxlabel().replace("\n", " ")

    def test_error_share_is_the_variance_that_is_lost(self, result):
        last = result.snapshot("vq")
        codes, features = last["codebook"][last["assignments"]], last["features"]
        lost = ((features - codes) ** 2).sum() / ((features - features.mean(0)) ** 2).sum()
        assert result.table()["error_share"][0] == pytest.approx(lost, rel=1e-4)

    def test_snapshot_steps_hold_first_and_last_and_lie_closer_early(self):
        steps = LabSettings(steps=400, snapshots=24).snapshot_steps
        assert steps[0] == 0 and steps[-1] == 400 and len(steps) <= 26
        assert sum(step <= 50 for step in steps) >= 8
        assert LabSettings(steps=1, snapshots=2).snapshot_steps == [0, 1]

    @pytest.mark.parametrize(
        ("methods", "settings", "says"),
        [
            ([], {}, "methods must name 1 to 100 quantizers"),
            (["vq", "vq"], {}, "methods holds 'vq' twice"),
            (["vqq"], {}, "did you mean 'vq'"),
            ("mine", {}, r"got 'mine'.*plugins=\['FILE.py'\] in a notebook"),
            ({"a": "mine"}, {}, r"method 'a'.*got 'mine'.*import_plugins"),
            (None, {}, r'type "vq", \["vq", "ibq"\] or .*; got None'),
            ([{"name": "vq"}], {}, r"label → settings: type.*got \[\{'name'"),
            ({"a": {"name": "vq", "code_dim": 5}}, {}, "method 'a': code_dim must be the dimension of the features, 2"),
            ({"a": {"name": "vq", "codebok_size": 5}}, {}, "method 'a'.*codebook_size"),
            ({"a": {}}, {}, "method 'a'.*needs a name"),
            (["vq"], {"steps": 0}, "steps must be at least 1"),
            (["vq"], {"step": 5}, "did you mean 'steps'"),
            (["vq"], {"learning_rate": 0.0}, "learning_rate must be > 0"),
            (["vq"], {"codebook_init": "grid"}, "codebook_init must be one of 'uniform'"),
        ],
    )
    def test_impossible_labs_are_refused(self, methods, settings, says, tmp_path):
        with pytest.raises(ValueError, match=re.compile(says, re.DOTALL)):
            run_lab(World(), methods, folder=tmp_path / "none", **settings)
        assert not (tmp_path / "none").exists()

    def test_what_are_no_features_is_told_how_to_become_some(self):
        with pytest.raises(ValueError, match=r"a World or a FeatureFile; got ndarray.*FeatureFile\(features\)"):
            run_lab(ROWS, ["vq"], **SMALL)

    def test_one_name_is_enough(self):
        seen = run_lab(World(), "vq revive_after=5", **SMALL | {"steps": 1})
        assert [config.revive_after for config in (run.config for run in seen.runs.values())] == [5]

    def test_a_loss_that_is_no_number_says_what_to_change(self):
        with pytest.raises(ValueError, match=r"the loss is .* lower learning_rate, or the world's spread"):
            run_lab(World(spread=1e30), ["vq"], **SMALL)
        with pytest.raises(ValueError, match=r"lower learning_rate, or bring .* standardise=True"):
            run_lab(FeatureFile(ROWS * np.float32(1e30)), ["vq"], **SMALL)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """A lab of three methods; the first diverges at step 3, the last raises an error of its own."""
    folder = tmp_path_factory.mktemp("halved") / "lab"
    forward, look_up = VectorQuantizer.forward, LookupFreeQuantizer.forward

    def diverge(quantizer, features):
        out = forward(quantizer, features)
        return out._replace(loss=out.loss * (float("nan") if quantizer.progress > 0.15 else 1))

    def raise_error(quantizer, features):
        raise RuntimeError("out of\nmemory") if quantizer.training else look_up(quantizer, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VectorQuantizer, "forward", diverge)
        patch.setattr(LookupFreeQuantizer, "forward", raise_error)
        return run_lab(World(), ["vq", "ibq", "lfq"], folder=folder, **SMALL)


class TestFailure:
    """A method that diverges or raises an error ends alone."""

    def test_the_others_are_as_without_it(self, halved):
        alone = run_lab(World(), ["ibq"], **SMALL)
        assert list(halved.runs) == ["ibq"] and halved.runs["ibq"].rows == alone.runs["ibq"].rows
        assert halved.failures["lfq"].reason == "RuntimeError: out of memory"

    def test_its_folder_keeps_its_rows_and_the_reason(self, halved):
        run = Run(halved.folder / "vq")
        assert run.status == "failed" and "the loss is nan at step 3" in run.provenance["reason"]
        assert list(run.metrics["step"]) == [0, 1, 2] and Run(halved.folder / "ibq").status == "finished"

    def test_table_figures_and_slider_say_it_in_a_sentence(self, halved, tmp_path):
        said = "vq failed and is not shown: the loss is nan at step 3"
        table = halved.table().set_index("method")
        assert table.loc["vq", "failed"].startswith("the loss is nan") and np.isnan(table.loc["vq", "usage"])
        assert table.loc["ibq", "failed"] == ""
        shown = show_lab_table(halved)
        assert list(shown["method"]) == ["IBQ", "VQ", "LFQ"] and list(shown["usage"])[1:] == ["–", "–"]
        lab_plane_table(halved).to_csv(tmp_path / "plane.csv")
        plane = plot_lab_plane(pd.read_csv(tmp_path / "plane.csv"))
        for figure in (plane, plot_lab_curves(halved.metrics)):
            assert said in figure.get_supxlabel().replace("\n", " ")
        assert said in explore_lab(halved).numbers.value
        with pytest.raises(ValueError, match="vq has no snapshots, because it failed"):
            halved.snapshot("vq")

    def test_made_again_only_what_failed_is_computed(self, halved):
        again = run_lab(World(), ["vq", "ibq", "lfq"], folder=halved.folder, **SMALL)
        assert not again.failures and again.failed == "" and "failed" not in show_lab_table(again)
        assert (
            again.runs["vq"].rows
            == run_lab(World(), ["vq"], **SMALL).runs["vq"].rows
            == tuple(read_rows(halved.folder / "vq"))
        )

    def test_where_none_finishes_each_reason_is_told(self):
        with pytest.raises(ValueError, match=r"not one of 2 methods finished\nvq: .*\nvq, N\(0, 1\): .*learning_rate"):
            run_lab(World(spread=1e30), ["vq", "vq codebook_init=normal"], **SMALL)


@pytest.mark.parametrize("name", ["residual", "grouped", "multi_scale", "hierarchical"])
def test_snapshots_of_many_combinations_hold_their_parts_codebooks(name, monkeypatch, tmp_path):
    settings = SMALL | {"codebook_size": 64, "steps": 2}
    plain = run_lab(World(dim=4), name, folder=tmp_path / "plain", **settings)
    monkeypatch.setattr(composite, "MOST_STORED", 100)
    parts = run_lab(World(dim=4), name, folder=tmp_path / "parts", **settings)
    config = parts.runs[name].config
    stored = [array for key, array in parts.runs[name].snapshots[2].items() if key.endswith("_codebooks")]
    assert len(stored) == 1 and stored[0].size == stored_codebook_numbers(config) < config.codebook_size * 4
    (file,) = (tmp_path / "parts" / name / "snapshots").glob("*2.npz")
    assert file.stat().st_size < (tmp_path / "plain" / name / "snapshots" / file.name).stat().st_size
    for snapshot in (parts.snapshot(name), Run(tmp_path / "parts" / name).snapshot()):
        assert not any(key.endswith("_codebooks") for key in snapshot)
        np.testing.assert_allclose(snapshot["codebook"], plain.snapshot(name)["codebook"], atol=1e-6)
    assert parts.table()["error_share"][0] == pytest.approx(plain.table()["error_share"][0], rel=1e-5)
    pd.testing.assert_frame_equal(lab_plane_table(parts), lab_plane_table(plain), atol=1e-3)


class TestFolder:
    def test_every_reader_opens_it(self, result, folder):
        table = list_runs(folder).set_index("name")
        assert set(table["status"]) == {"finished"} and set(table["quantizer"]) == {"vq", "ibq", "lfq"}
        assert table.loc["vq", "usage"] == result.runs["vq"].rows[-1]["usage"]
        run = Run(folder / "vq")
        assert plot_run_curves(run.metrics).axes
        assert map_run(run, "pca")[1][-1] == 12
        page = write_run_report(run)
        assert "Codes among features" in page.with_suffix(".md").read_text()

    def test_what_is_finished_is_read_and_not_made_again(self, result, folder, monkeypatch):
        monkeypatch.setattr(laboratory._Bench, "run", lambda bench: pytest.fail("made again"))
        again = run_lab(World(encoder="drifting"), METHODS, folder=folder, **SMALL)
        for label, run in again.runs.items():
            assert run.rows == result.runs[label].rows
            assert run.snapshots.keys() == result.runs[label].snapshots.keys()
        assert lab_plane_table(again).equals(lab_plane_table(result))

    def test_other_settings_are_refused_and_nothing_is_changed(self, result, folder):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(RunError, match="steps: 12 → 13"):
            run_lab(World(encoder="drifting"), METHODS, folder=folder, **SMALL | {"steps": 13})
        assert {path: path.stat().st_mtime_ns for path in before} == before

    def test_a_run_that_was_killed_is_made_again_whole(self, result, tmp_path):
        path = tmp_path / "killed"
        run_lab(World(encoder="drifting"), {"vq": METHODS["vq"]}, folder=path, **SMALL)
        file = path / "vq" / "provenance.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running"}))
        (path / "vq" / "snapshots" / "step_00000012.npz").unlink()
        again = run_lab(World(encoder="drifting"), {"vq": METHODS["vq"]}, folder=path, **SMALL)
        assert again.runs["vq"].rows == result.runs["vq"].rows
        run = Run(path / "vq")
        assert run.status == "finished" and run.snapshot_steps == result.snapshot_steps
        assert len(run.metrics) == len(result.runs["vq"].rows)

    def test_labels_become_names_of_folders(self, tmp_path):
        names = {"../x": {"name": "vq"}, "a b": {"name": "vq"}, "a_b": {"name": "vq"}, "..": {"name": "vq"}}
        run_lab(World(), names, folder=tmp_path / "lab", **SMALL | {"steps": 1})
        assert sorted(path.name for path in (tmp_path / "lab").iterdir()) == ["a_b-2", "a_b-3", "method", "x"]


ROWS = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)


def write_features(path, rows=ROWS):
    """A file of the kind that its name says."""
    if path.suffix == ".npy":
        np.save(path, rows)
    elif path.suffix == ".npz":
        np.savez(path, rows)
    elif path.suffix == ".safetensors":
        save_file({"features": torch.from_numpy(rows)}, path)
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"id": range(len(rows)), "features": rows.tolist()}), path)
    return path


class TestFeatureFile:
    @pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
    def test_every_kind_holds_the_same_rows(self, suffix, tmp_path):
        file, plain = FeatureFile(write_features(tmp_path / f"features{suffix}")), FeatureFile(ROWS)
        assert (file.rows, file.dim) == (200, 6)
        assert torch.allclose(file.points(30, 5), plain.points(30, 5))

    def test_arrays_memory_maps_and_tensors(self, tmp_path):
        mapped = np.memmap(tmp_path / "raw", np.float32, "w+", shape=ROWS.shape)
        mapped[:] = ROWS
        plain = FeatureFile(ROWS).points(20, 1)
        assert torch.equal(FeatureFile(mapped).points(20, 1), plain)
        assert torch.equal(FeatureFile(torch.from_numpy(ROWS)).points(20, 1), plain)
        half = torch.from_numpy(ROWS).bfloat16()
        assert torch.allclose(FeatureFile(half).points(20, 1), plain, atol=0.02)

    def test_training_never_sees_a_row_of_validation(self):
        numbered = np.arange(100, dtype=np.float32)[:, None]
        file = FeatureFile(numbered)
        trained = {int(row) for step in range(40) for row in file.points(50, step)}
        held = [int(row) for row in file.points(1000, 0, validation=True)]
        assert len(set(held)) == len(held) == 50
        assert trained == set(range(100)) - set(held)
        assert {int(row) for row in file.points(45, 3, validation=True)} < set(held)

    @pytest.mark.parametrize(("rows", "kept"), [(11, 5), (9_000, 4_500), (20_000, 5_000), (80_000, 8_000)])
    def test_how_many_rows_validate(self, rows, kept):
        assert len(FeatureFile(np.zeros((rows, 1), np.float32)).points(10**6, 0, validation=True)) == kept

    def test_few_rows_are_said_to_make_usage_read_low(self):
        seen = run_lab(FeatureFile(ROWS), ["vq"], **SMALL | {"steps": 2})
        assert seen.table()["tokens"][0] == 100
        for figure in (plot_lab_plane(lab_plane_table(seen)), plot_lab_curves(seen.metrics)):
            caption = figure.get_supxlabel().replace("\n", " ")
            assert "100 validation features, fewer than 10·K = 160: usage reads low" in caption

    def test_standardised_features_have_mean_0_and_variance_1(self):
        file = FeatureFile(ROWS * 30 + 100, standardise=True)
        points = torch.cat([file.points(500, step) for step in range(10)])
        assert points.mean(0).abs().max() < 0.15
        assert points.var(0).mean() == pytest.approx(1, abs=0.1)

    def test_a_million_rows_are_mapped_and_only_drawn_rows_read(self, tmp_path, monkeypatch):
        path = tmp_path / "large.npy"
        large = np.lib.format.open_memmap(path, "w+", np.float16, (1_000_000, 4))
        large[::1000] = 1
        monkeypatch.setattr(feature_files, "CHECKED_NUMBERS", 1000)
        read = []
        original = FeatureFile._read
        monkeypatch.setattr(FeatureFile, "_read", lambda file, rows: read.append(len(rows)) or original(file, rows))
        table = run_lab(FeatureFile(path), ["vq"], **SMALL | {"steps": 2}).table()
        assert table["tokens"][0] == 160
        assert sum(read) < 2000

    def test_nan_in_a_large_file_is_found_when_its_row_is_drawn(self, monkeypatch):
        monkeypatch.setattr(feature_files, "CHECKED_NUMBERS", 10)
        broken = ROWS.copy()
        broken[17] = np.nan
        file = FeatureFile(broken, name="mine")
        with pytest.raises(ValueError, match="mine: features must be finite in float32; row 17 holds NaN"):
            file.points(5000, 1)

    @pytest.mark.parametrize(
        ("rows", "says"),
        [
            (np.where(np.arange(200)[:, None] == 3, np.inf, ROWS), "row 3 holds NaN or infinity, and so do 1 of 200"),
            (np.full((20, 2), 1e300), "must be finite in float32"),
            (ROWS[0], r"must be \(rows, D\).*got \(6,\)"),
            (ROWS.reshape(2, 6, 10, 10), r"got \(2, 6, 10, 10\).*permute"),
            (np.arange(40).reshape(20, 2), "must be floating-point numbers; got int64"),
            (ROWS.astype(complex), "must be floating-point numbers; got complex"),
            (ROWS[:1], "at least 10 rows, since some are kept for validation; got 1"),
            (ROWS[:, :0], r"got \(200, 0\)"),
        ],
    )
    @pytest.mark.parametrize("kind", ["array", "file"])
    def test_what_are_no_features_is_named_with_the_rule(self, rows, says, kind, tmp_path):
        source = rows
        if kind == "file":
            np.save(tmp_path / "features.npy", rows)
            source = tmp_path / "features.npy"
        with pytest.raises(ValueError, match=re.compile(says, re.DOTALL)) as error:
            FeatureFile(source)
        assert ("features.npy" if kind == "file" else "an array") in str(error.value)

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: np.ma.masked_greater(ROWS, 1), r"mine: .* no masked numbers.*; \d+ are masked.*getmaskarray"),
            (lambda: torch.from_numpy(ROWS).to_sparse(), r"mine: .*got one that is torch.sparse_coo.*\.to_dense\(\)"),
            (lambda: torch.empty(20, 2, device="meta"), "mine: .*got one that is on the device meta.*Load the weights"),
            (lambda: torch.nested.nested_tensor([torch.ones(9, 2)]), "mine: .*nested.*torch.cat"),
            (lambda: torch.quantize_per_tensor(torch.ones(20, 2), 0.1, 0, torch.qint8), r"quantized.*dequantize\(\)"),
            (lambda: torch.ones(20, 2).bool(), r"mine: .*got torch.bool.*\.float\(\)"),
            (lambda: torch.ones(20, 2).cfloat(), "got torch.complex64.*features.real"),
            (ROWS.tolist, r"got list\. Use numpy.asarray"),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_arrays_of_other_kinds_are_named_with_a_remedy(self, make, says):
        with pytest.raises(ValueError, match=says):
            FeatureFile(make(), name="mine")

    def test_a_masked_array_without_masked_numbers_is_an_array(self):
        assert torch.equal(FeatureFile(np.ma.masked_array(ROWS)).points(20, 1), FeatureFile(ROWS).points(20, 1))

    def test_a_missing_file_says_where_it_was_looked_for(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"none.npy: there is no such file in {tmp_path};"):
            FeatureFile("none.npy")
        with pytest.raises(FileNotFoundError, match=f"no such file and no folder {tmp_path}/away;"):
            FeatureFile("away/none.npy")

    @pytest.mark.parametrize("scale", [1e-44, 1e-320, 1e38])
    def test_what_float32_cannot_divide_by_is_not_standardised(self, scale):
        with pytest.raises(ValueError, match=r"standard deviation of 1e-36 to 1e\+36|all rows are equal in float32"):
            FeatureFile(np.clip(ROWS.astype(float), -3, 3) * scale, standardise=True)

    @pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e35])
    def test_features_of_any_size_are_standardised_alike(self, scale):
        plain = FeatureFile(ROWS, standardise=True).points(30, 1)
        assert torch.allclose(FeatureFile(ROWS * np.float32(scale), standardise=True).points(30, 1), plain, atol=1e-4)

    def test_a_row_that_cannot_be_standardised_is_refused_when_it_is_drawn(self):
        rows = ROWS * np.float32(1e-20)
        rows[FeatureFile(rows)._held[0]] = 1e30  # the sample that gives the deviation does not hold it
        file = FeatureFile(rows, standardise=True)
        assert torch.isfinite(file.points(1000, 1)).all()
        with pytest.raises(ValueError, match="so far from the others"):
            file.points(200, 0, validation=True)

    def test_other_files_are_named(self, tmp_path):
        (tmp_path / "folder.npy").mkdir()
        with pytest.raises(ValueError, match="is a folder"):
            FeatureFile(tmp_path / "folder.npy")
        (tmp_path / "x.pt").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"x\.pt: features are read from \.npy, \.npz"):
            FeatureFile(tmp_path / "x.pt")
        for suffix in (".npy", ".npz", ".safetensors"):
            whole = write_features(tmp_path / f"cut{suffix}")
            whole.write_bytes(whole.read_bytes()[:300])
            with pytest.raises(ValueError, match=f"cut{suffix}"):
                FeatureFile(whole)
        np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"objects\.npy is no \.npy file, or holds Python objects"):
            FeatureFile(tmp_path / "objects.npy")
        with pytest.raises(ValueError, match="features are a file's path, an array or a tensor; got list"):
            FeatureFile([[1.0, 2.0]])

    def test_one_of_several_arrays_must_be_named(self, tmp_path):
        np.savez(tmp_path / "two.npz", a=ROWS, b=ROWS + 1)
        with pytest.raises(ValueError, match=r"holds several arrays: a, b\. Say which: column='a'"):
            FeatureFile(tmp_path / "two.npz")
        with pytest.raises(ValueError, match="has no array 'c' of floats; there are: a, b"):
            FeatureFile(tmp_path / "two.npz", "c")
        chosen = FeatureFile(tmp_path / "two.npz", "b")
        assert torch.allclose(chosen.points(9, 1), FeatureFile(ROWS).points(9, 1) + 1)
        assert chosen.describe() == "200 rows of two.npz, b"
        with pytest.raises(ValueError, match=r"features\.npy holds one array; column belongs to other formats"):
            FeatureFile(write_features(tmp_path / "features.npy"), "a")

    def test_parquet_without_its_library_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
        (tmp_path / "x.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match="pip install pyarrow"):
            FeatureFile(tmp_path / "x.parquet")

    def test_parquet_columns_of_numbers_and_bad_lists(self, tmp_path):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {f"x{number}": ROWS[:, number] for number in range(6)}
        parquet.write_table(arrow.table({"id": range(200), **columns}), tmp_path / "wide.parquet")
        wide = FeatureFile(tmp_path / "wide.parquet")
        assert torch.allclose(wide.points(9, 1), FeatureFile(ROWS).points(9, 1))
        assert FeatureFile(tmp_path / "wide.parquet", "x3").dim == 1
        odd = [[1.0, 2.0]] * 19 + [[1.0]]
        parquet.write_table(arrow.table({"f": odd}), tmp_path / "odd.parquet")
        with pytest.raises(ValueError, match="all lists must have one length"):
            FeatureFile(tmp_path / "odd.parquet")

    def test_rows_that_are_all_equal_cannot_be_standardised(self):
        with pytest.raises(ValueError, match="all rows are equal"):
            FeatureFile(np.ones((30, 2)), standardise=True)


PANELS = [("vq", 0), ("vq", 12), ("lfq", 0), ("lfq", 12)]


def texts_of(figure):
    """Titles, captions and legends."""
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


class TestPictures:
    def test_the_plane_of_a_world_of_two_dimensions_is_the_world(self, result):
        table = lab_plane_table(result)
        codes = table[(table["method"] == "vq") & (table["kind"] == "code")]
        last = result.snapshot("vq")
        assert np.allclose(codes[["x", "y"]], last["codebook"], atol=1e-4)
        assert np.array_equal(codes["hits"], last["counts"])
        first = table.drop_duplicates("method").set_index("method")
        assert first.loc["vq", "in_use"] == (last["counts"] > 0).sum()
        assert table.loc[0, "left"] < table["x"].quantile(0.01) and table.loc[0, "right"] > table["x"].quantile(0.99)

    def test_a_figure_is_drawn_again_from_its_csv(self, result, tmp_path):
        table = lab_plane_table(result, [0, 12], ["vq", "lfq"])
        table.to_csv(tmp_path / "plane.csv", index=False)
        figure, again = plot_lab_plane(table), plot_lab_plane(pd.read_csv(tmp_path / "plane.csv"))
        assert np.array_equal(np.asarray(draw(figure, 60)), np.asarray(draw(again, 60)))
        hits = {panel: int((result.snapshot(*panel)["counts"] > 0).sum()) for panel in PANELS}
        sizes = {"vq": ("VQ", 16), "lfq": ("LFQ", 4)}
        assert [axes.get_title() for axes in figure.axes[:4]] == [
            f"{sizes[label][0]}\nstep {step}: {in_use} of {sizes[label][1]} in use"
            for (label, step), in_use in hits.items()
        ]

    def test_more_dimensions_are_shown_along_the_two_widest(self):
        wide = ROWS * np.array([1, 9, 1, 1, 4, 1])
        seen = run_lab(FeatureFile(wide), ["vq"], **SMALL | {"steps": 2})
        table = lab_plane_table(seen)
        shown = table[table["kind"] == "feature"]
        features = seen.snapshot("vq")["features"][: len(shown)]
        assert abs(np.corrcoef(shown["x"], features[:, 1])[0, 1]) > 0.98
        assert abs(np.corrcoef(shown["y"], features[:, 4])[0, 1]) > 0.8
        assert table.loc[0, "share_1"] > table.loc[0, "share_2"] > 0.1
        assert "two widest directions" in plot_lab_plane(table).get_supxlabel().replace("\n", " ")

    def test_curves_show_every_method_and_come_again_from_their_csv(self, result, tmp_path):
        table = lab_curve_table(result.metrics)
        assert set(table["method"]) == set(METHODS)
        last = table[(table["method"] == "vq") & (table["step"] == 12)].iloc[0]
        assert last["validation_usage_mean"] == result.runs["vq"].rows[-1]["validation_usage"]
        table.to_csv(tmp_path / "curves.csv", index=False)
        figures = plot_lab_curves(result.metrics), plot_lab_curves(pd.read_csv(tmp_path / "curves.csv"))
        assert np.array_equal(*(np.asarray(draw(figure, 50)) for figure in figures))
        assert {text.get_text() for text in figures[0].legends[0].texts} == {"VQ", "IBQ, U(±1/K)", "LFQ"}

    def test_the_animation_has_a_frame_per_snapshot(self, result, tmp_path):
        path = write_lab_animation(result, tmp_path / "new" / "codes")
        with Image.open(path) as picture:
            assert picture.format == "GIF" and picture.n_frames == len(result.snapshot_steps)
            assert picture.info["loop"] == 0
            frames = []
            for number in range(picture.n_frames):
                picture.seek(number)
                frames.append(np.asarray(picture.convert("L"), dtype=float))
        assert all(np.abs(one - other).max() > 50 for one, other in itertools.pairwise(frames))
        with pytest.raises(ValueError, match=r"an animation is a \.gif"):
            write_lab_animation(result, tmp_path / "codes.mp4")

    def test_unknown_steps_and_methods_are_named(self, result):
        with pytest.raises(ValueError, match="no snapshot of step 5; there are: 0, 1"):
            lab_plane_table(result, 5)
        with pytest.raises(ValueError, match="did you mean 'lfq'"):
            lab_plane_table(result, methods=["lfqq"])
        with pytest.raises(ValueError, match="needs the columns"):
            plot_lab_plane(pd.DataFrame({"x": [1]}))

    def test_the_table_says_what_became_of_each(self, result):
        table = show_lab_table(result)
        assert list(table["method"]) == ["VQ", "IBQ, U(±1/K)", "LFQ"] and list(table["K"]) == ["16", "16", "4"]
        assert table["usage"][0] == f"{result.runs['vq'].rows[-1]['validation_usage']:.1%}"

    def test_the_page_holds_figures_table_and_provenance(self, tmp_path):
        given = PlaygroundParameters(preset="smoke", methods=("vq", "ibq"), steps=4, output=str(tmp_path / "mine"))
        lab = prepare_lab(given)
        made = lab.run(progress=False)
        table = lab_plane_table(made)
        figure = save_lab_figure(lab, "codes_at_the_end", plot_lab_plane(table), table)
        assert "codes not hit" in texts_of(figure) or "dead codes (no hit)" in texts_of(figure)
        page = write_lab_report(lab, made)
        text = (lab.folder / "report.md").read_text()
        assert page.parent == lab.folder and "![Codes among features at the last step]" in text
        assert "too short to mean anything" in text and lab.command in text and "12 clusters" in text
        assert "threads per run" not in text and "usage reads low" not in text, "a world has points enough"
        assert text.count("| VQ |") == text.count("| IBQ |") == 1 and "not noted" not in text
        assert len(pd.read_csv(lab.folder / "table.csv")) == 2 and "codes\\_through" not in text
        assert json.loads((lab.folder / "provenance.json").read_text())["seeds"] == [0]

    def test_few_features_call_no_code_dead_and_the_rarer_kind_lies_on_top(self):
        rows = np.random.default_rng(0).normal(size=(60, 3)).astype("f4")
        made = run_lab(FeatureFile(rows), ["vq"], codebook_size=32, steps=2, batch_size=8, snapshots=2, progress=False)
        table = lab_plane_table(made)
        figure = plot_lab_plane(table)
        assert "codes not hit" in texts_of(figure) and "dead codes (no hit)" not in texts_of(figure)
        assert "drawn: all codes and" in figure.get_supxlabel().replace("\n", " ")
        codes = table["kind"] == "code"
        for live in (4, 28):
            hits = np.where(np.arange(codes.sum()) < live, 9.0, 0.0)
            shown = plot_lab_plane(table.assign(hits=table["hits"].mask(codes, pd.Series(hits, table.index[codes]))))
            crosses, circles = shown.axes[0].collections[1:3]
            assert (crosses.get_zorder() > circles.get_zorder()) == (live > 16), live

    def test_the_slider_draws_each_step_once_when_it_is_asked_for(self, result, monkeypatch):
        explorer = explore_lab(result)
        assert list(explorer._pages) == [12] and explorer.step.value == 12
        last = explorer.plane.value
        explorer.step.value = 1
        assert explorer.plane.value != last and "step 1: vq" in explorer.numbers.value
        monkeypatch.setattr("ibqlab.widgets.lab.plot_lab_plane", lambda table: pytest.fail("drawn again"))
        explorer.step.value = 12
        assert explorer.plane.value == last
        assert last in explorer.static_html() and last in explorer._repr_mimebundle_()["text/html"]


class TestParameters:
    def test_methods_as_they_are_typed(self):
        assert read_methods(["vq", "vq codebook_init=normal revive_after=20", "ibq entropy_weight=0"]) == {
            "vq": {"name": "vq"},
            "vq, N(0, 1), revive_after=20": {"name": "vq", "codebook_init": "normal", "revive_after": 20},
            "ibq, entropy_weight=0": {"name": "ibq", "entropy_weight": 0},
        }
        assert list(read_methods(["all"])) == available_quantizers()

    @pytest.mark.parametrize("preset", ["smoke", "demo", "laptop"])
    @pytest.mark.parametrize("parameters", [PlaygroundParameters, FeaturesLabParameters])
    def test_every_preset_can_be_prepared_and_writes_nothing(self, parameters, preset, tmp_path):
        lab = prepare_lab(parameters(preset=preset))
        assert len(lab.methods) == (2 if preset == "smoke" else 12)
        assert lab.folder == tmp_path / "runs" / f"{parameters.use}-{preset}" and not lab.folder.exists()
        assert bool(lab.too_short) == (preset == "smoke")

    def test_what_is_typed_goes_before_the_preset(self, tmp_path):
        features = write_features(tmp_path / "features.npy")
        typed = {"source": str(features), "methods": ("vq", "vq codebook_size=8"), "codebook_size": 32, "steps": 7}
        lab = prepare_lab(FeaturesLabParameters(preset="smoke", **typed, codebook_init="normal", seed=3))
        assert [config.codebook_size for config in lab.methods.values()] == [32, 8]
        assert {config.codebook_init for config in lab.methods.values()} == {"normal"}
        assert (lab.settings.steps, lab.settings.seed, lab.features.dim) == (7, 3, 6)
        assert lab.command.startswith('ibqlab run features_lab preset=smoke \'methods=["vq", "vq codebook_size=8"]\'')
        assert lab.command.count("codebook_init=normal steps=7 seed=3") == 1

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"preset": "paper"}, "preset must be one of 'smoke'"),
            ({"methods": ("vq all",)}, "settings are typed key=value"),
            ({"methods": ("vqq",)}, "did you mean 'vq'"),
            ({"methods": ("all", "vq")}, "all stands alone"),
            ({"methods": ("vq", "vq")}, "twice"),
            ({"methods": ("vq beta=big",)}, "beta"),
            ({"codebook_init": "nomal"}, "did you mean 'normal'"),
            ({"steps": -1}, "steps must be at least 0"),
            ({"encoder": "still"}, "encoder must be one of"),
        ],
    )
    def test_mistakes_are_found_before_anything_starts(self, settings, says):
        with pytest.raises(ValueError, match=says):
            prepare_lab(PlaygroundParameters(**{"preset": "smoke", **settings}))

    @pytest.mark.parametrize("settings", [{"methods": ("vqq",)}, {"methods": ("vq beta",)}, {"steps": -1}])
    def test_features_are_opened_after_everything_else_is_checked(self, settings, monkeypatch, tmp_path):
        monkeypatch.setattr(FeatureFile, "__init__", lambda *_, **__: pytest.fail("opened"))
        with pytest.raises(ValueError, match=r"vqq|key=value|steps"):
            prepare_lab(FeaturesLabParameters(preset="smoke", source=str(tmp_path / "x.npy"), **settings))

    def test_a_plugin_runs_after_numbers_are_checked(self, tmp_path):
        (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
        with pytest.raises(ValueError, match="steps must be at least 0"):
            PlaygroundParameters(plugins=(str(tmp_path / "mine.py"),), steps=-1)


class TestSizesOfMethods:
    LAB = LabSettings(codebook_size=64)

    @pytest.mark.parametrize(
        ("text", "dim", "size"),
        [
            ("fsq levels=[4,4]", 2, 16),
            ("fsq levels=[4,4,4]", 3, 64),
            ("grouped groups=3", 6, 4**3),
            ("residual levels=3", 4, 4**3),
            ('residual inner={"name": "grouped"}', 4, 3**4),
            ("residual inner={name: ibq}", 4, 8**2),
            ("residual inner.name=ibq codebook_size=16", 4, 16),
            ("grouped inner={name: fsq, levels: [4, 4]}", 4, 16**2),
            ("vqp cls=ResidualVQ arguments={num_quantizers: 2}", 4, 64),
        ],
    )
    def test_levels_groups_and_parts_decide_the_size(self, text, dim, size):
        (config,) = lab_methods(World(dim=dim), [text], self.LAB).values()
        assert (config.codebook_size, config.code_dim) == (size, dim)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("residual part=leaky_vq", "^method 'residual part=leaky_vq': .*unknown key"),
            ("fsq levels=[4,4]", "the features, 6; got 2. Use settings of 6 channels, such as 6 levels$"),
            ("residul", r"did you mean 'residual'\? One of your own"),
        ],
    )
    def test_what_is_refused_is_echoed_as_typed(self, text, message):
        with pytest.raises(ValueError, match=message):
            lab_methods(World(dim=6), [text], self.LAB)
