"""A run's images: where they are found, whether they are still those that it began with, which are unreadable."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ibqlab.base.escaping import for_markdown, for_terminal
from ibqlab.base.files import is_ordinary
from ibqlab.config import parse, to_dict
from ibqlab.data import DataConfig, open_data
from ibqlab.data.broken import STAND_INS, UnreadableName, describe_unreadable
from ibqlab.data.source import ImageSource
from ibqlab.recipes.run_config import RunConfig
from ibqlab.runs import Run, RunError
from ibqlab.runs.paths import located
from ibqlab.runs.provenance_record import utc_now


def reachable(config: RunConfig, path: str | Path) -> RunConfig:
    """Settings whose paths lead where they led when the run in a folder was started; as they are for a new one.

    Args:
        config: the run's settings, typed in the current folder.
        path: the run folder, which need not exist.
    """
    if not is_ordinary(Path(path) / "config.yaml"):
        return config
    return parse(type(config), located(to_dict(config), Run(path).started_in, typed_here=True))


def facts_of(source: ImageSource) -> dict[str, Any]:
    """A source's identity, for provenance and to find it unchanged at resume."""
    return {
        "description": source.description,
        "fingerprint": source.fingerprint,
        "images": len(source),
        "classes": list(source.classes),
    }


def compare_data(run: Run, data: Mapping[str, Any], accept: bool) -> dict[str, Any]:
    """Hold a run's images against those that its provenance names.

    Args:
        run: the run, before anything of it is changed.
        data: identity of today's images by split: "fingerprint", "images" (how many), "classes" (their names).
        accept: continue with other images than before.
    Returns:
        What provenance is to say of changed images: what they are now, and what they were up to which step. {} where
        they are the same, or where the run has noted nothing.
    Raises:
        RunError: they have changed and that is not accepted; the message says in what.
    """
    recorded = run.provenance.get("data")
    if not isinstance(recorded, dict):
        return {}
    changes = [
        change
        for split, facts in data.items()
        if isinstance(facts, dict) and isinstance(recorded.get(split), dict)
        for change in _changes(split, recorded[split], facts)
    ]
    if not changes:
        return {}
    if not accept:
        raise RunError(
            f"{run.path}: the images are not those that the run was trained on; nothing was changed. There → now: "
            f"{'; '.join(changes)}. Put the images back, choose another folder (--output FOLDER), or continue with the "
            "new ones: --accept-changed-data, in Python accept_changed_data=True"
        )
    earlier = run.provenance.get("data_changes")
    change = {"at": utc_now(), "after_step": run.step, "before": recorded, "changes": changes}
    changes = [*(earlier if isinstance(earlier, list) else []), change]
    # Which images are unreadable was noted of the earlier ones.
    return {"data": dict(data), "data_changes": changes, "unreadable": None}


NAMED = 1000
"""Names of unreadable images that provenance holds at most."""


def open_images(config: DataConfig) -> dict[str, ImageSource]:
    """A run's images by split, "train" and "validation".

    Raises:
        ValueError: there are none.
        UnreadableImages: none of a split can be read; the message names some, and says what to do.
    """
    images = {split: open_data(config, split) for split in ("train", "validation")}
    for source in images.values():
        source.get(0, 0)
    return images


def note_unreadable(names: Sequence[str], images: int) -> dict[str, Any]:
    """What provenance is to say of unreadable images; {} where there are none.

    Args:
        names: of them, `UnreadableName` where the reason is known.
        images: how many there are, these included.
    """
    if not names:
        return {}
    reasons = {str(name): getattr(name, "reason", "") for name in names[:NAMED]}
    return {"unreadable": {"count": len(names), "images": images, "reasons": reasons}}


def unreadable_of(provenance: Mapping[str, Any]) -> tuple[list[UnreadableName], int, int]:
    """What `note_unreadable` has noted; no names where there is nothing, or something that others wrote.

    Returns:
        Names of unreadable images with reasons, the first thousand; how many are unreadable; how many images there are.
    """
    noted = provenance.get("unreadable")
    noted = noted if isinstance(noted, dict) else {}
    count, images, reasons = (noted.get(key) for key in ("count", "images", "reasons"))
    if not isinstance(reasons, dict) or type(count) is not int or type(images) is not int:
        return [], 0, 0
    return [UnreadableName(str(name), str(why)) for name, why in reasons.items()], count, images


def unreadable_line(provenance: Mapping[str, Any]) -> str:
    """What a report says, as Markdown, of images that a run could not read; "" where it read them all."""
    names, count, images = unreadable_of(provenance)
    return describe_unreadable(names, images, count, STAND_INS, for_markdown) if names else ""


def _changes(split: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a split's images then and now; what an older run did not note is not compared."""
    changes = []
    for key in ("images", "fingerprint", "classes"):
        if key not in before or before[key] == now.get(key):
            continue
        old, new = before[key], now.get(key)
        if key == "classes" and isinstance(old, list):
            changes.append(f"{split} classes {len(old)} → {len(new)} ({_class_changes(old, new)})")
        else:
            changes.append(f"{split} {key} {for_terminal(old)} → {for_terminal(new)}")
    return changes


def _class_changes(old: list[Any], new: list[str]) -> str:
    gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
    parts = [f"{word}: {', '.join(map(str, names))}" for word, names in (("gone", gone), ("new", added)) if names]
    return for_terminal("; ".join(parts) or "in another order")
