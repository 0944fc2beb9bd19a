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
from jaxtyping import Float
from torch import Tensor

from ibqlab.quantizers.assignments import QuantizerError
from ibqlab.quantizers.base import Quantizer, build_quantizer, quantizer_config
from ibqlab.quantizers.two_processes import difference_of_two

CODES, DIM = 24, 6
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

    def __str__(self) -> str:
        return f"✗ {self.rule.name}: {self.broken}. {self.rule.why}" if self.broken else f"✓ {self.rule.name}"


RULES: list[Rule] = []
"""All rules, the most basic first."""
BASIC = 2
"""So many of the first rules are what all others stand on; where one is broken, the others are not tried."""


def check_quantizer(name: str) -> list[Finding]:
    """Try every rule on a registered quantizer.

    Args:
        name: as it was registered.
    Returns:
        A finding per rule that was tried. Where the quantizer cannot be made, or gives something else than vectors and
        indices, the rules behind that are not tried.
    Raises:
        ValueError: no such quantizer.
    Cost: seconds; 20 to 300 MB for 262,144 codes.
    """
    quantizer_config({"name": name})
    findings: list[Finding] = []
    for rule in RULES:
        findings.append(_try(rule, name))
        if findings[-1].broken and len(findings) <= BASIC:
            break
    return findings


def _try(rule: Rule, name: str) -> Finding:
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


def small_settings(name: str, codes: int = CODES, dim: int = DIM) -> dict[str, Any]:
    """About so many codes of dimension D, drawn from N(0, 1) unless they are a fixed grid."""
    config = quantizer_config({"name": name})
    start = {} if config.codebook_init == "grid" else {"codebook_init": "normal"}
    return type(config).sized(codes, dim) | start


def _rule(name: str, why: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def add(check: Callable[[str], None]) -> Callable[[str], None]:
        RULES.append(Rule(name, why, check))
        return check

    return add


def _need(condition: bool, seen: str) -> None:
    if not condition:
        raise QuantizerError(seen)


def _features(seed: int = 0, shape: tuple[int, ...] = (2, DIM, 3, 4)) -> Float[Tensor, "B D h w"]:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _small(name: str, seed: int = 1) -> Quantizer:
    torch.manual_seed(seed)
    return build_quantizer(name, **small_settings(name))


def _step(quantizer: Quantizer, seed: int) -> tuple[Tensor, ...]:
    """One step of training by plain gradient descent; what the quantizer gave."""
    torch.manual_seed(seed)
    z = _features(seed).requires_grad_()
    out = quantizer(z)
    (out.loss + out.quantized.square().mean()).backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    return out.quantized.detach(), out.indices, out.loss.detach()


# --- what it gives ----------------------------------------------------------------------------------------------------


@_rule("it can be made", "A recipe makes it by its name and the settings of its config")
def _(name: str) -> None:
    quantizer = _small(name)
    _need(isinstance(quantizer, Quantizer), f"the class is no Quantizer but {type(quantizer).__name__}")
    size, shape = quantizer.config.codebook_size, tuple(quantizer.codebook.shape)
    _need(shape == (size, DIM), f"codebook must be (K, D) = ({size}, {DIM}), got {shape}")


@_rule("shapes, types and range", "Decoder, recorder and stored tokens rely on a vector and an index for every token")
def _(name: str) -> None:
    for training in (True, False):
        quantizer = _small(name).train(training)
        out = quantizer(_features())
        size = quantizer.config.codebook_size
        shapes = (tuple(out.quantized.shape), tuple(out.indices.shape))
        _need(shapes == ((2, DIM, 3, 4), (2, 3, 4)), f"quantized and indices are {shapes}")
        kinds = (out.quantized.dtype, out.indices.dtype)
        _need(kinds == (torch.float32, torch.int64), f"quantized and indices must be float32 and int64, got {kinds}")
        low, high = int(out.indices.min()), int(out.indices.max())
        _need(low >= 0 and high < size, f"indices must lie in 0 … {size - 1}, got {low} … {high}")
        _need(bool(out.quantized.isfinite().all()), "quantized holds NaN or infinity")


@_rule("every loss term has a weight", "The loss is the sum of terms by their weights; both are logged by name")
def _(name: str) -> None:
    quantizer = _small(name)
    out = quantizer(_features())
    weights = quantizer.loss_weights()
    expected = sum((weights[term] * value for term, value in out.terms.items()), torch.zeros(()))
    _need(out.loss.ndim == 0 and bool(out.loss.isfinite()), f"the loss must be one finite number, got {out.loss}")
    _need(torch.allclose(out.loss, expected), f"loss is {out.loss:.6g}, the weighted sum of terms {expected:.6g}")


@_rule("decoding the indices gives the same vectors", "Else stored tokens make other images than the tokenizer does")
def _(name: str) -> None:
    quantizer = _small(name).eval()
    out = quantizer(_features())
    wrong = (quantizer.decode(out.indices) != out.quantized).any(1)
    _need(
        not wrong.any(),
        f"in evaluation decode(indices) differs from quantized at {int(wrong.sum())} of {wrong.numel()} tokens; return "
        "the codes themselves there, not what the gradient's estimator adds and subtracts",
    )


@_rule("encode gives the indices of evaluation", "Tokens are stored by encode, and must be those of the forward pass")
def _(name: str) -> None:
    quantizer = _small(name)
    before = copy.deepcopy(quantizer.state_dict())
    indices = quantizer.encode(_features())
    _need(_same(before, quantizer.state_dict()), "encode changes the state")
    out = quantizer.eval()(_features())
    _need(torch.equal(indices, out.indices), "encode and forward choose different codes")


@_rule("evaluation changes nothing and repeats itself", "Else validation changes training, and tokens differ each time")
def _(name: str) -> None:
    quantizer = _small(name).eval()
    before = copy.deepcopy(quantizer.state_dict())
    first, second = quantizer(_features()), quantizer(_features())
    _need(torch.equal(first.indices, second.indices), "two evaluations of the same features choose different codes")
    _need(torch.equal(first.quantized, second.quantized), "two evaluations of the same features differ")
    _need(_same(before, quantizer.state_dict()), "a forward pass in evaluation changes the state")


@_rule("a token's code does not depend on the other tokens", "Else an image has other tokens in another batch")
def _(name: str) -> None:
    quantizer, z = _small(name), _features()
    alone = torch.cat([quantizer.encode(z[:1]), quantizer.encode(z[1:])])
    _need(torch.equal(quantizer.encode(z), alone), "an image alone gets other codes than in a batch of two")


# --- what learns ------------------------------------------------------------------------------------------------------


@_rule("the gradient reaches the encoder", "Else the encoder learns nothing from the reconstruction")
def _(name: str) -> None:
    z = _features().requires_grad_()
    quantized = _small(name)(z).quantized
    _need(
        quantized.requires_grad,
        "quantized is detached; return straight_through(features, codes) in training",
    )
    quantized.square().sum().backward()
    _need(z.grad is not None, "quantized has a gradient to the codes alone, none to the features")
    _need(bool(z.grad.isfinite().all()), "the features' gradient holds NaN or infinity")
    without = int((z.grad.flatten(2).norm(dim=1) == 0).sum())
    _need(without == 0, f"{without} of 24 tokens get no gradient")


@_rule(
    "codes learn as promised", "Codes that nothing moves stay where they started, and die as the encoder leaves them"
)
def _(name: str) -> None:
    quantizer = _small(name)
    out = quantizer(_features().requires_grad_())
    (out.loss + out.quantized.square().sum()).backward()
    if not any(parameter.requires_grad for parameter in quantizer.codes.parameters()):
        return  # moving averages, or a fixed grid
    gradient = quantizer.codebook_gradient
    _need(
        gradient is not None, "neither loss nor quantized has a gradient to the codebook; add a term that moves codes"
    )
    _need(bool(gradient.isfinite().all()), "the codebook's gradient holds NaN or infinity")
    reached = gradient.norm(dim=1) > 0
    _need(bool(reached.any()), "no code gets a gradient")
    share = f"{int(reached.sum())} of {len(reached)} codes get a gradient"
    if quantizer.reaches == "all":
        _need(bool(reached.all()), f"{share}, and all are promised")
    elif quantizer.reaches == "chosen":
        chosen = torch.zeros_like(reached)
        chosen[out.indices.flatten()] = True
        _need(torch.equal(reached, chosen), f"{share}, and those chosen are promised, {int(chosen.sum())}")


@_rule("every parameter takes part in a step", "Else training in several processes stops: each waits for its gradient")
def _(name: str) -> None:
    quantizer = _small(name)
    out = quantizer(_features().requires_grad_())
    (out.loss + out.quantized.square().sum()).backward()
    idle = [key for key, value in quantizer.named_parameters() if value.requires_grad and value.grad is None]
    _need(not idle, f"no gradient reaches {', '.join(idle)}; use it, or set requires_grad to False")


@_rule("zero features are quantized", "An encoder that starts at zero, or a black image, must not end the training")
def _(name: str) -> None:
    z = torch.zeros(1, DIM, 2, 2).requires_grad_()
    out = _small(name)(z)
    (out.loss + out.quantized.square().sum()).backward()
    for text, value in {"quantized": out.quantized, "the loss": out.loss, "the features' gradient": z.grad}.items():
        _need(value is None or bool(value.isfinite().all()), f"at zero features {text} holds NaN or infinity")


# --- what must not matter ---------------------------------------------------------------------------------------------


@_rule("permuting the codes permutes the indices", "A code's number means nothing; a choice by number is a mistake")
def _(name: str) -> None:
    quantizer = _small(name).eval()
    size = quantizer.config.codebook_size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    turned = copy.deepcopy(quantizer)
    tables = [value for value in turned.codes.state_dict(keep_vars=True).values() if value.shape[:1] == (size,)]
    if not tables:
        return  # a grid, whose order is fixed
    with torch.no_grad():
        for table in tables:
            table.copy_(table[order])
    expected, out = quantizer(_features()), turned(_features())
    _need(torch.equal(order[out.indices], expected.indices), "with the codes in another order other codes are chosen")
    near = torch.allclose(out.quantized, expected.quantized)  # codes under a map round otherwise in another order
    _need(near, "with the codes in another order the vectors differ")


@_rule("autocast changes nothing", "Mixed precision rounds to 8 bits; codes would be chosen by rounding")
def _(name: str) -> None:
    plain = _small(name)(_features())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = _small(name)(_features())
    _need(torch.equal(plain.indices, mixed.indices), "under autocast other codes are chosen")
    _need(torch.equal(plain.quantized, mixed.quantized), "under autocast the vectors differ")
    _need(mixed.loss.dtype == torch.float32, f"under autocast the loss is {mixed.loss.dtype}")


@_rule("half-precision features are quantized in float32", "A bfloat16 encoder must not round the distances to codes")
def _(name: str) -> None:
    z = _features().bfloat16()
    _need(torch.equal(_small(name)(z).indices, _small(name)(z.float()).indices), "bfloat16 features get other codes")


@_rule("memory layout does not matter", "channels_last is a way to compute faster, not another result")
def _(name: str) -> None:
    plain, turned = _small(name)(_features()), _small(name)(_features().to(memory_format=torch.channels_last))
    _need(torch.equal(plain.indices, turned.indices), "channels-last features get other codes")
    _need(torch.equal(plain.quantized, turned.quantized), "channels-last features give other vectors")


# --- what is stored ---------------------------------------------------------------------------------------------------


@_rule("the state dict holds everything", "Else a run that is resumed, or loaded, is another than the one that stopped")
def _(name: str) -> None:
    quantizer = _small(name)
    for seed in range(3):
        _step(quantizer, seed)
    stored = io.BytesIO()
    torch.save(quantizer.state_dict(), stored)
    stored.seek(0)
    twin = _small(name, seed=2)
    twin.load_state_dict(torch.load(stored, weights_only=True))
    remedy = "keep what changes in a buffer (register_buffer) or a parameter"
    ours, theirs = quantizer.eval()(_features()), twin.eval()(_features())
    _need(torch.equal(ours.indices, theirs.indices), f"a quantizer that loads it chooses other codes; {remedy}")
    _need(torch.equal(ours.quantized, theirs.quantized), f"a quantizer that loads it gives other vectors; {remedy}")
    for seed in (3, 4):
        steps = zip(_step(quantizer.train(), seed), _step(twin.train(), seed), strict=True)
        _need(all(torch.equal(a, b) for a, b in steps), f"a quantizer that loads it trains on otherwise; {remedy}")
    _need(_same(quantizer.state_dict(), twin.state_dict()), f"a quantizer that loads it learns otherwise; {remedy}")


@_rule("it can be copied and pickled", "Averages of weights copy it, and processes are handed its settings")
def _(name: str) -> None:
    quantizer = _small(name)
    _step(quantizer, 0)
    duplicate = copy.deepcopy(quantizer)
    _need(_same(duplicate.state_dict(), quantizer.state_dict()), "a copy has another state")
    again = pickle.loads(pickle.dumps(quantizer.config))
    _need(again == quantizer.config, f"its settings come back as {again}")
    stored = io.BytesIO()
    torch.save(quantizer, stored)
    stored.seek(0)
    _need(torch.load(stored, weights_only=False).config == quantizer.config, "a stored quantizer has other settings")


@_rule("two processes learn the same", "Each has half of a batch; what they do not share makes two quantizers of one")
def _(name: str) -> None:
    seen = difference_of_two(lambda: _small(name), lambda step, rank: _features(step)[rank : rank + 1])
    _need(not seen, f"{seen}; sum what is counted with ibqlab.base.processes.sum_over_processes" if seen else "")


# --- sizes ------------------------------------------------------------------------------------------------------------


@_rule("one token is enough", "The last batch of a data set may hold one image, and an image one token")
def _(name: str) -> None:
    out = _small(name)(_features(shape=(1, DIM, 1, 1)).requires_grad_())
    _need(bool(out.quantized.isfinite().all() and out.loss.isfinite()), "one token gives NaN or infinity")


@_rule("2 codes and 262,144 codes work", "Studies of the codebook's size go from the smallest to the largest published")
def _(name: str) -> None:
    for codes in (2, LARGE):
        dim = next((dim for dim in (4, 18) if _size(name, codes, dim) == codes), None)
        if dim is None:
            continue  # a grid that has no such size
        quantizer = build_quantizer(name, **small_settings(name, codes, dim))
        out = quantizer(_features(shape=(1, dim, 1, 2)))
        _need(bool(out.quantized.isfinite().all() and out.loss.isfinite()), f"K = {codes:,}: NaN or infinity")
        out = quantizer.eval()(_features(shape=(1, dim, 1, 2)))
        _need(
            torch.equal(quantizer.decode(out.indices), out.quantized), f"K = {codes:,}: decode differs from quantized"
        )


def _size(name: str, codes: int, dim: int) -> int:
    try:
        return quantizer_config({"name": name, **small_settings(name, codes, dim)}).codebook_size
    except ValueError:
        return 0


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )
