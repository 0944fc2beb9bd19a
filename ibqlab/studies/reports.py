"""A study as one page: tables with the paper's column, figures, what follows, and all it takes to make it again.

report.md and report.html lie in the study's folder; the page holds its pictures, so that it can be sent as one file.
"""

import base64
import html
import re
from pathlib import Path

from ibqlab.base.escaping import for_html, for_markdown
from ibqlab.base.files import explained, read_bytes, write_whole
from ibqlab.base.progress import SHORTEST
from ibqlab.grids.cells import as_json
from ibqlab.grids.opening import read_parameters_of
from ibqlab.studies.ablation import open_ablations
from ibqlab.studies.ablation_tables import AblationTables
from ibqlab.studies.figures import figure_collapse, figure_histogram, figure_reconstructions
from ibqlab.studies.provenance import provenance_of, provenance_text
from ibqlab.studies.scaling import ScalingReport
from ibqlab.studies.statistics import name_interval
from ibqlab.studies.study import Study, open_study
from ibqlab.studies.tables import TOO_SHORT, to_markdown, write_report

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;display:block;overflow-x:auto;font-size:13px}"
    "th,td{border-bottom:1px solid #ddd;padding:.3em .7em;text-align:left;vertical-align:top}"
    "td{overflow-wrap:anywhere;min-width:4em}@media print{table{display:table;font-size:9px}}"
    "img{max-width:100%;border:0}code{background:#f4f4f4;padding:.1em .3em;overflow-wrap:anywhere}"
)

PICTURE_BYTES = 64 * 2**20
"""Largest picture that a page takes in."""


def write_study_report(study: str | Path | AblationTables | ScalingReport) -> Path:
    """Report on a study, whole or partial.

    Args:
        study: the folder of a study that was run, or its name below the folder of all runs; or its tables, whose
            figures are not drawn again then.
    Returns:
        Path of report.html; report.md and figures/ lie beside it.
    Raises:
        StudyError: no study's folder, or nothing in it is finished.
    """
    if isinstance(study, AblationTables):
        return write_pages(study.study.folder, ablation_report(study), "ablations")
    if isinstance(study, ScalingReport):
        return write_pages(study.study.folder, study.markdown(), study.study.name)
    place, name, _ = read_parameters_of(study)
    if name == "ablations":
        return write_study_report(AblationTables(open_ablations(place)))
    opened = open_study(place)
    if name == "scale_codebook":
        return write_study_report(ScalingReport(opened))
    return write_pages(place, collapse_report(opened), name)


def collapse_report(study: Study) -> str:
    """A study of collapse as Markdown: its table, and its figures, which are drawn by the way."""
    figure_collapse(study, "published")
    figure_collapse(study, "same")
    figure_histogram(study)
    figure_reconstructions(study)
    pictures = {
        "collapse_curves": "Each method from its own start",
        "collapse_curves_same_start": "From every start",
        "usage_histogram": "Hits per code",
        "reconstructions": "Reconstructions",
    }
    shown = [f"## {title}\n\n![{title}](figures/{name}.png)" for name, title in pictures.items()]
    return "\n\n".join([write_report(study).read_text(encoding="utf-8").rstrip(), *shown]) + "\n"


def ablation_report(tables: AblationTables) -> str:
    """All tables of a study as Markdown; figures are saved by the way."""
    study = tables.study
    rows = list(tables.rows.values())
    parts = [
        f"# The paper's tables at preset {study.parameters.preset}",
        "Ours beside the paper's: "
        f"{len(rows)} of {len(study.cells)} runs finished, seeds {', '.join(map(str, study.seeds))}. In brackets: "
        f"{name_interval(len(study.seeds))}. Usage: share of codes hit at least once in the tokens named. "
        "quantizer: one pass forward and backward over a step's tokens, float32, while others were trained; MiB: "
        "what autograd keeps for it. The paper's numbers are of ImageNet at 256 pixels, ours of what the column "
        "`here` says on the images named at the end: orders can be compared, values cannot. PSNR and usage "
        "are of the validation images of each run, as many as 10 tokens per code take.",
    ]
    if max((row["steps"] for row in rows), default=SHORTEST) < SHORTEST:
        parts.append(TOO_SHORT)
    if tables.figure_collapse():
        parts.append(
            f"## Collapse through training (figure 2)\n\n{tables.compared_methods()}.\n\n"
            "![Collapse through training](figures/collapse.png)"
        )
    for name, table in study.tables.items():
        shown = tables.shown(name)
        write_whole(_made(study.folder / "figures") / f"{name}_table.csv", shown.to_csv(index=False).encode())
        picture = f"\n\n![{table.file.title}](figures/{name}.png)" if tables.figure(name) else ""
        if tables.figure_norms(name):
            picture += f"\n\n{tables.order_text(name)}".rstrip()
            picture += f"\n\n![Norms of features and codes, and the softmax's spread](figures/{name}_norms.png)"
        parts.append(
            f"## {table.file.title} ({table.file.table})\n\n{to_markdown(shown)}\n\n{tables.sentences(name)}\n\n"
            f"Printed numbers: {table.file.source}.{picture}"
        )
    failures = [(cell.name, failure) for cell in study.cells if (failure := study.store.failure(cell))]
    if failures:
        parts.append(
            "## Failed\n\n"
            + "\n".join(f"- {for_markdown(name)}: {for_markdown(failure['error'], 2000)}" for name, failure in failures)
        )
    parts.append(provenance_text(rows, study.command, f"ibqlab report {study.folder.name}"))
    write_whole(study.folder / "provenance.json", as_json(provenance_of(rows, study.command)))
    return "\n\n".join(parts) + "\n"


def write_pages(folder: Path, text: str, title: str) -> Path:
    """Markdown, and the same as one HTML page with its pictures inside; the page's path."""
    import mistune  # noqa: PLC0415 - comes with the notebook tools

    write_whole(folder / "report.md", text.encode(errors="replace"))
    body = mistune.create_markdown(escape=True, plugins=["table"])(text)
    body = re.sub(r"<img\b[^>]*>", lambda found: _picture(found[0], folder / "figures"), body)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{for_html(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
    write_whole(folder / "report.html", page.encode(errors="replace"))
    return folder / "report.html"


def _picture(tag: str, figures: Path) -> str:
    """An image of the page with its bytes inside; its description alone where it is none of the study's figures.

    Only ordinary .png files that lie inside `figures/`, links followed, are read: whatever else a page may name, from
    the disk or from the net, must not travel with it.
    """
    source, shown = (re.search(rf'{name}="([^"]*)"', tag) for name in ("src", "alt"))
    shown = shown[1] if shown else ""
    file = figures.parent / html.unescape(source[1] if source else "")
    try:
        inside = file.resolve().is_relative_to(figures.resolve()) and file.resolve().suffix == ".png"
        content = read_bytes(file, PICTURE_BYTES) if inside else b""
    except (OSError, ValueError, RuntimeError):
        content = b""
    if not content.startswith(b"\x89PNG"):
        return f"<em>{shown}</em>"
    return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" alt="{shown}">'


def _made(folder: Path) -> Path:
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
