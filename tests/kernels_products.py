"""How the kernels over rows of scores are launched."""

from compile_kernels import Variant

MODULE = "ibqlab.quantizers.row_kernels:"
SCORES = {"scores": "*fp32:16"}
STATISTICS = {"top": "*fp32:16", "log_sum": "*fp32:16", "tempered_log_sum": "*fp32:16"}
ENTROPIES = {"by_code": "*fp32:16", "slope": "*fp32:16"}


def parts(order: int, segments: int, column_stride: int | None) -> Variant:
    """A column stride of 1, which Triton makes a constant, or any."""
    sixteen = ":16" if column_stride else ""
    sizes = dict.fromkeys(["rows", "columns", "row_stride", "out_row_stride", "segment_stride"], "i32" + sixteen)
    types = {"values": "*fp32:16", "out": "*bf16:16"} | sizes | ({} if column_stride else {"column_stride": "i32"})
    constants = {"ORDER": order, "SEGMENTS": segments, "ROWS": 8, "COLUMNS": 128}
    constants |= {"column_stride": column_stride} if column_stride else {}
    return Variant(MODULE + "parts_of_matrix", types, constants, {"num_warps": 4})


def statistics(offset: bool, sums: bool, tempered: bool) -> list[Variant]:
    wanted = {"SUMS": sums, "TEMPERED": tempered, "LANES": 8}
    partial = {"maxima": "*fp32:16", "best": "*i32:16", "sums": "*fp32:16"}
    types = (
        SCORES | {"offset": "*fp32:16"} | partial | {"codes": "i32:16", "spans": "i32", "inverse_temperature": "fp32"}
    )
    joined = partial | {"indices": "*i64:16", "statistics": "*fp32:16", "spans": "i32", "inverse_temperature": "fp32"}
    return [
        Variant(MODULE + "span_statistics", types, wanted | {"OFFSET": offset, "WIDTH": 512}, {"num_warps": 8}),
        Variant(MODULE + "join_spans", joined, wanted | {"GROUP": 64}, {"num_warps": 1}),
    ]


def gradients(gains: bool, entropies: bool) -> list[Variant]:
    common = SCORES | {"gains": "*fp32:16"} | STATISTICS | ENTROPIES
    wanted = {"GAINS": gains, "ENTROPIES": entropies}
    products = common | {"partial": "*fp32:16", "codes": "i32:16", "spans": "i32", "inverse_temperature": "fp32"}
    sizes = {"codes": "i32:16", "first": "i32:16", "count": "i32:16", "inverse_temperature": "fp32"}
    found = [Variant(MODULE + "row_products", products, wanted | {"SPAN": 4096}, {"num_warps": 8})]
    for dtype, number in (("fp32", 1), ("bf16", 1), ("bf16", 3)):
        types = common | {"dots": "*fp32:16", "out": f"*{dtype}:16"} | sizes
        constants = wanted | {"PARTS": number, "SPAN": 1024}
        found.append(Variant(MODULE + "score_gradient", types, constants, {"num_warps": 4}))
    return found


SHARE_SUMS = SCORES | {"maxima": "*fp32:16", "top": "*fp32:16", "log_sum": "*fp32", "sums": "*fp32:16"}
SHARE_SUMS |= dict.fromkeys(["rows", "codes", "tiles", "group_rows"], "i32")
SHARE_SUMS |= {"inverse_temperature": "fp32", "reach": "fp32"}
ORDERS = ((1012, 6), (10210, 6), (112, 6), (12, 3), (210, 3))
"""Those of `ProductForm`: left, right, against_change, change, and the first half of right."""
WANTED = ((True, False, False), (False, False, False), (False, True, False), (False, True, True))
VARIANTS = [
    *(parts(order, segments, stride) for order, segments in ORDERS for stride in (1, None)),
    *(variant for wanted in WANTED for variant in statistics(*wanted)),
    Variant(MODULE + "share_sums", SHARE_SUMS, {"ROWS": 32, "COLUMNS": 128, "WIDTH": 512}, {"num_warps": 8}),
    *(variant for wanted in ((True, True), (True, False), (False, True)) for variant in gradients(*wanted)),
]
