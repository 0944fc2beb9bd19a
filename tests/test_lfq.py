"""LFQ: the factorised entropies equal the softmax over all codes, the published values, and indices in parts."""

import math

import numpy as np
import pytest
import torch
from golden import golden
from oracle import entropies

from ibqlab.quantizers import build_quantizer, factorize_indices, join_indices, quantizer_config
from ibqlab.quantizers.lfq import sign_entropies
from ibqlab.training import recipe_config, train


def features(tokens=40, dim=6, scale=1.0, dtype=torch.float64):
    drawn = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(dim), dtype=dtype)
    return (scale * drawn).requires_grad_()


def grid(dim):
    """All sign vectors, number by number."""
    return torch.tensor([[1.0 if code >> i & 1 else -1.0 for i in range(dim)] for code in range(2**dim)])


def literal(z, temperature, epsilon):
    """The published penalty: logits 2·z·c against all codes at once."""
    return entropies(2 * z, grid(z.shape[1]).to(z.dtype), temperature, epsilon)


def assert_near(ours, theirs, tolerance):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-12)


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.01, 0.02), (0.01, 1.0), (0.3, 0.0)])
def test_factorised_entropies_equal_the_softmax_over_all_codes(dim, temperature, scale):
    z = features(dim=dim, scale=scale)
    ours, theirs = sign_entropies(z, temperature, 1e-5), literal(z, temperature, 1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        mine, reference = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (a, b))
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9 * (1 + reference.abs().max().item()))


def test_gradients_pass_a_numerical_check():
    z = features(tokens=3, dim=3, scale=0.1)
    assert torch.autograd.gradcheck(lambda x: sign_entropies(x, 0.5), z)


def test_entropies_lie_between_certainty_and_evenness():
    certain = (100 * grid(4)).requires_grad_()
    sample, average = sign_entropies(certain, 0.01, epsilon=0.0)
    assert sample.item() == 0
    assert average.item() == pytest.approx(4 * math.log(2), rel=1e-6)
    (average - sample).backward()
    assert torch.isfinite(certain.grad).all()

    undecided = torch.zeros(5, 4, requires_grad=True)
    sample, average = sign_entropies(undecided, 0.01, epsilon=0.0)
    assert sample.item() == average.item() == pytest.approx(4 * math.log(2), rel=1e-6)
    (average - sample).backward()
    assert (undecided.grad == 0).all()

    one_code = (100 * grid(4)[:1]).expand(6, 4)
    assert sign_entropies(one_code, 0.01, epsilon=0.0)[1].item() == 0


@pytest.mark.parametrize(("tag", "dtype", "tolerance"), [("f64", torch.float64, 1e-6), ("f32", torch.float32, 1e-4)])
def test_golden_values(tag, dtype, tolerance):
    facts, stored = golden("lfq_quant")
    quantizer = build_quantizer("lfq", codebook_size=facts["config"]["codebook_size"]).to(dtype)
    assert quantizer.config.code_dim == facts["config"]["dim"]
    z = stored["z"].to(dtype).requires_grad_()
    out = quantizer(z)
    total = (stored["w"].to(dtype) * out.quantized).sum() + out.loss
    total.backward()
    assert torch.equal(out.indices.flatten(), stored["indices"])
    assert z[0, 0, 0, 0] == 0 and out.quantized[0, 0, 0, 0] == -1
    for ours, key in (
        (out.quantized, "z_q"),
        (out.terms["commitment"], "commitment"),
        (out.terms["sample_entropy"], "per_sample_entropy"),
        (out.terms["average_entropy"], "codebook_entropy"),
        (out.terms["sample_entropy"] - out.terms["average_entropy"], "entropy_aux_loss"),
        (total, "total"),
        (z.grad, "grad_z"),
    ):
        assert_near(ours, stored[f"{tag}/{key}"], tolerance)
    with torch.no_grad():
        still = quantizer.eval()(z)
    terms = {name: term.item() for name, term in still.terms.items()}
    assert terms == {"commitment": 0, "sample_entropy": 0, "average_entropy": 0} and still.loss.item() == 0
    assert stored[f"{tag}/eval_commitment"].item() == stored[f"{tag}/eval_entropy_aux_loss"].item() == 0


def test_golden_factorisation():
    facts, stored = golden("lfq_quant")
    bits = tuple(facts["config"]["factorized_bits"])
    pre, post = factorize_indices(stored["indices"], bits, codebook_size=64)
    assert torch.equal(pre, stored["fact/indices_pre"])
    assert torch.equal(post, stored["fact/indices_post"])
    assert torch.equal(join_indices((pre, post), bits), stored["indices"])
    entries = [
        build_quantizer("lfq", codebook_size=2**count).decode(part.view(2, 3, 4))
        for part, count in zip((pre, post), bits, strict=True)
    ]
    assert torch.equal(entries[0], stored["fact/entry_pre"])
    assert torch.equal(entries[1], stored["fact/entry_post"])


class TestIndicesInParts:
    def test_any_number_of_parts_comes_back(self):
        indices = torch.arange(2**9).view(2, -1)
        for bits in [(9,), (2, 7), (3, 1, 5)]:
            parts = factorize_indices(indices, bits)
            assert [int(part.max()) for part in parts] == [2**count - 1 for count in bits]
            assert torch.equal(join_indices(parts, bits), indices)

    def test_small_index_types_do_not_overflow(self):
        pre, post = torch.tensor([63], dtype=torch.uint8), torch.tensor([4095], dtype=torch.int16)
        assert join_indices((pre, post)).tolist() == [2**18 - 1]
        assert [part.tolist() for part in factorize_indices(pre)] == [[63], [0]]

    def test_first_channels_are_the_first_part(self):
        z = torch.full((1, 18, 1, 1), -1.0)
        z[0, 1], z[0, 6] = 1.0, 1.0
        indices = build_quantizer("lfq", codebook_size=2**18)(z).indices
        assert indices.item() == 2**1 + 2**6
        assert [part.item() for part in factorize_indices(indices)] == [2, 1]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda: factorize_indices(torch.tensor([64]), (2, 4)),
                r"0 … 63 for bits \(2, 4\), which must sum to log2",
            ),
            (lambda: factorize_indices(torch.tensor([-1]), (2, 4)), "got -1 … -1"),
            (lambda: factorize_indices(torch.tensor([3]), codebook_size=64), r"sum to log2.*\(6, 12\).*262144.*not 64"),
            (lambda: factorize_indices(torch.tensor([3]), ()), r"bits must be.*got \(\)"),
            (
                lambda: factorize_indices(torch.tensor([3]), (0, 6)),
                r"bits\[0\] must be at least 1; got 0, of bits \(0, 6\)",
            ),
            (lambda: join_indices((torch.tensor([3]),), (2, 4)), "ask for 2 parts, got 1"),
            (lambda: join_indices((torch.tensor([3]), torch.tensor([16])), (2, 4)), "part 1 must lie in 0 … 15"),
            (
                lambda: join_indices((torch.zeros(2).long(), torch.zeros(3).long()), (2, 4)),
                r"one shape.*\(2,\), \(3,\)",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestSettings:
    def test_code_dim_follows_from_the_codebook_size(self):
        assert build_quantizer("lfq", codebook_size=16384).config.code_dim == 14
        assert quantizer_config({"name": "lfq", "codebook_size": 2**18, "code_dim": 18}).code_dim == 18

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"codebook_size": 1000}, "power of two.*got 1000. Use 512 or 1024"),
            ({"codebook_size": 64, "code_dim": 8}, "code_dim must be log2.*6 for 64 codes; got 8. Use code_dim=6"),
            ({"codebook_init": "normal"}, "codebook_init does not apply to lfq.*got 'normal'.*'grid'"),
            ({"commitment_weight": -1.0}, "commitment_weight must be ≥ 0"),
            ({"entropy_temperature": 0.0}, "entropy_temperature must be > 0"),
        ],
    )
    def test_impossible_settings_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            build_quantizer("lfq", **settings)

    def test_no_other_quantizer_has_the_grid(self):
        with pytest.raises(ValueError, match="'grid' is the fixed codebook of the quantizer 'lfq'"):
            build_quantizer("vq", codebook_init="grid")

    def test_weights_reach_the_loss(self):
        z = features(dtype=torch.float32).detach().view(1, 4, 10, 6).permute(0, 3, 1, 2)
        settings = {"commitment_weight": 2.0, "entropy_weight": 0.5, "sample_entropy_weight": 3.0}
        out = build_quantizer("lfq", codebook_size=64, average_entropy_weight=0.7, **settings)(z)
        sample, average = sign_entropies(z.permute(0, 2, 3, 1).reshape(-1, 6))
        commitment = (z.abs() - 1).square().mean()
        torch.testing.assert_close(out.loss, 2 * commitment + 0.5 * (3 * sample - 0.7 * average))
        assert set(build_quantizer("lfq", codebook_size=64, entropy_weight=0.0)(z).terms) == {"commitment"}


class TestSignGrid:
    def test_codebook_is_the_grid_and_nothing_is_stored(self):
        quantizer = build_quantizer("lfq", codebook_size=64)
        assert torch.equal(quantizer.codebook, grid(6))
        assert torch.equal(quantizer.double().codebook, grid(6).double())
        assert not quantizer.state_dict() and not list(quantizer.parameters())

    def test_a_model_made_without_memory_gets_its_grid_back(self):
        with torch.device("meta"):
            quantizer = build_quantizer("lfq", codebook_size=64)
        assert torch.equal(quantizer.cpu().codebook, grid(6))

    def test_the_published_size_fits_a_laptop(self):
        quantizer = build_quantizer("lfq", codebook_size=2**18)
        z = torch.randn(1, 18, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            out = quantizer(z)
        out.loss.backward()
        assert max(sizes) <= 2**18  # p̄ itself, and no 256 × 262,144 matrix
        assert torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0
        assert torch.equal(quantizer.decode(out.indices), torch.where(z > 0, 1.0, -1.0))


def test_lfq_trains(tmp_path):
    quantizer = {"name": "lfq", "codebook_size": 16, "entropy_weight": 0.5}
    settings = {"steps": 3, "record.log_every": 1, "record.checkpoint_every": 2, "tokenizer.quantizer": quantizer}
    config = recipe_config("builtin/smoke", settings)
    run = train(config, tmp_path / "run", progress=False)
    assert run.status == "finished"
    rows = run.metrics.set_index("step")
    assert (rows.loc[1:, "gradient_reach"] == 0).all()
    assert (rows.loc[1:, ["term_commitment", "term_sample_entropy", "term_average_entropy"]] > 0).all(axis=None)
    assert np.array_equal(run.snapshot(3)["codebook"], grid(4).numpy())
