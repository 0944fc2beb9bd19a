"""The rules of the alarm: what each looks at, from where on it counts as trouble, and what it says then.

A rule judges one row at a time. It knows the row, facts about the codebook, and what it has kept of earlier rows.
Thresholds are fields, so that another can be tried: `Alarm(facts, [ReachLost(codes=50)])`. A new rule is a subclass of
`Rule`, which stands in `alarm_base`, with a name, and an entry of `RULES`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from ibqlab.base.checks import is_finite_number
from ibqlab.base.measures import is_measure, measure
from ibqlab.diagnostics.alarm_base import CodebookFacts, Rule, Words, even_share, quantization_loss, read_numbers
from ibqlab.quantizers.base import registrations


def facts_of(config: Mapping[str, Any]) -> CodebookFacts | None:
    """The facts that a tokenizer's settings hold; None where they name no codebook, such as a generator's.

    Args:
        config: plain settings, as a run's config.yaml holds them; of another program's run "codebook_size" suffices.
            How the quantizer's codes learn says its class (`Quantizer.reaches`), of a monitored run that of its
            settings' "quantizer", or their "reaches"; nothing is known of one that is not registered here.
    """
    tokenizer = config.get("tokenizer")
    quantizer = tokenizer.get("quantizer") if isinstance(tokenizer, dict) else config
    size = quantizer.get("codebook_size") if isinstance(quantizer, dict) else None
    if type(size) is not int or size < 1:
        return None
    own = config.get("settings")  # of a monitored run
    own = own if isinstance(own, dict) else {}
    name, weight = quantizer.get("name", own.get("quantizer")), quantizer.get("entropy_weight")
    epsilon, decay, steps = quantizer.get("entropy_epsilon"), config.get("ema_decay"), config.get("steps")
    has_placeholder = name == "ibq" and config.get("ema_codebook_start") == "placeholder"
    known = has_placeholder and is_finite_number(decay) and is_finite_number(steps)
    registered = registrations().get(name) if isinstance(name, str) else None
    reaches = own.get("reaches", registered.quantizer.reaches if registered else "")
    return CodebookFacts(
        codebook_size=size,
        softmax=reaches == "softmax",
        fixed=quantizer.get("codebook_init", own.get("codebook_init")) == "grid",
        mapped=reaches == "map" or quantizer.get("codebook") == "linear",
        double_quantization=quantizer.get("double_quantization") is not False,
        entropy_epsilon=epsilon if weight and is_finite_number(epsilon) else None,
        placeholder_share=decay**steps if known and decay else 0.0,
        monitored=config.get("kind") == "monitored",
    )


@dataclass(frozen=True, kw_only=True)
class UsageFalls(Rule):
    """Usage falls while the quantization loss falls: the features draw together on a few codes.

    Seen in SEED-Voken #51: the quantization loss went to 0 by itself, and few codes were left. A codebook that learns
    has a falling loss, too, but not a falling usage.
    """

    name: ClassVar[str] = "usage_falls"
    title: ClassVar[str] = "usage falls"
    usage_left: float = 0.5
    """Of the highest usage so far; below it usage has fallen. Steps of a healthy run differ by a tenth."""
    loss_left: float = 0.5
    """Of the quantization loss at that time; below it the loss has fallen. #51 saw a tenth, when it was late."""
    smoothed: int = 5
    """Rows whose median counts, so that one step is no peak."""

    def judge(self, row: Mapping[str, Any], facts: CodebookFacts, memory: dict[str, Any]) -> dict[str, float] | None:
        share, loss = even_share(row), quantization_loss(row)
        if share is None or loss is None:
            return None
        latest = memory["latest"] = [*memory.get("latest", []), (share, loss)][-self.smoothed :]
        share, loss = (median(column) for column in zip(*latest, strict=True))
        if share >= memory.get("highest", (0.0, 0.0))[0]:
            memory["highest"] = share, loss
        highest, loss_then = memory["highest"]
        if share >= self.usage_left * highest or loss >= self.loss_left * loss_then:
            return {}
        return {"usage": share, "highest_usage": highest, "quantization_loss": loss, "loss_then": loss_then}

    def explain(self, values: Mapping[str, float], facts: CodebookFacts) -> Words:
        return Words(
            f"the codes of a step fell from {values['highest_usage']:.1%} to {values['usage']:.1%} of even use, the "
            f"quantization loss from {values['loss_then']:.3g} to {values['quantization_loss']:.3g}",
            "features draw together on a few codes, so the loss falls because there is less to quantize",
            "a lower quantization_weight or optimizer.learning_rate, or codes that start among the features "
            "(tokenizer.quantizer.codebook_init=kmeans)",
        )


@dataclass(frozen=True, kw_only=True)
class FewCodes(Rule):
    """A step's tokens hit few codes, whatever the loss does."""

    name: ClassVar[str] = "few_codes"
    title: ClassVar[str] = "few codes"
    rows: int = 5
    share: float = 0.1
    """Of the codes that even use would hit. On photographs at K = 1,024 IBQ keeps about half, VQ less than a tenth."""

    def judge(self, row: Mapping[str, Any], facts: CodebookFacts, memory: dict[str, Any]) -> dict[str, float] | None:
        share = even_share(row)
        if share is None:
            return None
        return {"step_usage": float(row["step_usage"]), "share_of_even": share} if share < self.share else {}

    def explain(self, values: Mapping[str, float], facts: CodebookFacts) -> Words:
        codes = round(values["step_usage"] * facts.codebook_size)
        remedy = (
            "another start (tokenizer.quantizer.codebook_init=kmeans), revival of dead codes "
            "(revive_after=20), or a method that reaches all codes (name=ibq, name=simvq)"
        )
        cause = "codes that no token chose got no gradient and stayed behind while the features moved on"
        if facts.softmax:
            cause = "the softmax over z·C holds one code per token, or all codes alike, so that none is singled out"
            remedy = f"{_hold_back(facts)}codes of the features' order of length (codebook_init=normal or kmeans)"
        if facts.fixed:
            cause = "the features keep to few of the grid's codes"
            remedy = "a higher tokenizer.quantizer.entropy_weight, or fewer codes"
        return Words(
            f"a step's tokens hit {codes:,} of {facts.codebook_size:,} codes, {values['share_of_even']:.1%} of what "
            "even use would",
            cause,
            remedy,
        )


@dataclass(frozen=True, kw_only=True)
class ReachLost(Rule):
    """A step's gradient reaches hardly any code, so lost codes cannot come back."""

    name: ClassVar[str] = "reach_lost"
    title: ClassVar[str] = "reach lost"
    codes: int = 10
    """Reach under 10/K: fewer codes than this learn in a step. IBQ without double quantization ends there, VQ too."""
    most: float = 0.25
    """Of all codes: a codebook of a few codes is in no trouble because it is small."""

    def concerns(self, facts: CodebookFacts) -> bool:
        # Where codes share a map, a step moves those, too, that its gradient does not name.
        return not facts.fixed and not facts.mapped

    def judge(self, row: Mapping[str, Any], facts: CodebookFacts, memory: dict[str, Any]) -> dict[str, float] | None:
        values = read_numbers(row, "gradient_reach")
        # 0: the codes take no gradient at all, as before deferred quantization begins.
        if values is None or not values["gradient_reach"]:
            return None
        return values if values["gradient_reach"] < min(self.codes / facts.codebook_size, self.most) else {}

    def explain(self, values: Mapping[str, float], facts: CodebookFacts) -> Words:
        codes = round(values["gradient_reach"] * facts.codebook_size)
        cause = "only codes that were chosen learn, and few are chosen"
        remedy = "tokenizer.quantizer.name=ibq, whose gradient reaches all codes, name=simvq, or codebook_init=kmeans"
        if facts.softmax:
            cause = "the softmax over z·C has decided: features or codes are too long, and only the chosen code learns"
            remedy = f"{_hold_back(facts)}shorter codes (codebook_init=unit), or a lower optimizer.learning_rate"
        return Words(f"the gradient reaches {codes:,} of {facts.codebook_size:,} codes", cause, remedy)


@dataclass(frozen=True, kw_only=True)
class FeaturesAtCodes(Rule):
    """Features as long as the codes, and a softmax over z·C that has decided.

    Seen without double quantization: features grow from 1.5 to the codes' 8.4, the softmax then holds 1.0 codes, and
    usage ends at 1 % (experiments/LOG.md). SEED-Voken #59 is of this kind: codes of norm 16 at D = 256.
    """

    name: ClassVar[str] = "features_at_codes"
    title: ClassVar[str] = "features at codes' norm"
    norm: float = 0.8
    """Of the codes' mean norm, from which on features count as long."""
    softmax: float = 2.0
    """Codes per token in the softmax, below which it has decided. Healthy runs of K = 1,024 have hundreds."""

    def concerns(self, facts: CodebookFacts) -> bool:
        return facts.softmax

    def judge(self, row: Mapping[str, Any], facts: CodebookFacts, memory: dict[str, Any]) -> dict[str, float] | None:
        values = read_numbers(row, "feature_norm_mean", "code_norm_mean", "softmax_perplexity")
        if values is None:
            return None
        long = values["feature_norm_mean"] >= self.norm * values["code_norm_mean"]
        return values if long and values["softmax_perplexity"] < self.softmax else {}

    def explain(self, values: Mapping[str, float], facts: CodebookFacts) -> Words:
        return Words(
            f"features have a norm of {values['feature_norm_mean']:.3g}, codes of {values['code_norm_mean']:.3g}, and "
            f"the softmax over z·C holds {values['softmax_perplexity']:.3g} codes per token",
            "nothing holds features back, and the longest codes win whatever a token says",
            f"{_hold_back(facts)}a larger quantization_weight, or a lower optimizer.learning_rate",
        )


@dataclass(frozen=True, kw_only=True)
class FeaturesRunAway(Rule):
    """The quantization error grows many times over while a step's tokens hit few codes: the codes do not follow.

    Seen in a plain VQ from U(±1/K): features grew from a norm of 1.3 to 10, codes to 0.18, the error 65-fold, and a
    step hit an eighth of the codes that even use would. A codebook that is used evenly may have a growing error, too,
    since features grow; one of few codes is in trouble where its error grows.
    """

    name: ClassVar[str] = "features_run_away"
    title: ClassVar[str] = "features run away"
    growth: float = 10.0
    """Times the smallest quantization error so far, from which on it has grown. Features of twice the norm, with codes
    that follow, give four."""
    usage: float = 0.25
    """Of even use, below which few codes are hit. Healthy runs on photographs at K = 1,024 keep half."""
    smoothed: int = 3
    """Rows whose median counts, so that one step is no trough."""

    def concerns(self, facts: CodebookFacts) -> bool:
        return not facts.fixed  # a grid follows nobody

    def judge(self, row: Mapping[str, Any], facts: CodebookFacts, memory: dict[str, Any]) -> dict[str, float] | None:
        share, error = even_share(row), read_numbers(row, "quantization_error")
        if share is None or error is None:
            return None
        latest = memory["latest"] = [*memory.get("latest", []), error["quantization_error"]][-self.smoothed :]
        smallest = memory["smallest"] = min(memory.get("smallest", math.inf), median(latest))
        if share >= self.usage or median(latest) < self.growth * smallest or not median(latest):
            return {}
        norms = read_numbers(row, "feature_norm_mean", "code_norm_mean") or {}
        return {"share_of_even": share, "quantization_error": median(latest), "smallest_error": smallest, **norms}

    def explain(self, values: Mapping[str, float], facts: CodebookFacts) -> Words:
        norms = ""
        if "feature_norm_mean" in values:
            norms = (
                f"; features have a norm of {values['feature_norm_mean']:.3g}, codes of {values['code_norm_mean']:.3g}"
            )
        return Words(
            f"the quantization error grew from {values['smallest_error']:.3g} to {values['quantization_error']:.3g}, "
            f"while a step hits {values['share_of_even']:.1%} of the codes that even use would{norms}",
            "features grow, and the few codes that are chosen do not follow them",
            "codes that start among the features (tokenizer.quantizer.codebook_init=kmeans), a larger "
            "quantization_weight, or a lower optimizer.learning_rate",
        )


@dataclass(frozen=True, kw_only=True)
class EntropyCeiling(Rule):
    """The average entropy is as large as the loss can see while usage is low: the penalty pushes no further.

    Two ways lead there. A softmax so flat that every token holds all codes, as from U(±1/K): its mean is even whatever
    is chosen. Or ε: at K = 262,144 the published 1e-5 caps the entropy at 11.19 nats, and ln K is 12.48.
    """

    name: ClassVar[str] = "entropy_ceiling"
    title: ClassVar[str] = "entropy ceiling"
    ceiling: float = 0.99
    """Of the largest entropy the loss can see."""
    usage: float = 0.5
    """Of even use, below which the entropy says nothing of what is chosen. A codebook used evenly is at the ceiling,
    too."""

    def concerns(self, facts: CodebookFacts) -> bool:
        return facts.entropy_epsilon is not None and facts.entropy_ceiling > 0

    def judge(self, row: Mapping[str, Any], facts: CodebookFacts, memory: dict[str, Any]) -> dict[str, float] | None:
        values, share = read_numbers(row, "term_average_entropy"), even_share(row)
        if values is None or share is None:
            return None
        reached = values["term_average_entropy"] >= self.ceiling * facts.entropy_ceiling
        return values | {"share_of_even": share} if reached and share < self.usage else {}

    def explain(self, values: Mapping[str, float], facts: CodebookFacts) -> Words:
        ceiling, largest = facts.entropy_ceiling, math.log(facts.codebook_size)
        cause = "the softmax that the entropy is taken of is flat, so its mean is even whatever code is chosen"
        remedy = "longer codes (tokenizer.quantizer.codebook_init=normal) or a lower entropy_temperature"
        if ceiling < 0.95 * largest:
            cause = f"ε caps the entropy below ln K = {largest:.2f}, or {cause}"
            remedy = f"tokenizer.quantizer.entropy_epsilon=0, or {remedy}"
        return Words(
            f"the average entropy is {values['term_average_entropy']:.2f} of at most {ceiling:.2f} nats, while a step "
            f"hits {values['share_of_even']:.1%} of the codes that even use would",
            cause,
            remedy,
        )


@dataclass(frozen=True, kw_only=True)
class NonFiniteValues(Rule):
    """A number is NaN or infinite.

    Seen in SEED-Voken #53 after 19 hours, and in the adaptive weight of the adversarial loss.
    """

    name: ClassVar[str] = "nonfinite"
    title: ClassVar[str] = "NaN"
    rows: int = 1
    """One is enough: no later row mends it."""

    def judge(self, row: Mapping[str, Any], facts: CodebookFacts, memory: dict[str, Any]) -> dict[str, float] | None:
        # Usage and perplexity of no tokens are no numbers; what left no tokens is told by itself.
        broken = [key for key, value in row.items() if _is_broken(value) and not key.endswith(("usage", "perplexity"))]
        return {key: math.nan for key in broken if is_measure(key)}

    def explain(self, values: Mapping[str, float], facts: CodebookFacts) -> Words:
        names = [measure(key).title if is_measure(key) else key for key in values]
        return Words(
            f"NaN or infinity in {', '.join(names[:3])}" + (", …" if names[3:] else ""),
            "a step too long, or numbers too large for the precision",
            "a lower optimizer.learning_rate, precision=32-true, or adaptive_weight=false where that weight is NaN",
        )


@dataclass(frozen=True, kw_only=True)
class PlaceholderAverages(Rule):
    """The averaged codebook will still hold its placeholder at the run's end, so averaged weights mean nothing."""

    name: ClassVar[str] = "placeholder_averages"
    title: ClassVar[str] = "averages are a placeholder"
    rows: int = 1
    stops: bool = False
    """Training itself is in no trouble."""
    share: float = 0.05
    """Of the placeholder at the last step, from which on averages are warned of when they are loaded, too."""

    def concerns(self, facts: CodebookFacts) -> bool:
        return facts.placeholder_share > self.share

    def judge(self, row: Mapping[str, Any], facts: CodebookFacts, memory: dict[str, Any]) -> dict[str, float] | None:
        return {"placeholder_share": facts.placeholder_share}

    def explain(self, values: Mapping[str, float], facts: CodebookFacts) -> Words:
        return Words(
            f"at the last step {values['placeholder_share']:.0%} of the averaged codebook will be its placeholder",
            "as published, its average starts at U(±1/K) and not at the codes, and the run is too short to forget that",
            'ema_codebook_start=codes, more steps, or the weights as trained (weights="raw")',
        )


RULES: tuple[Rule, ...] = (
    UsageFalls(),
    FewCodes(),
    ReachLost(),
    FeaturesAtCodes(),
    FeaturesRunAway(),
    EntropyCeiling(),
    NonFiniteValues(),
    PlaceholderAverages(),
)
"""All rules with their thresholds."""


def _is_broken(value: Any) -> bool:
    """Whether a value of a row is no finite number; JSON has null for these."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _hold_back(facts: CodebookFacts) -> str:
    """The setting that holds features back, where it is off."""
    return "" if facts.double_quantization else "double_quantization=true, which holds features back, "
