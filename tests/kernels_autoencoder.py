"""How group normalisation's and LPIPS' kernels are launched: published widths in bfloat16 and float32, a narrow one."""

from compile_kernels import Variant

MODULE = "ibqlab.tokenizer.group_norm_kernels"
COMPARING = "ibqlab.losses.lpips_kernels"
FLOATS = "*fp32:16"
STATISTICS = {"mean": FLOATS, "deviation": FLOATS}
SIZES = {"channels": "i32:16", "pixels": "i32", "chunk": "i32"}
TILES = [{"BLOCK_PIXELS": 4096 // wide, "BLOCK_CHANNELS": wide} for wide in (128, 32)]
GROUPS = [
    {"WIDTH": width, "BLOCK_WIDTH": wide, "BLOCK_CHUNKS": 512 // wide} for width, wide in ((4, 4), (3, 4), (16, 16))
]


def walks(dtype, weights, tile):
    """The kernels that walk over pixels, for activations of one type."""
    options, x = {"num_warps": 8}, f"*{dtype}:16"
    parameters = {**STATISTICS, "weight": weights, "bias": weights, "weight_stride": "i32:16", "width": "i32", **SIZES}
    yield Variant(
        f"{MODULE}:channel_moments",
        {"x": x, "means": FLOATS, "spreads": FLOATS, "chunks": "i32", **SIZES},
        tile,
        options,
    )
    for swish in (True, False):
        constants = {"SWISH": swish, **tile}
        yield Variant(f"{MODULE}:apply_norm", {"x": x, "result": x, **parameters}, constants, options)
        sums = {"sums": FLOATS, "products": FLOATS, "chunks": "i32"}
        yield Variant(f"{MODULE}:channel_sums", {"x": x, "gradient": x, **sums, **parameters}, constants, options)
        sums = {"group_sum": FLOATS, "group_product": FLOATS}
        for skip in (True, False):
            types = {"x": x, "gradient": x, "skip": x, "result": x, **sums, **parameters}
            yield Variant(f"{MODULE}:input_gradient", types, {"HAS_SKIP": skip, **constants}, options)


def groups():
    """The kernels that put a group's channels together."""
    options = {"num_warps": 4}
    for constants in GROUPS:
        moments = {"channel_means": FLOATS, "channel_spreads": FLOATS, "chunks": "i32", "epsilon": "fp32"}
        yield Variant(f"{MODULE}:group_moments", {**moments, **STATISTICS, **SIZES}, constants, options)
        names = ("sums", "products", "image_sums", "image_products", "group_sum", "group_product", "weight")
        sizes = {"channels": "i32:16", "weight_stride": "i32:16", "chunks": "i32"}
        yield Variant(f"{MODULE}:group_sums", {**dict.fromkeys(names, FLOATS), **sizes}, constants, options)


def comparisons():
    """LPIPS' kernels, for the narrowest and widest layers of its networks."""
    sizes = {"weight": FLOATS, "channels": "i32:16", "pixels": "i32"}
    for dtype, wide in (("bf16", 64), ("bf16", 512), ("fp32", 512)):
        maps = dict.fromkeys(("x", "y"), f"*{dtype}:16")
        constants, options = {"BLOCK_PIXELS": 4096 // wide, "BLOCK_CHANNELS": wide}, {"num_warps": 8}
        yield Variant(f"{COMPARING}:compare", {**maps, **sizes, "distances": FLOATS}, constants, options)
        types = {**maps, **sizes, "slope": FLOATS, "result": maps["y"]}
        yield Variant(f"{COMPARING}:compare_gradient", types, constants, options)


VARIANTS = [
    *walks("bf16", "*fp32:16", TILES[0]),
    *walks("bf16", "*bf16:16", TILES[0]),
    *walks("fp32", "*fp32:16", TILES[0]),
    *walks("bf16", "*fp32:16", TILES[1]),
    *groups(),
    *comparisons(),
]
