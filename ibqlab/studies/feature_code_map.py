"""The paper's figures 2, 3 and 6 from runs: where codes lie among features, and whether they stay there.

    figures = prepare_feature_map(FeatureMapParameters(preset="demo"))
    figures.run()                    # trains what is missing of the study explore_collapse, whose runs these are
    figures.figure_maps_and_usage()

Runs come from one of three places: the study `explore_collapse` at some preset (the same folder that its own notebook
uses, so that neither trains twice), the folder of any study of methods that is there, or single runs by name. Figures,
the numbers behind them and a report go to a folder of their own.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.checks import require
from ibqlab.base.files import write_whole
from ibqlab.base.progress import tell
from ibqlab.config import ConfigError
from ibqlab.diagnostics.distribution_gap import measure_distribution_gap
from ibqlab.grids.cells import as_json
from ibqlab.plots import code_map_table, plot_code_maps, save_figure
from ibqlab.plots.code_map import Panel
from ibqlab.plots.feature_code_map import gap_curve_table, plot_gap_curves, plot_maps_and_usage, usage_curve_table
from ibqlab.plots.style import extend_caption, in_order, mark_too_short, method_label
from ibqlab.runs import Run
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import find_run, output_folder, run_name
from ibqlab.runs.provenance_record import portable
from ibqlab.studies.drawn_runs import DrawnRun, FeatureMapParameters, label_run, told_apart
from ibqlab.studies.figures import last_map, map_each, map_run
from ibqlab.studies.gap_sentences import describe_gaps, gap_summary, show_gap_summary
from ibqlab.studies.method_grid import StudyParameters, require_methods
from ibqlab.studies.pages import join_parts, to_markdown, too_short_note, write_pages
from ibqlab.studies.provenance import provenance_of, provenance_text
from ibqlab.studies.registry import open_study
from ibqlab.studies.study import Study, as_typed

NAME = "feature_code_map"
SOURCE = "explore_collapse"
"""The study whose runs are drawn where no others are named."""
COMPARED = ("vq", "ibq")
"""Methods of figure 2."""
STARTS = {"published": "codes_and_usage", "same": "codes_and_usage_same_start"}
"""What `figure_maps_and_usage` may show, and the name of its file."""
PAPER_2 = "paper, figure 2: t-SNE of each method, trained on ImageNet, VQ and IBQ from their own starts"
PAPER_3 = "paper, figure 3: a drawing of which codes learn and how the distributions drift apart, without numbers"
PAPER_6 = "paper, figure 6: t-SNE of Soft VQ after training on ImageNet, 2.5 % of codes in use"


class FeatureCodeMap:
    """Runs whose codes and features are compared. Nothing is trained or written before `run`.

    Args:
        parameters: of the notebook.
    Raises:
        ConfigError: an unknown preset, method or recipe; a run of something else than a tokenizer; runs that differ in
            nothing that figures tell apart.
        FileNotFoundError: no such study or run.
    """

    def __init__(self, parameters: FeatureMapParameters):
        self.parameters = parameters
        self.study: Study | None = None
        self.drawn: list[DrawnRun] = []
        if parameters.runs:
            self.drawn = told_apart([label_run(Run(find_run(name))) for name in parameters.runs])
            default = NAME
        elif parameters.study:
            self.study = open_study(parameters.study)
            default = f"{self.study.folder.name}-figures"
        else:
            names = {field.name for field in fields(StudyParameters)} - {"output"}
            self.study = open_study(SOURCE, StudyParameters(**{name: getattr(parameters, name) for name in names}))
            default = f"{NAME}-{parameters.preset}"
        if self.study:
            require_methods(self.study)
        self.folder = output_folder(parameters.output, default=default)
        self.projection = parameters.projection or (self.study.grid.projection if self.study else "umap")
        self._gaps: pd.DataFrame | None = None

    def __repr__(self) -> str:
        number = len(self.study.cells) if self.study else len(self.drawn)
        source = f" of {run_name(self.study.folder)}" if self.study else ""
        return f"{number} runs{source} → {self.folder.name}"

    def run(self, progress: bool = True) -> "FeatureCodeMap":
        """Train what is missing of the preset's study; runs that are there already are read.

        Raises:
            StudyError: a run failed, or the study that was named has none that is finished.
        """
        if self.study and not self.parameters.study:
            self.study.run(progress).check()
        if self.study:
            finished = self.study.finished()
            if not finished:
                raise self.study.nothing_finished()
            self.drawn = [DrawnRun(cell.labels, run) for cell, run in finished]
        # Maps of several sizes cannot be compared.
        size = max((one.labels["codebook_size"], one.labels["code_dim"]) for one in self.drawn)
        of_size = [one for one in self.drawn if (one.labels["codebook_size"], one.labels["code_dim"]) == size]
        methods = in_order([one.labels["method"] for one in of_size])
        self.drawn = sorted(of_size, key=lambda one: methods.index(one.labels["method"]))
        self._gaps = None
        tell(folder=str(self.folder.resolve()))
        return self

    # --- numbers ---

    @property
    def metrics(self) -> pd.DataFrame:
        """All logged rows of the runs, with what tells them apart."""
        frames = [one.run.metrics.assign(**one.labels) for one in self._ready()]
        return pd.concat(frames, ignore_index=True)

    @property
    def gaps(self) -> pd.DataFrame:
        """One row per run and snapshot: what tells the run apart, step, features, and what `DistributionGap` holds."""
        if self._gaps is None:
            rows = [row for one in self._ready() for row in _gap_rows(one)]
            if not rows:
                raise ConfigError(
                    "no snapshot of these runs holds codebook and features, which the figures are made of"
                )
            self._gaps = pd.DataFrame(rows)
        return self._gaps

    @property
    def too_short(self) -> str:
        """Why the runs are too short to mean anything; empty where they are not."""
        if self.study:
            return self.study.too_short
        return why_too_short(max(one.run.step for one in self.drawn))

    # --- figures ---

    def figure_maps_and_usage(self, starts: str = "published") -> Figure | None:
        """Codes among features under VQ and IBQ after training, and usage through training: the paper's figure 2.

        Args:
            starts: "published": each from the start that it has of its own, saved as `codes_and_usage`; "same": both
                from one start, saved as `codes_and_usage_same_start`.
        Returns:
            The figure; None where "same" is asked for and the runs have no start in common.
        """
        require(starts in STARTS, f"starts must be one of {', '.join(map(repr, STARTS))}; got {starts!r}")
        pair = self._compared() if starts == "published" else self.same_start()
        if not pair:
            return None
        panels, missing = self._last_maps(pair)
        maps = code_map_table(panels)
        chosen = [(one.labels["method"], one.labels["init"]) for one in pair]
        rows = self.metrics
        rows = rows[[line in chosen for line in zip(rows["method"], rows["init"], strict=True)]]
        usage = usage_curve_table(rows)
        figure = plot_maps_and_usage(maps, usage, "\n".join(filter(None, (PAPER_2, missing))))
        name = STARTS[starts]
        self._save(name, figure, maps, of_one_seed=True)
        write_whole(self.folder / "figures" / f"{name}_curves.csv", usage.to_csv(index=False).encode())
        return figure

    def figure_gap(self) -> Figure:
        """Codes that gradient reaches, and the gap between codes and features through training, from every start: what
        the paper's figure 3 draws, measured. Saved as `distribution_gap`."""
        table = gap_curve_table(self.metrics, self.gaps)
        return self._save("distribution_gap", plot_gap_curves(table, PAPER_3), table)

    def figure_soft_vq(self) -> Figure | None:
        """Soft VQ's codes among features at its first and last snapshot, and IBQ's at its last: the paper's figure 6.
        Saved as `soft_vq_codes`; None without a run of Soft VQ."""
        soft = self._one("soft_vq")
        if soft is None:
            return None
        runs = {one.title: one.run for one in (soft, self._one("ibq")) if one}

        def first_and_last(run: Run) -> list[tuple[str, Panel]]:
            projection, steps = map_run(run, self.projection)
            shown = sorted({steps[0], steps[-1]} if run is soft.run else {steps[-1]})
            return [
                (f", step {step:,}", (projection, steps.index(step), run.snapshot(step)["counts"])) for step in shown
            ]

        panels, missing = map_each(runs, first_and_last)
        figure = plot_code_maps(panels)
        extend_caption(figure, "\n".join(filter(None, (PAPER_6, missing))))
        return self._save("soft_vq_codes", figure, code_map_table(panels), of_one_seed=True)

    # --- words ---

    def summary(self) -> pd.DataFrame:
        """Per method and start: usage, the gap at the first and last snapshot, distances and similarity of codes."""
        return gap_summary(self.metrics, self.gaps)

    def table(self) -> pd.DataFrame:
        """The same for reading; the numbers are saved as table.csv."""
        summary = self.summary()
        write_whole(self._figures() / "table.csv", summary.to_csv(index=False).encode())
        return show_gap_summary(summary)

    def describe(self) -> str:
        """What the runs say of the gap, as Markdown; a direction is named only where seeds tell it apart from 0."""
        short = f"**{self.too_short}: too short to mean anything.**\n\n" if self.too_short else ""
        return short + describe_gaps(self.gaps)

    def write_report(self) -> Path:
        """report.md and report.html with figures, table, sentences and provenance, in the folder of the figures."""
        titles = {
            "codes_and_usage": "Codes among features, and usage (figure 2)",
            "codes_and_usage_same_start": "The same from one start",
            "distribution_gap": "Gradient reach and the gap (figure 3)",
            "soft_vq_codes": "Soft VQ (figure 6)",
        }
        pictures = [
            f"## {title}\n\n![{title}](figures/{name}.png)"
            for name, title in titles.items()
            if (self.folder / "figures" / f"{name}.png").is_file()
        ]
        rows = [{"provenance": one.run.provenance, "seed": one.labels["seed"]} for one in self.drawn]
        steps = max(one.run.step for one in self.drawn)
        text = join_parts(
            "# Codes and features: the paper's figures 2, 3 and 6",
            too_short_note(steps),
            *pictures,
            f"## Numbers\n\n{to_markdown(self.table())}",
            f"## What they say\n\n{describe_gaps(self.gaps)}",
            provenance_text(rows, self.command, **self._runs_text()),
        )
        write_whole(self.folder / "provenance.json", as_json(provenance_of(rows, self.command)))
        page = write_pages(self.folder, f"{text}\n", NAME)
        tell(folder=str(self.folder.resolve()), result=self.result())
        return page

    def result(self) -> str:
        """One line: the gap at the last snapshot by method and start."""
        last = self.summary()
        shares = [
            f"{method_label(row['method'])} from {row['init']} {row['gap_last_mean']:.2f}" for _, row in last.iterrows()
        ]
        return f"gap of codes and features at the end (0: one distribution): {', '.join(shares)}"

    @property
    def command(self) -> str:
        """What makes the figures again."""
        plain = type(self.parameters)()
        words = ["ibqlab run", NAME]
        for field in fields(plain):
            value = getattr(self.parameters, field.name)
            if field.name == "preset" and not (self.parameters.study or self.parameters.runs):
                words.append(f"preset={value}")
            elif value != getattr(plain, field.name) and field.name not in ("preset", "retry", "output"):
                paths = tuple(map(portable, value)) if field.name == "runs" else value
                words.append(f"{field.name}={as_typed(portable(value) if field.name == 'study' else paths)}")
        return " ".join(words)

    # --- for views ---

    def same_start(self) -> list[DrawnRun]:
        """VQ and IBQ, or the first two methods, from one start and with one seed, where there are such runs.

        Code k then began at the same place in both. Empty where there are none.
        """
        methods = self._two_methods()
        # IBQ's own start first: from the other one all methods here may collapse.
        own = [one.labels["init"] for one in self._ready() if one.labels["published_init"]]
        inits = dict.fromkeys([*reversed(own), *(one.labels["init"] for one in self.drawn)])
        for init in inits:
            pair = [one for method in methods if (one := self._one(method, init))]
            if len(pair) == 2 and pair[0].labels["seed"] == pair[1].labels["seed"]:
                return pair
        return []

    def pair(self) -> list[Run]:
        """Two runs for a view: of one start where there are such, else each method from its own; one where there is
        one method alone."""
        return [one.run for one in self.same_start() or self._compared()]

    # --- inside ---

    def _ready(self) -> list[DrawnRun]:
        require(bool(self.drawn), "no run is read yet; call run() first")
        return self.drawn

    def _two_methods(self) -> list[str]:
        methods = list(dict.fromkeys(one.labels["method"] for one in self._ready()))
        return list(COMPARED) if set(COMPARED) <= set(methods) else methods[:2]

    def _compared(self) -> list[DrawnRun]:
        return [one for method in self._two_methods() if (one := self._one(method))]

    def _one(self, method: str, init: str = "") -> DrawnRun | None:
        """The run of a method and start with the first seed; without a start its own, or the first there is."""
        runs = [
            one for one in self._ready() if one.labels["method"] == method and (not init or one.labels["init"] == init)
        ]
        runs.sort(key=lambda one: (not one.labels["published_init"], one.labels["seed"]))
        return runs[0] if runs else None

    def _last_maps(self, drawn: list[DrawnRun]) -> tuple[dict[str, Panel], str]:
        return map_each({one.title: one.run for one in drawn}, lambda run: [last_map(run, self.projection)])

    def _figures(self) -> Path:
        folder = self.folder / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _save(self, name: str, figure: Figure, data: pd.DataFrame, of_one_seed: bool = False) -> Figure:
        seeds = sorted({one.labels["seed"] for one in self.drawn})
        if of_one_seed:
            extend_caption(figure, one_seed_text(seeds[0], len(seeds)))
        if self.too_short:
            mark_too_short(figure, self.too_short)
        save_figure(figure, self._figures() / name, data)
        return figure

    def _runs_text(self) -> dict[str, str]:
        """Where the runs lie, and what trained them, for the provenance."""
        commands = sorted({str(line) for one in self.drawn if (line := one.run.provenance.get("command_line"))})
        names = ", ".join(one.run.name for one in self.drawn)
        return {"runs": names, **({"trained by": "; ".join(commands)} if commands else {})}


def prepare_feature_map(parameters: FeatureMapParameters) -> FeatureCodeMap:
    """The figures that a notebook's parameters ask for; nothing is trained or written.

    Raises:
        As `FeatureCodeMap`.
    """
    return FeatureCodeMap(parameters)


def one_seed_text(seed: int, seeds: int) -> str:
    """What the caption of maps says of seeds and spaces."""
    others = f", the first of {seeds}" if seeds > 1 else ""
    return f"maps: seed {seed}{others}; each method has a space of its own"


def _gap_rows(one: DrawnRun) -> list[dict[str, Any]]:
    """The gap at every snapshot of a run that holds finite codes and features."""
    rows = []
    for step in one.run.snapshot_steps:
        snapshot = one.run.snapshot(step)
        if not {"codebook", "features"} <= set(snapshot):
            continue
        try:
            gap = measure_distribution_gap(snapshot["codebook"], snapshot["features"], snapshot["counts"])
        except ValueError:  # the run has diverged there
            continue
        rows.append({**one.labels, "step": step, "features": len(snapshot["features"]), **gap._asdict()})
    return rows
