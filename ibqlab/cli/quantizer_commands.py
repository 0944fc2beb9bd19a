"""`ibqlab check`: whether a quantizer keeps the rules that every quantizer keeps."""

import sys
from collections.abc import Sequence

import click

from ibqlab.cli.terminal import PLUGIN, say, say_loading


@click.command()
@click.argument("name", required=False)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@PLUGIN
def check(name: str | None, settings: Sequence[str], plugins: Sequence[str]) -> None:
    """Try the rules that every quantizer keeps on NAME, or on all that a --plugin registers; seconds on a CPU.

    With settings of NAME, such as another quantizer inside it: check residual inner.name=my_vq --plugin FILE.py
    Sizes are the rules' own.

    ✓ a rule holds; ✗ it is broken: what was seen, and why it matters. The exit code is 1 where one is broken.
    """
    say_loading(f"check {name or ' '.join(plugins)}".rstrip())
    from ibqlab.base.checks import require_choice
    from ibqlab.config import ConfigError, apply_overrides
    from ibqlab.quantizers import available_quantizers, check_quantizer
    from ibqlab.quantizers.contract import RULES
    from ibqlab.quantizers.findings import in_lines
    from ibqlab.recipes.plugins import import_plugins, registered_by

    if not name and not plugins:
        raise ConfigError(f"NAME is missing; there are {', '.join(available_quantizers())}. Or give --plugin FILE")
    names = [name] if name else [one for plugin in import_plugins(plugins) for one in registered_by(plugin)]
    if not names:
        raise ConfigError(f"{', '.join(plugins)} registers no quantizer; put @register_quantizer(NAME) above its class")
    if name and name not in available_quantizers():
        try:
            require_choice("NAME", name, available_quantizers())
        except ValueError as error:
            sentence = str(error) if str(error).endswith("?") else f"{error}."
            raise ConfigError(
                f"{sentence} One of your own is known with the file that registers it: ibqlab check {name} "
                "--plugin FILE.py"
            ) from None
    is_broken, typed = False, apply_overrides({}, settings)
    for size in ("codebook_size", "code_dim"):
        if size in typed:
            raise ConfigError(f"{size} is the rules' own, a small one; leave {size}= out")
    for registered in names:
        findings, one = check_quantizer(registered, typed), " ".join([registered, *settings])
        broken = sum(bool(finding.broken) for finding in findings)
        is_broken |= broken > 0
        say("\n".join([one, *(f"  {line}" for line in in_lines(findings))]))
        untried = len(RULES) - len(findings)
        rest = f"; {untried} rules stand on these and were not tried" if untried else ""
        say(f"{one}: {broken or 'none'} of {len(findings)} rules broken{rest}")
    sys.exit(int(is_broken))
