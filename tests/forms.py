"""What only a GPU chooses by itself, on tensors of the CPU: Triton's kernels in its interpreter, and bfloat16 parts."""

import sys

import pytest
import torch

from ibqlab.quantizers import blocks, index_backprop_rows, products
from ibqlab.quantizers.products import ProductForm

PARTS = ProductForm(torch.bfloat16, 3)
"""A GPU's form of float32. Products of parts are exact in float32, so that a CPU can sum them, too."""
USERS = ("index_backprop", "estimators", "soft_vq", "products")


def emulate(monkeypatch, *, kernels=False, parts=False, form=PARTS):
    """Let every product of float32 take a GPU's form, and every row a GPU's kernels, for a test's duration."""
    if kernels:
        row_kernels = pytest.importorskip("ibqlab.quantizers.row_kernels", reason="needs Triton")

        def row_kernels_for(scores):
            return row_kernels if scores.dtype == torch.float32 else None

        for module in (blocks, index_backprop_rows, products):
            monkeypatch.setattr(module, "row_kernels_for", row_kernels_for)
    if parts:
        chosen = products.product_form

        def product_form(dtype, device, matmul="float32"):
            return form if dtype == torch.float32 else chosen(dtype, device, matmul)

        for name in USERS:
            # A function of the package may hide its module.
            monkeypatch.setattr(sys.modules[f"ibqlab.quantizers.{name}"], "product_form", product_form)
        if "ibqlab.generator.cross_entropy" in sys.modules:
            monkeypatch.setattr(sys.modules["ibqlab.generator.cross_entropy"], "product_form", product_form)
