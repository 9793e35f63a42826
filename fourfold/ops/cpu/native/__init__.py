"""The kernels compiled from the C++ sources of this directory, if they have been: see ``build.py``."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache

import torch

_int, _long, _float, _at = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ff_fingerprint": (ctypes.c_char_p, ()),
    "ff_level": (_int, (_int,)),
    "ff_attention": (None, (*[_at] * 4, _long, _long, *[_at] * 3, *[_long] * 7, _float, _int)),
    "ff_has_matrix": (_int, ()),
    "ff_half_attention": (None, (*[_at] * 4, _long, _long, _at, _at, *[_long] * 7, _float, _int)),
    "ff_attention_backward": (None, (*[_at] * 4, _long, _long, *[_at] * 7, *[_long] * 7, _float, _int)),
    "ff_matmul": (None, (_int, _long, _at, _at, _long, _long, _at, _long, _at, _int)),
    "ff_experts": (None, (_int, _long, _at, _long, _at, _long, _long, _at, _at, _long, _float, _at, _int, _int)),
    "ff_plain_experts": (None, (_int, *[_at] * 3, *[_long] * 3, _at, _at, _long, _float, _at, _int)),
    "ff_half_experts": (None, (*[_at] * 3, *[_long] * 4, _at, _at, _long, _float, _at, _int)),
    "ff_half_linear": (None, (_at, _at, _int, _at, *[_long] * 3, _int)),
    "ff_linear": (None, (_at, _int, _long, _long, _at, _long, _at, _int)),
    "ff_decode_layers": (None, (_at, _long, *[_at] * 5)),
    "ff_rms_norm": (None, (_at, _at, _at, _at, _long, _long, _float)),
    "ff_half_rms_norm": (None, (*[_at] * 3, _long, _long, _float, _int)),
    "ff_latent_attention": (
        None,
        (_at, _int, _at, *[_long] * 3, _at, _at, _long, _at, _at, _at, _int, *[_long] * 6, _float, _at, _int),
    ),
    "ff_select_positions": (
        None,
        (_at, _at, _int, _at, *[_long] * 6, _at, _long, _float, *[_at] * 4, *[_long] * 5, _at, _int, _int),
    ),
    "ff_encode_rows": (_int, (_at, _long, _at, _long, _int, _at, _int)),
    "ff_decode_rows": (None, (_at, _long, _at, _long, _int, _at, _int)),
    "ff_rope": (None, (_int, *[_at] * 4, *[_long] * 6, _int, _int)),
    "ff_hyper_maps": (None, (*[_at] * 5, _long, _int, _long, _int, _float, _float, *[_at] * 3, _int)),
    "ff_half_hyper_maps": (None, (*[_at] * 4, _long, _int, _long, _int, _float, _float, *[_at] * 3, _int)),
    "ff_collapse_streams": (None, (*[_at] * 4, _long, _int, _long, _float, _float, _at)),
    "ff_read_streams": (None, (_at, _at, _long, _int, _long, _at, _int)),
    "ff_mix_streams": (None, (*[_at] * 4, _long, _int, _long, _at, _int)),
    "ff_half_read_streams": (None, (_at, _at, _long, _int, _long, _at, _int)),
    "ff_half_mix_streams": (None, (*[_at] * 4, _long, _int, _long, _at, _int)),
    "ff_read_bandwidth": (ctypes.c_double, (_at, _long, _int)),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels for this processor, or None where they were not built, or from other sources than these."""
    from fourfold.ops.cpu.native import build  # here, so that it can also be run as a program

    level = torch.backends.cpu.get_cpu_capability()
    path = build.library(level if level in build.LEVELS else "DEFAULT")
    if not path.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        logging.getLogger(__name__).warning("native kernels are left aside: %s", error)
        return None
    if loaded.ff_fingerprint().decode() != build.fingerprint():
        logging.getLogger(__name__).warning(
            "native kernels are left aside: built from other sources; run python -m fourfold.ops.cpu.native.build"
        )
        return None
    return loaded


def matrix_unit() -> bool:
    """Whether kernels may use the matrix unit of the processor (AMX); ``FOURFOLD_MATRIX=off`` leaves it aside."""
    loaded = library()
    return loaded is not None and os.environ.get("FOURFOLD_MATRIX") != "off" and bool(loaded.ff_has_matrix())
