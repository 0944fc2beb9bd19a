"""How the kernels of a recorded sampling step are launched: for the published sizes, in both types."""

from compile_kernels import Variant

MODULE = "ibqlab.generator.sampler_kernels"
WARPS = {"num_warps": 4}
NONE = dict.fromkeys(("gate", "update", "scale", "shift"))


def norm_variants():
    """IBQ's blocks and last norm, the first norm of a step, and Open-MAGVIT2's blocks; B (1,024) and XXL (1,920)."""
    for kind in ("*bf16:16", "*fp32:16"):
        for width, block in ((1024, 1024), (1920, 2048)):
            constants = {"WIDTH": width, "BLOCK": block, "EPSILON": 1e-5}
            always = {"x": "*fp32:16", "weight": kind, "out": kind}
            for absent in ((), ("gate", "update"), ("gate", "scale", "shift"), tuple(NONE)):
                types = always | {name: kind for name in NONE if name not in absent}
                nothing = {name: None for name in absent}
                yield Variant(f"{MODULE}:_add_and_normalise", types, constants | nothing, WARPS)


def attention_variants():
    """64 channels of a head as published, 128, and a number that is no power of 2."""
    for kind, size in (("*bf16:16", 2), ("*fp32:16", 4)):
        for channels, block in ((64, 64), (128, 128), (12, 16)):
            types = dict.fromkeys(("qkv", "keys", "values", "out"), kind)
            types |= {"table": "*fp32:16", "position": "*i64:16", "active": "*i64:16", "root": "fp32"}
            types |= dict.fromkeys(("heads", "positions", "lanes"), "i32")
            constants = {"CHANNELS": channels, "BLOCK": block, "PLACES": 8192 // block // size}
            yield Variant(f"{MODULE}:_attend", types, constants, WARPS)
            # The second part of a token: its position is a number beside another one, at 8 bytes.
            yield Variant(f"{MODULE}:_attend", types | {"position": "*i64"}, constants, WARPS)


def feed_forward_variants():
    """The hidden width of B."""
    for kind in ("*bf16:16", "*fp32:16"):
        yield Variant(f"{MODULE}:_gate_hidden", {"both": kind, "out": kind}, {"HIDDEN": 2816, "BLOCK": 1024}, WARPS)


def draw_variants():
    """IBQ's vocabulary, the largest one, and the first part of Open-MAGVIT2's tokens."""
    types = dict.fromkeys(("scores", "scales", "temperatures"), "*fp32:16") | {"numbers": "*fp64:16"}
    types |= dict.fromkeys(("position", "prompt_length", "chosen"), "*i64:16")
    types |= {"broken": "*u8:16", "positions": "i32"}
    for vocabulary, block, blocks, parts in ((16384, 1024, 16, 1), (262144, 1024, 256, 1), (64, 64, 1, 2)):
        for guided, greedy in ((True, False), (False, False), (True, True)):
            constants = {"VOCABULARY": vocabulary, "GUIDED": guided, "GREEDY": greedy}
            constants |= {"PARTS": parts, "PART": parts - 1, "BLOCK": block, "BLOCKS": blocks}
            yield Variant(f"{MODULE}:_choose", types, constants, WARPS | {"maxnreg": 128})


def writing_variants():
    """Tokens of one part and of two."""
    types = dict.fromkeys(("first", "tokens", "position", "prompt_length", "token"), "*i64:16")
    types |= dict.fromkeys(("worth", "positions", "lanes"), "i32")
    yield Variant(f"{MODULE}:_write_tokens", types, {"second": None, "LANES": 64}, {"num_warps": 1})
    yield Variant(f"{MODULE}:_write_tokens", types | {"second": "*i64:16"}, {"LANES": 64}, {"num_warps": 1})


VARIANTS = [
    *(*norm_variants(), *attention_variants(), *feed_forward_variants()),
    *(*draw_variants(), *writing_variants()),
]
