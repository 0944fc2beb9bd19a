"""A lab as a page: its figures, its table, what came of each method, and what made it."""

from pathlib import Path

from ibqlab.base.escaping import for_markdown
from ibqlab.base.files import write_whole
from ibqlab.diagnostics.lab import Lab, LabResult
from ibqlab.diagnostics.usage import TOKENS_PER_CODE
from ibqlab.grids.cells import as_json
from ibqlab.plots.lab import show_lab_table
from ibqlab.runs import Run
from ibqlab.studies.pages import join_parts, to_markdown, too_short_note, write_pages
from ibqlab.studies.provenance import provenance_of, provenance_text

PICTURES = {
    "codes_through_time": "Codes at four steps",
    "codes_at_the_end": "Codes among features at the last step",
    "lab_curves": "Usage, perplexity, gradient reach and error through time",
}
"""Figures of both notebooks of the lab, in the order of a page; those that were drawn are shown."""
_HOW = (
    "- usage: share of codes hit at least once in the validation features named; lowest: of all validations\n"
    "- error share: what quantizing loses of the features' variance; 0 % is perfect, 100 % is what their mean "
    "alone would leave\n"
    "- gradient reach: share of codes whose gradient in the last step exceeds a thousandth of the largest\n"
    "- s: wall-clock time of a method"
)


def _few(result: LabResult) -> str:
    """A line on usage that reads low, where the features kept for validation are too few for so many codes."""
    table = result.table().dropna(subset=["tokens"])
    per_code = float((table["tokens"] / table["codebook_size"]).min())
    few = f"only {per_code:.1f} features per code at the least, fewer than {TOKENS_PER_CODE}"
    return f"\n- {few}: usage reads low" if per_code < TOKENS_PER_CODE else ""


def write_lab_report(lab: Lab, result: LabResult) -> Path:
    """Write report.md, report.html, provenance.json and table.csv into a lab's folder.

    Args:
        lab: whose figures are drawn already.
        result: of its `run`.
    Returns:
        Path of report.html; of report.md where the notebook tools, which make the page, are not installed.
    Raises:
        RunError: the folder cannot be written.
    """
    table = result.table()
    write_whole(lab.folder / "table.csv", table.to_csv(index=False).encode())
    pictures = [
        f"## {title}\n\n![{title}](figures/{name}.png)"
        for name, title in PICTURES.items()
        if (lab.folder / "figures" / f"{name}.png").is_file()
    ]
    rows = [
        {"provenance": Run(folder).provenance, "seed": result.seed} for folder in lab.method_folders if folder.is_dir()
    ]
    settings = lab.settings
    facts = (
        f"{for_markdown(result.features)}; {result.steps:,} steps of {settings.batch_size:,} features, K = "
        f"{settings.codebook_size:,}, D = {result.dim}, seed {result.seed}. Every method sees the same features."
    )
    text = join_parts(
        f"# {for_markdown(lab.folder.name)}",
        facts,
        too_short_note(result.steps) if not lab.too_short else f"**{lab.too_short}: too short to mean anything.**",
        for_markdown(result.failed, 2000) if result.failed else "",
        f"## Table\n\n{to_markdown(show_lab_table(result))}\n\n{_HOW}{_few(result)}",
        *pictures,
        provenance_text(rows, lab.command, features=result.features),
    )
    write_whole(lab.folder / "provenance.json", as_json(provenance_of(rows, lab.command)))
    return write_pages(lab.folder, f"{text}\n", lab.folder.name)
