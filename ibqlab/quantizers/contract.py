"""What every quantizer promises, as rules that can be tried on any registered name.

    for finding in check_quantizer("my_vq"):
        print(finding)                    # ✓ rule, or ✗ rule: what was seen, and why it matters

A rule is a small experiment on a codebook of 24 codes; the last ones take 2 and 262,144. The tests run the same rules
over the whole registry, so what holds for a built-in quantizer is what is asked of yours.
"""

import copy
import io
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ibqlab.base.checks import require_choice
from ibqlab.quantizers.assignments import QuantizerError
from ibqlab.quantizers.base import Quantizer, build_quantizer, quantizer_config, registrations
from ibqlab.quantizers.trials import (
    DIM,
    features,
    need,
    same_state,
    settings_tried,
    size_of,
    small,
    small_settings,
    train_step,
)
from ibqlab.quantizers.two_processes import difference_of_two

LARGE = 2**18
"""Codes of the largest published codebook."""


class Rule(NamedTuple):
    """One promise of a quantizer."""

    name: str
    """In a few words."""
    why: str
    """What goes wrong where it is broken."""
    check: Callable[[str], None]
    """Tries it on a registered name; raises where it is broken."""


class Finding(NamedTuple):
    """What became of one rule."""

    rule: Rule
    broken: str
    """What was seen; "" where the rule holds."""
    exempt: str = ""
    """Why the method need not keep it."""

    def __str__(self) -> str:
        if self.exempt:
            return f"– {self.rule.name}: {self.exempt}"
        return f"✗ {self.rule.name}: {self.broken}. {self.rule.why}" if self.broken else f"✓ {self.rule.name}"


RULES: list[Rule] = []
"""All rules, the most basic first."""
BASIC = 2
"""So many of the first rules are what all others stand on; where one is broken, the others are not tried."""


def check_quantizer(name: str, settings: dict[str, Any] | None = None) -> list[Finding]:
    """Try every rule on a registered quantizer.

    Args:
        name: as it was registered.
        settings: to try it with, such as {"inner": {"name": "my_vq"}} of a composite; sizes are the rules' own.
    Returns:
        A finding per rule that was tried. Where the quantizer cannot be made, or gives something else than vectors and
        indices, the rules behind that are not tried.
    Raises:
        ValueError: no such quantizer, or settings that cannot be.
    Cost: seconds; 20 to 300 MB for 262,144 codes.
    """
    quantizer_config({"name": name})
    findings: list[Finding] = []
    with settings_tried(settings or {}):
        quantizer_config({"name": name, **small_settings(name)})
        for rule in RULES:
            findings.append(try_rule(rule, name))
            if findings[-1].broken and len(findings) <= BASIC:
                break
    return findings


def try_rule(rule: Rule, name: str) -> Finding:
    """What becomes of one rule on a registered quantizer; no error of the quantizer's is raised."""
    exempt = exemptions(name).get(rule.name)
    if exempt:
        return Finding(rule, "", exempt)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what they would say is a rule of its own
        try:
            rule.check(name)
        except QuantizerError as error:
            return Finding(rule, str(error).rstrip("."))
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            text = f"{type(error).__name__}: {error}".rstrip(".")
            return Finding(rule, f"{text} ({os.path.basename(last.filename)}, line {last.lineno})")
    return Finding(rule, "")


def exemptions(name: str) -> dict[str, str]:
    """Rules that a registered quantizer is exempt from, by its own account → why.

    Raises:
        ValueError: it names a rule that there is not.
    """
    exempt = dict(registrations()[name].quantizer.exempt)
    for rule in exempt:
        require_choice(f"{name!r}: exempt from", rule, [rule.name for rule in RULES])
    return exempt


def _rule(name: str, why: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def add(check: Callable[[str], None]) -> Callable[[str], None]:
        RULES.append(Rule(name, why, check))
        return check

    return add


# --- what it gives ----------------------------------------------------------------------------------------------------


@_rule("it can be made", "A recipe makes it by its name and the settings of its config")
def _(name: str) -> None:
    quantizer = small(name)
    need(isinstance(quantizer, Quantizer), f"the class is no Quantizer but {type(quantizer).__name__}")
    size, shape = quantizer.config.codebook_size, tuple(quantizer.codebook.shape)
    need(shape == (size, DIM), f"codebook must be (K, D) = ({size}, {DIM}), got {shape}")


@_rule("shapes, types and range", "Decoder, recorder and stored tokens rely on a vector and an index for every token")
def _(name: str) -> None:
    for training in (True, False):
        quantizer = small(name).train(training)
        out = quantizer(features())
        size = quantizer.config.codebook_size
        shapes = (tuple(out.quantized.shape), tuple(out.indices.shape))
        need(shapes == ((2, DIM, 3, 4), (2, 3, 4)), f"quantized and indices are {shapes}")
        kinds = (out.quantized.dtype, out.indices.dtype)
        need(kinds == (torch.float32, torch.int64), f"quantized and indices must be float32 and int64, got {kinds}")
        low, high = int(out.indices.min()), int(out.indices.max())
        need(low >= 0 and high < size, f"indices must lie in 0 … {size - 1}, got {low} … {high}")
        need(bool(out.quantized.isfinite().all()), "quantized holds NaN or infinity")


@_rule("every loss term has a weight", "The loss is the sum of terms by their weights; both are logged by name")
def _(name: str) -> None:
    quantizer = small(name)
    out = quantizer(features())
    weights = quantizer.loss_weights()
    expected = sum((weights[term] * value for term, value in out.terms.items()), torch.zeros(()))
    need(out.loss.ndim == 0 and bool(out.loss.isfinite()), f"the loss must be one finite number, got {out.loss}")
    need(torch.allclose(out.loss, expected), f"loss is {out.loss:.6g}, the weighted sum of terms {expected:.6g}")


@_rule("decoding the indices gives the same vectors", "Else stored tokens make other images than the tokenizer does")
def _(name: str) -> None:
    quantizer = small(name).eval()
    out = quantizer(features())
    wrong = (quantizer.decode(out.indices) != out.quantized).any(1)
    need(
        not wrong.any(),
        f"in evaluation decode(indices) differs from quantized at {int(wrong.sum())} of {wrong.numel()} tokens; return "
        "the codes themselves there, not what the gradient's estimator adds and subtracts",
    )


@_rule("encode gives the indices of evaluation", "Tokens are stored by encode, and must be those of the forward pass")
def _(name: str) -> None:
    quantizer = small(name)
    before = copy.deepcopy(quantizer.state_dict())
    indices = quantizer.encode(features())
    need(same_state(before, quantizer.state_dict()), "encode changes the state")
    out = quantizer.eval()(features())
    need(torch.equal(indices, out.indices), "encode and forward choose different codes")


@_rule("evaluation changes nothing and repeats itself", "Else validation changes training, and tokens differ each time")
def _(name: str) -> None:
    quantizer = small(name).eval()
    before = copy.deepcopy(quantizer.state_dict())
    first, second = quantizer(features()), quantizer(features())
    need(torch.equal(first.indices, second.indices), "two evaluations of the same features choose different codes")
    need(torch.equal(first.quantized, second.quantized), "two evaluations of the same features differ")
    need(same_state(before, quantizer.state_dict()), "a forward pass in evaluation changes the state")


@_rule("a token's code does not depend on the other tokens", "Else an image has other tokens in another batch")
def _(name: str) -> None:
    quantizer, z = small(name), features()
    alone = torch.cat([quantizer.encode(z[:1]), quantizer.encode(z[1:])])
    need(torch.equal(quantizer.encode(z), alone), "an image alone gets other codes than in a batch of two")


# --- what learns ------------------------------------------------------------------------------------------------------


@_rule("the gradient reaches the encoder", "Else the encoder learns nothing from the reconstruction")
def _(name: str) -> None:
    z = features().requires_grad_()
    quantized = small(name)(z).quantized
    need(
        quantized.requires_grad,
        "quantized is detached; return straight_through(features, codes) in training",
    )
    (quantized + 2).square().sum().backward()  # grids have 0 among their numbers
    need(z.grad is not None, "quantized has a gradient to the codes alone, none to the features")
    need(bool(z.grad.isfinite().all()), "the features' gradient holds NaN or infinity")
    without = int((z.grad.flatten(2).norm(dim=1) == 0).sum())
    need(without == 0, f"{without} of 24 tokens get no gradient")


@_rule(
    "codes learn as promised", "Codes that nothing moves stay where they started, and die as the encoder leaves them"
)
def _(name: str) -> None:
    quantizer, gradient = small(name), None
    if not any(parameter.requires_grad for parameter in quantizer.codes.parameters()):
        return  # moving averages, or a fixed grid
    # Codes may have to wait until the encoder has settled, and then start at its features.
    for seed, quantizer.progress in enumerate((0.0, 1.0, 1.0)):
        out = quantizer(features(seed).requires_grad_())
        (out.loss + out.quantized.square().sum()).backward()
        gradient = quantizer.codebook_gradient
        if gradient is not None and gradient.any():
            break
    need(gradient is not None, "neither loss nor quantized has a gradient to the codebook; add a term that moves codes")
    need(bool(gradient.isfinite().all()), "the codebook's gradient holds NaN or infinity")
    reached = gradient.norm(dim=1) > 0
    need(bool(reached.any()), "no code gets a gradient")
    share = f"{int(reached.sum())} of {len(reached)} codes get a gradient"
    promise = vars(type(quantizer)).get("reaches", "")  # of this class alone: a derived one may have another estimator
    if promise in ("all", "softmax"):
        need(bool(reached.all()), f"{share}, and all are promised")
    elif promise == "chosen":
        chosen = torch.zeros_like(reached)
        chosen[out.indices.flatten()] = True
        need(torch.equal(reached, chosen), f"{share}, and those chosen are promised, {int(chosen.sum())}")


@_rule("every parameter takes part in a step", "Else training in several processes stops: each waits for its gradient")
def _(name: str) -> None:
    quantizer = small(name)
    out = quantizer(features().requires_grad_())
    (out.loss + out.quantized.square().sum()).backward()
    idle = [key for key, value in quantizer.named_parameters() if value.requires_grad and value.grad is None]
    need(not idle, f"no gradient reaches {', '.join(idle)}; use it, or set requires_grad to False")


@_rule("zero features are quantized", "An encoder that starts at zero, or a black image, must not end the training")
def _(name: str) -> None:
    z = torch.zeros(1, DIM, 2, 2).requires_grad_()
    out = small(name)(z)
    (out.loss + out.quantized.square().sum()).backward()
    for text, value in {"quantized": out.quantized, "the loss": out.loss, "the features' gradient": z.grad}.items():
        need(value is None or bool(value.isfinite().all()), f"at zero features {text} holds NaN or infinity")


# --- what must not matter ---------------------------------------------------------------------------------------------


@_rule("permuting the codes permutes the indices", "A code's number means nothing; a choice by number is a mistake")
def _(name: str) -> None:
    quantizer = small(name).eval()
    size = quantizer.config.codebook_size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    turned = copy.deepcopy(quantizer)
    tables = [value for value in turned.state_dict(keep_vars=True).values() if value.shape[:1] == (size,)]
    if not tables:
        return  # a grid, whose order is fixed
    with torch.no_grad():
        for table in tables:
            table.copy_(table[order])
    expected, out = quantizer(features()), turned(features())
    need(torch.equal(order[out.indices], expected.indices), "with the codes in another order other codes are chosen")
    near = torch.allclose(out.quantized, expected.quantized)  # codes under a map round otherwise in another order
    need(near, "with the codes in another order the vectors differ")


@_rule("autocast changes nothing", "Mixed precision rounds to 8 bits; codes would be chosen by rounding")
def _(name: str) -> None:
    plain = small(name)(features())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = small(name)(features())
    need(torch.equal(plain.indices, mixed.indices), "under autocast other codes are chosen")
    need(torch.equal(plain.quantized, mixed.quantized), "under autocast the vectors differ")
    need(mixed.loss.dtype == torch.float32, f"under autocast the loss is {mixed.loss.dtype}")


@_rule("half-precision features are quantized in float32", "A bfloat16 encoder must not round the distances to codes")
def _(name: str) -> None:
    z = features().bfloat16()
    need(torch.equal(small(name)(z).indices, small(name)(z.float()).indices), "bfloat16 features get other codes")


@_rule("memory layout does not matter", "channels_last is a way to compute faster, not another result")
def _(name: str) -> None:
    plain, turned = small(name)(features()), small(name)(features().to(memory_format=torch.channels_last))
    need(torch.equal(plain.indices, turned.indices), "channels-last features get other codes")
    need(torch.equal(plain.quantized, turned.quantized), "channels-last features give other vectors")


# --- what is stored ---------------------------------------------------------------------------------------------------


@_rule("the state dict holds everything", "Else a run that is resumed, or loaded, is another than the one that stopped")
def _(name: str) -> None:
    quantizer = small(name)
    for seed in range(3):
        train_step(quantizer, seed)
    stored = io.BytesIO()
    torch.save(quantizer.state_dict(), stored)
    stored.seek(0)
    twin = small(name, seed=2)
    twin.load_state_dict(torch.load(stored, weights_only=True))
    remedy = "keep what changes in a buffer (register_buffer) or a parameter"
    ours, theirs = quantizer.eval()(features()), twin.eval()(features())
    need(torch.equal(ours.indices, theirs.indices), f"a quantizer that loads it chooses other codes; {remedy}")
    need(torch.equal(ours.quantized, theirs.quantized), f"a quantizer that loads it gives other vectors; {remedy}")
    for seed in (3, 4):
        steps = zip(train_step(quantizer.train(), seed), train_step(twin.train(), seed), strict=True)
        need(all(torch.equal(a, b) for a, b in steps), f"a quantizer that loads it trains on otherwise; {remedy}")
    need(same_state(quantizer.state_dict(), twin.state_dict()), f"a quantizer that loads it learns otherwise; {remedy}")


@_rule("it can be copied and pickled", "Averages of weights copy it, and processes are handed its settings")
def _(name: str) -> None:
    quantizer = small(name)
    train_step(quantizer, 0)
    duplicate = copy.deepcopy(quantizer)
    need(same_state(duplicate.state_dict(), quantizer.state_dict()), "a copy has another state")
    again = pickle.loads(pickle.dumps(quantizer.config))
    need(again == quantizer.config, f"its settings come back as {again}")
    stored = io.BytesIO()
    torch.save(quantizer, stored)
    stored.seek(0)
    need(torch.load(stored, weights_only=False).config == quantizer.config, "a stored quantizer has other settings")


@_rule("two processes learn the same", "Each has half of a batch; what they do not share makes two quantizers of one")
def _(name: str) -> None:
    seen = difference_of_two(lambda: small(name), lambda step, rank: features(step)[rank : rank + 1])
    need(not seen.startswith("QuantizerError: "), seen.removeprefix("QuantizerError: ").rstrip("."))
    need(not seen, f"{seen}; sum what is counted with ibqlab.base.processes.sum_over_processes" if seen else "")


# --- sizes ------------------------------------------------------------------------------------------------------------


@_rule("one token is enough", "The last batch of a data set may hold one image, and an image one token")
def _(name: str) -> None:
    out = small(name)(features(shape=(1, DIM, 1, 1)).requires_grad_())
    need(bool(out.quantized.isfinite().all() and out.loss.isfinite()), "one token gives NaN or infinity")


@_rule("2 codes and 262,144 codes work", "Studies of the codebook's size go from the smallest to the largest published")
def _(name: str) -> None:
    for codes in (2, LARGE):
        dim = next((dim for dim in (4, 18) if size_of(name, codes, dim) == codes), None)
        if dim is None:
            continue  # a grid that has no such size
        quantizer = build_quantizer(name, **small_settings(name, codes, dim))
        out = quantizer(features(shape=(1, dim, 1, 2)))
        need(bool(out.quantized.isfinite().all() and out.loss.isfinite()), f"K = {codes:,}: NaN or infinity")
        out = quantizer.eval()(features(shape=(1, dim, 1, 2)))
        need(torch.equal(quantizer.decode(out.indices), out.quantized), f"K = {codes:,}: decode differs from quantized")
