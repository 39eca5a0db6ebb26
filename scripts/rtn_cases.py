"""Writes passes/testdata/rtn.json: weights, and what ONNX Runtime's MatMulNBits quantizer makes of them."""

import json
import pathlib

import numpy as np
from onnxruntime.capi._pybind_state import quantize_matmul_2bits, quantize_matmul_4bits, quantize_matmul_8bits

QUANTIZE = {2: quantize_matmul_2bits, 4: quantize_matmul_4bits, 8: quantize_matmul_8bits}
SHAPES = [(37, 19, 16), (64, 5, 32), (130, 3, 128), (256, 2, 256), (172, 3, 64)]


def case(rng, bits, symmetric, k, n, group):
    w = rng.standard_normal((k, n)).astype(np.float32)
    w[:, 0] = np.abs(w[:, 0])  # one sign only
    w[:, 1] *= 1e-3
    w[: group // 2, 0] = np.round(w[: group // 2, 0] * 8) / 8  # halves between codes
    w[:group, -1] = 0
    kb = -(-k // group)
    codes = np.zeros((n, kb, group * bits // 8), np.uint8)
    scales = np.zeros((n, kb), np.float32)
    zero_points = np.zeros((n, -(-kb * bits // 8)), np.uint8)
    QUANTIZE[bits](codes, w, scales, zero_points, group, n, k, symmetric)
    hexed = {"w": w, "codes": codes, "scales": scales, "zero_points": zero_points}
    meta = {"bits": bits, "symmetric": symmetric, "k": k, "n": n, "group": group}
    return meta | {name: a.astype(a.dtype.newbyteorder("<")).tobytes().hex() for name, a in hexed.items()}


rng = np.random.default_rng(7)
cases = [case(rng, b, s, *shape) for b in QUANTIZE for s in (False, True) for shape in SHAPES]
path = pathlib.Path(__file__).parent.parent / "passes/testdata/rtn.json"
path.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
