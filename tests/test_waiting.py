"""What a user sees while waiting: something at once, then where things stand, and at the end what came of it."""

import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "lightning_fabric", "torchvision", "torchmetrics", "pandas", "sklearn", "scipy", "sympy")
HEAVY += ("matplotlib", "ipywidgets", "IPython", "triton", "torch.distributed.tensor", "torch.distributed.fsdp")


def python(code, *arguments, **settings):
    """Run code in a new interpreter; what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True, **settings
    ).stdout


class TestImports:
    @pytest.mark.parametrize("module", ["ibqlab.training", "ibqlab.pretrained", "ibqlab.diagnostics"])
    def test_import_leaves_alone_what_only_a_run_needs(self, module):
        code = f"import sys, torch, {module}; print([name for name in {HEAVY} if name in sys.modules])"
        assert python(code) == "[]\n"

    def test_a_hand_made_gradient_stays_out_of_compiled_graphs(self):
        """Also in the process in which nothing had imported the compiler when the function was made and called."""
        code = """if True:
            import sys, torch
            from ibqlab.quantizers import index_backprop
            features, codes = torch.randn(5, 3), torch.randn(7, 3)
            alone = index_backprop(features, codes).quantized
            assert "torch._dynamo" not in sys.modules
            graphs = []
            def backend(graph, inputs):
                graphs.append([node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"])
                return graph
            @torch.compile(backend=backend)
            def whole(features):
                return 2 * index_backprop(1 * features, codes).quantized
            for rows in (5, 4, 3):
                assert torch.equal(whole(features[:rows]), 2 * alone[:rows])
            print({name for graph in graphs for name in graph}, len(graphs))
        """
        assert python(code) == "{'mul'} 4\n"
