"""The folder of a token store while it is written: what stands there, and which processes work on it.

Nothing that somebody else put there is touched. Each process holds a lock of its own, so a second command is told who
writes the store.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

from ibqlab.base.files import UnreadableFile, explained, is_temporary, read_json, sweep
from ibqlab.base.locking import holding, read_holder
from ibqlab.config import completed, to_dict
from ibqlab.data.source import DataConfig, Split
from ibqlab.tokens.manifest import MANIFEST, UNFINISHED, TokenManifest, TokenStoreError

REQUEST = f"{UNFINISHED}/request.json"
"""The manifest as it will be, but for the checksums: what is being written here."""
LOCK = ".writing-{}.lock"
"""Held by the process of that number while it works; a finished store has none."""


def lock_file(folder: Path, rank: int) -> Path:
    """The lock of one of the processes that share the work."""
    return folder / LOCK.format(rank)


@contextmanager
def locked(folder: Path, rank: int) -> Iterator[None]:
    """Hold a process's lock inside the block.

    Raises:
        TokenStoreError: another process writes the store.
    """
    file = lock_file(folder, rank)
    with ExitStack() as stack:
        with explained(file):
            is_ours = stack.enter_context(holding(file, remove=True))
        if not is_ours:
            holder = read_holder(file) or "its number is not known"
            raise TokenStoreError(f"another process ({holder}) is writing this store, {folder}; wait for it")
        yield


def clear(folder: Path) -> None:
    """Delete what a finished store needs no more: the pieces, and locks that killed processes left."""
    if not (folder / MANIFEST).is_file():
        return
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    for file in folder.glob(LOCK.format("*")):
        with explained(file), holding(file, remove=True):
            pass


def is_finished(folder: Path, manifest: TokenManifest, processes: int) -> bool:
    """Whether a folder holds the store already. What killed processes left of unfinished files is deleted.

    Args:
        folder: where the store is to be written.
        manifest: what is to be written, as yet without checksums.
        processes: how many share the work.
    Raises:
        TokenStoreError: the folder holds anything else, or a store of other settings.
    """
    sweep(folder)
    sweep(folder / UNFINISHED)
    locks = {LOCK.format(rank) for rank in range(processes)}
    with explained(folder):
        if folder.exists() and not folder.is_dir():
            raise TokenStoreError(f"{folder} is no folder; nothing was changed. Choose another name")
        if not folder.exists() or all(file.name in locks or is_temporary(file.name) for file in folder.iterdir()):
            return False
    file = next((file for file in (folder / MANIFEST, folder / REQUEST) if file.is_file()), None)
    if file is None:
        if (folder / UNFINISHED).is_dir():
            return False
        raise TokenStoreError(
            f"{folder} exists and holds no tokens; nothing was changed. Choose another folder, or empty it"
        )
    try:
        content = read_json(file)
    except UnreadableFile as error:
        raise TokenStoreError(f"{error}; restore it, or delete {folder} and start again") from None
    different = _differences(to_dict(manifest), content | {"data": completed(DataConfig, content.get("data"))})
    if different:
        raise TokenStoreError(
            f"{folder} holds tokens of other settings ({', '.join(different)} differ); nothing was changed. "
            "Choose another folder, or delete this one"
        )
    if file.name != MANIFEST:
        return False
    clear(folder)
    return True


def _differences(expected: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """In which settings two manifests differ. Fingerprints tell whether the images do; their folder does not count."""

    def settings(manifest: dict[str, Any]) -> dict[str, Any]:
        data = manifest["data"]
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if key not in ("source", "validation_source")}
        return manifest | {"data": data}

    expected, recorded = settings(expected), settings(recorded)
    different = [
        key for key in expected if key not in (*get_args(Split), "versions") and recorded.get(key) != expected[key]
    ]
    for split in get_args(Split):
        facts = recorded.get(split)
        if not isinstance(facts, dict) or facts.get("fingerprint") != expected[split]["fingerprint"]:
            different.append(f"{split} images")
    return different


def manifest_json(manifest: TokenManifest) -> bytes:
    """A manifest as its file holds it."""
    return json.dumps(to_dict(manifest), indent=2, ensure_ascii=False).encode()
