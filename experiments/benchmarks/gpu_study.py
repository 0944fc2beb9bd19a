"""A study on one GPU in eight minutes: VQ and IBQ with 16,384 and 262,144 codes of 256 numbers, on photographs.

    python experiments/benchmarks/gpu_study.py --output experiments/results/explore_collapse_h200

What `ibqlab run explore_collapse preset=h200` trains, without the notebook, so that it runs where Jupyter is missing.
The report, its figures and the numbers behind each go to --output; the runs, gigabytes of snapshots, stay in a folder
of their own and are resumed from there.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from ibqlab.studies import StudyParameters, open_study, write_study_report


def copy_report(study: Path, output: Path) -> None:
    """Report, provenance and figures with their tables, as results folders have them."""
    output.mkdir(parents=True, exist_ok=True)
    for file in (study / "report.md", study / "provenance.json", *sorted((study / "figures").iterdir())):
        shutil.copy(file, output / file.name)


def main() -> None:
    """Train what is missing, report, copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="h200")
    parser.add_argument("--runs", help="folder of the runs; by itself the study's own below the folder of all runs")
    parser.add_argument("--output", required=True, help="folder of the report")
    chosen = parser.parse_args()
    began = time.monotonic()
    runs = os.path.abspath(chosen.runs) if chosen.runs else ""
    study = open_study("explore_collapse", StudyParameters(preset=chosen.preset, projection="pca", output=runs))
    outcome = study.run(progress=sys.stdout.isatty())
    if study.finished():
        write_study_report(study)
        copy_report(study.folder, Path(chosen.output))
    print(f"{len(study.finished())} of {len(study.cells)} runs, {time.monotonic() - began:.0f} s: {chosen.output}")
    outcome.check()


if __name__ == "__main__":
    main()
