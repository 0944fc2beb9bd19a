"""The map of a large codebook: fitted, shown in JupyterLab, moved by its slider, clicked.

    python experiments/benchmarks/codebook_map.py --output map.csv             # K = 262,144, 50,000 features

Makes a run folder with snapshots of random codes and features, fits the plane, opens the map in a headless Chromium and
measures what a reader waits for: from running the cell to drawn points, from a key on the slider to moved points, from
a click on a code to its card. The plane is fitted before, so that the map is shown from stored coordinates. Besides
wall-clock times it gives the processor time of JupyterLab, kernel and browser, which a busy machine does not stretch;
without a graphics card it holds the drawing of every point. `load_before` tells how many processes wanted the cores.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
from rows import origin_columns

from ibqlab.runs import Run
from ibqlab.views.map_data import map_run_codes
from ibqlab.views.subject import open_subject

CHROMIUM = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
LAB = (
    *("-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
    *("--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"),
    "--LabApp.extension_manager=readonly",
)
NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}
IDLE = "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
WHOLE = "step => document.querySelector('.ibqlab-map-canvas')?.dataset.whole === step"
WAIT = "() => document.querySelector('.ibqlab-map-canvas').dataset.wait"
DRAWN = "step => document.querySelector('.ibqlab-map-canvas')?.dataset.drawn === step"
PATIENCE = 180_000


def make_run(folder: Path, given: argparse.Namespace) -> None:
    """Codes around the features or left behind at their start, of which a share is in use."""
    generator = np.random.default_rng(given.seed)
    run = Run.start(folder, {"kind": "monitored", "codebook_size": given.codes, "code_dim": given.dim})
    features = generator.normal(size=(given.features, given.dim)).astype(np.float32)
    start = 0.3 * generator.normal(size=(given.codes, given.dim)).astype(np.float32)
    goal = generator.normal(size=(given.codes, given.dim)).astype(np.float32)
    learns = generator.random(given.codes) < given.in_use
    last_hit = np.full(given.codes, -1)
    for number in range(given.snapshots):
        step = 100 * number
        share = number / max(1, given.snapshots - 1)
        counts = np.where(learns, generator.poisson(12 * (1 - share / 2), given.codes), 0)
        last_hit[counts > 0] = step
        run.save_snapshot(
            step,
            codebook=np.where(learns[:, None], start + share * (goal - start), start).astype(np.float32),
            features=(1 + 0.2 * share) * features,
            assignments=generator.integers(given.codes, size=given.features),
            counts=counts,
            last_hit=last_hit,
        )
        run.log({"step": step, "loss": 1.0})
    run.finish("finished", seed=given.seed)


def fit(folder: Path, method: str) -> dict[str, float]:
    """Seconds of the fit and of reading it again; MiB that the process has held at most."""
    numbers = {}
    for name in ("fit", "read"):
        began, cpu = time.perf_counter(), time.process_time()
        data = map_run_codes(open_subject(folder), method, dead_codes=None, progress=True)
        numbers[f"{name}_s"], numbers[f"{name}_cpu_s"] = time.perf_counter() - began, time.process_time() - cpu
    assert len(data.code_ids) == data.codebook_size
    return numbers | {"fit_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


@contextmanager
def lab(folder: Path, cell: str) -> Iterator[str]:
    """A JupyterLab with one notebook of one cell; the notebook's address."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (folder / "work").mkdir()
    nbformat.write(notebook, folder / "work" / "map.ipynb")
    settings = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(NO_NEWS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{kind.upper()}_DIR": str(folder / kind) for kind in ("config", "data", "runtime")}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, *LAB, f"--port={port}"],
            cwd=folder / "work",
            env=os.environ | own,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/doc/tree/map.ipynb"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def look(folder: Path, run: Path, given: argparse.Namespace) -> dict[str, float]:
    """What a reader waits for, seconds."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - the fit alone does without

    cell = (
        "from ibqlab.widgets import CodebookMap\n"
        f"shown = CodebookMap({str(run)!r}, {given.method!r}, dead_codes=None)\nshown"
    )
    with lab(folder, cell) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=given.chromium, headless=True, args=list(CHROMIUM))
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.wait_for_function(IDLE)
        began, spent = time.perf_counter(), processor_seconds()
        page.evaluate(RUN_ALL)
        page.wait_for_function(DRAWN, arg=str(given.snapshots - 1))
        numbers = {"shown_s": time.perf_counter() - began, "shown_cpu_s": processor_seconds() - spent}
        numbers |= _slide(page, given) | _click(page)
        if given.picture:
            page.screenshot(path=given.picture)
        browser.close()
    return numbers


def _slide(page: Any, given: argparse.Namespace) -> dict[str, float]:
    """Seconds from a key on the slider to points drawn, the first time at a step and on coming back."""
    page.locator(".ibqlab-codebook-map .widget-slider .noUi-handle").first.focus()
    waits: dict[str, list[float]] = {"slider_first_s": [], "slider_again_s": []}
    keys = [("slider_first_s", "ArrowLeft", -1)] * 4 + [("slider_again_s", "ArrowRight", 1)] * 4
    waits["slider_cpu_s"], frame = [], given.snapshots - 1
    for name, key, by in keys:
        page.wait_for_function(WHOLE, arg=str(frame))
        page.wait_for_timeout(1000)
        frame += by
        spent = processor_seconds()
        page.keyboard.press(key)
        page.wait_for_function(DRAWN, arg=str(frame))
        waits["slider_cpu_s"].append(processor_seconds() - spent)
        waits[name].append(float(page.evaluate(WAIT)) / 1000)
    page.wait_for_function(WHOLE, arg=str(frame))
    return {name: statistics.median(values) for name, values in waits.items()}


def _click(page: Any) -> dict[str, float]:
    """Seconds from a click on a code to its card."""
    seconds, spent = [], []
    for number in range(3):
        box = page.locator(".ibqlab-map-canvas canvas").first.bounding_box()
        x, y = (box[side] + box[size] * (0.42 + 0.04 * number) for side, size in (("x", "width"), ("y", "height")))
        before = page.locator(".ibq-card h3").inner_text()
        page.mouse.move(x, y)
        page.wait_for_timeout(5000)
        began, cpu = time.perf_counter(), processor_seconds()
        page.mouse.click(x, y)
        page.wait_for_function("before => document.querySelector('.ibq-card h3').innerText !== before", arg=before)
        seconds.append(time.perf_counter() - began)
        spent.append(processor_seconds() - cpu)
    return {"card_s": statistics.median(seconds), "card_cpu_s": statistics.median(spent)}


def processor_seconds() -> float:
    """Processor time of all processes below this one: JupyterLab, kernel and browser."""
    times, children = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        number = int(file.parent.name)
        times[number] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        children.setdefault(int(fields[1]), []).append(number)
    seconds, below = 0.0, list(children.get(os.getpid(), []))
    while below:
        number = below.pop()
        seconds += times[number]
        below += children.get(number, [])
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=262_144)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--features", type=int, default=50_000)
    parser.add_argument("--snapshots", type=int, default=10)
    parser.add_argument("--in-use", type=float, default=0.6, help="share of codes, 0 to 1")
    parser.add_argument("--method", default="pca")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser; none: fit alone")
    parser.add_argument("--run", help="folder of the run, kept; none: a temporary one")
    parser.add_argument("--picture", help="file for a screenshot of the map at the end")
    parser.add_argument("--output", help="CSV file; none: print alone")
    arguments = parser.parse_args()
    origin = origin_columns(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(arguments.run or f"{temporary}/run").resolve()
        if not path.exists():
            make_run(path, arguments)
        row: dict[str, Any] = {"codes": arguments.codes, "dim": arguments.dim, "features": arguments.features}
        row |= {"snapshots": arguments.snapshots, "method": arguments.method} | fit(path, arguments.method)
        row["load_before"] = os.getloadavg()[0]
        if arguments.chromium:
            row |= look(Path(temporary), path, arguments)
        for key, value in row.items():
            print(f"{key:24} {value if isinstance(value, str | int) else round(value, 3)}")
        if arguments.output:
            pd.DataFrame([row | origin]).to_csv(arguments.output, index=False)
