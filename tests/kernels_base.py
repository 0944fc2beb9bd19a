"""How the trial kernel is launched."""

from compile_kernels import Variant

VARIANTS = [Variant("ibqlab.base.trial_kernel:count_up", {"numbers": "*i32:16"}, {"SIZE": 16}, {"num_warps": 4})]
