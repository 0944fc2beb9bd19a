"""Python processes that start warm: forked from one that has imported torch, for tests that start many.

    sys.executable = str(WarmPython(folder).program)                      # the fixture `warm_start` does that
    subprocess.run([sys.executable, "-m", "ibqlab", "runs"], check=True)  # and notebooks' kernels, and torchrun's ranks

A fresh process spends two to three seconds of processor time on importing libraries; a fork of one that has them spends
none. Every process is one of its own: with its own arguments, environment, folder, streams, exit code and end. The
program of that name is a small one: it asks the server for a fork, hands over its streams, passes on the signals that
it gets, and ends as the fork ends. Where it is killed, so is the fork a moment later; tests that kill processes, or
that look at what is imported, take fresh ones.
"""

import array
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys

LIBRARIES = (
    *("ibqlab.cli", "ibqlab.training.fabric", "ibqlab.grids.cell_rows", "ibqlab.studies", "ibqlab.notebooks"),
    *("torch", "torchvision", "torchmetrics.image", "numpy", "pandas", "scipy.stats", "lightning_fabric", "PIL.Image"),
    *("sklearn.datasets", "sklearn.decomposition", "click", "tqdm", "ruamel.yaml", "filelock", "jaxtyping"),
    *("pydantic", "papermill.execute", "nbclient", "nbformat", "jupyter_client", "ipykernel.kernelapp", "mistune"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)
"""What the server imports: what most processes need, and nothing that reads settings or starts threads."""
MOST_FILES = 250
"""As many as a socket passes on at once."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WarmPython:
    """A server of forks and the program that asks it for one.

    Args:
        folder: for the program and the server's socket; its path must be short enough for one.
    """

    def __init__(self, folder):
        self.program, address = folder / "python", folder / "socket"
        asks = f'exec "{sys.executable}" -I -S "{__file__}" "{address}" "$0" "$@"'
        self.program.write_text(f"#!/bin/sh\n{asks}\n")
        self.program.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        ready, written = os.pipe()
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(address), str(written)],
            pass_fds=[written],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(written)
        with os.fdopen(ready) as answer:
            assert answer.read() == "ready", "the server of forks did not start"

    def stop(self):
        """End the server; processes that it has forked end by themselves."""
        self.server.kill()
        self.server.wait()


# --- the server -------------------------------------------------------------------------------------------------------


def serve(address, ready):
    """Fork for everybody who asks. Returns in each fork, with what it shall run."""
    sys.modules["rfc3987_syntax"] = None  # two seconds of grammars of addresses, which no notebook has
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pandas imports pyarrow, whose memory has a thread
    for library in LIBRARIES:
        __import__(library)
    gc.freeze()  # else each collection in a fork would copy all of it
    assert len(os.listdir("/proc/self/task")) == 1, "a library has started a thread, which a fork would lack"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        os.write(ready, b"ready")
        os.close(ready)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
        while True:
            connection, _ = listener.accept()
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                listener.close()
                return keep(connection)
            connection.close()


def keep(connection):
    """Fork once more, and tell the asker how that process ends; returns in the process."""
    request, handles = receive(connection)
    child = os.fork()
    if not child:
        connection.close()
        return become(request, handles)
    for handle in handles:
        os.close(handle)
    ends = os.pidfd_open(child)
    while True:
        for readable in select.select([ends, connection], [], [])[0]:
            if readable == ends:
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps(code).encode())
                os._exit(0)
            sent = connection.recv(1)
            signal.pidfd_send_signal(ends, sent[0] if sent else signal.SIGKILL)
            if not sent:
                os._exit(0)


def receive(connection):
    """A request and the open files that come with its first bytes."""
    text, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(MOST_FILES * 4))
    handles = array.array("i", ancillary[0][2])
    while not text.endswith(b"\n"):
        text += connection.recv(65536)
    return json.loads(text), handles


def become(request, handles):
    """Take on the asker's open files, environment, folder and arguments; what to run."""
    import fcntl  # noqa: PLC0415
    import importlib  # noqa: PLC0415
    import multiprocessing.spawn  # noqa: PLC0415
    import random  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415

    # Out of the way first: a file may have come under the number that another one shall have.
    aside = [fcntl.fcntl(handle, fcntl.F_DUPFD, 1000) for handle in handles]
    for handle in handles:
        os.close(handle)
    for number, handle in zip(request["numbers"], aside, strict=True):
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ.pop("JPY_PARENT_PID", None)  # a kernel would look whether that is its parent
    importlib.reload(sys.modules["ibqlab"])  # which sets a variable for the processes that it starts
    os.chdir(request["folder"])
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.executable = request["program"]
    multiprocessing.spawn.set_executable(request["program"])
    random.seed()
    np.random.seed()  # noqa: NPY002 - the state that libraries share, which the fork has in common with others
    return request["words"]


def run_and_end(words):
    """Run what `python *words` runs and end as it ends, but without clearing up the memory, which would copy it."""
    import atexit  # noqa: PLC0415
    import threading  # noqa: PLC0415

    code = 0
    try:
        run(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)


def run(words):
    """What `python *words` does."""
    import runpy  # noqa: PLC0415
    import types  # noqa: PLC0415

    while words[0].startswith("-") and words[0] not in ("-m", "-c"):
        words = words[1:]  # options of the interpreter
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


# --- who asks ---------------------------------------------------------------------------------------------------------


def ask(address, program, words):
    """Have the words run by a fork, and end as it ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        connection.connect(address)
        handles = open_files({connection.fileno()})
        request = {"words": words, "program": program, "folder": os.getcwd(), "numbers": list(handles)}
        text = json.dumps({**request, "environment": dict(os.environ)}).encode() + b"\n"
        sent = connection.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", handles.values()))])
        connection.sendall(text[sent:])
        answer = connection.recv(64)
    code = json.loads(answer) if answer else 1
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL is as it is
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def open_files(without):
    """Number that a file shall have → its handle: input, output, errors, of which none stays closed, and all others."""
    handles = {}
    for number in {0, 1, 2, *map(int, os.listdir("/proc/self/fd"))} - without:
        with contextlib.suppress(OSError):  # the folder that was listed
            os.fstat(number)
            handles[number] = number
    for number in {0, 1, 2} - handles.keys():
        handles[number] = os.open(os.devnull, os.O_RDWR)
    return handles


if __name__ == "__main__":
    if sys.flags.isolated:
        ask(sys.argv[1], sys.argv[2], sys.argv[3:])
    run_and_end(serve(sys.argv[1], int(sys.argv[2])))
