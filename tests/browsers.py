"""A real browser for tests, and servers that have nothing of their owner's.

Nothing here depends on how fast the machine is: every step waits for what it needs to see. `conftest.py` makes the
fixture `browser` of `chromium`.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SETTINGS = {
    "apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
    # Off the screen, cells would be left out of the page.
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}
OURS = "share/jupyter/lab/settings/overrides.d/ibqlab.json"
LAB = (
    *("-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
    *("--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"),
    "--LabApp.extension_manager=readonly",
)
OWN_ADDRESS = re.compile(r"(https?|wss?)://127\.0\.0\.1:|data:|blob:|about:|file:")
PATIENCE = 300
"""Seconds after which what was waited for is taken to be broken: on a busy machine all takes many times longer."""
KERNEL_IDLE = "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
# Braces: a promise that comes back would be awaited, and this one ends only when all cells have run.
RUN_ALL = """() => {
    window.allHaveRun = false;
    window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.allHaveRun = true; });
}"""
INTERRUPT = "() => { window.jupyterapp.commands.execute('notebook:interrupt-kernel') }"
ERRORS = """() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells
    .flatMap(cell => cell.outputs ?? []).filter(output => output.output_type === 'error')
    .map(error => `${error.ename}: ${error.evalue}`)"""
# What the kernel tells of errors in callbacks, which no cell shows, and what it was sent and has not yet dealt with:
# callbacks have a thread of their own, so that a cell may run before them.
LISTEN = """() => {
    window.told = [];
    window.unanswered = new Set();
    window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.anyMessage.connect((_, { msg, direction }) => {
        const { msg_type, msg_id } = msg.header, { ename, evalue, text, name } = msg.content;
        if (direction === 'send' && msg.channel === 'shell') window.unanswered.add(msg_id);
        if (msg_type === 'status' && msg.content.execution_state === 'idle')
            window.unanswered.delete(msg.parent_header.msg_id);
        if (msg_type === 'error') window.told.push(`${ename}: ${evalue}`);
        if (msg_type === 'stream' && name === 'stderr') window.told.push(text);
    });
}"""
OTHER_CELL = """() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel
    .requestExecute({code: 'import sys; sys.stderr.flush()'}).done.then(reply => reply.content.status)"""
"""Ends when the kernel is free, and all that it said before has come."""
HARMLESS = ("Ignoring draw call", "No such comm")
"""Of jupyter-scatter, while it has no points yet, and of a kernel that is asked for widgets before it has any."""
OUTPUTS_SHOWN = """() => document.querySelectorAll('.jp-OutputArea-output').length
    && !document.body.innerText.includes('Loading widget')"""


@contextmanager
def chromium():
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install ibqlab[dev]"
    )
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(BROWSERS)})")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, headless=True, args=list(QUIET))
        yield started
        started.close()


@contextmanager
def running_lab(folder):
    """Address of a JupyterLab on folder/work."""
    settings = folder / Path(OURS).parents[1]
    with serving([*LAB, f"--LabApp.app_settings_dir={settings}"], folder, "api") as address:
        yield f"{address}/doc/tree"


@contextmanager
def serving(command, folder, page):
    """Address of a server, in folder/work, that a Python command with `--port` starts and whose page has answered."""
    port, log_file = free_port(), folder / "server.log"
    with open(log_file, "w") as log:
        server = subprocess.Popen(
            [sys.executable, *command, f"--port={port}"],
            cwd=folder / "work",
            env=os.environ | folders_of_its_own(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            await_server(f"http://127.0.0.1:{port}/{page}", server, log_file)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(server)


@contextmanager
def notebook_folder(folder, notebooks):
    """Settings and runs of its own, and copied notebooks under work; runs of this process go there, too.

    Args:
        folder: an empty one.
        notebooks: name, or path below work → other values of its parameters.
    """
    write_settings(folder)
    (folder / "work").mkdir()
    for notebook, values in notebooks.items():
        copy_notebook(folder / "work", notebook, **values)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in folders_of_its_own(folder).items():
            patch.setenv(variable, value)
        yield folder


def copy_notebook(folder, notebook, **values):
    """A notebook with other values of its parameters."""
    target = folder / f"{notebook}.ipynb"
    copy = nbformat.read(ROOT / "notebooks" / target.name, as_version=4)
    cell = copy.cells[1]
    for name, value in values.items():
        line = rf"^({name}: \w+ =) [^#\n]*"
        cell.source, found = re.subn(line, rf"\1 {json.dumps(value)}  ", cell.source, flags=re.MULTILINE)
        assert found == 1, f"the parameters cell has no {name}"
    target.parent.mkdir(exist_ok=True)
    nbformat.write(copy, target)


def write_settings(folder):
    """The user's settings, and ours where an installed package has them."""
    for name, values in SETTINGS.items():
        file = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / name
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    (source,) = (source for source, target in wheel["shared-data"].items() if target == OURS)
    (folder / OURS).parent.mkdir(parents=True)
    shutil.copy(ROOT / source, folder / OURS)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def folders_of_its_own(folder):
    names = {f"JUPYTER_{kind.upper()}_DIR": kind for kind in ("config", "data", "runtime")}
    names |= {"IPYTHONDIR": "ipython", "IBQLAB_RUNS": "runs"}
    return {variable: str(folder / name) for variable, name in names.items()}


def stop(server):
    """End the server, which ends its kernels; by force if it does not listen."""
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def await_server(address, server, log):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not answer within {PATIENCE} s:\n{log.read_text()[-3000:]}")


@contextmanager
def opened(browser, address, notebook):
    """A page with a notebook, as `visited`."""
    with visited(browser, f"{address}/{notebook}.ipynb") as shown:
        yield shown


@contextmanager
def visited(browser, address):
    """A page, the errors that its console tells, and what it asked other machines for.

    Of slowness the console warns on a busy machine: that is no error.
    """
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(1000 * PATIENCE)
    errors, elsewhere = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if OWN_ADDRESS.match(request.url) else elsewhere.append(request.url))
    page.goto(address)
    try:
        yield SimpleNamespace(page=page, errors=errors, elsewhere=elsewhere)
    finally:
        page.close()


def run_all(page):
    page.wait_for_function(KERNEL_IDLE)
    page.evaluate(RUN_ALL)


@contextmanager
def notebook_run(browser, address, notebook):
    """The page of a notebook that has run to its end; nothing goes wrong, then or later."""
    with opened(browser, address, notebook) as shown:
        page = shown.page
        page.wait_for_function(KERNEL_IDLE)
        page.evaluate(LISTEN)
        run_all(page)
        page.wait_for_function("() => window.allHaveRun")
        page.evaluate("() => window.unanswered.clear()")  # while a cell waits, answers may name the cell's own message
        assert page.evaluate(ERRORS) == []
        page.wait_for_function(OUTPUTS_SHOWN)
        yield page
        require_no_error(shown)


def require_no_error(shown):
    """No error of a cell, of a callback, of a widget or of the page, and nothing was asked of other machines."""
    page = shown.page
    page.wait_for_function("() => window.unanswered.size === 0")
    assert page.evaluate(OTHER_CELL) == "ok"
    assert page.evaluate(ERRORS) == []
    assert "Error displaying widget" not in page.inner_text("body")
    told = [text for text in page.evaluate("() => window.told") if re.search(r"Error|Exception|Traceback", text)]
    assert [text for text in [*told, *shown.errors] if not any(known in text for known in HARMLESS)] == []
    assert shown.elsewhere == []


def drag(page, handle, to):
    """Press the mouse on an element, move to a place of the screen and let go."""
    handle.scroll_into_view_if_needed()
    grip = handle.bounding_box()
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    page.mouse.move(*to(), steps=5)
    page.mouse.up()


def drag_slider(slider, share):
    """Move a slider's handle to a share of its way, from 0 at its left to 1."""
    rail = slider.locator(".noUi-base")

    def place():
        box = rail.bounding_box()
        return box["x"] + share * box["width"], box["y"] + box["height"] / 2

    drag(slider.page, slider.locator(".noUi-handle"), place)
