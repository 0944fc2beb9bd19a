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

MOST_METHODS = 100


def lab_methods(
    features: World | FeatureFile, methods: Mapping[str, Any] | Sequence[str] | str, lab: LabSettings
) -> dict[str, QuantizerConfig]:
    """The quantizers that a lab's methods describe, by label.

    Raises:
        ValueError: no method, a name given twice, or settings that cannot be; the message begins with the label.
    """
    if not isinstance(methods, Mapping):
        texts = [methods] if isinstance(methods, str) or not isinstance(methods, Iterable) else list(methods)
        require(
            all(isinstance(text, str) for text in texts),
            'methods are a name, a list of names, or label → settings: type "vq", ["vq", "ibq"] or {"VQ": {"name": '
            f'"vq", "codebook_init": "normal"}}}}; got {for_terminal(repr(methods), 80)}',
        )
        methods = read_methods(texts)
    require(0 < len(methods) <= MOST_METHODS, f"methods must name 1 to {MOST_METHODS} quantizers; got {len(methods)}")
    configs = {}
    for label, settings in methods.items():
        try:
            configs[str(label)] = _method_config(settings, features.dim, lab)
        except ValueError as error:
            raise ConfigError(f"method {str(label)!r}: {error}") from None
    return configs


def read_methods(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Methods as they are typed: "vq", "vq codebook_init=normal revive_after=20".

    Args:
        texts: a registered name each, with settings behind it; ["all"] stands for every registered name.
    Returns:
        Label → settings with the name. A label says what differs: "vq, N(0, 1)", "vq, revive_after=20".
    Raises:
        ValueError: a method given twice, an unknown name, or something that is no key=value.
    """
    if list(texts) == ["all"]:
        texts = available_quantizers()
    methods: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, *assignments = text.split() or [""]
        require(name != "all", f"methods: all stands alone, for every registered quantizer; got {list(texts)}")
        _require_registered(name)
        settings = dict(map(split_assignment, assignments))
        require(
            "name" not in settings, f"methods: {name!r} is the name already; leave name= of {for_terminal(text)!r} out"
        )
        settings = {
            key: value if key == "codebook_init" else read_assigned(key, value) for key, value in settings.items()
        }
        label = ", ".join([name, *(_in_words(key, value) for key, value in settings.items())])
        require(label not in methods, f"methods holds {for_terminal(label)!r} twice: {list(texts)}")
        methods[label] = {"name": name, **settings}
    return methods


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
        default = quantizer_config({"name": settings["name"]} if is_named else settings)  # refuses what has no name
        filled = type(default).sized(settings.get("codebook_size", lab.codebook_size), dim)
        if lab.codebook_init and default.codebook_init in CHOSEN_STARTS:
            filled["codebook_init"] = lab.codebook_init
        config = quantizer_config({**filled, **settings})
    require(
        config.code_dim == dim,
        f"code_dim must be the dimension of the features, {dim}; got {config.code_dim}. Leave it out",
    )
    return config


def _require_registered(name: Any) -> None:
    """Refuse the name of a quantizer that is not registered; it may be of somebody's own file that has not run yet."""
    try:
        require_choice("methods", name, available_quantizers())
    except ValueError as error:
        raise ValueError(
            f"{error}. One of your own is known once its file has run: plugins=['FILE.py'] in a notebook's parameters, "
            "ibqlab.recipes.plugins.import_plugins(['FILE.py']) in code"
        ) from None
