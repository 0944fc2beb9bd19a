"""The cases that people report: what a claim needs to hold, what each case runs, and what the notebook may ask for."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ibqlab.base.intervals import student_interval
from ibqlab.plots.printing import draw
from ibqlab.recipes.presets import preset_names
from ibqlab.runs import Run, RunError
from ibqlab.studies.cases import (
    CASES,
    Arm,
    Case,
    CaseMeasure,
    CaseResult,
    CasesParameters,
    Claim,
    plot_case,
    prepare_cases,
)
from ibqlab.studies.cases.case import KINDS, REMEDY, REPORTED
from ibqlab.studies.cases.lab_cases import FLOAT16_MOST, play


def made_up(sick, cured):
    """A case of two settings whose usage at the end is given, seed by seed."""
    usage = {"sick": sick, "cured": cured}
    case = Case(
        name="made_up",
        title="Made up",
        symptom="",
        setting="Nothing.",
        arms=(
            Arm(key="sick", label="sick", role=REPORTED),
            Arm(key="cured", label="cured", role=REMEDY, typed="cure=true"),
        ),
        measures=(CaseMeasure(key="usage", title="usage", unit=" %", scale=100),),
        claims=(
            Claim(kind="symptom", measure="usage", arm="sick", against="cured", lower=True, says="usage is lost"),
            Claim(kind="remedy", measure="usage", arm="cured", against="sick", says="the cure helps"),
        ),
        runner=lambda arm, seed, steps, folder: pd.DataFrame({"x": [0, steps], "usage": [1.0, usage[arm.key][seed]]}),
        steps=10,
    )
    return case.run(range(len(sick)), 0, Path(), show=lambda text: None)


class TestClaims:
    def test_one_holds_where_the_interval_excludes_0_on_its_side(self):
        result = made_up(sick=[0.2, 0.3, 0.25], cured=[0.9, 0.95, 1.0])
        symptom, remedy = result.findings()
        assert symptom.difference == pytest.approx(student_interval([-0.7, -0.65, -0.75]))
        assert symptom.holds and remedy.holds and result.reproduced
        assert symptom.sentence == "usage is lost. Usage, sick against cured: -70.0 points (-82.4 to -57.6)."
        assert "**Reproduced.**" in result.report() and "`cure=true`" in result.report()

    def test_the_other_side_does_not_hold(self):
        result = made_up(sick=[0.9, 0.95, 1.0], cured=[0.2, 0.3, 0.25])
        assert not any(finding.holds for finding in result.findings())
        assert "not seen here: “usage is lost”" in result.report()
        assert "of what helped here: nothing" in result.report()

    def test_an_interval_around_0_is_not_reproduced(self):
        result = made_up(sick=[0.2, 0.9, 0.5], cured=[0.9, 0.3, 0.6])
        assert not result.reproduced and "**Not reproduced.**" in result.report()

    @pytest.mark.parametrize("seeds", [1, 2])
    def test_too_few_seeds_are_said_and_nothing_is_judged(self, seeds):
        result = made_up(sick=[0.1] * seeds, cured=[1.0] * seeds)
        assert not any(finding.holds for finding in result.findings()) and not result.reproduced
        report = result.report()
        assert f"**Nothing is judged: claims need at least 3 seeds, got {seeds}.**" in report
        assert "* *symptom*: “usage is lost” is not judged. Usage, sick against cured: -90.0 points" in report
        assert not any(words in report for words in ("not seen here", "eproduced", "To type", "1 seeds"))

    def test_a_claim_with_too_few_values_is_not_judged(self):
        result = made_up(sick=[0.2, 0.3, 0.25], cured=[0.9, 0.95, 1.0])
        lost = (result.curves["arm"] == "cured") & (result.curves["seed"] == 1)
        curves = result.curves.assign(usage=result.curves["usage"].mask(lost))
        symptom, _ = dataclasses.replace(result, curves=curves).findings()
        assert not symptom.holds
        assert symptom.sentence.startswith("“usage is lost” is not judged, since it has a value in 2 of 3 seeds.")

    def test_a_figure_names_what_was_reported(self):
        figure = plot_case(made_up(sick=[0.2, 0.3], cured=[0.9, 1.0]))
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sick (as reported)", "cured"]
        assert draw(figure, 50).size[0] > 300


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
class TestEveryCase:
    def test_its_claims_speak_of_its_arms_and_measures(self, case):
        assert {claim.kind for claim in case.claims} == set(KINDS)
        for claim in case.claims:
            assert claim.says and case.measure(claim.measure) and case.arm(claim.arm)
            assert not claim.against or case.arm(claim.against)

    def test_one_arm_is_as_reported_and_every_remedy_says_what_to_type(self, case):
        assert [arm.role for arm in case.arms].count(REPORTED) == 1
        remedies = {arm.key: arm.typed for arm in case.arms if arm.role == REMEDY}
        assert remedies and all(remedies.values())
        assert {claim.arm for claim in case.claims if claim.kind == "remedy"} == set(remedies)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases") / "book"
    names = ("after_epoch_one", "batch_perplexity", "no_discriminator")
    parameters = CasesParameters(preset="smoke", cases=names, output=str(folder))
    return prepare_cases(parameters).run(progress=False)


class TestBook:
    def test_runs_are_run_folders_and_are_read_again(self, book, monkeypatch):
        assert Run(book.folder / "after_epoch_one" / "seed0" / "drifting").status == "finished"
        monkeypatch.setattr("ibqlab.diagnostics.lab.laboratory._Bench", None)
        again = prepare_cases(CasesParameters(preset="smoke", cases=("after_epoch_one",), output=str(book.folder)))
        again.run(progress=False)
        before, after = (b.results["after_epoch_one"].curves for b in (book, again))
        pd.testing.assert_frame_equal(before, after)

    def test_other_steps_in_the_same_folder_are_refused(self, book):
        other = CasesParameters(preset="smoke", cases=("after_epoch_one",), steps=5, output=str(book.folder))
        with pytest.raises(RunError, match="steps"):
            prepare_cases(other).run(progress=False)

    def test_figures_lie_beside_their_numbers_and_say_that_they_are_too_short(self, book):
        figure = book.figure("batch_perplexity")
        assert "too short to mean anything" in figure.legends[0].get_title().get_text()
        table = pd.read_csv(book.folder / "figures" / "batch_perplexity.csv")
        assert {"label", "step", "seeds", "counted_perplexity_mean"} <= set(table)
        assert book.report("batch_perplexity").startswith("**preset smoke: too short to mean anything.**")
        assert book.summary() == (
            "3 cases run, none judged: claims need at least 3 seeds, got 1 (too short to mean anything)"
        )
        assert str(book).startswith("3 cases, 10 settings, 1 seed → ")

    def test_a_case_that_was_not_asked_for_has_neither_figure_nor_report(self, book):
        assert book.figure("dimension") is None and book.report("dimension").startswith("Not asked for")
        assert "SEED-Voken #59" in book.symptom("dimension")

    def test_no_batch_reads_a_perplexity_above_its_tokens(self, book):
        curves = book.results["batch_perplexity"].curves
        alone = curves[curves["arm"] == "each_batch"].set_index("x")["counted_perplexity"]
        assert (alone <= alone.index).all() and alone.is_monotonic_increasing

    def test_weights_alone_start_a_fresh_discriminator(self, book):
        starts = book.provenance("no_discriminator", "start")
        assert starts["run_folder"]["discriminator"] == "its own"
        assert {starts[key]["discriminator"] for key in ("weights", "weights_rate", "weights_later")} == {
            "fresh, as the recipe says: the file has none"
        }
        curves = book.results["no_discriminator"].curves
        at_start = curves[curves["x"] == 0].set_index("arm")["validation_psnr"]
        assert at_start.nunique() == 1  # the same weights, whatever they came from


def test_a_token_is_nan_where_its_largest_logit_overflows_the_number_type(tmp_path):
    case = CASES["small_batch"]
    world = {"dim": 4, "clusters": 8, "spread": 400.0}
    small = {"world": world, "quantizer": {"name": "ibq"}, "lab": {"codebook_size": 16, "batch_size": 16}}
    curves = {}
    for kind in ("float16", "float32"):
        arm = Arm(key="arm", label="", settings=small | {"precision": kind})
        curves[kind] = case.runner(arm, 0, 4, tmp_path).set_index("x")
    snapshot = play(arm, 0, 4, tmp_path).snapshot("arm")
    logits = (snapshot["features"] @ snapshot["codebook"].T) / 0.01
    assert curves["float16"]["largest_logit"][4] == pytest.approx(logits.max(), rel=1e-5)
    share = curves["float16"]["nan_tokens"][4]
    assert 0 < share < 1 and share == pytest.approx((logits.max(1) > FLOAT16_MOST).mean(), abs=0.01)
    assert (curves["float32"]["nan_tokens"] == 0).all()
    assert case.ends(curves["float16"].reset_index())["nan_steps"] > 0


def test_float16_overflows_where_the_case_says_it_does():
    assert torch.finfo(torch.float16).max == FLOAT16_MOST
    assert torch.isinf(torch.tensor(656.0).half() / 0.01) and torch.isfinite(torch.tensor(655.0).half() / 0.01)


def test_usage_since_epoch_one_is_signed():
    curve = pd.DataFrame({"x": [0, 30, 50, 60, 300], "validation_usage": [0.9, 0.95, 0.8, 0.7, 0.3]})
    assert CASES["after_epoch_one"].ends(curve) == {"usage_change": pytest.approx(-0.5)}


def test_the_end_of_a_measure_is_its_last_number():
    result = made_up(sick=[0.2, 0.3], cured=[0.9, 1.0])
    curves = pd.concat([result.curves, result.curves.assign(x=20, usage=np.nan)])
    assert dataclasses.replace(result, curves=curves).ends().equals(result.ends())
    assert isinstance(result, CaseResult)


class TestParameters:
    def test_presets_and_defaults(self):
        assert preset_names("cases") == ["smoke", "demo"]
        assert list(prepare_cases(CasesParameters()).cases) == list(CASES)
        assert prepare_cases(CasesParameters()).seeds == (10, 11, 12, 13, 14)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"cases": ("dimensio",)}, "did you mean 'dimension'"),
            ({"cases": ("dimension", "dimension")}, "twice"),
            ({"seeds": (0, 0)}, "twice"),
            ({"seeds": (-1,)}, "seeds must be"),
            ({"steps": -1}, "steps must be"),
            ({"preset": "laptop"}, "preset"),
        ],
    )
    def test_impossible_ones_are_refused(self, settings, says):
        with pytest.raises(ValueError, match=says):
            CasesParameters(**settings)
