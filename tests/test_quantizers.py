"""One contract for every registered quantizer, and what is particular to each."""

import copy
import io
import math
import pickle
import re
import subprocess
import sys
from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from golden import golden, golden_file
from oracle import ibq_loss
from registry import accepts, quantizers_that_accept, small_settings
from torch.nn import functional as F

from ibqlab.quantizers import (
    Assignment,
    Quantizer,
    QuantizerConfig,
    assignments,
    available_quantizers,
    build_quantizer,
    nearest_code,
    quantizer_config,
    register_quantizer,
    rotate_to_codes,
    straight_through,
)
from ibqlab.quantizers.assignments import QuantizerError
from ibqlab.quantizers.contract import BASIC, RULES, check_quantizer, exemptions

CODES, DIM = 24, 6
PUBLISHED = {"ibq", "lfq", "simvq", "soft_vq", "vq", "vq_cosine", "vq_ema"}
BY_KMEANS = quantizers_that_accept(codebook_init="kmeans")

STORED_KINDS = {
    "int32": torch.Tensor.int,
    "uint8": lambda indices: indices.to(torch.uint8),
    "uint16": lambda indices: indices.to(torch.uint16),
    "uint64": lambda indices: indices.to(torch.uint64),
    "array": torch.Tensor.numpy,
    "uint16 array": lambda indices: indices.numpy().astype(np.uint16),
    "big-endian array": lambda indices: indices.numpy().astype(">u4"),
    "read-only array": lambda indices: np.broadcast_to(indices.numpy(), indices.shape),
    "lists": torch.Tensor.tolist,
    "list of tensors": list,
}
WRONG_INDICES = {
    "float": (torch.zeros(1, 2, 2), r"whole numbers; got torch\.float32\. Use indices\.long\(\)"),
    "bool": (torch.zeros(1, 2, 2, dtype=torch.bool), r"whole numbers; got torch\.bool"),
    "float array": (np.zeros((1, 2, 2)), r"whole numbers; got torch\.float64"),
    "complex": (np.zeros((1, 2, 2), dtype=complex), "whole numbers"),
    "text": ("many", "whole numbers in a tensor, an array, or lists"),
    "nothing": (None, "whole numbers in a tensor, an array, or lists"),
    "ragged": ([[[1, 2], [3]]], "lists of equal length"),
    "beyond 64 bits": ([[[10**30]]], "whole numbers"),
    "beyond 63 bits": (np.full((1, 1, 1), 2**63, dtype=np.uint64), r"below 2\^63"),
    "empty list": ([], r"\(B, h, w\); got \(0,\)"),
    "a row": ([1, 2, 3], r"\(B, h, w\); got \(3,\)\. Use indices\.view\(B, h, w\)"),
    "too large": (np.full((1, 1, 1), 99, dtype=np.uint16), "got 99 … 99; were they made by another tokenizer"),
    "negative": ([[[-1]]], "got -1 … -1"),
}


def features(seed=0, shape=(2, DIM, 3, 4)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(name, **settings):
    """A quantizer of dimension DIM, as `small_settings` has it."""
    torch.manual_seed(1)
    return build_quantizer(name, **{**small_settings(name, CODES, DIM), **settings})


def test_the_published_names_are_registered():
    assert set(available_quantizers()) >= PUBLISHED


@pytest.mark.parametrize("name", available_quantizers())
def test_a_quantizer_and_its_settings_are_pickled(name):
    stored = io.BytesIO()
    torch.save(build_quantizer(name, codebook_size=16, code_dim=4), stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False).config
    assert loaded == quantizer_config({"name": name, "codebook_size": 16, "code_dim": 4})
    assert type(copy.deepcopy(loaded)) is type(pickle.loads(pickle.dumps(loaded))) is type(loaded)


@pytest.mark.parametrize("name", available_quantizers())
class TestContract:
    @pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
    def test_it_keeps_every_rule(self, name, rule):
        if rule.name not in exemptions(name):
            rule.check(name)

    def test_encode_gives_the_indices_of_evaluation_and_nothing_else(self, name):
        quantizer = built(name)
        z = features().requires_grad_()
        before = copy.deepcopy(quantizer.state_dict())
        indices = quantizer.encode(z.to(memory_format=torch.channels_last))
        assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
        assert torch.equal(indices, quantizer.eval()(z).indices)
        with torch.no_grad():
            out = quantizer(z)
        assert torch.equal(indices, out.indices)
        assert torch.equal(out.quantized, quantizer.decode(indices))
        torch.testing.assert_close(out.loss, quantizer(z).loss)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_encode_refuses_what_no_index_can_stand_for(self, name, bad):
        z = features()
        z[1, 2, 0, 3] = bad
        with pytest.raises(ValueError, match="1 of 24 tokens hold NaN or infinity, first token 15"):
            built(name).encode(z)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("training", [True, False])
    def test_half_quantizers_compute_in_float32(self, name, dtype, training):
        half = built(name).to(dtype)
        wide = copy.deepcopy(half).float()
        for quantizer in (half, wide):
            quantizer.train(training)
        z = features().to(dtype)
        mine, theirs = z.clone().requires_grad_(), z.clone().float().requires_grad_()
        assert torch.equal(half.encode(z), wide.encode(z.float()))
        torch.manual_seed(2)
        got = half(mine)
        torch.manual_seed(2)
        expected = wide(theirs)
        assert torch.equal(got.indices, expected.indices)
        assert torch.equal(got.quantized, expected.quantized)
        torch.testing.assert_close(got.loss, expected.loss)
        assert got.quantized.dtype == got.loss.dtype == torch.float32
        assert half.codebook.isfinite().all()
        if training:
            (got.loss + got.quantized.square().sum()).backward()
            assert mine.grad.dtype == dtype
            assert mine.grad.isfinite().all()

    def test_double_features_stay_double(self, name):
        assert built(name)(features().double()).quantized.dtype == torch.float64

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_half_quantizer_decodes_what_it_gave(self, name, dtype):
        quantizer = built(name).to(dtype).eval()
        out = quantizer(features())
        assert torch.equal(quantizer.decode(out.indices), out.quantized)

    @pytest.mark.parametrize("kind", STORED_KINDS)
    def test_indices_of_every_kind_decode(self, name, kind):
        quantizer = built(name)
        indices = quantizer.encode(features())
        assert torch.equal(quantizer.decode(STORED_KINDS[kind](indices)), quantizer.decode(indices))

    @pytest.mark.parametrize(("wrong", "says"), WRONG_INDICES.values(), ids=WRONG_INDICES)
    def test_what_are_no_indices_is_refused(self, name, wrong, says):
        with pytest.raises(ValueError, match=says):
            built(name).decode(wrong)

    def test_compiled_it_gives_the_same(self, name):
        quantizer = built(name).eval()
        compiled = torch.compile(quantizer, backend="eager")
        assert torch.equal(compiled(features()).quantized, quantizer(features()).quantized)

    def test_state_and_copy_survive(self, name):
        quantizer = built(name)
        out = quantizer(features().requires_grad_())
        (out.loss + out.quantized.sum()).backward()
        twin = built(name, **({"codebook_init": "unit"} if accepts(name, codebook_init="unit") else {}))
        twin.load_state_dict(quantizer.state_dict())
        duplicate = copy.deepcopy(quantizer)
        assert torch.equal(twin.codebook, quantizer.codebook)
        assert torch.equal(duplicate.codebook, quantizer.codebook)

    def test_bad_features_are_refused(self, name):
        quantizer = built(name)
        with pytest.raises(ValueError, match=r"\(B, D, h, w\) with D = code_dim = 6, got \(2, 5, 3, 4\)"):
            quantizer(torch.zeros(2, 5, 3, 4))
        with pytest.raises(ValueError, match="no token"):
            quantizer(torch.zeros(0, DIM, 3, 4))

    def test_indices_out_of_range_are_refused(self, name):
        quantizer = built(name)
        size = quantizer.config.codebook_size
        with pytest.raises(ValueError, match=rf"0 … {size - 1} \(codebook_size {size}\), got {size} … {size}"):
            quantizer.decode(torch.full((1, 2, 2), size))

    def test_sizes_beyond_every_honest_use_are_refused(self, name):
        with pytest.raises(ValueError, match="codebook_size must be at most 16,777,216; got 1,099,511,627,776"):
            build_quantizer(name, codebook_size=2**40)

    def test_impossible_settings_are_refused(self, name):
        with pytest.raises(ValueError, match="codebook_size must be at least 2, got 1"):
            build_quantizer(name, codebook_size=1)
        with pytest.raises(ValueError, match="did you mean 'normal'"):
            build_quantizer(name, codebook_init="norml")
        with pytest.raises(ValueError, match="codebook_size"):
            build_quantizer(name, codebok_size=16)
        with pytest.raises(ValueError, match="codebook_size"):
            build_quantizer(name, codebook_size="16")


def test_nothing_imports_the_compiler_before_something_is_compiled():
    program = "import sys, ibqlab.quantizers, ibqlab.generator; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_codebook_larger_than_the_memory_is_not_begun():
    with pytest.raises(ValueError, match=r"16,777,216 codes of dimension 65,536 needs .*choose a smaller"):
        build_quantizer("ibq", codebook_size=2**24, code_dim=2**16)


def test_moving_averages_in_half_precision_do_not_overflow():
    quantizer = build_quantizer("vq_ema", codebook_size=2, code_dim=2, ema_decay=0.0).half()
    quantizer(torch.ones(1, 2, 300, 400))  # 120,000 hits, nearly twice float16's largest number
    assert quantizer.codebook.isfinite().all()


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'soft_vq'"):
        build_quantizer("softvq")


def test_initialisations_have_their_spread():
    bounded = build_quantizer("vq", codebook_size=512, code_dim=32).codebook
    assert bounded.abs().max() <= 1 / 512
    assert bounded.std().item() == pytest.approx(1 / 512 / math.sqrt(3), rel=0.05)
    assert build_quantizer("ibq", codebook_size=512, code_dim=32).codebook.std().item() == pytest.approx(1, rel=0.05)
    unit = build_quantizer("ibq", codebook_size=512, code_dim=32, codebook_init="unit").codebook
    assert unit.norm(dim=1).mean().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BY_KMEANS)
def test_half_quantizers_start_from_centres(name, dtype):
    """The centres are stored, hence rounded, in half precision, so that they are not those of float32."""
    quantizer = built(name, codebook_init="kmeans").to(dtype)
    z = features().to(dtype).requires_grad_()
    torch.manual_seed(3)
    out = quantizer(z)
    assert out.quantized.dtype == out.loss.dtype == torch.float32
    assert quantizer.codebook.isfinite().all() and not torch.equal(quantizer.codebook, built(name).to(dtype).codebook)
    (out.loss + out.quantized.square().sum()).backward()
    assert z.grad.dtype == dtype and z.grad.isfinite().all()


@pytest.mark.parametrize("name", BY_KMEANS)
def test_kmeans_start_puts_codes_among_the_features(name):
    centres = torch.tensor([[5.0, 0, 0, 0, 0, 0], [0, 5.0, 0, 0, 0, 0], [0, 0, 0, 0, 0, -5.0]])
    noise = 0.05 * torch.randn(300, DIM, generator=torch.Generator().manual_seed(0))
    points = centres.repeat_interleave(100, 0) + noise
    quantizer = built(name, codebook_init="kmeans")
    quantizer(points.T.reshape(1, DIM, 15, 20))
    assert torch.cdist(quantizer.codebook, centres).min(dim=1).values.max() < 0.6
    started = quantizer.codebook.detach().clone()
    quantizer(points.T.reshape(1, DIM, 15, 20) + 100)
    if list(quantizer.parameters()):  # codes without a gradient are averages, which every batch moves
        assert torch.equal(quantizer.codebook, started)


class TestVectorQuantizer:
    def test_metrics_choose_differently(self):
        codebook = torch.tensor([[1.0, 0.0], [10.0, 10.0], [0.0, 1.1]])
        z = torch.tensor([[0.1, 1.0], [2.0, 2.0]])
        assert nearest_code(z, codebook, "l2").tolist() == [2, 2]
        assert nearest_code(z, codebook, "cosine").tolist() == [2, 1]
        assert nearest_code(z, codebook, "dot").tolist() == [1, 1]

    def test_only_chosen_codes_learn(self):
        quantizer = built("vq")
        out = quantizer(features())
        out.loss.backward()
        learned = quantizer.codebook_gradient.norm(dim=1) > 0
        assert learned.nonzero()[:, 0].tolist() == out.indices.unique().tolist()

    def test_beta_moves_to_the_side_it_is_put_on(self):
        z = features()
        on_codebook, on_encoder = built("vq", beta=0.1)(z), built("vq", beta=0.1, beta_on="encoder")(z)
        mean = on_codebook.terms["commitment"].item()
        assert on_codebook.loss.item() == pytest.approx(1.1 * mean, rel=1e-6)
        z.requires_grad_()
        (side_a,) = torch.autograd.grad(built("vq", beta=0.1)(z).loss, z)
        (side_b,) = torch.autograd.grad(built("vq", beta=0.1, beta_on="encoder")(z).loss, z)
        torch.testing.assert_close(side_b, 0.1 * side_a)
        assert on_encoder.loss.item() == pytest.approx(1.1 * mean, rel=1e-6)

    def test_rotation_takes_the_features_to_the_codes_and_turns_the_gradient(self):
        z = torch.tensor([[2.0, 0.0], [0.0, 3.0]], requires_grad=True)
        codes = torch.tensor([[0.0, 1.0], [0.0, -1.0 + 1e-3]])
        out = rotate_to_codes(z, codes)
        torch.testing.assert_close(out[0], codes[0])
        (gradient,) = torch.autograd.grad(out[0, 1], z)
        torch.testing.assert_close(gradient[0], torch.tensor([0.5, 0.0]))
        quantizer = built("vq", gradient="rotation")
        plain = built("vq")
        torch.testing.assert_close(quantizer(features()).quantized, plain(features()).quantized, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("variant", ["l20_legacy1", "l20_legacy0", "l21_legacy1", "l21_legacy0"])
    @pytest.mark.parametrize(
        ("tag", "dtype", "tolerance"), [("f64", torch.float64, 1e-6), ("f32", torch.float32, 1e-4)]
    )
    def test_golden_values(self, variant, tag, dtype, tolerance):
        _, stored = golden("vq_quant")
        quantizer = build_quantizer(
            "vq_cosine" if "l21" in variant else "vq",
            codebook_size=32,
            code_dim=8,
            beta_on="codebook" if variant.endswith("1") else "encoder",
        ).to(dtype)
        quantizer.codes.weight.data.copy_(stored["codebook"])
        z = stored["z"].to(dtype).requires_grad_()
        out = quantizer(z)
        total = (stored["w"].to(dtype) * out.quantized).sum() + out.loss
        total.backward()
        prefix = f"{variant}/{tag}"
        assert torch.equal(out.indices.flatten(), stored[f"{variant[:3]}/indices"])
        for ours, key in (
            (out.quantized, "z_q"),
            (out.loss, "loss"),
            (total, "total"),
            (z.grad, "grad_z"),
            (quantizer.codebook_gradient, "grad_codebook"),
        ):
            assert_near(ours, stored[f"{prefix}/{key}"], tolerance)


class TestUnitVectors:
    @pytest.mark.parametrize("metric", ["l2", "cosine"])
    @pytest.mark.parametrize("system", ["llamagen_vq", "titok"])
    @pytest.mark.parametrize(
        ("tag", "dtype", "tolerance"), [("f64", torch.float64, 1e-6), ("f32", torch.float32, 1e-4)]
    )
    def test_golden_values(self, system, tag, dtype, tolerance, metric):
        stored = golden(f"peers/{system}")[1]
        suffix = {"llamagen_vq": ".pt", "titok": ".bin"}[system]
        weights = torch.load(golden_file(f"peers/{system}_official{suffix}"), weights_only=True)
        codes = weights.get("model", weights)["quantize.embedding.weight"]
        quantizer = build_quantizer(
            "vq",
            codebook_size=len(codes),
            code_dim=codes.shape[1],
            metric=metric,
            unit_vectors=True,
            beta_on="encoder",
        ).to(dtype)
        quantizer.codes.weight.data.copy_(codes)
        z = stored["out/h"].to(dtype).requires_grad_()
        out = quantizer(z)
        (total := (stored["train/w"].to(dtype) * out.quantized).sum() + out.loss).backward()
        assert torch.equal(out.indices.flatten(), stored["train/indices"].flatten())
        for ours, key in (
            (out.quantized, "z_q"),
            (total, "total"),
            (z.grad, "grad_h"),
            (quantizer.codes.weight.grad, "grad_codebook"),
        ):
            assert_near(ours, stored[f"train/{tag}/{key}"], tolerance)
        still = quantizer.eval()(z)
        assert torch.equal(still.indices.flatten(), stored["out/indices"].flatten())
        assert torch.equal(still.quantized, quantizer.decode(still.indices))
        assert_near(still.quantized, stored["out/z_q"].to(dtype), 1e-6)

    def test_no_result_depends_on_a_length(self):
        quantizer = built("vq", unit_vectors=True)
        torch.testing.assert_close(quantizer.codes.weight.norm(dim=1), torch.ones(CODES))
        z, before = features(), quantizer(features())
        with torch.no_grad():
            quantizer.codes.weight.mul_(3.0)
        after = quantizer(7 * z)
        assert torch.equal(after.indices, before.indices)
        torch.testing.assert_close(after.quantized, before.quantized)
        torch.testing.assert_close(after.loss, before.loss)
        torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(CODES))

    def test_only_chosen_codes_learn_and_the_diagnosis_sees_which(self):
        quantizer = built("vq", unit_vectors=True)
        out = quantizer(features().requires_grad_())
        out.loss.backward()
        for gradient in (quantizer.codebook_gradient, quantizer.codes.weight.grad):
            assert (gradient.norm(dim=1) > 0).nonzero()[:, 0].tolist() == out.indices.unique().tolist()

    def test_revived_codes_are_directions_of_tokens(self):
        quantizer, z = built("vq", unit_vectors=True, revive_after=1), 50 * features()
        old = quantizer.codes.weight.clone()
        quantizer(z)
        moved = quantizer.codes.weight[(quantizer.codes.weight != old).any(1)]
        directions = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, DIM), dim=1)
        assert len(moved) and (torch.cdist(moved, directions).min(1).values < 1e-3).all()

    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("vq", {"metric": "dot"}, 'unit_vectors needs metric "l2" or "cosine", got \'dot\''),
            ("vq_ema", {}, "unit_vectors needs codebook \"free\", got 'ema'"),
            ("vq", {"codebook_init": "kmeans"}, 'another codebook_init than "kmeans"'),
            ("cvq", {}, "unit_vectors does not apply to cvq"),
            ("nsvq", {}, "unit_vectors does not apply to nsvq"),
            ("wasserstein_vq", {}, "unit_vectors does not apply to wasserstein_vq"),
            ("deferred_vq", {}, "unit_vectors does not apply to deferred_vq"),
        ],
    )
    def test_what_contradicts_them_is_refused(self, name, settings, message):
        with pytest.raises(ValueError, match=message):
            built(name, unit_vectors=True, **settings)


def assert_near(ours, theirs, tolerance):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-12)


class TestMovingAverage:
    def test_codes_follow_the_mean_of_their_features(self):
        quantizer = built("vq_ema", ema_decay=0.5)
        z = features()
        for _ in range(60):
            out = quantizer(z)
        tokens = z.permute(0, 2, 3, 1).reshape(-1, DIM)
        for code in out.indices.unique():
            mean = tokens[out.indices.flatten() == code].mean(0)
            torch.testing.assert_close(quantizer.codebook[code], mean, atol=1e-3, rtol=1e-3)

    def test_takes_no_gradient(self):
        quantizer = built("vq_ema")
        assert not list(quantizer.parameters())
        assert quantizer.codebook_gradient is None
        assert set(quantizer(features()).terms) == {"commitment"}

    def test_dead_codes_are_revived_on_features_after_their_patience(self):
        z = features() + 50
        patient, revived = built("vq_ema"), built("vq_ema", revive_after=3)
        for _ in range(2):
            patient(z), revived(z)
        assert torch.equal(patient.codebook, revived.codebook)
        for _ in range(20):
            patient(z), revived(z)
        patient.eval(), revived.eval()
        assert revived(z).indices.unique().numel() > 5 * patient(z).indices.unique().numel()

    def test_revival_leaves_living_codes_alone(self):
        quantizer = built("vq", revive_after=1)
        z = features()
        alive = built("vq")(z).indices.unique()
        before = quantizer.codebook.detach().clone()
        quantizer(z)
        assert torch.equal(quantizer.codebook[alive], before[alive])
        assert not torch.equal(quantizer.codebook, before)


class TestSimVq:
    def test_every_code_moves_with_one_gradient(self):
        quantizer = built("simvq")
        before = quantizer.codebook.detach().clone()
        quantizer(features()[:1, :, :1, :1]).loss.backward()
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter.sub_(0.1 * parameter.grad)
        assert ((quantizer.codebook - before).norm(dim=1) > 0).all()
        assert (quantizer.codebook_gradient.norm(dim=1) > 0).sum() == 1

    def test_a_frozen_codebook_cannot_be_revived(self):
        with pytest.raises(ValueError, match="frozen"):
            built("simvq", revive_after=5)


class TestSoftVq:
    def test_temperature_falls_along_a_cosine(self):
        quantizer = built("soft_vq", temperature_start=1.0, temperature_end=0.2)
        seen = []
        for progress in (0.0, 0.25, 0.5, 1.0):
            quantizer.progress = progress
            seen.append(quantizer.temperature)
        assert seen == pytest.approx([1.0, 0.6 + 0.4 * math.cos(math.pi / 4), 0.6, 0.2])

    def test_training_value_is_the_softmax_average(self):
        quantizer = built("soft_vq")
        z = features().requires_grad_()
        out = quantizer(z)
        tokens = z.permute(0, 2, 3, 1).reshape(-1, DIM)
        expected = (tokens @ quantizer.codebook.T / 0.9).softmax(1) @ quantizer.codebook
        torch.testing.assert_close(out.quantized.permute(0, 2, 3, 1).reshape(-1, DIM), expected)
        out.quantized.sum().backward()
        assert (quantizer.codebook_gradient.norm(dim=1) > 0).all()

    def test_soft_becomes_hard_at_the_end(self):
        quantizer = built("soft_vq")
        quantizer.progress = 1.0
        soft = quantizer(features())
        soft.loss.backward()
        assert torch.isfinite(quantizer.codebook_gradient).all()
        torch.testing.assert_close(soft.quantized, quantizer.eval()(features()).quantized)

    def test_temperatures_out_of_order_are_refused(self):
        with pytest.raises(ValueError, match="temperature_end ≤ temperature_start"):
            built("soft_vq", temperature_start=0.1, temperature_end=0.5)


class TestIndexBackpropQuantizer:
    @pytest.mark.parametrize("double", [True, False])
    def test_loss_and_gradient_equal_the_published_form(self, double):
        quantizer = built("ibq", double_quantization=double, entropy_weight=0.0).double()
        z = features().double().requires_grad_()
        codebook = quantizer.codebook.detach().clone().requires_grad_()
        out = quantizer(z)
        tokens = z.permute(0, 2, 3, 1).reshape(-1, DIM)
        z_q, index, loss = ibq_loss(tokens, codebook, double=double)
        assert torch.equal(out.indices.flatten(), index)
        torch.testing.assert_close(out.loss, loss)
        (out.loss + out.quantized.sin().sum()).backward()
        ours, z.grad = z.grad, None
        (loss + z_q.sin().sum()).backward()
        torch.testing.assert_close(ours, z.grad)
        torch.testing.assert_close(quantizer.codebook_gradient, codebook.grad)

    def test_double_quantization_holds_back_features_that_commitment_draws_out(self):
        torch.manual_seed(0)
        quantizer = build_quantizer("ibq", codebook_size=1024, code_dim=64, entropy_weight=0.0)

        def along_the_code(name, norm):
            """A term's mean gradient along features that point at codes; above 0, training shortens them."""
            towards = F.normalize(quantizer.codebook.detach()[:64])
            z = (norm * towards).T.reshape(1, 64, 64, 1).contiguous().requires_grad_()
            quantizer(z).terms[name].backward()
            return (z.grad.reshape(64, 64).T * towards).sum(1).mean()

        assert along_the_code("commitment", 1.0) < 0 < along_the_code("double_quantization", 1.0)
        # Once the softmax has decided, the two terms are the same pull.
        decided = [along_the_code(name, 4.0) for name in ("commitment", "double_quantization")]
        torch.testing.assert_close(*decided, rtol=1e-2, atol=0.0)

    def test_penalty_is_left_out_where_its_weight_is_zero_and_in_evaluation(self):
        assert "sample_entropy" in built("ibq")(features()).terms
        assert "sample_entropy" not in built("ibq", entropy_weight=0.0)(features()).terms
        assert "sample_entropy" not in built("ibq").eval()(features()).terms

    def test_entropy_epsilon_changes_the_average_entropy_only(self):
        z = features()
        published, exact = built("ibq"), built("ibq", entropy_epsilon=0.0)
        a, b = published(z).terms, exact(z).terms
        assert torch.equal(a["sample_entropy"], b["sample_entropy"])
        assert a["average_entropy"] < b["average_entropy"]

    @pytest.mark.parametrize(
        "case", ["ibq_quant_a", "ibq_quant_b_temp001", "ibq_quant_c_no_entropy", "ibq_quant_d_weights"]
    )
    @pytest.mark.parametrize(
        ("tag", "dtype", "tolerance"), [("f64", torch.float64, 1e-6), ("f32", torch.float32, 1e-4)]
    )
    def test_golden_values(self, case, tag, dtype, tolerance):
        facts, stored = golden(case)
        config = facts["config"]
        quant_weight, entropy_weight = (2.0, 0.1) if case.endswith("d_weights") else (1.0, 0.05)
        quantizer = build_quantizer(
            "ibq",
            codebook_size=config["n_e"],
            code_dim=config["e_dim"],
            beta=config["beta"],
            quantization_weight=quant_weight,
            entropy_weight=entropy_weight if config["use_entropy_loss"] else 0.0,
            entropy_temperature=config["entropy_temperature"],
            sample_entropy_weight=config["sample_minimization_weight"],
            average_entropy_weight=config["batch_maximization_weight"],
        ).to(dtype)
        quantizer.codes.weight.data.copy_(stored["codebook"])
        z = stored["z"].to(dtype).requires_grad_()
        out = quantizer(z)
        assert torch.equal(out.indices.flatten(), stored["indices"])
        assert_near(out.quantized, stored[f"{tag}/z_q"], tolerance)
        quant = out.terms["double_quantization"] + out.terms["commitment"] + config["beta"] * out.terms["codebook"]
        assert_near(quant, stored[f"{tag}/quant_loss"], tolerance)
        task = (stored["w"].to(dtype) * out.quantized).sum()
        losses = {"task": task, "quant": quant, "total": task + out.loss}
        if config["use_entropy_loss"]:
            assert_near(out.terms["sample_entropy"], stored[f"{tag}/sample_entropy"], tolerance)
            assert_near(out.terms["average_entropy"], stored[f"{tag}/avg_entropy"], tolerance)
            losses["entropy"] = (
                config["sample_minimization_weight"] * out.terms["sample_entropy"]
                - config["batch_maximization_weight"] * out.terms["average_entropy"]
            )
            assert_near(losses["entropy"], stored[f"{tag}/entropy_loss"], tolerance)
        for name, loss in losses.items():
            grad_z, grad_codebook = torch.autograd.grad(loss, (z, quantizer.codes.weight), retain_graph=True)
            assert_near(grad_z, stored[f"{tag}/grad_z/{name}"], tolerance)
            assert_near(grad_codebook, stored[f"{tag}/grad_codebook/{name}"], tolerance)


def test_a_new_quantizer_takes_ten_lines():
    @register_quantizer("always_first")
    class AlwaysFirst(Quantizer):
        def __init__(self, config):
            super().__init__(config, torch.nn.Module())
            self.codes.forward = lambda: torch.eye(config.codebook_size, config.code_dim)

        def assign(self, features, codebook):
            indices = torch.zeros(len(features), dtype=torch.int64)
            return Assignment(features + (F.embedding(indices, codebook) - features).detach(), indices, {})

    quantizer = build_quantizer("always_first", codebook_size=CODES, code_dim=DIM)
    out = quantizer(features())
    assert out.indices.unique().tolist() == [0]
    assert out.loss.item() == 0
    assert quantizer.config.config_name == "always_first"
    with pytest.raises(ValueError, match="exists already"):
        register_quantizer("vq")(AlwaysFirst)


@pytest.mark.parametrize("start", ["unit", "kmeans"])
def test_an_assignment_alone_is_a_quantizer_with_free_codes_and_every_start(start):
    @register_quantizer("nearest")
    class Nearest(Quantizer):
        def assign(self, features, codebook):
            indices = nearest_code(features, codebook)
            return Assignment(F.embedding(indices, codebook), indices, {})

    torch.manual_seed(0)
    quantizer = build_quantizer("nearest", codebook_size=CODES, code_dim=DIM, codebook_init=start)
    before = quantizer.codebook.detach().clone()
    quantizer(features()).quantized.square().sum().backward()
    assert torch.equal(quantizer.codebook, before) == (start == "unit")
    assert (quantizer.codebook_gradient.norm(dim=1) > 0).any()


class Good(Quantizer):
    """Nearest codes with a straight-through gradient: what the broken ones below change in one point."""

    def loss_weights(self):
        return {"pair": 1.0}

    def parts(self, features, codebook):
        indices = nearest_code(features, codebook)
        codes = F.embedding(indices, codebook)
        return codes, indices, {"pair": F.mse_loss(features, codes)}

    def assign(self, features, codebook):
        codes, indices, terms = self.parts(features, codebook)
        return Assignment(straight_through(features, codes) if self.training else codes, indices, terms)


class WrongShape(Good):
    def assign(self, features, codebook):
        codes, indices, terms = self.parts(features, codebook)
        return Assignment(codes[:, :-1], indices, terms)


class WrongIndices(Good):
    def assign(self, features, codebook):
        codes, indices, terms = self.parts(features, codebook)
        return Assignment(codes, indices.float(), terms)


class OutOfRange(Good):
    def assign(self, features, codebook):
        codes, indices, terms = self.parts(features, codebook)
        return Assignment(codes, indices + 1000, terms)


class Nothing(Good):
    def assign(self, features, codebook):
        return None


class Raising(Good):
    def assign(self, features, codebook):
        return self.no_such_attribute


class Detached(Good):
    def assign(self, features, codebook):
        codes, indices, terms = self.parts(features, codebook)
        return Assignment(codes.detach(), indices, terms)


class NeverExact(Good):
    def assign(self, features, codebook):
        codes, indices, terms = self.parts(features, codebook)
        return Assignment(features + 0.5 * (codes - features).detach(), indices, terms)


class NoWeight(Good):
    def loss_weights(self):
        return {}


class ZeroLength(Good):
    def assign(self, features, codebook):
        return super().assign(features / features.norm(dim=1, keepdim=True), codebook)


class Forgetful(Good):
    """Its scale lives in a plain attribute."""

    scale = 1.0

    def assign(self, features, codebook):
        self.scale = self.scale * 1.5 if self.training else self.scale
        shift = torch.zeros_like(features)
        shift[:, 0] = self.scale
        codes, indices, terms = self.parts(features + shift, codebook)
        return Assignment(straight_through(features, codes) if self.training else codes, indices, terms)


class ByNumber(Good):
    def parts(self, features, codebook):
        indices = torch.arange(len(features), device=features.device) % len(codebook)
        codes = F.embedding(indices, codebook)
        return codes, indices, {"pair": F.mse_loss(features, codes)}


class Idle(Good):
    def __init__(self, config):
        super().__init__(config)
        self.unused = torch.nn.Linear(2, 2)


class FixedCodes(Good):
    def assign(self, features, codebook):
        return super().assign(features, codebook.detach())


class CountsAlone(Good):
    """Each process counts its own tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("hits", torch.zeros(config.codebook_size))

    def assign(self, features, codebook):
        out = super().assign(features, codebook)
        if self.training and torch.is_grad_enabled():
            self.hits += torch.bincount(out.indices, minlength=len(codebook))
        return out


class Excused(CountsAlone):
    exempt: ClassVar = {"two processes learn the same": "hits are for looking at"}


class PromisesAll(Good):
    reaches = "all"


class Restless(Good):
    def parts(self, features, codebook):
        return super().parts(features + torch.randn_like(features), codebook)


BROKEN = {
    WrongShape: ("shapes, types and range", r"quantized of shape \(N, D\) = \(24, 6\); got \(24, 5\)"),
    WrongIndices: ("shapes, types and range", r"indices as int64; got .*float32\. Use indices\.long\(\)"),
    OutOfRange: ("shapes, types and range", r"indices must lie in 0 … 23, got 10\d\d"),
    Nothing: ("shapes, types and range", r"must return Assignment\(.*; got NoneType"),
    Raising: ("shapes, types and range", r"raised in assign \(test_quantizers.py, line \d+\): AttributeError"),
    Detached: ("the gradient reaches the encoder", "straight_through"),
    NeverExact: ("decoding the indices gives the same vectors", "24 of 24 tokens"),
    NoWeight: ("shapes, types and range", "'pair' has none"),
    ZeroLength: ("zero features are quantized", "NaN"),
    Forgetful: ("the state dict holds everything", "register_buffer"),
    ByNumber: ("permuting the codes permutes the indices", "other codes are chosen"),
    Idle: ("every parameter takes part in a step", r"unused\.weight"),
    FixedCodes: ("codes learn as promised", "has a gradient to the codebook"),
    CountsAlone: ("two processes learn the same", "another hits; sum what is counted"),
    PromisesAll: ("codes learn as promised", "and all are promised"),
    Restless: ("evaluation changes nothing and repeats itself", "two evaluations"),
}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_the_contract_finds_what_is_broken_and_says_why(cls):
    register_quantizer("mine")(cls)
    rule, says = BROKEN[cls]
    findings = {finding.rule.name: finding for finding in check_quantizer("mine")}
    assert re.search(says, findings[rule].broken), findings[rule]
    assert str(findings[rule]).startswith("✗") and findings[rule].rule.why in str(findings[rule])
    assert (len(findings) == len(RULES)) == (rule not in [basic.name for basic in RULES[:BASIC]])


def test_the_contract_finds_nothing_where_nothing_is_broken():
    register_quantizer("mine")(Good)
    before = torch.get_rng_state()
    assert not [finding for finding in check_quantizer("mine") if finding.broken]
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="quantizer name must be one of"):
        check_quantizer("no_such_thing")


def test_a_method_may_be_exempt_from_a_rule_and_says_why():
    register_quantizer("mine")(Excused)
    findings = check_quantizer("mine")
    assert not [finding for finding in findings if finding.broken]
    assert "– two processes learn the same: hits are for looking at" in map(str, findings)
    Excused.exempt["two proceses"] = "misspelt"
    try:
        with pytest.raises(ValueError, match="did you mean 'two processes learn the same'"):
            check_quantizer("mine")
    finally:
        del Excused.exempt["two proceses"]


def test_a_broken_quantizer_is_named_where_it_is_used():
    register_quantizer("mine")(WrongShape)
    with pytest.raises(QuantizerError, match="the quantizer 'mine': assign must return quantized of shape"):
        build_quantizer("mine")(features(shape=(1, 64, 2, 2)))
    register_quantizer("raising")(Raising)
    with pytest.raises(QuantizerError, match=r"'raising' raised in assign .*ibqlab check raising") as caught:
        build_quantizer("raising")(features(shape=(1, 64, 2, 2)))
    assert isinstance(caught.value.__cause__, AttributeError)
    register_quantizer("detached")(Detached)
    with pytest.warns(UserWarning, match="'detached' detaches its gradient"):
        build_quantizer("detached")(features(shape=(1, 64, 2, 2)).requires_grad_())


OPEN = make_dataclass("Open", [("z", int)], bases=(QuantizerConfig,), frozen=True, kw_only=True)


@pytest.mark.parametrize(
    ("name", "config", "defaults", "says"),
    [
        ("", QuantizerConfig, {}, "a quantizer's name is text"),
        (3, QuantizerConfig, {}, "a quantizer's name is text"),
        ("mine", dict, {}, "must be derived from QuantizerConfig"),
        ("mine", QuantizerConfig, {"code_dims": 8}, "did you mean 'code_dim'"),
        ("all", QuantizerConfig, {}, "'all' means something else in settings. Write 'all_vq'"),
        ("2 VQ", QuantizerConfig, {}, "letters a–z.*got '2 VQ'. Write 'VQ'"),
        *((name, QuantizerConfig, {}, "Write 'a_b'") for name in ("a b", "a.b", "a/b", "a,b", "a=b")),
        ("x" * 60, QuantizerConfig, {}, "40 at most"),
        (
            "mine",
            QuantizerConfig,
            {"codebook_size": -4},
            "no possible settings: .* at least 2, got -4",
        ),
        ("mine", type("Lost", (QuantizerConfig,), {"__annotations__": {"z": int}}), {}, "its setting 'z'; write @data"),
        (
            "mine",
            make_dataclass("Open", [("z", int)], bases=(QuantizerConfig,), frozen=True, kw_only=True),
            {},
            "z has",
        ),
    ],
)
def test_what_recipes_could_not_name_is_not_registered(name, config, defaults, says):
    before = available_quantizers()
    with pytest.raises(ValueError, match=says):
        register_quantizer(name, config, **defaults)(type("Mine", (Quantizer,), {}))
    assert available_quantizers() == before


@pytest.mark.parametrize(("what", "says"), [(int, r"class int\(Quantizer\)"), (len, "@quantizer_from"), (3, "got 3")])
def test_what_is_no_quantizer_is_not_registered(what, says):
    with pytest.raises(ValueError, match=f"takes a class derived from Quantizer.*{says}"):
        register_quantizer("mine")(what)
    with pytest.raises(ValueError, match=r"write @register_quantizer\('my_vq'\) above class Good"):
        register_quantizer(Good)


def test_each_config_has_its_own_copy_of_a_default_that_can_change():
    config = make_dataclass("Lists", [("z", list, None)], bases=(QuantizerConfig,), frozen=True, kw_only=True)
    register_quantizer("mine", config, z=[1])(Good)
    first, second = (quantizer_config({"name": "mine"}) for _ in range(2))
    first.z.append(2)
    assert second.z == [1]


@pytest.mark.parametrize(
    ("method", "says"), [("assign", "got Tensor"), ("choose", "must lie in 0 … 1023, got -1 … -1")]
)
def test_what_is_stored_is_looked_at_too(method, says):
    cls = type("Negative", (Good,), {method: lambda self, features, codebook: torch.zeros(len(features)).long() - 1})
    register_quantizer("mine")(cls)
    with pytest.raises(QuantizerError, match=says):
        build_quantizer("mine").encode(features(shape=(1, 64, 2, 2)))


def test_a_gpu_is_waited_for_in_the_first_passes_and_each_64th(monkeypatch):
    monkeypatch.setattr(assignments, "_has_numbers", lambda features: True)
    register_quantizer("mine")(Good)
    quantizer, tokens = build_quantizer("mine"), SimpleNamespace(device=torch.device("cuda"))
    looks = []
    for quantizer._passes in range(200):
        looks.append(assignments.looks_at_numbers(quantizer, tokens))
    assert not assignments.looks_at_numbers(build_quantizer("vq"), tokens)
    assert [step for step, looked in enumerate(looks) if looked] == [*range(8), 64, 128, 192]


def test_a_setting_called_name_is_refused():
    config = make_dataclass("Named", [("name", str, "x")], bases=(QuantizerConfig,), frozen=True, kw_only=True)
    with pytest.raises(ValueError, match="`name` is the quantizer's own"):
        register_quantizer("mine", config)(type("Mine", (Quantizer,), {}))


@pytest.mark.parametrize("name", [None, ["ibq"], {"ibq": 1}])
def test_a_name_that_is_no_text_is_refused_like_any_other(name):
    with pytest.raises(ValueError, match="quantizer name must be one of '"):
        quantizer_config({"name": name})
