"""Every composite around every registered quantizer: it quantizes, decodes, learns and is recorded, or says why not."""

import math

import pytest
import torch

from ibqlab.diagnostics.recorder import Recorder
from ibqlab.quantizers import build_quantizer, quantizer_config
from ibqlab.quantizers.base import registrations
from ibqlab.quantizers.trials import small_settings

COMPOSITES = ("grouped", "hierarchical", "multi_scale", "residual")
BUILT_IN = sorted(name for name, known in registrations().items() if known.module.startswith("ibqlab."))
REFUSED = {(outer, inner) for outer in COMPOSITES for inner in ("hierarchical", "multi_scale")}  # these need a grid


@pytest.mark.parametrize("inner", BUILT_IN)
@pytest.mark.parametrize("outer", COMPOSITES)
def test_a_composite_of_any_quantizer(outer, inner):
    settings = {"name": inner, **small_settings(inner, 16, 4)}
    gradient = {"gradient": "parts"} if outer == "residual" else {}
    if (outer, inner) in REFUSED:
        with pytest.raises(ValueError, match="inner must be settings of a quantizer of single tokens"):
            build_quantizer(outer, inner=settings, **gradient)
        return
    torch.manual_seed(0)
    quantizer = build_quantizer(outer, inner=settings, **gradient)
    features = torch.randn(2, quantizer.config.code_dim, 4, 4, requires_grad=True)
    quantizer.progress = 1.0
    recorder = Recorder(quantizer, window_tokens=64, probe_tokens=16)
    recorder.before_step()
    out = quantizer(features)
    (out.loss + out.quantized.square().sum()).backward()
    recorder.observe(out.indices, 1)
    row = recorder.report(features, 1)
    assert features.grad.isfinite().all() and features.grad.any()
    assert all(math.isfinite(value) for value in row.values())
    learning = [weight for part in quantizer.parts for weight in part.codes.parameters() if weight.requires_grad]
    assert not learning or any(weight.grad is not None and weight.grad.any() for weight in learning)
    evaluated = quantizer.eval()(features.detach())
    assert torch.equal(evaluated.indices, quantizer.encode(features))
    assert torch.equal(quantizer.decode(evaluated.indices), evaluated.quantized)
    assert evaluated.indices.max() < quantizer.config.codebook_size


@pytest.mark.parametrize(
    ("innermost", "size"),
    [({"name": "vq", "codebook_size": 4, "code_dim": 2}, 4), ({"name": "fsq", "levels": [3, 3]}, 9)],
)
@pytest.mark.parametrize(("outer", "inner"), [("residual", "grouped"), ("hierarchical", "residual")])
def test_sizes_follow_from_the_innermost_parts(outer, inner, innermost, size):
    config = quantizer_config({"name": outer, "inner": {"name": inner, "inner": innermost}})
    assert config.codebook_size == size ** (config.number() * quantizer_config(config.inner).number())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": {"name": "grouped"}, "codebook_size": 64}, "power of 4, the number of parts; got 64. Use 16 or 81$"),
        ({"levels": 24, "codebook_size": 16}, "power of 24, the number of parts; got 16. Use 16777216$"),
        ({"levels": 5, "inner": {"name": "grouped", "groups": 5}, "codebook_size": 16}, "Use a smaller levels$"),
    ],
)
def test_a_size_that_cannot_be_is_told_of_the_whole(settings, message):
    with pytest.raises(ValueError, match=message):
        quantizer_config({"name": "residual", **settings})
