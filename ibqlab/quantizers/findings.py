"""What became of the rules of `contract`, in lines to read, and those rules that are tried before a training."""

import re
import time
from collections.abc import Sequence

from ibqlab.quantizers.contract import BASIC, RULES, Finding, try_rule

LONG = ("two processes learn the same", "2 codes and 262,144 codes work")
"""Rules that take processes or much memory."""


REPEATS = "evaluation changes nothing and repeats itself"
COMPARES = (
    "encode gives the indices of evaluation",
    "a token's code does not depend on the other tokens",
    "permuting the codes permutes the indices",
    "autocast changes nothing",
    "half-precision features are quantized in float32",
    "memory layout does not matter",
    "the state dict holds everything",
    "two processes learn the same",
)
"""Rules that compare two passes: where features get other codes each time, these say nothing of their own."""


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

    One cause is the same words, whatever their numbers. Where a quantizer draws its choice at random, what compares two
    passes follows from that.
    """
    broken = {finding.rule.name: finding.broken for finding in findings}
    is_random = broken.get(REPEATS, "").startswith("two evaluations")
    following = [name for name in COMPARES if broken.get(name)] if is_random else []
    findings = [finding for finding in findings if finding.rule.name not in following]
    causes: dict[str, list[str]] = {}
    for finding in findings:
        if finding.broken:
            causes.setdefault(re.sub(r"\d+", "#", finding.broken), []).append(finding.rule.name)
    lines = []
    for finding in findings:
        first, *others = causes.get(re.sub(r"\d+", "#", finding.broken), [finding.rule.name])
        if finding.rule.name == first:
            rest = f". For the same cause these could not be looked at: {'; '.join(others)}" if others else ""
            if following and finding.rule.name == REPEATS:
                rest += f". These follow from it: {'; '.join(following)}"
            lines.append(f"{finding}{rest}")
    return lines
