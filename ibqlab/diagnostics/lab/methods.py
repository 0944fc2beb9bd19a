"""Methods of a lab, as people type them, and the quantizers that they describe."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ibqlab.base.checks import require, require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.config import ConfigError, read_assigned, split_assignment
from ibqlab.diagnostics.lab.feature_files import FeatureFile
from ibqlab.diagnostics.lab.run_config import LabSettings
from ibqlab.diagnostics.lab.worlds import World
from ibqlab.quantizers import CHOSEN_STARTS, INITIALISATIONS, QuantizerConfig, available_quantizers, quantizer_config
from ibqlab.quantizers.composite import open_sizes

MOST_METHODS = 100


def lab_methods(
    features: World | FeatureFile, methods: Mapping[str, Any] | Sequence[str] | str, lab: LabSettings
) -> dict[str, QuantizerConfig]:
    """The quantizers that a lab's methods describe, by label.

    Raises:
        ValueError: no method, a name given twice, or settings that cannot be; the message begins with the label.
    """
    typed: dict[str, str] = {}
    if not isinstance(methods, Mapping):
        texts = [methods] if isinstance(methods, str) or not isinstance(methods, Iterable) else list(methods)
        require(
            all(isinstance(text, str) for text in texts),
            'methods are a name, a list of names, or label → settings: type "vq", ["vq", "ibq"] or {"VQ": {"name": '
            f'"vq", "codebook_init": "normal"}}}}; got {for_terminal(repr(methods), 80)}',
        )
        methods = read_methods(texts)
        typed = dict(zip(methods, texts, strict=False))  # "all" stands for many, whose labels are their names
    require(0 < len(methods) <= MOST_METHODS, f"methods must name 1 to {MOST_METHODS} quantizers; got {len(methods)}")
    configs = {}
    for label, settings in methods.items():
        try:
            configs[str(label)] = _method_config(settings, features.dim, lab)
        except ValueError as error:
            text = typed.get(label, str(label)) if len(typed) == len(methods) else str(label)
            raise ConfigError(f"method {text!r}: {error}") from None
    return configs


def read_methods(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Methods as they are typed: "vq", "vq codebook_init=normal revive_after=20", "residual inner={name: ibq}",
    "residual inner.name=ibq", "vqp cls=ResidualVQ arguments={num_quantizers: 2}".

    Args:
        texts: a registered name each, with settings behind it; what stands in brackets or quotes is one value, spaces
            and all. ["all"] stands for every registered name.
    Returns:
        Label → settings with the name. A label says what differs: "vq, N(0, 1)", "vq, revive_after=20".
    Raises:
        ValueError: a method given twice, an unknown name, or something that is no key=value.
    """
    if list(texts) == ["all"]:
        texts = available_quantizers()
    methods: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, *assignments = _words(text) or [""]
        require(name != "all", f"methods: all stands alone, for every registered quantizer; got {list(texts)}")
        _require_registered(name)
        typed = dict(map(split_assignment, assignments))
        require(
            "name" not in typed, f"methods: {name!r} is the name already; leave name= of {for_terminal(text)!r} out"
        )
        settings = {key: value if key == "codebook_init" else read_assigned(key, value) for key, value in typed.items()}
        label = ", ".join([name, *(_in_words(key, value) for key, value in settings.items())])
        require(label not in methods, f"methods holds {for_terminal(label)!r} twice: {list(texts)}")
        methods[label] = {"name": name, **_nested(settings)}
    return methods


def _words(text: str) -> list[str]:
    """Text cut at its spaces, except inside brackets and quotes: a name, and its settings.

    A bracket or quote that is not closed holds the rest, which is refused when it is read.
    """
    words, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth = max(0, depth + (letter in "[({") - (letter in "])}"))
        if letter.isspace() and not quote and not depth:
            words.append("")
        else:
            words[-1] += letter
    return [word for word in words if word]


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose keys have no dots: {"inner.name": "ibq"} → {"inner": {"name": "ibq"}}."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
            require(isinstance(section, dict), f"{key}: {parent} holds {section!r}, it has no settings of its own")
        section[last] = value
    return nested


def _in_words(key: str, value: Any) -> str:
    """A setting in a label; a start of the codebook as figures write it, which gives the line its dashes."""
    return INITIALISATIONS.get(value, str(value)) if key == "codebook_init" else f"{key}={value}"


def _method_config(settings: Any, dim: int, lab: LabSettings) -> QuantizerConfig:
    """A method's settings, complete: size, dimension and start are the lab's where the method does not say its own."""
    if isinstance(settings, QuantizerConfig):
        config = settings
    else:
        settings = {"name": settings} if isinstance(settings, str) else settings
        is_named = isinstance(settings, Mapping) and "name" in settings
        if is_named:
            _require_registered(settings["name"])
        if not is_named:
            quantizer_config(settings)  # refuses it
        filled = open_sizes(settings, lab.codebook_size, dim)
        config = quantizer_config({**filled, **settings})
        inner = settings.get("inner")
        says_start = "codebook_init" in settings or (isinstance(inner, Mapping) and "codebook_init" in inner)
        if lab.codebook_init and config.codebook_init in CHOSEN_STARTS and not says_start:
            config = quantizer_config({**filled, "codebook_init": lab.codebook_init, **settings})
    is_typed = isinstance(settings, QuantizerConfig) or "code_dim" in settings
    require(
        config.code_dim == dim,
        f"code_dim must be the dimension of the features, {dim}; got {config.code_dim}. "
        + ("Leave it out" if is_typed else f"Use settings of {dim} channels, such as {dim} levels"),
    )
    return config


def _require_registered(name: Any) -> None:
    """Refuse the name of a quantizer that is not registered; it may be of somebody's own file that has not run yet."""
    try:
        require_choice("methods", name, available_quantizers())
    except ValueError as error:
        sentence = str(error) if str(error).endswith("?") else f"{error}."
        raise ValueError(
            f"{sentence} One of your own is known once its file has run: plugins=['FILE.py'] in a notebook's "
            "parameters, ibqlab.recipes.plugins.import_plugins(['FILE.py']) in code"
        ) from None
