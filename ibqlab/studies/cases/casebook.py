"""All cases, and what the notebook `your_case` may set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibqlab.base.checks import SEED, STEPS, require, require_between, require_choice
from ibqlab.base.progress import ProgressLine, tell
from ibqlab.plots import style
from ibqlab.plots.printing import PrintFigure, save_figure
from ibqlab.recipes.presets import CasesPreset, find_preset
from ibqlab.runs import Run
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import output_folder
from ibqlab.studies.cases.case import Case, CaseResult, count_text, too_few_seeds
from ibqlab.studies.cases.case_figure import case_table, plot_case
from ibqlab.studies.cases.checkpoint_case import NO_DISCRIMINATOR
from ibqlab.studies.cases.lab_cases import AFTER_EPOCH_ONE, DIMENSION, SMALL_BATCH
from ibqlab.studies.cases.perplexity_case import BATCH_PERPLEXITY

CASES: dict[str, Case] = {
    case.name: case for case in (DIMENSION, AFTER_EPOCH_ONE, SMALL_BATCH, BATCH_PERPLEXITY, NO_DISCRIMINATOR)
}
"""By name, those that are reported most first."""


@dataclass(frozen=True, kw_only=True)
class CasesParameters:
    """What the `parameters` cell of the notebook `your_case` may set. Empty or 0 means: as the preset says."""

    preset: str = "demo"
    """One of `preset_names("cases")`."""
    cases: tuple[str, ...] = ()
    """Keys of `CASES`; empty: all."""
    seeds: tuple[int, ...] = ()
    """Of every run; claims need at least three."""
    steps: int = 0
    """Of every run; 0: the preset's, or each case's own."""
    output: str = ""
    """Folder: a name below the folder of all runs, or a path that starts with / ./ or ~; empty: your_case-<preset>."""

    def __post_init__(self):
        find_preset(self.preset, "cases")
        for name in self.cases:
            require_choice("cases", name, CASES)
        require(len(set(self.cases)) == len(self.cases), f"cases holds a name twice: {list(self.cases)}")
        for seed in self.seeds:
            require_between("seeds", seed, 0, SEED)
        require(len(set(self.seeds)) == len(self.seeds), f"seeds holds a number twice: {list(self.seeds)}")
        require_between("steps", self.steps, 0, STEPS)


class CaseBook:
    """Cases that are ready: nothing is computed or written before `run`.

    Args:
        parameters: of the notebook.
    """

    def __init__(self, parameters: CasesParameters):
        preset: CasesPreset = find_preset(parameters.preset, "cases")
        self.preset = parameters.preset
        self.cases = {name: CASES[name] for name in parameters.cases or CASES}
        self.seeds = parameters.seeds or preset.seeds
        self.steps = parameters.steps or preset.steps
        self.folder: Path = output_folder(parameters.output, default=f"your_case-{parameters.preset}")
        self.results: dict[str, CaseResult] = {}

    def __contains__(self, name: str) -> bool:
        require_choice("case", name, CASES)
        return name in self.cases

    def run(self, progress: bool = True) -> "CaseBook":
        """Every run that is not finished in the folder; the others are read there.

        Args:
            progress: show where the work stands.
        """
        with ProgressLine(progress) as line:
            for name, case in self.cases.items():
                self.results[name] = case.run(self.seeds, self.steps, self.folder / name, line.show)
        tell(folder=str(self.folder.resolve()), result=self.summary())
        return self

    def figure(self, name: str) -> PrintFigure | None:
        """The curves of a case, also written into the folder's `figures/`; None where the case was not asked for."""
        if name not in self:
            return None
        result = self.results[name]
        figure = plot_case(result)
        reason = self.too_short(result)
        if reason:
            style.mark_too_short(figure, reason)
        save_figure(figure, self.folder / "figures" / name, case_table(result))
        return figure

    def report(self, name: str) -> str:
        """The case in words, as Markdown, with its table."""
        if name not in self:
            return f"Not asked for: add {name} to `cases`."
        result = self.results[name]
        reason = self.too_short(result)
        head = f"**{reason}: too short to mean anything.**\n\n" if reason else ""
        return f"{head}{result.report()}\n\n{_as_markdown(result)}"

    def symptom(self, name: str) -> str:
        """What people report, and what is run here in its place, as Markdown."""
        case = CASES[name]
        return f"*Reported*: {case.symptom}\n\n*Here*: {case.setting}"

    def provenance(self, name: str, key: str) -> dict[str, Any]:
        """What the run folders of a case's settings say of themselves, with the first seed.

        Args:
            name: of the case.
            key: of provenance.json, such as "start": where a continued training began.
        Returns:
            Arm → value; arms whose runs do not say it, or that were not run, are left out.
        """
        folder = self.folder / name / f"seed{self.seeds[0]}"
        runs = {arm.key: folder / arm.key for arm in CASES[name].arms}
        told = {arm: Run(path).provenance.get(key) for arm, path in runs.items() if path.exists()}
        return {arm: value for arm, value in told.items() if value is not None}

    def summary(self) -> str:
        """One line over all cases."""
        cases, seeds = count_text(len(self.cases), "case"), count_text(len(self.seeds), "seed")
        seen = [case.title for name, case in self.cases.items() if self.results[name].reproduced]
        missed = [case.title for name, case in self.cases.items() if not self.results[name].reproduced]
        short = [name for name, result in self.results.items() if self.too_short(result)]
        words = f"{len(seen)} of {cases} reproduced over {seeds}"
        words += f"; not, or in part: {', '.join(missed)}" if missed else ""
        if too_few_seeds(len(self.seeds)):
            words = f"{cases} run, none judged: {too_few_seeds(len(self.seeds))}"
        return words + (" (too short to mean anything)" if short else "")

    def too_short(self, result: CaseResult) -> str:
        """Why the runs of a case say nothing; empty where they do."""
        if self.preset == "smoke":
            return why_too_short(result.steps, self.preset)
        # A case's own steps are enough for it, however few; its claims were tried with them.
        return f"{result.steps:,} steps of {result.case.steps:,}" if result.steps < result.case.steps else ""

    def __str__(self) -> str:
        arms = sum(len(case.arms) for case in self.cases.values())
        sizes = (len(self.cases), "case"), (arms, "setting"), (len(self.seeds), "seed")
        return f"{', '.join(count_text(number, noun) for number, noun in sizes)} → {self.folder.name}"


def prepare_cases(parameters: CasesParameters) -> CaseBook:
    """The cases that a notebook's parameters ask for; nothing is written.

    Raises:
        ValueError: a case, preset or folder that cannot be.
    """
    return CaseBook(parameters)


def _as_markdown(result: CaseResult) -> str:
    """The table of a case."""
    table = result.table()
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
