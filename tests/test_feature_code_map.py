"""The paper's figures from runs: the gap is what its formula says, sentences claim what seeds tell apart, runs are
shared with the study that trained them, and bad input is a sentence."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ibqlab.config import ConfigError, parse
from ibqlab.diagnostics.distribution_gap import measure_distribution_gap
from ibqlab.plots.feature_code_map import gap_curve_table, plot_gap_curves, plot_maps_and_usage, usage_curve_table
from ibqlab.runs import RunError
from ibqlab.studies import (
    FeatureMapParameters,
    StudyError,
    StudyParameters,
    figure_code_maps,
    figure_maps_through_training,
    open_study,
    prepare_feature_map,
)
from ibqlab.studies.figures import last_map, map_each, map_run
from ibqlab.studies.gap_sentences import describe_gaps, gap_summary, show_gap_summary
from ibqlab.widgets import explore_run, explore_study

pytestmark = pytest.mark.usefixtures("warm_start")
GRID = {
    "preset": "smoke",
    "methods": ["vq", "soft_vq", "ibq"],
    "initialisations": ["normal"],
    "codebook_sizes": [16],
    "code_dims": [4],
    "steps": 2,
    "projection": "pca",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Trained by the notebook explore_collapse, so to say."""
    folder = tmp_path_factory.mktemp("feature_code_map") / "mine"
    trained = open_study("explore_collapse", parse(StudyParameters, GRID | {"output": str(folder)}))
    trained.run(progress=False).check()
    return trained


@pytest.fixture
def figures(study, tmp_path):
    given = {"study": str(study.folder), "projection": "pca", "output": str(tmp_path / "figures")}
    return prepare_feature_map(parse(FeatureMapParameters, given)).run(progress=False)


# --- the gap ---------------------------------------------------------------------------------------------------------


def energy_gap(codes, features):
    """The formula, pair by pair."""

    def mean_distance(one, other):
        return np.mean([np.linalg.norm(a - b) for a in one for b in other])

    between = mean_distance(codes, features)
    return (2 * between - mean_distance(codes, codes) - mean_distance(features, features)) / (2 * between)


def test_the_gap_is_the_energy_distance_over_its_largest_value():
    rng = np.random.default_rng(0)
    codes, features = rng.normal(size=(30, 5)) + 1, rng.normal(size=(40, 5)) * 2
    counts = np.arange(30) % 3  # a third has no hit
    gap = measure_distribution_gap(codes, features, counts)
    assert gap.distribution_gap == pytest.approx(energy_gap(codes, features))
    nearest = np.linalg.norm(codes[:, None] - features, axis=2).min(1)
    spread = np.sqrt(np.square(features - features.mean(0)).sum(1).mean())
    assert gap.feature_spread == pytest.approx(spread)
    assert gap.in_use_distance == pytest.approx(nearest[counts > 0].mean() / spread, rel=1e-5)
    assert gap.unused_distance == pytest.approx(nearest[counts == 0].mean() / spread, rel=1e-5)
    units = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    cosines = (units @ units.T)[~np.eye(30, dtype=bool)]
    assert gap.code_similarity == pytest.approx(cosines.mean())


def test_the_gap_at_its_ends():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(2500, 8)).astype("f4")
    alike = measure_distribution_gap(
        points, points + rng.normal(size=(2500, 8)).astype("f4") * 1e-3, np.ones(2500, int)
    )
    assert alike.distribution_gap == pytest.approx(0, abs=1e-3), "thinned alike on both sides"
    apart = measure_distribution_gap(np.zeros((3, 2)) + 5, np.zeros((4, 2)), np.array([1, 1, 1]))
    assert apart.distribution_gap == 1 and math.isnan(apart.unused_distance) and math.isnan(apart.in_use_distance)
    scaled = [measure_distribution_gap(s * points[:60], s * points[60:] + s, np.ones(60, int)) for s in (1e-6, 1, 1e6)]
    assert len({round(gap.distribution_gap, 6) for gap in scaled}) == 1, "the unit does not matter"
    nothing = measure_distribution_gap(np.ones((2, 2)), np.ones((2, 2)), np.ones(2, int))
    assert nothing.distribution_gap == 0


@pytest.mark.parametrize(
    ("codes", "features", "counts", "says"),
    [
        (np.ones((1, 2)), np.ones((3, 2)), np.ones(1, int), "two codes and two features; got 1 and 3"),
        (np.ones((3, 2)), np.ones((3, 2)), np.ones(2, int), r"one entry per code, 3; got shape \(2,\)"),
        (np.full((3, 2), np.nan), np.ones((3, 2)), np.ones(3, int), "NaN"),
        (np.ones((3, 2)), np.ones((3, 4)), np.ones(3, int), "same dimension"),
    ],
)
def test_what_has_no_gap_is_refused(codes, features, counts, says):
    with pytest.raises(ValueError, match=says):
        measure_distribution_gap(codes, features, counts)


# --- sentences -------------------------------------------------------------------------------------------------------


def gap_rows(ends, method="vq", init="N(0, 1)"):
    """Two snapshots of one run per seed: (first, last) gaps."""
    rest = {"init": init, "published_init": False, "codebook_size": 8, "code_dim": 2, "features": 50}
    rest |= {"in_use_distance": 0.5, "unused_distance": np.nan, "feature_spread": 1.0}
    return pd.DataFrame(
        [
            {"method": method, "seed": seed, "step": step, "distribution_gap": gap, "code_similarity": gap / 2, **rest}
            for seed, pair in enumerate(ends)
            for step, gap in zip((0, 30), pair, strict=True)
        ]
    )


def test_a_direction_is_claimed_only_where_seeds_tell_it():
    grew = describe_gaps(gap_rows([(0.2, 0.40), (0.2, 0.42), (0.2, 0.44)]))
    assert "- VQ from N(0, 1): the gap grew, 0.20 → 0.42: +0.22 (+0.17 to +0.27), 3 seeds." in grew
    shrank = describe_gaps(gap_rows([(0.40, 0.2), (0.42, 0.2), (0.44, 0.2)], "soft_vq"))
    assert "the gap shrank" in shrank and "the cosine of two codes fell" in shrank
    mixed = describe_gaps(gap_rows([(0.2, 0.4), (0.2, 0.1), (0.2, 0.3)]))
    assert "no direction told apart from 0" in mixed and "grew" not in mixed
    alone = describe_gaps(gap_rows([(0.2, 0.9)]))
    assert "one seed, so no direction is claimed" in alone and "grew" not in alone


def test_an_order_of_methods_is_of_one_start_and_paired_by_seed():
    vq, ibq = gap_rows([(0.2, 0.4), (0.2, 0.5), (0.2, 0.6)]), gap_rows([(0.2, 0.1), (0.2, 0.2), (0.2, 0.31)], "ibq")
    told = describe_gaps(pd.concat([vq, ibq]))
    assert (
        "VQ − IBQ, both from N(0, 1): the gap at the end is larger under VQ, +0.30 (+0.28 to +0.31), 3 seeds." in told
    )
    apart = describe_gaps(pd.concat([vq, ibq.assign(init="U(±1/K)")]))
    assert "VQ − IBQ" not in apart, "another start explains as much as another method"


def test_the_table_holds_first_and_last_and_what_is_missing_is_a_dash():
    gaps = gap_rows([(0.2, 0.4), (0.2, 0.5)])
    metrics = gaps[["method", "init", "published_init", "seed", "step"]].assign(
        validation_usage=[0.9, 0.5, 0.9, 0.25], validation_tokens=80
    )
    (row,) = gap_summary(metrics, gaps).to_dict("records")
    assert (row["gap_first_mean"], row["gap_last_max"], row["seeds"], row["steps"]) == (0.2, 0.5, 2, 30)
    assert (row["usage_min"], row["usage_max"], row["tokens"]) == (0.25, 0.5, 80)
    (shown,) = show_gap_summary(gap_summary(metrics, gaps)).to_dict("records")
    assert shown["codes not hit to features"] == "–" and shown["usage"] == "37.5 % (25.0–50.0)"
    bare = gap_summary(metrics.drop(columns=["validation_usage"]), gaps)
    assert show_gap_summary(bare)["usage"].tolist() == ["–"], "a run that was stopped before its first validation"


# --- runs and figures ------------------------------------------------------------------------------------------------


def texts(figure):
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_figures_and_report_come_from_a_study_that_is_there(figures, study):
    before = {path: path.stat().st_mtime_ns for path in (study.folder / "rows").iterdir()}
    two = figures.figure_maps_and_usage()
    told = texts(two).replace("\n", " ")
    assert "VQ from N(0, 1)" in told and "IBQ from N(0, 1)" in told and "paper, figure 2: t-SNE" in told
    assert "K = 16; in use: hit in" in told and "maps: seed 0" in told and "too short to mean anything" in told
    assert figures.figure_maps_and_usage("same") is not None and figures.figure_soft_vq() is not None
    three = texts(figures.figure_gap()).replace("\n", " ")
    assert "paper, figure 3" in three and "1 seed" in three and "right: codes not hit" in three
    page = figures.write_report()
    report = (page.parent / "report.md").read_text()
    assert page.parent == figures.folder and report.count("![") == 4
    assert "one seed, so no direction is claimed" in report and "ibqlab run feature_code_map" in report
    assert "ibq-normal-K16-D4-seed0" in report, "which runs these are"
    stored = pd.read_csv(figures.folder / "figures" / "codes_and_usage.csv")
    usage = pd.read_csv(figures.folder / "figures" / "codes_and_usage_curves.csv")
    again = plot_maps_and_usage(stored, usage)
    assert [axes.get_title() for axes in again.axes] == [axes.get_title() for axes in two.axes]
    gaps = pd.read_csv(figures.folder / "figures" / "distribution_gap.csv")
    assert len(plot_gap_curves(gaps).axes) == 3
    assert {path: path.stat().st_mtime_ns for path in (study.folder / "rows").iterdir()} == before


def test_a_preset_shares_the_runs_of_explore_collapse(monkeypatch, tmp_path):
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))
    prepared = prepare_feature_map(parse(FeatureMapParameters, GRID))
    assert prepared.study.name == "explore_collapse" and prepared.study.folder == tmp_path / "explore_collapse-smoke"
    assert prepared.folder == tmp_path / "feature_code_map-smoke" and not list(tmp_path.iterdir())
    assert "projection=pca" in prepared.command and prepared.command.startswith(
        "ibqlab run feature_code_map preset=smoke"
    )


def test_runs_may_be_named_one_by_one(study, tmp_path):
    folders = [str(run.path) for _, run in study.finished() if run.name.startswith(("vq", "ibq"))]
    given = {"runs": folders, "projection": "pca", "output": str(tmp_path / "two")}
    two = prepare_feature_map(parse(FeatureMapParameters, given)).run()
    assert [one.title for one in two.drawn] == ["vq from N(0, 1)", "ibq from N(0, 1), default"]
    assert two.figure_soft_vq() is None
    with pytest.raises(ConfigError, match="same method, start, size and seed"):
        prepare_feature_map(parse(FeatureMapParameters, {"runs": [folders[0], folders[0]]}))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"study": "a", "runs": ["b"]}, "either study or runs"),
        ({"runs": ["b"], "methods": ["vq"], "steps": 3}, "drawn as they are; leave out steps, methods"),
        ({"preset": "smokey"}, "smoke"),
        ({"study": "nowhere"}, "no such study"),
        ({"runs": ["nowhere"]}, "no such run"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_anything_starts(given, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        prepare_feature_map(parse(FeatureMapParameters, given))


def test_before_run_and_without_validations_there_is_a_sentence(study, tmp_path):
    given = {"study": str(study.folder), "output": str(tmp_path / "figures")}
    with pytest.raises(ValueError, match=r"call run\(\) first"):
        prepare_feature_map(parse(FeatureMapParameters, given)).figure_gap()
    with pytest.raises(ValueError, match="validation"):
        usage_curve_table(study.metrics().assign(validation_usage=np.nan))
    with pytest.raises(ValueError, match="a table of gaps needs the columns"):
        gap_curve_table(study.metrics(), pd.DataFrame({"step": [0]}))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_two_runs_of_the_view_share_start_seed_and_first_codebook(figures):
    """So that selecting a code in one map means something in the other."""
    first, second = figures.pair()
    assert [first.name, second.name] == ["vq-normal-K16-D4-seed0", "ibq-normal-K16-D4-seed0"]
    assert np.array_equal(first.snapshot(0)["codebook"], second.snapshot(0)["codebook"])


# --- diverged runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def diverged(study, tmp_path):
    """The study with VQ's last snapshot full of NaN, and all of Soft VQ's."""
    copy = shutil.copytree(study.folder, tmp_path / "diverged")
    for method, last_only in (("vq", True), ("soft_vq", False)):
        files = sorted((copy / f"{method}-normal-K16-D4-seed0").glob("snapshots/*.npz"))
        for file in files[-1:] if last_only else files:
            shot = dict(np.load(file))
            shot["features"][:] = np.nan
            np.savez(file, **shot)
    return open_study(copy)


def test_figures_of_diverged_runs_say_what_they_leave_out(diverged, tmp_path):
    given = {"study": str(diverged.folder), "projection": "pca", "output": str(tmp_path / "figures")}
    figures = prepare_feature_map(parse(FeatureMapParameters, given)).run(progress=False)
    first = figures.figure_maps_and_usage("same")
    titles = [" ".join(axes.get_title().split()) for axes in first.axes]
    assert any(title.startswith("VQ from N(0, 1), step 0 (later: NaN)") for title in titles), titles
    soft = figures.figure_soft_vq()
    reason = "no map of soft_vq-normal-K16-D4-seed0: its snapshots hold NaN or infinity: the run has diverged"
    assert reason in " ".join(soft.get_supxlabel().split())
    assert not any(axes.get_title().startswith("Soft") for axes in soft.axes)
    assert figures.figure_gap() is not None and len(figures.table()) == 2, "Soft VQ has no gap to show"
    assert figures.write_report().is_file()


def test_studies_and_explorers_of_diverged_runs_draw_what_is_finite(diverged):
    for draw in (figure_code_maps, figure_maps_through_training):
        caption = " ".join(draw(diverged).get_supxlabel().split())
        assert "no map of soft_vq-normal-K16-D4-seed0" in caption
    explorer = explore_study(diverged)
    explorer.choices["method"].value = "soft_vq"
    assert "the run has diverged" in explorer.code_map.value and "<img" in explorer.histogram.value
    explorer.choices["method"].value = "vq"
    assert "no map of step 2: its snapshot holds NaN" in explorer.code_map.value
    explorer.step.value = 0
    assert "<img" in explorer.code_map.value
    of_run = explore_run(explorer.run)
    assert "no map of step 2" in of_run.code_map.value and "<img" in of_run.histogram.value


def test_a_study_of_nothing_but_nan_has_no_map(diverged):
    runs = {"soft": next(run for cell, run in diverged.finished() if cell.labels["method"] == "soft_vq")}
    with pytest.raises(StudyError, match="no map of soft_vq"):
        map_each(runs, lambda run: [last_map(run, "pca")])
    snapshot_free = SimpleNamespace(name="mine", snapshot_steps=[0], snapshot=lambda step: {"counts": np.ones(3)})
    with pytest.raises(RunError, match="no map of mine: its snapshots hold no codebook and features"):
        map_run(snapshot_free, "pca")
