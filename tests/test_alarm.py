"""The alarm: a row or a run that sets each rule off, and one that must not; who is told, and how often."""

import json
import math
import os
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from ibqlab.cli import main
from ibqlab.config import content_hash, to_dict
from ibqlab.diagnostics import RULES, Alarm, AlarmEvent, CodebookFacts, facts_of, find_alarms
from ibqlab.diagnostics.alarm_remedies import IN_WORDS
from ibqlab.diagnostics.alarm_rules import EntropyCeiling, FewCodes, ReachLost
from ibqlab.diagnostics.recorder import Recorder
from ibqlab.grids import worker
from ibqlab.grids.cell_rows import last_whole_validation
from ibqlab.monitor import CodebookMonitor
from ibqlab.plots import plot_run_curves
from ibqlab.plots.alarms import alarm_list, mark_alarms
from ibqlab.quantizers import available_quantizers, build_quantizer, nearest_code, quantizer_from
from ibqlab.quantizers.base import registrations, replace_registrations
from ibqlab.runs import Run
from ibqlab.studies import StudyParameters, open_study, write_study_report
from ibqlab.studies.run_explanation import describe_alarms, run_alarms
from ibqlab.studies.run_report import write_run_report
from ibqlab.training import TrainingError, TrainingInterrupted, recipe_config, train
from ibqlab.training.tokenizer.validation import Validation
from ibqlab.widgets import LiveCurves

IBQ = CodebookFacts(codebook_size=1024, softmax=True, entropy_epsilon=1e-5)
WELL = {
    **{"loss": 1.0, "step_usage": 0.3, "step_usage_even": 0.4, "quantization_error": 1.0, "gradient_reach": 0.9},
    **{"feature_norm_mean": 1.4, "code_norm_mean": 8.0, "softmax_perplexity": 460.0, "term_average_entropy": 6.2},
}
"""A row of a healthy IBQ run on photographs at K = 1,024."""
FLAT = -math.log(1 / 1024 + 1e-5)
TROUBLE = {
    "usage_falls": {"step_usage": 0.14, "quantization_error": 0.4},
    "few_codes": {"step_usage": 0.03},
    "reach_lost": {"gradient_reach": 7 / 1024},
    "features_at_codes": {"feature_norm_mean": 7.0, "softmax_perplexity": 1.1},
    "features_run_away": {"step_usage": 0.06, "quantization_error": 12.0},
    "entropy_ceiling": {"step_usage": 0.17, "term_average_entropy": 0.999 * FLAT},
    "nonfinite": {"loss": math.nan},
}
"""What sets each rule off, and no other one."""
NEARLY = {
    "usage_falls": ({"step_usage": 0.14}, {"quantization_error": 0.1}),
    "few_codes": ({"step_usage": 0.05},),
    "reach_lost": ({"gradient_reach": 11 / 1024},),
    "features_at_codes": ({"feature_norm_mean": 7.0}, {"softmax_perplexity": 1.1}),
    "features_run_away": (
        {"step_usage": 0.06, "quantization_error": 9.0},
        {"step_usage": 0.12, "quantization_error": 12.0},
    ),
    "entropy_ceiling": ({"term_average_entropy": FLAT}, {"step_usage": 0.17}),
    "nonfinite": ({"perplexity": math.nan}, {"note": None}),
}
"""What comes near it, or is half of it, and must not."""
SMALL = {
    "record.tokens_per_code": 2,
    "data.source": "digits",
    "data.image_size": 8,
    "tokenizer.autoencoder.resolution": 8,
    "steps": 8,
}


def rows_of(change, first=8, then=12):
    """A healthy run that changes."""
    return [{"step": step, **WELL, **(change if step > first else {})} for step in range(1, first + then + 1)]


def rules_of(rows, facts=IBQ, rules=RULES):
    return [event.rule for event in find_alarms(rows, facts, rules)]


def smoke(quantizer="ibq", size=64, **settings):
    """A run of eight steps on digits."""
    chosen = {"name": quantizer, "codebook_size": size, "code_dim": 6 if size == 64 else 8}
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return recipe_config("builtin/smoke", SMALL | {"tokenizer.quantizer": chosen} | dotted)


# --- rules on rows ---


@pytest.mark.parametrize("rule", TROUBLE)
def test_each_rule_has_a_run_that_sets_it_off(rule):
    (event,) = find_alarms(rows_of(TROUBLE[rule]), IBQ)
    waits = next(one.rows for one in RULES if one.name == rule)
    assert event.rule == rule and event.step >= 8 + waits
    assert event.seen and event.cause and event.remedy and f"alarm at step {event.step}, {event.title}: " in str(event)


@pytest.mark.parametrize(("rule", "change"), [(rule, one) for rule, changes in NEARLY.items() for one in changes])
def test_each_rule_has_runs_that_must_not(rule, change):
    assert rules_of(rows_of(change)) == []


@pytest.mark.parametrize("facts", [IBQ, CodebookFacts(codebook_size=1024), replace(IBQ, fixed=True)], ids=str)
def test_remedies_in_somebody_elses_model_are_words(facts):
    stream = rows_of({key: value for change in TROUBLE.values() for key, value in change.items()})
    for event in find_alarms(stream, replace(facts, monitored=True, placeholder_share=0.3)):
        text = f"{event.cause} {event.remedy}"
        assert not re.search(
            r"\b[a-z]+_[a-z]+\b|[a-z]=|[a-z]\.[a-z]+\.", text.replace("torch.nn.utils.clip_grad_norm_", "")
        ), text
    assert IN_WORDS.keys() == {rule.name for rule in RULES}


def test_every_rule_is_tried():
    assert {rule.name for rule in RULES} == {*TROUBLE, "placeholder_averages"} and len(RULES) == 8
    assert NEARLY.keys() == TROUBLE.keys()


def test_usage_that_was_never_high_has_not_fallen():
    low = {"step_usage": 0.06}
    rows = [{"step": step, **WELL, **low, "quantization_error": 1 / step} for step in range(1, 30)]
    assert rules_of(rows) == []


def test_averages_of_a_placeholder_are_told_of_at_once_and_do_not_stop():
    facts = replace(IBQ, placeholder_share=0.3)
    (event,) = find_alarms(rows_of({}), facts)
    assert (event.rule, event.step) == ("placeholder_averages", 1) and "30%" in event.seen
    assert rules_of(rows_of({}), replace(IBQ, placeholder_share=0.04)) == []
    assert [rule.name for rule in RULES if not rule.stops] == ["placeholder_averages"]


def test_a_trouble_is_told_once_and_again_when_it_comes_back():
    bad, well = {**WELL, **TROUBLE["reach_lost"]}, WELL
    stream = [*[well] * 2, *[bad] * 30, *[well] * 9, *[bad] * 5, *[well] * 10, *[bad] * 5]
    events = find_alarms([{"step": step, **row} for step, row in enumerate(stream)], IBQ)
    assert [event.step for event in events] == [4, 2 + 30 + 9 + 5 + 10 + 2]


def test_rows_that_say_nothing_change_nothing():
    bad = {**WELL, **TROUBLE["few_codes"]}
    stream = [bad, bad, {"loss": 1.0}, bad, {"validation_usage": 0.1}, bad, bad]
    events = find_alarms([{"step": step, **row} for step, row in enumerate(stream)], IBQ)
    assert [(event.rule, event.step) for event in events] == [("few_codes", 6)]


def test_a_chance_row_sets_nothing_off():
    for rule in ("few_codes", "reach_lost", "features_at_codes", "entropy_ceiling"):
        assert rules_of(rows_of(TROUBLE[rule], then=2)) == []


def test_rules_know_which_codebooks_they_concern():
    vq = CodebookFacts(codebook_size=1024)
    for facts in (replace(vq, fixed=True), replace(vq, mapped=True)):
        assert rules_of(rows_of(TROUBLE["reach_lost"]), facts) == []
    assert rules_of(rows_of(TROUBLE["features_at_codes"]), vq) == []
    assert rules_of(rows_of(TROUBLE["entropy_ceiling"]), vq) == []


def test_a_small_codebook_is_in_no_trouble_for_being_small():
    rows = rows_of({"gradient_reach": 0.5})
    assert rules_of(rows, CodebookFacts(codebook_size=12)) == []
    assert rules_of(rows_of({"gradient_reach": 0.2}), CodebookFacts(codebook_size=12)) == ["reach_lost"]


def test_epsilon_is_named_where_it_caps_the_entropy():
    large = CodebookFacts(codebook_size=262_144, entropy_epsilon=1e-5)
    assert large.entropy_ceiling == pytest.approx(11.19, abs=0.01)
    words = EntropyCeiling().explain({"term_average_entropy": 11.18, "share_of_even": 0.3}, large)
    assert "ln K = 12.48" in words.cause and "entropy_epsilon=0" in words.remedy
    assert "ε" not in EntropyCeiling().explain({"term_average_entropy": 6.9, "share_of_even": 0.3}, IBQ).cause


def test_thresholds_can_be_changed():
    rows = rows_of({"gradient_reach": 40 / 1024})
    assert rules_of(rows) == [] and rules_of(rows, rules=[ReachLost(codes=50)]) == ["reach_lost"]
    assert rules_of(rows_of({"step_usage": 0.03}, then=2), rules=[FewCodes(rows=2)]) == ["few_codes"]


def test_facts_are_read_from_settings():
    facts = facts_of(to_dict(smoke(steps=100, ema_codebook_start="placeholder")))
    assert facts.codebook_size == 64 and facts.softmax and facts.double_quantization and not facts.fixed
    assert facts.entropy_epsilon == 1e-5 and facts.placeholder_share == pytest.approx(0.999**100)
    assert facts_of(to_dict(smoke("lfq"))).fixed
    assert all(facts_of(to_dict(smoke(name))).mapped for name in ("simvq", "fvq", "vqgan_lc"))
    assert facts_of(to_dict(smoke("vq"))).placeholder_share == 0
    off = facts_of(
        to_dict(smoke(tokenizer__quantizer={"name": "ibq", "entropy_weight": 0, "double_quantization": False}))
    )
    assert off.entropy_epsilon is None and not off.double_quantization
    assert facts_of({"codebook_size": 12}) == CodebookFacts(codebook_size=12)
    monitored = {"kind": "monitored", "codebook_size": 12}
    assert facts_of(monitored | {"settings": {"quantizer": "ibq"}}).softmax
    assert facts_of(monitored | {"settings": {"quantizer": 3, "codebook_init": "grid", "reaches": "map"}}) == (
        CodebookFacts(codebook_size=12, fixed=True, mapped=True, monitored=True)
    )
    assert facts_of({"generator": {}, "tokenizer": "runs/mine"}) is None
    with pytest.raises(ValueError, match="codebook_size must be"):
        CodebookFacts(codebook_size=0)


@pytest.mark.parametrize(
    ("reaches", "rules"), [("softmax", ["reach_lost", "features_at_codes"]), ("map", []), ("", ["reach_lost"])]
)
def test_a_quantizer_of_ones_own_says_how_its_codes_learn(reaches, rules):
    registered = registrations()
    try:
        quantizer_from(nearest_code, "my_vq", reaches=reaches)
        facts = facts_of({"tokenizer": {"quantizer": {"name": "my_vq", "codebook_size": 1024}}})
    finally:
        replace_registrations(registered)
    assert rules_of(rows_of(TROUBLE["features_at_codes"] | TROUBLE["reach_lost"]), facts) == rules


def test_events_go_through_a_file():
    (event,) = find_alarms(rows_of(TROUBLE["few_codes"]), IBQ)
    assert AlarmEvent.of_row(json.loads(json.dumps(event.row()))) == event
    assert AlarmEvent.of_row({"step": 3}).rule == ""


def test_a_row_of_a_file_is_judged_like_the_row_itself():
    rows = rows_of(TROUBLE["nonfinite"])
    stored = [{key: None if math.isnan(value) else value for key, value in row.items()} for row in rows]
    assert rules_of(stored) == rules_of(rows) == ["nonfinite"]


# --- the recorder's rows of made-up features ---


def recorded(lengths, chosen):
    """Rows of features of these lengths around the first codes, as many codes as are said, of IBQ's 64."""
    torch.manual_seed(0)
    quantizer = build_quantizer("ibq", codebook_size=64, code_dim=64)
    recorder = Recorder(quantizer, 640, 32)
    rows = []
    for step, (length, count) in enumerate(zip(lengths, chosen, strict=True), start=1):
        codes = quantizer.codebook.detach()[torch.arange(128) % count]  # (128, 64), of norm 8 or so
        features = (length * (codes / 8 + 0.05 * torch.randn(128, 64))).T.reshape(1, 64, 8, 16).requires_grad_()
        quantizer.codes.zero_grad()
        out = quantizer(features)
        out.loss.backward()
        recorder.observe(out.indices, step)
        rows.append({"step": step} | recorder.report(features, step))
    return rows


def test_features_that_grow_to_the_codes_norm_set_it_off_and_short_ones_do_not():
    facts = facts_of(to_dict(smoke()))
    assert "features_at_codes" in rules_of(recorded([1, 3, 8, 8, 8, 8], [64] * 6), facts)
    assert rules_of(recorded([1] * 8, [64] * 8), facts) == []


@pytest.mark.parametrize(("start", "told"), [("uniform", ["features_run_away"]), ("features", [])])
def test_a_plain_vq_whose_features_run_away_is_told_of_and_one_that_starts_among_them_is_not(tmp_path, start, told):
    torch.manual_seed(0)
    size, draw = 128, torch.randn(64, 64)
    encoder = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    decoder = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    codes = torch.empty(size, 8).uniform_(-1 / size, 1 / size)
    images = torch.randn(2000, 64) @ draw / 8
    codebook = torch.nn.Parameter(codes if start == "uniform" else encoder(images[:size]).detach())
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), codebook], lr=1e-3)
    monitor = CodebookMonitor(tmp_path / "mine", codebook_size=size)
    monitor.watch(codebook)
    for step in range(1, 181):
        batch = images[torch.randint(0, 2000, (16 * int(torch.randint(5, 65, ())),))]
        z = encoder(batch)
        indices = torch.cdist(z, codebook).argmin(1)
        chosen = codebook[indices]
        loss = (decoder(z + (chosen - z).detach()) - batch).square().mean()
        loss = loss + (chosen - z.detach()).square().mean() + 0.25 * (z - chosen.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.update(step, indices=indices, features=z, codebook=codebook, loss=loss)
    monitor.close()
    assert [row["rule"] for row in Run(monitor.path).alarms] == told


def test_features_that_draw_together_on_few_codes_set_it_off_and_a_loss_that_falls_alone_does_not():
    facts = facts_of(to_dict(smoke()))
    falling = [1, 1, 1, 1, 2, 4, 6, 7, 8, 8, 8, 8, 8, 8]
    assert "usage_falls" in rules_of(recorded(falling, [64] * 4 + [30, 20] + [8] * 8), facts)
    assert "usage_falls" not in rules_of(recorded(falling, [64] * 14), facts)


# --- runs ---

SETTINGS = ("record.alarm=stop", "record.tokens_per_code=2", "optimizer.learning_rate=1e-3")
GRID = {
    **{"preset": "smoke", "methods": ("vq", "vq_ema"), "initialisations": ("published",), "codebook_sizes": (64,)},
    **{"code_dims": (6,), "seeds": (0,), "steps": 6, "settings": SETTINGS},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two cells worked on, of which the alarm stops one."""
    folder = tmp_path_factory.mktemp("alarms") / "study"
    study = open_study("explore_collapse", StudyParameters(**GRID, output=str(folder)))
    study.store.claim(study.facts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        for cell in study.cells:
            study.store.prepare(cell)
            assert worker.main(str(folder), cell.name) == 0
    return study


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """A run that was stopped by the alarm: codes of length 40 leave the softmax no choice. And what was told."""
    told, live = [], LiveCurves(every=600)
    folder = tmp_path_factory.mktemp("alarm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lengthen_codes(patch)
        with pytest.raises(TrainingInterrupted) as stop:
            train(collapsing(record__alarm="stop"), folder, progress=False, watch=live, on_alarm=told.append)
    return Run(folder), told, live, str(stop.value)


def collapsing(**settings):
    """IBQ of 256 codes without what holds its features back."""
    quantizer = {"name": "ibq", "codebook_size": 256, "code_dim": 8, "double_quantization": False, "entropy_weight": 0}
    return smoke(tokenizer__quantizer=quantizer, **settings)


def lengthen_codes(patch):
    """One code far away in front of all others: every token's largest z·C is its own."""
    from ibqlab.quantizers import codebooks  # noqa: PLC0415

    start = codebooks.FreeCodebook.__init__

    def init(self, *args):
        start(self, *args)
        with torch.no_grad():
            self.weight.mul_(0.01)
            self.weight[:2] = 40 * torch.tensor([1.0, -1.0])[:, None]

    patch.setattr(codebooks.FreeCodebook, "__init__", init)


def test_a_run_that_stops_at_an_alarm_is_saved_and_goes_on(collapsed, tmp_path):
    run, told, _, message = collapsed
    last = told[-1]
    assert run.status == "stopped" and run.step == last.step < 8
    assert message.startswith(f"stopped at step {last.step} of 8 by the alarm (") and last.seen in message
    assert [AlarmEvent.of_row(row).rule for row in run.alarms] == [event.rule for event in told]


def test_the_same_command_goes_on_and_tells_nothing_twice(collapsed):
    run, told, _, _ = collapsed
    before, again = run.alarms, []
    with pytest.MonkeyPatch.context() as patch:
        lengthen_codes(patch)
        while run.status != "finished":
            try:
                train(collapsing(record__alarm="stop"), run.path, progress=False, on_alarm=again.append)
            except TrainingInterrupted:
                continue
    events = [AlarmEvent.of_row(row) for row in run.alarms]
    assert run.alarms[: len(before)] == before and events[len(told) :] == again
    assert len({event.rule for event in events}) == len(events) == len(find_alarms(run.rows, facts_of(run.config)))
    assert {"few_codes", "reach_lost"} <= {event.rule for event in events}


def test_a_cell_that_the_alarm_stops_has_its_row_and_is_left_alone(study):
    well, stopped = study.rows().to_dict("records")
    assert (stopped["steps"], well["steps"]) == (3, 6) and math.isnan(well["stopped"])
    assert stopped["stopped"] == "reach lost at step 3 of 6" and 0 <= stopped["usage"] <= 1 and stopped["psnr"] > 0
    assert stopped["validation_step"] == 2 and math.isnan(well["validation_step"])
    assert [run.status for _, run in study.finished()] == ["finished", "stopped"]
    outcome = study.run(progress=False)
    assert len(outcome.finished) == 2 and outcome.check() is None


def test_the_row_of_a_stopped_run_is_of_one_step():
    """Features that overflow at step 1: no token has a code there, and the numbers are those of step 0."""
    overflow = Validation(l1=None, psnr=None, counts=torch.zeros(4, dtype=torch.int64), images=2, broken=[]).row()
    assert [overflow[f"validation_{key}"] for key in ("usage", "perplexity", "tokens")] == [None] * 3
    whole = Validation(l1=0.5, psnr=9.0, counts=torch.tensor([3, 1, 0, 0]), images=2, broken=[]).row()
    row = last_whole_validation(pd.DataFrame([{"step": 0} | whole, {"step": 1, "gradient_reach": 0.5} | overflow]))
    assert (row["step"], row["validation_usage"], row["validation_psnr"]) == (0, 0.5, 9.0)
    assert math.isnan(row["gradient_reach"])


def test_a_stop_at_nan_says_what_helps(tmp_path):
    with pytest.raises(
        TrainingInterrupted, match=r"the next step would fail: lower .* \(now 1e\+30\), in a new output"
    ):
        train(collapsing(record__alarm="stop", optimizer__learning_rate=1e30), tmp_path / "run", progress=False)


def test_a_stopped_cell_whose_row_is_lost_is_measured_and_not_trained(study):
    cell, run = study.finished()[1]
    row, rows = study.store.row(cell), len(run.rows)
    (study.folder / "rows" / f"{cell.name}.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        assert worker.main(str(study.folder), cell.name) == 0
    again = study.store.row(cell)
    assert len(run.rows) == rows and (again["stopped"], again["usage"]) == (row["stopped"], row["usage"])


def test_a_study_tells_its_alarms(study):
    text = write_study_report(study).with_name("report.md").read_text()
    name = study.cells[1].name
    assert "- **reach lost** in 1 of 2 runs, first at step 3: [" in text and f"]({name}/alarms.jsonl)" in text
    assert "reach lost at step 3 of 6" in text and "ended before their last step" in text
    shown = CliRunner().invoke(main, ["show", str(study.folder / name)])
    assert "\nalarms\n  step 3, reach lost; try tokenizer.quantizer.name=ibq" in shown.output
    assert "Likely cause" not in shown.output and shown.exit_code == 0
    assert "\nalarms" not in CliRunner().invoke(main, ["show", str(study.folder / study.cells[0].name)]).output


def test_live_curves_mark_alarms(collapsed):
    _, told, live, _ = collapsed
    assert live.alarms == told and told[0].title in live.widget.value


def test_a_report_lists_and_marks_them(collapsed):
    run = collapsed[0]
    text = write_run_report(run).with_name("report.md").read_text()
    assert "## Alarms" in text and "reach lost**: " in text and "## What explains it" in text
    assert all((run.path / "figures" / f"{name}.png").is_file() for name in ("band", "explanation", "rarefaction"))


def test_alarms_of_a_run_from_before_there_were_any(collapsed, tmp_path):
    run = collapsed[0]
    events, told = run_alarms(run)
    old = Run.start(tmp_path / "old", run.config)
    for row in run.rows:
        old.log(row)
    assert told and run_alarms(old) == (events, False) and "told of none" in describe_alarms(old)
    (old.path / "alarms.jsonl").write_text("no\nalarm\n")
    assert run_alarms(old) == (events, False)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The smoke run of every registered quantizer: its name → the run."""
    folder = tmp_path_factory.mktemp("healthy")
    return {name: train(smoke(name, steps=6), folder / name, progress=False) for name in sorted(available_quantizers())}


def test_the_registered_quantizers_set_off_only_what_is_true_of_them(healthy):
    told = {name: [row["rule"] for row in run.alarms] for name, run in healthy.items()}
    silent = {name for name, rules in told.items() if not rules}
    assert {"ibq", "lfq", "soft_vq", "vq", "simvq", "deferred_vq"} <= silent
    assert told["vq_ema"] == ["reach_lost", "few_codes"]  # from N(0, 1) they do lose nearly all codes at once
    for run in (healthy[name] for name in told.keys() - silent):
        rows = run.metrics.set_index("step")
        for event in run.alarms:
            assert event["rule"] in ("reach_lost", "few_codes")
            if event["rule"] == "reach_lost":
                assert 0 < rows.loc[event["step"], "gradient_reach"] < 10 / 64
            else:
                assert (run.snapshot()["counts"] > 0).sum() < 6
    assert not any((healthy[name].path / "alarms.jsonl").exists() for name in silent)
    assert describe_alarms(healthy["ibq"]) == "No rule of the alarm went off."


def test_a_flat_softmax_is_an_entropy_at_its_ceiling(tmp_path):
    """From U(±1/K) every token's softmax holds all codes, so the penalty sees even use whatever is chosen."""
    quantizer = {"name": "ibq", "codebook_size": 256, "code_dim": 8, "codebook_init": "uniform"}
    run = train(smoke(tokenizer__quantizer=quantizer, steps=4), tmp_path / "run", progress=False)
    assert [row["rule"] for row in run.alarms] == ["entropy_ceiling"]


def test_a_nan_is_an_alarm(tmp_path):
    told = []
    with pytest.raises(TrainingError, match="NaN or infinity"):
        train(smoke("vq", optimizer__learning_rate=1e18), tmp_path / "run", progress=False, on_alarm=told.append)
    (row,) = [row for row in Run(tmp_path / "run").alarms if row["rule"] == "nonfinite"]
    assert told[-1].rule == "nonfinite" and row["seen"] == told[-1].seen and "learning_rate" in row["remedy"]


def test_a_callback_may_end_a_training_and_off_tells_nothing(tmp_path, capsys):
    config = smoke(ema_codebook_start="placeholder", steps=2)

    def end(event):
        raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match="stopped at step"):
        train(config, tmp_path / "run", on_alarm=end)
    assert [row["rule"] for row in Run(tmp_path / "run").alarms] == ["placeholder_averages"]
    capsys.readouterr()
    assert train(config, tmp_path / "run").status == "finished"
    assert "alarm at" not in capsys.readouterr().err and len(Run(tmp_path / "run").alarms) == 1
    off = smoke(ema_codebook_start="placeholder", steps=1, record__alarm="off")
    assert train(off, tmp_path / "off", progress=False).alarms == []


def test_the_terminal_says_it(tmp_path, capsys):
    train(smoke(ema_codebook_start="placeholder", steps=1), tmp_path / "run")
    assert "alarm at step 0, averages are a placeholder: " in capsys.readouterr().err


def test_a_recipe_decides_and_old_runs_are_found_again():
    warning, stopping = smoke(), smoke(record__alarm="stop")
    old = to_dict(warning)
    del old["record"]["alarm"]
    assert warning.record.alarm == "warn" and content_hash(old) == content_hash(warning) != content_hash(stopping)
    with pytest.raises(ValueError, match=r"alarm must be one of 'warn', 'stop', 'off', got 'loud'"):
        smoke(record__alarm="loud")


def test_alarms_are_marked_at_their_steps(healthy):
    events = find_alarms(rows_of(TROUBLE["few_codes"]), IBQ) * 3
    figure = plot_run_curves(healthy["ibq"].metrics)
    lines = [len(axes.get_lines()) for axes in figure.axes]
    mark_alarms(figure, events)
    assert [len(axes.get_lines()) - before for axes, before in zip(figure.axes, lines, strict=True)] == [1] * 4
    assert "red: alarms (few codes at steps 13 and 13 and 1 more)" in figure.get_supxlabel().replace("\n", " ")
    assert alarm_list([]) == ""
    unmarked = figure.get_supxlabel()
    mark_alarms(figure, [])
    assert figure.get_supxlabel() == unmarked


def test_an_alarm_needs_no_rows_to_begin_with():
    assert Alarm(IBQ).check({"step": 0}) == []
