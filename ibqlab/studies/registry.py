"""All studies by name, and the one way to open them: by name and parameters, or by the folder of an earlier run."""

import shlex
from dataclasses import replace
from pathlib import Path

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import write_whole
from ibqlab.config import ConfigError, nearest, parse
from ibqlab.grids.cells import PARAMETERS_FILE, StudyError, as_json, read_json
from ibqlab.recipes.plugins import copies_first
from ibqlab.runs.finding import find_run, hint_at_runs, run_name
from ibqlab.runs.folder import PLUGINS
from ibqlab.studies.ablations import ABLATIONS
from ibqlab.studies.collapse import EXPLORE_COLLAPSE
from ibqlab.studies.fair_comparison import FAIR_COMPARISON
from ibqlab.studies.pages import join_parts, write_pages
from ibqlab.studies.provenance import provenance_of, provenance_text
from ibqlab.studies.scaling import SCALE_CODEBOOK
from ibqlab.studies.study import SharedParameters, Study, StudyDefinition
from ibqlab.studies.study_alarms import describe_study_alarms
from ibqlab.studies.token_costs import LINK_STAGES

DEFINITIONS: dict[str, StudyDefinition] = {
    definition.name: definition
    for definition in (EXPLORE_COLLAPSE, SCALE_CODEBOOK, ABLATIONS, LINK_STAGES, FAIR_COMPARISON)
}
"""A new study is a module with its definition, a line here, its presets in experiments/studies/NAME.yaml, and the
notebook that `ibqlab run NAME` executes."""
REMEDY_LETTERS = 2000
"""Letters of what a message says to type; the folder's own parameters stand in it."""


def open_study(name: str | Path, parameters: SharedParameters | None = None) -> Study:
    """A study, nothing trained: by name, its preset overruled by parameters, or by its folder as it was last run.

        open_study("explore_collapse", StudyParameters(preset="demo"))   # new, or the same again
        open_study("my_collapse")                                        # the folder

    Args:
        name: a key of `DEFINITIONS`; without parameters a study's folder, a path or a name below the folder of all
            runs.
        parameters: of the notebook; None: those that the folder was last run with.
    Raises:
        ConfigError: an unknown study, preset or recipe, or runs that cannot be.
        FileNotFoundError: there is no such folder.
        StudyError: no study's folder, or one whose runs have another recipe, other settings or another number of steps
            than the parameters say. Other methods, sizes and seeds may be added to a folder.
    """
    if parameters is None:
        # The presets may have changed since. What is finished stays readable, so nothing is compared.
        folder = _find_folder(name)
        with copies_first(folder):
            return Study(*_parameters_of(folder))
    definition = _definition(str(name))
    if not isinstance(parameters, definition.parameters):
        raise ConfigError(f"{name} takes {definition.parameters.__name__}; got {type(parameters).__name__}")
    study = Study(definition, parameters)
    try:
        study.require_same()
    except StudyError as error:
        remedy = for_terminal(_remedy(study.folder), REMEDY_LETTERS)
        raise StudyError(f"{error}. {remedy}") from None
    return study


def write_study_report(study: Study | str | Path, redraw: bool = True) -> Path:
    """Report on a study, whole or partial.

    Args:
        study: or its folder, a path or a name below the folder of all runs.
        redraw: False: figures that are there already are taken as they are, such as those of a notebook.
    Returns:
        Path of report.html; report.md, provenance.json and figures/ lie beside it.
    Raises:
        StudyError: no study's folder, or nothing in it is finished.
    """
    study = study if isinstance(study, Study) else open_study(study)
    text = study.definition.report(study, redraw)
    rows = [row for cell in study.cells if (row := study.store.row(cell))]
    made_by = provenance_text(rows, study.command, f"ibqlab report {study.folder.name}")
    write_whole(study.folder / "provenance.json", as_json(provenance_of(rows, study.command)))
    return write_pages(study.folder, f"{join_parts(text, describe_study_alarms(study), made_by)}\n", study.name)


def _find_folder(name: str | Path) -> Path:
    """A study's folder; where there is none and a study is called so, what to write is said."""
    try:
        return find_run(name, "study")
    except FileNotFoundError as error:
        if str(name) not in DEFINITIONS:
            raise
        made = f"open_study({str(name)!r}, {DEFINITIONS[str(name)].parameters.__name__}(preset=...))"
        raise FileNotFoundError(f"{error}. For the study of that name give its parameters: {made}") from None


def _definition(name: str) -> StudyDefinition:
    if name not in DEFINITIONS:
        raise ConfigError(f"there is no study {for_terminal(name, 80)!r}; {nearest(name, list(DEFINITIONS))}")
    return DEFINITIONS[name]


def _parameters_of(folder: Path) -> tuple[StudyDefinition, SharedParameters]:
    """What a folder was last run with; `output` is this folder.

    Raises:
        StudyError: it is no study's folder.
        ConfigError: parameters that the study does not take.
    """
    values = read_json(folder / PARAMETERS_FILE)
    if values is None and (folder / "config.yaml").is_file():
        raise StudyError(f"{folder.name} is a run, no study; type ibqlab report {shlex.quote(run_name(folder))}")
    if values is None:
        remedy = hint_at_runs(folder, "report") or "run a study's notebook first"
        raise StudyError(f"{folder} is no study's folder: it holds no {PARAMETERS_FILE}; {remedy}")
    name = values.pop("study", None)
    if not isinstance(name, str):
        raise StudyError(f"{folder / PARAMETERS_FILE} is damaged: it names no study; run the study's notebook again")
    definition = _definition(name)
    values["output"] = str(folder.resolve())
    return definition, parse(definition.parameters, values, source=f"{folder.name}, parameters")


def _remedy(folder: Path) -> str:
    """What to type where a folder is another study's."""
    try:
        with copies_first(folder):
            existing = Study(*_parameters_of(folder))
            # The file beside may have been edited since; the study goes on with the copies that it keeps.
            kept = {plugin.name: folder / PLUGINS / plugin.file_name for plugin in existing.plugins}
    except (StudyError, FileNotFoundError, ValueError):
        return "Give output another folder, or the parameters that the folder was made with"
    name = run_name(folder)
    if typed := getattr(existing.parameters, "plugins", ()):
        copies = tuple(str(kept[one]) if one in kept and kept[one].is_file() else one for one in typed)
        existing.parameters = replace(existing.parameters, plugins=copies)
    return (
        f"To open it as it is: open_study({name!r}), or ibqlab report {shlex.quote(name)}; to go on with it: "
        f"{existing.command_to(name)}; to make another one: output=ANOTHER"
    )
