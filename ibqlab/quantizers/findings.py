"""What became of the rules of `contract`, in lines to read, and those rules that are tried before a training."""

import re
import time
from collections.abc import Sequence

from ibqlab.quantizers.contract import BASIC, RULES, Finding, try_rule

LONG = ("two processes learn the same", "2 codes and 262,144 codes work")
"""Rules that take processes or much memory."""


def quick_findings(name: str, seconds: float = 5.0) -> list[Finding]:
    """Rules that a registered quantizer breaks, of those that take a fraction of a second each.

    Args:
        name: as it was registered.
        seconds: after which no further rule is tried.
    """
    end, broken = time.monotonic() + seconds, []
    for position, rule in enumerate(RULES):
        if rule.name in LONG or time.monotonic() > end:
            continue
        finding = try_rule(rule, name)
        if finding.broken:
            broken.append(finding)
            if position < BASIC:
                break
    return broken


def in_lines(findings: Sequence[Finding]) -> list[str]:
    """Findings as text, a line each; what breaks several rules is said once, at the first of them.

    One cause is the same words, whatever their numbers.
    """
    causes: dict[str, list[str]] = {}
    for finding in findings:
        if finding.broken:
            causes.setdefault(re.sub(r"\d+", "#", finding.broken), []).append(finding.rule.name)
    lines = []
    for finding in findings:
        first, *others = causes.get(re.sub(r"\d+", "#", finding.broken), [finding.rule.name])
        if finding.rule.name == first:
            rest = f". For the same cause these could not be looked at: {'; '.join(others)}" if others else ""
            lines.append(f"{finding}{rest}")
    return lines
