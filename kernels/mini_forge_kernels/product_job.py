"""What a product is to be made of, as frozen_product.cpp and amx_product.cpp take it."""

import ctypes


class Job(ctypes.Structure):
    """Fields as in product_job.h, where it is said what they mean."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out", "w", "scales", "code", "low", "factor", "before")),
        *((name, ctypes.c_long) for name in (
            "rows", "terms", "columns", "rank", "x_stride", "out_stride", "w_stride", "low_stride", "factor_stride",
            "before_stride", "blocksize",
        )),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("bits", "is_transposed", "adds", "threads")),
    ]  # fmt: skip
