"""Compiles Triton kernels for GPUs that are not there and prints what each needs of one, as JSON.

    python tests/compile_kernels.py kernels_base kernels_products

Each module named has `VARIANTS`: a list of `Variant`. A process of its own, because the tests' processes have Triton's
interpreter in place of its compiler. Triton brings the assembler, so what comes out is what a GPU would be given.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

GPUS = (80, 90, 100)
"""Compute capabilities: A100, H100 and H200, B200."""


class Variant(NamedTuple):
    """A kernel as some caller launches it."""

    kernel: str
    """Module and name, as "ibqlab.base.trial_kernel:count_up"."""
    types: dict[str, str]
    """Triton's types of the arguments that are no constants, such as "*fp32", "*bf16", "i32"; one ending in ":16" is a
    number or pointer that can be divided by 16, as most are."""
    constants: dict[str, Any]
    """Of the arguments that are."""
    options: Mapping[str, Any] = MappingProxyType({})
    """num_warps, num_stages."""


def compile_variant(variant: Variant, capability: int) -> dict[str, Any]:
    """Shared memory, registers and spilled bytes of a kernel on a GPU; raises what the compiler raises."""
    import triton  # noqa: PLC0415 - after the environment is settled
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    module, _, name = variant.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {key: text.removesuffix(":16") for key, text in variant.types.items()}
    signature |= dict.fromkeys(variant.constants, "constexpr")
    signature = {key: signature[key] for key in kernel.arg_names}
    divisible = [number for number, key in enumerate(kernel.arg_names) if variant.types.get(key, "").endswith(":16")]
    attributes = {(number,): [["tt.divisibility", 16]] for number in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    return {"shared_bytes": compiled.metadata.shared} | assembler_report(compiled.asm["ptx"], capability)


def assembler_report(ptx: str, capability: int) -> dict[str, int]:
    """Registers per thread and spilled bytes, as the assembler that Triton brings reports them."""
    from triton import knobs  # noqa: PLC0415

    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx)
        # Two assemblers come along, and which one knows this text's version depends on the GPU and on Triton's version.
        for assembler in (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell):
            command = [assembler.path, "-v", f"--gpu-name={architecture}", "kernel.ptx", "-o", "kernel.cubin"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"no assembler takes it: {done.stderr}")
    patterns = {"registers": r"Used (\d+) registers", "spilled_bytes": r"(\d+) bytes spill stores"}
    return {name: int(re.search(pattern, done.stderr)[1]) for name, pattern in patterns.items()}


def main() -> None:
    """Compile what the modules named list."""
    rows = []
    for module in sys.argv[1:]:
        for variant in importlib.import_module(module).VARIANTS:
            for capability in GPUS:
                row = {"kernel": variant.kernel, "constants": repr(variant.constants), "capability": capability}
                try:
                    row |= compile_variant(variant, capability)
                except Exception as error:
                    row |= {"error": f"{type(error).__name__}: {error}"}
                rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    # Run as a script this file is `__main__`; modules of variants import it by its name.
    sys.modules["compile_kernels"] = sys.modules["__main__"]
    main()
