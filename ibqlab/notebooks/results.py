"""What came of an executed notebook, in lines, and a copy of it that stays readable.

What is unusual: the copy holds no widgets. Every view is replaced by what it showed last, so that the copy says the
same wherever it is opened, without a kernel.
"""

import html
import json
import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, read_json, write_whole
from ibqlab.base.measures import measure
from ibqlab.runs.caveats import few_tokens, why_too_short
from ibqlab.runs.metrics import last_values

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
_PICTURE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


# --- what came of it -------------------------------------------------------------------------------------------------


def results_of(folder: Path, result: str = "") -> list[str]:
    """Lines on what a study, a run or a measurement has left: figures, report, and its result in a sentence.

    Args:
        folder: that the notebook worked on.
        result: the sentence; empty: what the rows of a study or the last validation of a run say.
    """
    reports = [folder / "report.html", folder / "figures" / "report.md", folder / "report.md", folder / "cards.md"]
    pictured = [pictures for pictures in (folder / "figures", folder) if any(pictures.glob("*.png"))]
    lines = [f"figures: {pictures}" for pictures in pictured[:1]]
    lines += [f"report: {file}" for file in reports if file.is_file()][:1]
    is_run = (folder / "config.yaml").is_file()
    result = result or (_result_of_run(folder) if is_run else _result_of_study(folder))
    if result:
        reason = why_too_short(steps_of(folder), _read(folder / "parameters.json").get("preset", ""))
        lines.append(f"result: {result}" + (f" ({reason}: too short to mean anything)" if reason else ""))
    return [for_terminal(line, None) for line in lines]


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    try:
        return read_json(file)
    except (OSError, UnreadableFile):
        return {}


def steps_of(folder: Path) -> Any:
    """Steps of a run by now, or of the longest run of a study; None where nothing tells them."""
    steps = [_read(file).get("steps") for file in (folder / "rows").glob("*.json")]
    steps.append(last_values(folder / "metrics.jsonl").get("step"))
    return max((step for step in steps if isinstance(step, (int, float))), default=None)


def _result_of_study(folder: Path) -> str:
    """Usage at the end by method and start, means over the runs that are finished."""
    usages, tokens = defaultdict(list), set()
    for file in sorted((folder / "rows").glob("*.json")):
        row = _read(file)
        if isinstance(row.get("usage"), float) and "depth" not in row:
            start = f" from {row['init']}" if "init" in row else ""
            usages[f"{row.get('method')}{start}"].append(row["usage"])
            tokens.add(row["tokens"] if isinstance(row.get("tokens"), (int, float)) else 0)
    if not usages:
        return ""
    means = {name: sum(values) / len(values) for name, values in usages.items()}
    shares = ", ".join(f"{name} {mean:.1%}" for name, mean in sorted(means.items(), key=lambda pair: pair[1]))
    tokens_text = f" in {min(tokens):,.0f} validation tokens or more" if all(tokens) else ""
    runs = sum(map(len, usages.values()))
    return f"{measure('usage').label}{tokens_text}, mean over {runs} runs by method: {shares}"


def _result_of_run(folder: Path) -> str:
    """What the last validation of a run came to."""
    from ibqlab.runs import Run  # noqa: PLC0415 - a command's first line is said before anything is imported

    row = last_values(folder / "metrics.jsonl")
    psnr = measure("psnr")
    texts = {
        "validation_usage": f"{{:.1%}} of {measure('usage').label}",
        "validation_psnr": f"{psnr.title} {{:.1f}} {psnr.unit}",
        "validation_loss": f"loss {{:.3f}} {measure('validation_loss').unit}",
    }
    words = [text.format(row[name]) for name, text in texts.items() if isinstance(row.get(name), (int, float))]
    tokens = row.get("validation_tokens")
    if not words or not isinstance(tokens, (int, float)):
        return ", ".join(words)
    few = ""
    with suppress(RunError):  # settings that cannot be read
        few = few_tokens(tokens, Run(folder).config) if "validation_usage" in row else ""
    return f"{', '.join(words)} in {tokens:,.0f} validation tokens{f': {few}' if few else ''}"


# --- the copy --------------------------------------------------------------------------------------------------------


def without_widgets(file: Path) -> None:
    """Replace every widget in an executed copy by what it showed last, and bars by their last state, in place.

    Args:
        file: a notebook of format 4; left alone where it is none, such as after a kill.
    """
    notebook = _read(file)
    if not notebook:
        return
    state = notebook.get("metadata", {}).pop("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.get("cells", []):
        if "outputs" in cell:
            outputs = [_static(output, state) for output in cell["outputs"]]
            cell["outputs"] = [output for output in outputs if output is not None]
    write_whole(file, (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode())


def _static(output: dict[str, Any], state: dict[str, Any]) -> dict[str, Any] | None:
    """An output without widgets; None where it showed nothing."""
    if output.get("output_type") == "stream":
        # What a carriage return wrote over is not there any more.
        lines = "".join(output["text"]).split("\n")
        return output | {"text": "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)}
    data = dict(output.get("data", {}))
    if VIEW not in data:
        return output
    view = data.pop(VIEW)
    data.pop("text/plain", None)
    if "text/html" in data:
        data["text/plain"] = text_of("".join(data["text/html"]))
    if not data:
        markup = _view(view["model_id"], state)
        if not markup:
            return None
        pictures = _PICTURE.findall(markup)
        data = {"text/html": markup, "text/plain": text_of(markup)} | (
            {"image/png": pictures[0]} if len(pictures) == 1 else {}
        )
    return output | {"data": data}


def _view(model: str, state: dict[str, Any]) -> str:
    """What a widget showed, as HTML."""
    facts = state.get(model, {})
    values, name = facts.get("state", {}), facts.get("model_name", "")
    children = [_view(child.removeprefix("IPY_MODEL_"), state) for child in values.get("children", [])]
    if children:
        between = " " if name == "HBoxModel" else "<br>"
        return between.join(child for child in children if child)
    if name == "HTMLModel":
        return values.get("value", "")
    # A bar stands beside its own text.
    if "Progress" in name or "Button" in name:
        return ""
    options, chosen = values.get("_options_labels"), values.get("index")
    value = options[chosen] if options and isinstance(chosen, int) else values.get("value")
    if value is None:
        return ""
    words = [values.get("description", ""), str(value)]
    return f"<span>{html.escape(' '.join(word for word in words if word))}</span>"


def text_of(markup: str) -> str:
    """A view's HTML as plain text; of pictures their descriptions, of styles nothing, of a table its rows."""
    shown = re.sub(r"<style>.*?</style>", "", markup, flags=re.DOTALL)
    described = re.sub(r'<img\b[^>]*?alt="([^"]*)"[^>]*>', r"\1", shown)
    ends = "<br>|</p>|</div>|</tr>"
    lines = [html.unescape(re.sub(r"<[^>]+>", " ", line)).split() for line in re.split(ends, described)]
    return "\n".join(" ".join(words) for words in lines if words)
