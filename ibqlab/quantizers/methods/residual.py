"""Residual quantization: each level quantizes what the levels before it left over; the code is their sum."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import check_numbers, require, require_choice
from ibqlab.quantizers.base import (
    Assignment,
    Quantizer,
    make_quantizer,
    quantizer_config,
    register_quantizer,
    registrations,
)
from ibqlab.quantizers.codebooks import CHOSEN_STARTS
from ibqlab.quantizers.composite import CompositeConfig, CompositeQuantizer, as_grid, as_rows, summed
from ibqlab.quantizers.estimators import rotate_to_codes, straight_through
from ibqlab.quantizers.methods.diveq import directed_error

GRADIENTS = ("straight_through", "rotation", "diveq", "parts")


@dataclass(frozen=True, kw_only=True)
class ResidualQuantizerConfig(CompositeConfig):
    """Residual quantization of any quantizer, without dropping levels in training."""

    levels: int = 2
    """Quantizers one behind the other, 1 to 24. Published RQ-VAE: 4 with 16,384 codes each, whose 2^56 combinations are
    more than an index may have here."""
    shared: bool = False
    """Whether all levels are one and the same quantizer with one codebook. Published RQ-VAE: True."""
    gradient: str = "straight_through"
    """How the gradient passes the sum of codes. "straight_through" (published RQ-VAE), "rotation", "diveq" (published
    residual DiVeQ, on the error of the sum), or "parts": as each level passes it, by the chain rule through what is
    left over. Levels whose codes learn from the reconstruction need one of the last two."""
    noise_std: float = 1e-3
    """σ of the direction's noise, ≥ 0; read where gradient is "diveq". Published: 1e-3."""

    number_setting = "levels"

    def number(self) -> int:
        """As many parts as levels."""
        return self.levels

    def __post_init__(self):
        check_numbers(self)
        require(1 <= self.levels <= 24, f"levels must be from 1 to 24, got {self.levels}. Use 2 to 8")
        super().__post_init__()
        require_choice("gradient", self.gradient, GRADIENTS)
        require(self.noise_std >= 0, f"noise_std must be ≥ 0, got {self.noise_std}. Use 1e-3, or 0 for no noise")
        learns = self.codebook_init not in CHOSEN_STARTS or self.gradient in ("diveq", "parts")
        if not learns:
            known = tuple(registration.quantizer for registration in registrations().values())
            learns = _loss_reaches_codes(json.dumps(self.inner, sort_keys=True), known)
        require(
            learns,
            f"gradient {self.gradient!r} reaches no code, and {self.inner['name']!r} has no loss that does; "
            f"use gradient='parts'{'' if self.loss_weights() else ' or ' + repr('diveq')}",
        )


@lru_cache(maxsize=256)
def _loss_reaches_codes(settings: str, _: tuple[type, ...]) -> bool:
    """Whether a part's loss alone moves its codes, tried on a small one; a loss may move other weights alone.

    True, too, for codes that take no gradient, such as moving averages, and where it cannot be tried.

    Args:
        settings: of the part, as JSON.
        _: all registered classes: a name may be registered again, for another one.
    """
    inner = json.loads(settings)
    try:
        config = quantizer_config({**inner, "codebook_size": 16})
    except ValueError:  # its size follows from other settings
        config = quantizer_config(inner)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            part = make_quantizer(config)
            weights = _code_weights(part)
            for part.progress in (0.0, 1.0):
                loss = part(torch.randn(1, config.code_dim, 8, 8, requires_grad=True)).loss
                if loss.requires_grad:
                    loss.backward()
        except (RuntimeError, ValueError, OSError):  # the training will say it
            return True
    return not weights or any(weight.grad is not None and bool(weight.grad.any()) for weight in weights)


def _code_weights(quantizer: Quantizer) -> list[nn.Parameter]:
    """What the codes of a quantizer, or of its innermost parts, are made of, where it learns by gradient."""
    if isinstance(quantizer, CompositeQuantizer):
        return [weight for part in quantizer.codes.parts for weight in _code_weights(part)]
    return [weight for weight in quantizer.codes.parameters() if weight.requires_grad]


@register_quantizer("residual", ResidualQuantizerConfig, label="Residual")
class ResidualQuantizer(CompositeQuantizer):
    """Residual Quantization.

        r_1 = z,   q_d = Q_d(r_d),   r_{d+1} = r_d − sg(q_d),   z_q = z + sg(Σ_d q_d − z)
        loss = mean_d loss of Q_d at r_d,   k = Σ_d k_d k^(L−d)

    Sums of codes are the codebook, so that K counts them: few of a coarse code's combinations may be in use.
    Source: RQ-VAE (Lee et al., 2022); published rq-vae-transformer, whose codes are moving averages with
    restarts: inner {"name": "vq_ema", "revive_after": …}. vector-quantize-pytorch passes the gradient once per level,
    so that the encoder gets L times as much.
    """

    def __init__(self, config: ResidualQuantizerConfig):
        super().__init__(config, summed)

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """Every level's choice for what the codes before it left over."""
        return self.codes.index([digit for _, digit in self._levels(features)])

    @torch.no_grad()
    def part_features(self, features: Float[Tensor, "B D h w"]) -> list[Float[Tensor, "N D"]]:
        """What the levels before each left over."""
        return [rest for rest, _ in self._levels(as_rows(features))]

    def _levels(self, features: Float[Tensor, "N D"]) -> Iterator[tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]]:
        """Of each level: what it gets, and its choice."""
        rest = features
        for part in self.parts:
            indices = part.encode(as_grid(rest))
            yield rest, indices.flatten()
            rest = rest - part.look_up(indices)[0, 0].to(rest.dtype)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Level by level; the gradient as the config says."""
        config, rest = self.config, features
        vectors, digits, terms = [], [], []
        for part in self.parts:
            quantized, indices, part_terms = self.quantize_part(part, rest)
            if config.gradient != "parts":
                # The code itself, since what a part returns in training may be a mixture, or rounded.
                quantized = part.look_up(indices[None, None])[0, 0].to(rest.dtype)
            rest = rest - (quantized if config.gradient == "parts" else quantized.detach())
            vectors.append(quantized)
            digits.append(indices)
            terms.append(part_terms)
        quantized, indices = summed(vectors), self.codes.index(digits)
        if not self.training:
            quantized = self.look_up(indices[None, None])[0, 0].to(features.dtype)
        elif config.gradient == "diveq":
            quantized = features + directed_error(features, quantized, config.noise_std)
        elif config.gradient != "parts":
            carry = {"straight_through": straight_through, "rotation": rotate_to_codes}[config.gradient]
            quantized = carry(features, quantized)
        return Assignment(quantized.contiguous(), indices, self.averaged(terms))
