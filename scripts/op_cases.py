#!/usr/bin/env python3
"""Writes dialects/testdata/*.cases: single ops with random inputs, and what ONNX Runtime or numpy says of them.

Usage: scripts/op_cases.py [FAMILY..]     needs onnx, onnxruntime and numpy
The format is described in dialects/src/testing.rs.
"""
import pathlib
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import onnx.reference
from onnx import TensorProto as T, helper as h

OUT = pathlib.Path(__file__).resolve().parent.parent / "dialects" / "testdata"
NAMES = {T.FLOAT: "f32", T.DOUBLE: "f64", T.FLOAT16: "f16", T.BFLOAT16: "bf16", T.INT64: "i64", T.INT32: "i32",
         T.INT16: "i16", T.INT8: "i8", T.UINT64: "u64", T.UINT32: "u32", T.UINT16: "u16", T.UINT8: "u8",
         T.BOOL: "bool", T.INT4: "i4", T.UINT4: "u4", T.INT2: "i2", T.UINT2: "u2", T.FLOAT8E4M3FN: "f8e4m3fn",
         T.FLOAT8E4M3FNUZ: "f8e4m3fnuz", T.FLOAT8E5M2: "f8e5m2", T.FLOAT8E5M2FNUZ: "f8e5m2fnuz",
         T.FLOAT4E2M1: "f4e2m1"}
rng = np.random.default_rng(7)
lines = []


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def proto(x):
    """A TensorProto, whatever the element type: an ml_dtypes array keeps its own."""
    return x if isinstance(x, onnx.TensorProto) else onnx.numpy_helper.from_array(np.asarray(x), "x")


def text(x):
    if x is None:
        return "-"
    p = proto(x)
    if not p.HasField("raw_data"):
        p = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(p))
    dims = "x".join(map(str, p.dims)) or "."
    return f"{NAMES[p.data_type]} {dims} {p.raw_data.hex()}".rstrip()


def run_ort(op, opset, attrs, inputs, outputs, domain, level=None):
    """The op as a model of one node, run by ONNX Runtime."""
    protos = {f"i{i}": proto(x) for i, x in enumerate(inputs) if x is not None}
    names = [f"i{i}" if x is not None else "" for i, x in enumerate(inputs)]
    outs = [f"o{i}" for i in range(outputs)]
    node = h.make_node(op, names, outs, domain=domain, **attrs)
    inits = []
    for name, p in protos.items():
        q = onnx.TensorProto()
        q.CopyFrom(p)
        q.name = name
        inits.append(q)
    # Everything is a constant, as weights are: any element type can be given, and without optimizations nothing is folded.
    graph = h.make_graph([node], "g", [], [onnx.ValueInfoProto(name=o) for o in outs], inits)
    opsets = [h.make_opsetid("", opset if not domain else 21)] + ([h.make_opsetid(domain, opset)] if domain else [])
    model = h.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run_with_ort_values(None, {})
    return [to_numpy(v) for v in values]


def to_numpy(v):
    special = {T.BFLOAT16: ml_dtypes.bfloat16, T.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
               T.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz, T.FLOAT8E5M2: ml_dtypes.float8_e5m2,
               T.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz}
    kind = v.element_type()
    return v.numpy().view(special[kind]) if kind in special else v.numpy()


def case(label, op, inputs, outputs=1, opset=21, domain="", want=None, rtol=1e-5, atol=1e-6, compare=None, **attrs):
    """One case. `want` is the reference's results, else ONNX Runtime computes them."""
    # An attribute may be called what an argument of this function is called.
    attrs = {name.rstrip("_"): v for name, v in attrs.items()}
    if want is None:
        want = run_ort(op, opset, attrs, inputs, outputs, domain)
    if compare is not None:
        want = [w if i in compare else None for i, w in enumerate(want)]
    lines.append(f"case {label} {domain or 'onnx'}.{op} {opset} {outputs} {rtol:g} {atol:g}")
    for name, v in attrs.items():
        if isinstance(v, (list, tuple)):
            kind = "fs" if isinstance(v[0], float) else "ss" if isinstance(v[0], str) else "is"
            lines.append(f"attr {name} {kind} {' '.join(map(str, v))}")
        else:
            kind = "f" if isinstance(v, float) else "s" if isinstance(v, str) else "i"
            lines.append(f"attr {name} {kind} {v}")
    lines.extend("in " + text(x) for x in inputs)
    lines.extend("out " + text(x) for x in want)


def matmul():
    shapes = [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (1, 3, 4, 2)),
              ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4,)), ((4,), (2, 4, 3)), ((3, 4), (2, 4, 5)),
              ((2, 3, 4), (1, 4, 5)), ((1, 1, 4), (2, 4, 3)), ((0, 4), (4, 5))]
    for a, b in shapes:
        x, y = f32(*a), f32(*b)
        case(f"{a}x{b}".replace(" ", ""), "MatMul", [x, y], want=[np.matmul(x.astype("f8"), y.astype("f8")).astype("f4")])
    x, y = rng.standard_normal((3, 4)), rng.standard_normal((4, 5))
    case("f64", "MatMul", [x, y], rtol=1e-14, atol=1e-14)
    x, y = x.astype("f2"), y.astype("f2")
    case("f16", "MatMul", [x, y], want=[(x.astype("f8") @ y.astype("f8")).astype("f2")], rtol=2e-3, atol=1e-3)
    x, y = rng.integers(-9, 9, (2, 3, 4)), rng.integers(-9, 9, (4, 2))
    case("i64", "MatMul", [x, y], rtol=0, atol=0)
    for ta, tb in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        for bias in [None, (), (5,), (3, 1), (1, 5), (3, 5), (1,)]:
            a, b = f32(*((4, 3) if ta else (3, 4))), f32(*((5, 4) if tb else (4, 5)))
            c = None if bias is None else f32(*bias)
            alpha, beta = (1.0, 1.0) if bias == (5,) else (0.5, 2.0)
            case(f"gemm{ta}{tb}{bias}".replace(" ", ""), "Gemm", [a, b] + ([] if c is None else [c]),
                 transA=ta, transB=tb, alpha=alpha, beta=beta)


def softmax():
    for op in ["Softmax", "LogSoftmax"]:
        for opset, axis in [(21, None), (21, 0), (21, 1), (21, -1), (13, 1), (11, None), (11, 0), (11, 2), (11, -2)]:
            attrs = {} if axis is None else {"axis": axis}
            case(f"opset{opset}_axis{axis}", op, [4 * f32(2, 3, 37)], opset=opset, **attrs)
        x = f32(3, 5) * 30
        x[1, 2] = -np.inf
        case("masked", op, [x])
        y = x.astype("f2")
        case("f16", op, [y], rtol=2e-3, atol=1e-3)
        case("empty", op, [f32(2, 0)])
    x = rng.standard_normal((2, 5))
    y = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    case("f64", "Softmax", [x], want=[y], rtol=1e-13, atol=1e-13)
    case("f64", "LogSoftmax", [x], want=[np.log(y)], rtol=1e-13, atol=1e-13)


def normalization():
    for axis, shape, scale in [(-1, (2, 3, 37), (37,)), (1, (2, 3, 37), (3, 37)), (-1, (5, 64), (64,)), (0, (3, 4), (3, 4)),
                               (2, (2, 3, 8), (8,))]:
        for epsilon in [1e-5, 0.1]:
            x, s, b = f32(*shape) * 3 + 1, f32(*scale), f32(*scale)
            case(f"{shape}{axis}".replace(" ", ""), "LayerNormalization", [x, s, b], outputs=3, opset=17, axis=axis, epsilon=epsilon)
            dims = tuple(range(axis % len(shape), len(shape)))
            z = x.astype("f8")
            y = (z / np.sqrt((z * z).mean(axis=dims, keepdims=True) + epsilon) * s).astype("f4")
            case(f"{shape}{axis}".replace(" ", ""), "RMSNormalization", [x, s], opset=23, axis=axis, epsilon=epsilon, want=[y])
    x, s = f32(2, 8), f32(8)
    case("no_bias", "LayerNormalization", [x, s], opset=17)
    z = x.astype("f8")
    scalar = f32(1)
    case("one_scale", "RMSNormalization", [x, scalar], opset=23,
         want=[(z / np.sqrt((z * z).mean(-1, keepdims=True) + 1e-5) * scalar).astype("f4")])
    y = (4 * x).astype("f2")
    case("f16", "LayerNormalization", [y, s.astype("f2")], opset=17, rtol=3e-3, atol=2e-3)
    x, s = rng.standard_normal((2, 8)), rng.standard_normal(8)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + np.float32(1e-5)) * s
    case("f64", "LayerNormalization", [x, s], opset=17, want=[want], rtol=1e-13, atol=1e-13)


def pack(codes, bits):
    """Rows of codes as bytes, low-first, each row padded."""
    per = 8 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    return sum((codes[..., i::per] << (bits * i)).astype("u1") for i in range(per)).astype("u1")


def packed_weight(n, k, group, bits, container):
    """Random codes [N, kb, group], scales and zero points [N, kb], and the float64 weight [N, K] that they are."""
    kb = -(-k // group)
    q = rng.integers(0, 2**bits, (n, kb, group)).astype("u1")
    scales = ((rng.random((n, kb)) + 0.5) * 0.1).astype("f4")
    zeros = rng.integers(0, 2**bits, (n, kb)).astype("u1")
    value = lambda z: ((q - z[:, :, None].astype("f8")) * scales[:, :, None].astype("f8")).reshape(n, -1)[:, :k]
    return pack(q, container), scales, zeros, value


def dequantize():
    for bits, group, n, k in [(4, 32, 5, 43), (2, 16, 3, 40), (8, 16, 3, 33), (3, 16, 4, 24), (5, 43, 4, 43),
                              (4, 5, 3, 13), (2, 7, 3, 17), (4, 32, 70, 66)]:
        container = {2: 2, 3: 4, 4: 4, 5: 8, 8: 8}[bits]
        codes, scales, zeros, value = packed_weight(n, k, group, bits, container)
        mid = np.full(zeros.shape, 2 ** (bits - 1))
        for z, shape, axis, turned in [(zeros, [n, k], 1, False), (None, [k, n], 0, True), (zeros, [1, k, n], 1, True)]:
            w = value(mid if z is None else z).astype("f4")
            case(f"{bits}bit_g{group}_{n}x{k}_axis{axis}", "dequantize", [codes, scales, z], opset=1, domain="quant",
                 rtol=1e-7, atol=0, want=[(w.T if turned else w).reshape(shape)], bits=bits, group_size=group, axis=axis,
                 shape=shape, to=1)
    codes, scales, zeros, value = packed_weight(4, 32, 16, 4, 4)
    half = scales.astype("f2")
    w = (value(zeros) / scales.repeat(16, 1) * half.astype("f8").repeat(16, 1)).astype("f4").astype("f2")
    case("f16", "dequantize", [codes, half, zeros], opset=1, domain="quant", rtol=1e-7, atol=0, want=[w], bits=4, group_size=16,
         axis=1, shape=[4, 32], to=10)


def matmul_nbits():
    n = 5
    for bits, group, k in [(2, 16, 48), (2, 32, 43), (2, 128, 130), (2, 256, 260), (4, 16, 64), (4, 32, 43), (4, 32, 96),
                           (4, 128, 200), (4, 256, 70), (8, 16, 40), (8, 32, 64), (8, 64, 70)]:
        codes, scales, zeros, _ = packed_weight(n, k, group, bits, bits)
        for z in ["none", "codes", "float"]:
            for level in [0, 4]:
                for shape in [(1, k), (2, 3, k)]:
                    small = shape == (1, k)
                    if bits == 8 and z == "float" or level < 4 and not small or small and z == "float":
                        continue
                    zp = {"none": None, "codes": pack(zeros, bits), "float": zeros.astype("f4") + 0.25}[z]
                    inputs = [f32(*shape), codes, scales, zp]
                    if level == 4 and z == "codes":
                        inputs += [None, f32(n)]
                    case(f"{bits}bit_g{group}_k{k}_zero_{z}_level{level}_m{shape[0]}", "MatMulNBits", inputs, opset=1,
                         domain="com.microsoft", rtol=2e-5, atol=2e-5, K=k, N=n, bits=bits, block_size=group, accuracy_level=level)
    codes, scales, zeros, _ = packed_weight(n, 64, 16, 4, 4)
    order = rng.permutation(np.arange(64) // 16).astype("i4")
    plain = np.stack([codes & 15, codes >> 4], -1).reshape(n, 64).astype("f8")
    for z in [None, zeros]:
        w = (plain - (np.full(zeros.shape, 8.0) if z is None else z)[:, order]) * scales[:, order]
        x = f32(2, 64)
        case(f"order_{z is None}", "MatMulNBits", [x, codes, scales, None if z is None else pack(z, 4), order], opset=1, domain="com.microsoft",
             rtol=2e-5, atol=2e-5, K=64, N=n, bits=4, block_size=16, want=[(x @ w.T).astype("f4")])


def onnx_reference(op, opset, attrs, inputs, outputs):
    """The op by the ONNX project's own Python implementation, in float64 where the inputs are float32."""
    wide = [x.astype("f8") if x is not None and x.dtype == np.float32 else x for x in inputs]
    names = [f"i{i}" if x is not None else "" for i, x in enumerate(inputs)]
    outs = [f"o{i}" for i in range(outputs)]
    graph = h.make_graph([h.make_node(op, names, outs, **attrs)], "g",
                         [onnx.ValueInfoProto(name=n) for n in names if n], [onnx.ValueInfoProto(name=o) for o in outs])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)])
    got = onnx.reference.ReferenceEvaluator(model).run(None, {n: x for n, x in zip(names, wide) if n})
    return [g.astype("f4") if g.dtype == np.float64 else g for g in got]


def attention():
    def one(label, q, k, v, rest=(), outputs=1, opset=24, **attrs):
        inputs = [f32(*q), f32(*k), f32(*v), *rest]
        want = onnx_reference("Attention", opset, attrs, inputs, outputs)
        case(label, "Attention", inputs, outputs=outputs, opset=opset, want=want, atol=2e-6, **attrs)

    four = ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
    shared = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    three = ((2, 5, 32), (2, 7, 16), (2, 7, 12))
    heads = dict(q_num_heads=4, kv_num_heads=2)
    one("4d", *four)
    one("grouped", *shared)
    one("3d", *three, **heads)
    one("3d_causal", *three, is_causal=1, scale=0.3, **heads)
    one("causal", *four, is_causal=1)
    one("softcap", *four, softcap=1.5)
    one("long", (1, 1, 150, 4), (1, 1, 150, 4), (1, 1, 150, 4), is_causal=1)
    for shape in [(7,), (5, 7), (4, 5, 7), (2, 1, 5, 7), (2, 4, 1, 7), (5, 1)]:
        one(f"float_mask{shape}".replace(" ", ""), *four, rest=[f32(*shape)])
        mask = rng.random(shape) < 0.7
        one(f"bool_mask{shape}".replace(" ", ""), *shared, rest=[mask], is_causal=int(shape == (5, 7)))
    mask = np.ones((5, 7), bool)
    mask[2] = False
    one("nothing_to_attend", *four, rest=[mask])
    one("mask_and_softcap", *four, rest=[mask], softcap=2.0)
    past = [f32(2, 2, 3, 8), f32(2, 2, 3, 6)]
    one("past", *shared, rest=[None, *past], outputs=3, is_causal=1)
    one("past_3d", *three, rest=[None, *past], outputs=3, **heads)
    for mode in range(4):
        # The reference gives mode 0 after the softcap, against the specification's text.
        softcap = 3.0 if mode else 0.0
        one(f"scores{mode}", *shared, rest=[f32(5, 7)], outputs=4, qk_matmul_output_mode=mode, softcap=softcap)
    one("padded", *four, rest=[None, None, None, np.array([7, 4])])
    one("padded_causal", *four, rest=[None, None, None, np.array([7, 3])], is_causal=1)
    one("short_mask", *four, rest=[f32(5, 6), None, None, np.array([5, 6])])
    one("window", (1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4), opset=27, left_window_size=2, right_window_size=1)
    one("window_causal", (1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4), opset=27, left_window_size=1, is_causal=1)
    # What ONNX Runtime makes of the same op.
    case("ort", "Attention", [f32(2, 4, 5, 8), f32(2, 2, 5, 8), f32(2, 2, 5, 8), f32(5, 5)], opset=23, is_causal=1)


def rotary():
    cache = lambda *shape: (np.cos(f32(*shape)), np.sin(f32(*shape)))
    positions = rng.integers(0, 11, (2, 3))
    for interleaved in [0, 1]:
        for label, x, caches, rest, attrs in [
            ("4d", f32(2, 4, 3, 8), cache(2, 3, 4), [], {}),
            ("4d_positions", f32(2, 4, 3, 8), cache(11, 4), [positions], {}),
            ("3d", f32(2, 3, 32), cache(2, 3, 4), [], {"num_heads": 4}),
            ("3d_positions", f32(2, 3, 32), cache(11, 4), [positions], {"num_heads": 4}),
            ("part", f32(2, 4, 3, 8), cache(11, 3), [positions], {"rotary_embedding_dim": 6}),
        ]:
            case(f"{label}_{interleaved}", "RotaryEmbedding", [x, *caches, *rest], opset=23, interleaved=interleaved, **attrs)


def conv():
    def one(label, x, w, bias=True, **attrs):
        inputs = [f32(*x), f32(*w)] + ([f32(w[0])] if bias else [])
        case(label, "Conv", inputs, atol=1e-5, **attrs)

    one("1d", (2, 3, 9), (4, 3, 3))
    one("1d_stride_pad", (2, 3, 10), (4, 3, 3), strides=[2], pads=[1, 2])
    one("2d", (2, 3, 7, 6), (5, 3, 3, 2), bias=False)
    one("2d_dilated", (1, 2, 9, 8), (3, 2, 3, 3), dilations=[2, 1], pads=[1, 0, 2, 1], strides=[1, 2])
    one("2d_groups", (2, 4, 6, 6), (6, 2, 3, 3), group=2, pads=[1, 1, 1, 1])
    one("depthwise", (1, 4, 6, 6), (4, 1, 3, 3), group=4, kernel_shape=[3, 3])
    one("3d", (1, 2, 5, 4, 6), (3, 2, 2, 3, 2), strides=[2, 1, 1], pads=[1, 0, 0, 0, 1, 1])
    one("many_tiles", (1, 1, 40, 33), (2, 1, 3, 3), pads=[1, 1, 1, 1])
    one("1x1", (1, 5, 3, 3), (2, 5, 1, 1), strides=[2, 2])
    for auto in ["SAME_UPPER", "SAME_LOWER", "VALID"]:
        for stride in [1, 2]:
            one(f"{auto}{stride}", (1, 2, 8, 7), (2, 2, 4, 3), auto_pad=auto, strides=[stride, stride])
    x, w = rng.standard_normal((1, 2, 5)), rng.standard_normal((3, 2, 2))
    want = np.stack([np.einsum("nck,mck->nm", x[:, :, i:i + 2], w) for i in range(4)], -1)
    case("f64", "Conv", [x, w], want=[want], rtol=1e-13, atol=1e-13)


def pool():
    for op in ["MaxPool", "AveragePool"]:
        for label, x, attrs in [
            ("1d", (2, 3, 9), dict(kernel_shape=[3])),
            ("2d_stride", (1, 2, 8, 7), dict(kernel_shape=[3, 2], strides=[2, 2])),
            ("2d_pads", (1, 2, 8, 7), dict(kernel_shape=[3, 3], strides=[2, 1], pads=[1, 0, 1, 2])),
            ("2d_ceil", (1, 2, 8, 7), dict(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
            ("2d_ceil_pads", (1, 2, 8, 7), dict(kernel_shape=[3, 3], strides=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1)),
            ("2d_dilated", (1, 2, 8, 7), dict(kernel_shape=[2, 3], dilations=[2, 2])),
            ("3d", (1, 2, 4, 5, 3), dict(kernel_shape=[2, 2, 2], strides=[1, 2, 1])),
            ("same_upper", (1, 2, 8, 7), dict(kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER")),
            ("same_lower", (1, 2, 8, 7), dict(kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_LOWER")),
        ]:
            if op == "MaxPool":
                case(label, op, [f32(*x)], outputs=2, **attrs)
            else:
                case(label, op, [f32(*x)], **attrs)
                case(f"{label}_with_padding", op, [f32(*x)], count_include_pad=1, **attrs)
    case("column_major", "MaxPool", [f32(1, 2, 5, 4)], outputs=2, kernel_shape=[2, 2], storage_order=1)
    case("u8", "MaxPool", [rng.integers(0, 255, (1, 2, 5, 4)).astype("u1")], kernel_shape=[2, 2], rtol=0, atol=0)
    case("i8", "MaxPool", [rng.integers(-128, 127, (1, 2, 5, 4)).astype("i1")], kernel_shape=[2, 2], pads=[1, 1, 0, 0], rtol=0, atol=0)
    for op in ["GlobalAveragePool", "GlobalMaxPool"]:
        case("2d", op, [f32(2, 3, 5, 7)])
        case("1d", op, [f32(2, 3, 33)])
    for p in [1, 2, 3]:
        case(f"p{p}", "LpPool", [f32(1, 2, 7, 6)], opset=18, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], p=p)
        case(f"p{p}_dilated", "LpPool", [f32(1, 2, 7, 6)], opset=18, kernel_shape=[3, 2], dilations=[2, 3], p=p)
        case(f"p{p}", "GlobalLpPool", [f32(2, 3, 4, 5)], opset=2, p=p, rtol=1e-4)
    case("same_upper", "LpPool", [f32(1, 2, 7, 6)], opset=11, kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER")
    at = np.array([[[[1, 3], [9, 16]], [[24, 26], [33, 39]]]])
    case("unpool", "MaxUnpool", [f32(1, 2, 2, 2), at], opset=11, kernel_shape=[2, 3], strides=[2, 2])
    x = rng.standard_normal((2, 3, 4))
    case("f64", "AveragePool", [x], kernel_shape=[2], want=[(x[:, :, 1:] + x[:, :, :-1]) / 2], rtol=1e-14, atol=1e-14)
    case("f64", "GlobalAveragePool", [x], want=[x.mean(-1, keepdims=True)], rtol=1e-14, atol=1e-14)


def channel_norm():
    for shape in [(2, 3, 4, 5), (2, 3), (2, 3, 7)]:
        x = f32(*shape) * 2 + 1
        parameters = [f32(3), f32(3), f32(3), rng.random(3).astype("f4") + 0.1]
        case(f"{shape}".replace(" ", ""), "BatchNormalization", [x, *parameters], opset=15, epsilon=1e-3, atol=1e-5)
        case(f"opset9_{shape}".replace(" ", ""), "BatchNormalization", [x, *parameters], opset=9, atol=1e-5)
    for shape in [(2, 3, 4, 5), (2, 3, 7)]:
        case(f"{shape}".replace(" ", ""), "InstanceNormalization", [f32(*shape), f32(3), f32(3)], epsilon=1e-2, atol=1e-5)
    x = f32(2, 6, 4, 3)
    z = x.astype("f8").reshape(2, 3, -1)
    z = ((z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)).reshape(x.shape)
    scale, bias = f32(6), f32(6)
    by_channel = lambda v: v.reshape(1, -1, 1, 1)
    case("group21", "GroupNormalization", [x, scale, bias], opset=21, num_groups=3, atol=1e-5,
         want=[(z * by_channel(scale) + by_channel(bias)).astype("f4")])
    scale, bias = f32(3), f32(3)
    case("group18", "GroupNormalization", [x, scale, bias], opset=18, num_groups=3, atol=1e-5,
         want=[(z * by_channel(scale.repeat(2)) + by_channel(bias.repeat(2))).astype("f4")])
    for size in [1, 3, 5]:
        case(f"size{size}", "LRN", [f32(2, 5, 3, 2)], size=size, alpha=0.5, beta=0.6, bias=1.5)
    x = rng.standard_normal((2, 5, 3))
    squares = np.stack([(x[:, max(0, c - 1):c + 3] ** 2).sum(1) for c in range(5)], 1)
    case("size4", "LRN", [x], size=4, alpha=0.5, beta=0.75, want=[x / (1 + 0.5 / 4 * squares) ** 0.75], rtol=1e-13, atol=1e-13)
    x, p = rng.standard_normal((2, 3, 4)), rng.random((4, 3)) + 0.5
    scale, bias, mean, variance = [v[:, None] for v in p]
    case("f64", "BatchNormalization", [x, *p], opset=15, rtol=1e-13, atol=1e-13,
         want=[(x - mean) / np.sqrt(variance + np.float32(1e-5)) * scale + bias])
    own = [x.mean((0, 2)), x.var((0, 2))]
    z = (x - own[0][:, None]) / np.sqrt(own[1][:, None] + np.float32(1e-5)) * scale + bias
    momentum = np.float64(np.float32(0.7))
    running = [p[i] * momentum + o * (1 - momentum) for i, o in zip([2, 3], own)]
    case("training", "BatchNormalization", [x, *p], outputs=3, opset=15, rtol=1e-12, atol=1e-12, training_mode=1, momentum=0.7,
         want=[z, *running])
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + np.float32(1e-5))
    case("f64", "InstanceNormalization", [x, p[0], p[1]], want=[z * scale + bias], rtol=1e-13, atol=1e-13)


def recurrent():
    for op, gates, outputs in [("LSTM", 4, 3), ("GRU", 3, 2), ("RNN", 1, 2)]:
        def one(label, seq=4, batch=2, size=3, hidden=5, bias=True, lengths=None, state=False, peepholes=False, **attrs):
            n = 2 if attrs.get("direction") == "bidirectional" else 1
            inputs = [f32(seq, batch, size), f32(n, gates * hidden, size), f32(n, gates * hidden, hidden),
                      f32(n, 2 * gates * hidden) if bias else None, lengths, f32(n, batch, hidden) if state else None]
            if op == "LSTM":
                inputs += [f32(n, batch, hidden) if state else None, f32(n, 3 * hidden) if peepholes else None]
            while inputs[-1] is None:
                inputs.pop()
            case(label, op, inputs, outputs=outputs, opset=14, hidden_size=hidden, atol=1e-5, rtol=1e-4, **attrs)

        lengths = np.array([2, 4], "i4")
        one("plain", bias=False)
        one("bias_state", state=True)
        one("reverse", direction="reverse", state=True)
        one("bidirectional", direction="bidirectional", state=True)
        one("lengths", direction="bidirectional", lengths=lengths)
        one("clip", clip=0.5)
        if op == "LSTM":
            one("peepholes", peepholes=True, state=True)
            one("activations", activations=["HardSigmoid", "Softsign", "Relu"])
        if op == "GRU":
            one("linear_before_reset", linear_before_reset=1, direction="bidirectional", state=True)
            one("activations", activations=["HardSigmoid", "ScaledTanh"], activation_alpha=[0.3, 1.2], activation_beta=[0.4, 0.9])
        if op == "RNN":
            one("activations", activations=["LeakyRelu"], activation_alpha=[0.2])


def tensor(kind, array):
    """A TensorProto of a type numpy does not have, from integers or floats."""
    return h.make_tensor("x", kind, array.shape, array.flatten().tolist())


def qdq():
    integers = {T.UINT8: (0, 255, 13), T.INT8: (-128, 127, 13), T.UINT16: (0, 65535, 21), T.INT16: (-32768, 32767, 21),
                T.UINT4: (0, 15, 21), T.INT4: (-8, 7, 21), T.UINT2: (0, 3, 25), T.INT2: (-2, 1, 25)}
    positive = lambda *shape: (rng.random(shape) + 0.5).astype("f4") * np.float32(0.1)
    forms = [("scalar", (), {}), ("axis1", (3,), {}), ("axis0", (2,), {"axis": 0}), ("axis_last", (10,), {"axis": -1}),
             ("block_last", (2, 3, 3), {"axis": 2, "block_size": 4}), ("block_middle", (2, 2, 10), {"axis": 1, "block_size": 2})]
    for kind, (low, high, opset) in integers.items():
        for label, shape, attrs in forms:
            if "block_size" in attrs:
                opset = max(opset, 21)
            scale = positive(*shape)
            codes = rng.integers(low, high + 1, (2, 3, 10))
            zero = rng.integers(low, high + 1, shape)
            for z in [zero, None]:
                zp = None if z is None else tensor(kind, np.asarray(z))
                params = [scale] + ([] if z is None else [zp])
                # The definition: blocks are repeated along their axis, vectors stand along theirs.
                def spread(p):
                    if "block_size" in attrs:
                        return p.repeat(attrs["block_size"], attrs["axis"]).take(range(codes.shape[attrs["axis"]]), attrs["axis"])
                    dims = [1, 1, 1]
                    if p.ndim:
                        dims[attrs.get("axis", 1)] = -1
                    return p.reshape(dims)
                zs = spread(np.zeros(shape, "i8") if z is None else np.asarray(z))
                name = f"{NAMES[kind]}_{label}_{'zero' if z is not None else 'plain'}"
                x = (codes - zs).astype("f4") * spread(scale)
                case(name, "DequantizeLinear", [tensor(kind, codes), *params], opset=opset, want=[x], rtol=0, atol=0, **attrs)
                x = f32(2, 3, 10) * (4 if high < 300 else 1000)
                want = np.clip(np.rint(x / spread(scale)) + zs, low, high)
                if z is None and (opset < 21):
                    if kind == T.UINT8:
                        case(name, "QuantizeLinear", [x, *params], opset=opset, want=[tensor(kind, want.astype("i8"))], rtol=0, atol=0, **attrs)
                    continue
                extra = {"output_dtype": int(kind)} if z is None else {}
                case(name, "QuantizeLinear", [x, *params], opset=opset, want=[tensor(kind, want.astype("i8"))], rtol=0, atol=0, **extra, **attrs)
    # What ONNX Runtime makes of some of them.
    for kind in [T.UINT8, T.INT8, T.INT4, T.UINT4, T.INT16]:
        low, high, _ = integers[kind]
        codes, zero = rng.integers(low, high + 1, (4, 12)), rng.integers(low, high + 1, (4, 3))
        params = [positive(4, 3), tensor(kind, zero)]
        case("ort", "DequantizeLinear", [tensor(kind, codes), *params], rtol=1e-6, atol=0, axis=1, block_size=4)
        if kind in [T.UINT8, T.INT8]:
            case("ort", "QuantizeLinear", [f32(4, 12) * 5, *params], rtol=0, atol=0, axis=1, block_size=4)
    case("i32", "DequantizeLinear", [rng.integers(-2**31, 2**31, (3, 4)).astype("i4"), positive(4)], opset=13, rtol=1e-6, atol=0)
    case("half_scale", "DequantizeLinear", [rng.integers(-128, 128, (3, 4)).astype("i1"), positive(4).astype("f2")], opset=21,
         rtol=1e-3, atol=0)
    for kind in [T.FLOAT8E4M3FN, T.FLOAT8E5M2, T.FLOAT8E4M3FNUZ, T.FLOAT8E5M2FNUZ]:
        x = tensor(kind, f32(3, 4) * 10)
        case(NAMES[kind], "DequantizeLinear", [x, positive()], opset=19)
        zero = tensor(kind, np.zeros(()))
        kinds = {T.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn, T.FLOAT8E5M2: ml_dtypes.float8_e5m2,
                 T.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz, T.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz}
        x, scale = f32(3, 4) * 4, positive()
        case(NAMES[kind], "QuantizeLinear", [x, scale, zero], opset=19, rtol=0, atol=0, want=[(x / scale).astype(kinds[kind])])


def integer():
    case("range", "DynamicQuantizeLinear", [f32(3, 7) * 3], outputs=3)
    case("positive", "DynamicQuantizeLinear", [rng.random((3, 7)).astype("f4") + 2], outputs=3)
    case("negative", "DynamicQuantizeLinear", [-rng.random((3, 7)).astype("f4") - 2], outputs=3)
    case("zeros", "DynamicQuantizeLinear", [np.zeros((2, 3), "f4")], outputs=3)
    u8 = lambda *shape: rng.integers(0, 256, shape).astype("u1")
    i8 = lambda *shape: rng.integers(-128, 128, shape).astype("i1")
    exact = dict(rtol=0, atol=0)
    case("plain", "MatMulInteger", [u8(3, 4), u8(4, 5)], **exact)
    case("zeros", "MatMulInteger", [u8(2, 3, 40), i8(40, 5), u8(), i8()], **exact)
    case("columns", "MatMulInteger", [u8(2, 3, 4), i8(4, 5), u8(), i8(5)], **exact)
    a, z, b = u8(3, 4).astype("i4"), u8(3).astype("i4"), i8(4, 5).astype("i4")
    case("rows", "MatMulInteger", [a.astype("u1"), b.astype("i1"), z.astype("u1")], want=[(a - z[:, None]) @ b], **exact)
    a, b, zb = u8(2, 3, 4).astype("i4"), i8(2, 4, 5).astype("i4"), i8(2, 1, 5).astype("i4")
    case("batches", "MatMulInteger", [a.astype("u1"), b.astype("i1"), None, zb.astype("i1")], want=[a @ (b - zb)], **exact)
    s = lambda *shape: (rng.random(shape) + 0.5).astype("f4") * np.float32(0.1)
    case("scalars", "QLinearMatMul", [u8(2, 3, 8), s(), u8(), u8(8, 5), s(), u8(), s() * np.float32(80), u8()], **exact)
    case("signed", "QLinearMatMul", [i8(3, 8), s(), i8(), i8(8, 5), s(), i8(), s() * np.float32(80), i8()], **exact)
    case("columns", "QLinearMatMul", [u8(3, 8), s(), u8(), i8(8, 5), s(5), i8(5), s() * np.float32(80), u8()], **exact)


def gather_block():
    indices = np.array([[0, 4, -1], [2, 2, -5]])
    for bits in [2, 4, 8]:
        for k in [32, 64]:
            codes, scales, zeros, _ = packed_weight(5, k, 16, bits, bits)
            for z in [None, pack(zeros, bits)]:
                case(f"{bits}bit_k{k}_{'zero' if z is not None else 'plain'}", "GatherBlockQuantized",
                     [codes.reshape(5, -1), indices, scales] + ([] if z is None else [z]), opset=1, domain="com.microsoft",
                     bits=bits, block_size=16, gather_axis=0, quantize_axis=1)
    for kind, low in [(T.UINT4, 0), (T.INT4, -8)]:
        codes, zeros = rng.integers(low, low + 16, (5, 3, 32)), rng.integers(low, low + 16, (5, 3, 2))
        scales = (rng.random((5, 3, 2)) + 0.5).astype("f4")
        for z in [[], [tensor(kind, zeros)]]:
            for gather in [0, 1]:
                case(f"{NAMES[kind]}_axis{gather}_{len(z)}", "GatherBlockQuantized",
                     [tensor(kind, codes), np.array([[2, -3], [0, 1]]), scales, *z], opset=1,
                     domain="com.microsoft", block_size=16, gather_axis=gather, quantize_axis=2)


def conv_transpose():
    def one(label, x, w, bias=True, **attrs):
        inputs = [f32(*x), f32(*w)] + ([f32(w[1] * attrs.get("group", 1))] if bias else [])
        case(label, "ConvTranspose", inputs, opset=11, atol=1e-5, **attrs)

    one("1d", (2, 3, 5), (3, 4, 3))
    one("1d_stride", (2, 3, 5), (3, 4, 3), strides=[3], pads=[1, 2], output_padding=[2])
    one("2d", (2, 3, 4, 3), (3, 2, 3, 2), bias=False, strides=[2, 1], pads=[1, 0, 0, 1])
    one("2d_dilated", (1, 2, 4, 3), (2, 3, 3, 2), dilations=[2, 3], strides=[1, 2], pads=[1, 1, 1, 1])
    one("groups", (2, 4, 3, 3), (4, 2, 2, 3), group=2, strides=[2, 2])
    one("depthwise", (1, 3, 3, 4), (3, 1, 3, 3), group=3, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
    one("3d", (1, 2, 2, 3, 2), (2, 2, 2, 2, 3), strides=[2, 1, 2])
    one("many_channels", (1, 2, 2, 2), (2, 35, 2, 2), strides=[2, 2])
    one("many_tiles", (1, 1, 30, 21), (1, 1, 2, 2))
    for auto in ["SAME_UPPER", "SAME_LOWER", "VALID"]:
        for stride in [2, 3]:
            one(f"{auto}{stride}", (1, 2, 4, 3), (2, 2, 4, 3), auto_pad=auto, strides=[stride, stride])
            one(f"{auto}{stride}_shape", (1, 2, 4, 3), (2, 2, 4, 3), auto_pad=auto, strides=[stride, stride], output_shape=[10, 8])
    one("output_shape", (1, 2, 4, 3), (2, 2, 4, 4), strides=[3, 2], output_shape=[11, 7])
    one("larger_output_shape", (1, 2, 4, 3), (2, 2, 2, 2), strides=[2, 2], output_shape=[9, 7])
    x, w = rng.standard_normal((1, 2, 4)), rng.standard_normal((2, 3, 3))
    full = np.zeros((1, 3, 9))
    for i in range(4):
        full[:, :, 2 * i:2 * i + 3] += np.einsum("nc,cmk->nmk", x[:, :, i], w)
    case("f64", "ConvTranspose", [x, w], want=[full], rtol=1e-13, atol=1e-13, strides=[2])
    for shape, block, columns, attrs in [((5, 6), (2, 3), (2, 12, 16), {}), ((5, 6), (2, 2), (1, 8, 9), dict(strides=[2, 1], pads=[0, 0, 1, 0], dilations=[1, 3])),
                                         ((4, 3, 3), (2, 2, 1), (1, 4, 18), {})]:
        case(f"{shape}".replace(" ", ""), "Col2Im", [f32(*columns), np.array(shape), np.array(block)], opset=18, **attrs)


def integer_conv():
    u8 = lambda *shape: rng.integers(0, 256, shape).astype("u1")
    # Pairs of larger products saturate on processors without dot product instructions, where ONNX Runtime is not exact.
    i8 = lambda *shape: rng.integers(-64, 64, shape).astype("i1")
    s = lambda *shape: (rng.random(shape) + 0.5).astype("f4") * np.float32(0.1)
    exact = dict(rtol=0, atol=0, opset=10)
    case("zeros", "ConvInteger", [u8(2, 3, 5, 4), u8(4, 3, 3, 2), u8(), u8()], pads=[1, 1, 1, 1], **exact)
    case("groups", "ConvInteger", [u8(1, 4, 7), u8(4, 2, 3), u8()], group=2, strides=[2], **exact)
    # ONNX Runtime takes one zero point for all filters: each filter is run on its own.
    x, w, zero, zeros = u8(1, 2, 7), u8(3, 2, 3), u8(), u8(3)
    each = [run_ort("ConvInteger", 10, dict(pads=[1, 1], dilations=[2]), [x, w[i:i + 1], zero, zeros[i]], 1, "")[0] for i in range(3)]
    case("channels", "ConvInteger", [x, w, zero, zeros], want=[np.concatenate(each, 1)], pads=[1, 1], dilations=[2], **exact)
    for label, x, w, z, wz in [("u8", u8, u8, u8, u8()), ("u8_i8", u8, i8, u8, i8()), ("i8", i8, i8, i8, i8(4) * 0), ("channels", u8, i8, u8, i8(4) * 0)]:
        ws = s(4) if wz.ndim else s()
        bias = rng.integers(-5000, 5000, 4).astype("i4")
        for group in [1, 2]:
            case(f"{label}_g{group}", "QLinearConv", [x(1, 4, 6, 5), s(), z(), w(4, 4 // group, 3, 3), ws, wz, s() * np.float32(60), z(), bias],
                 pads=[1, 0, 1, 2], strides=[1, 2], group=group, **exact)
    case("plain", "QLinearConv", [u8(1, 2, 7), s(), u8(), i8(3, 2, 3), s(3), i8(3) * 0, s() * np.float32(30), i8().view("u1")], **exact)


def resize():
    def one(label, x, scales=None, sizes=None, roi=None, opset=19, **attrs):
        inputs = [x, roi, None if scales is None else np.array(scales, "f4")] + ([] if sizes is None else [np.array(sizes)])
        case(label, "Resize", inputs, opset=opset, atol=1e-5, **attrs)

    x = f32(1, 1, 5, 6)
    modes = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
    for how in modes + ["half_pixel_symmetric"]:
        for label, sizes in [("up", [8, 13]), ("down", [3, 4]), ("mixed", [11, 1])]:
            for mode in ["linear", "cubic"]:
                one(f"{mode}_{how}_{label}", x, sizes=[1, 1, *sizes], mode=mode, coordinate_transformation_mode=how)
            for nearest in ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]:
                # Without halves, 3 of 5 places lie on places of the operand: there rounding decides.
                if (label != "mixed" or nearest == "floor") and not (how == "half_pixel_symmetric" and "prefer" not in nearest):
                    one(f"nearest_{nearest}_{how}_{label}", x, sizes=[1, 1, *sizes], coordinate_transformation_mode=how, nearest_mode=nearest)
    for mode in ["nearest", "linear", "cubic"]:
        one(f"{mode}_scales", x, scales=[1, 1, 0.6, 2.5], mode=mode, coordinate_transformation_mode="asymmetric")
        one(f"{mode}_crop", x, sizes=[1, 1, 4, 5], roi=np.array([0, 0, 0.2, -0.1, 1, 1, 0.8, 1.2], "f4"), mode=mode,
            coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=7.5)
    for scales in [[1, 1, 0.5, 0.3], [1, 1, 0.4, 2.0]]:
        for mode in ["linear", "cubic"]:
            for outside in [0, 1]:
                one(f"{mode}_antialias{outside}", x, scales=scales, mode=mode, antialias=1, exclude_outside=outside)
    one("exclude_outside", x, scales=[1, 1, 1.7, 0.8], mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5)
    one("axes", x, sizes=[9, 3], axes=[3, 2], mode="linear")
    for policy in ["not_larger", "not_smaller"]:
        one(policy, x, sizes=[7, 7], axes=[2, 3], mode="linear", keep_aspect_ratio_policy=policy)
    one("3d", f32(1, 1, 3, 4, 2), scales=[1, 1, 2, 0.5, 3], mode="linear")
    one("opset11", x, scales=[1, 1, 2, 0.5], roi=np.zeros(0, "f4"), opset=11, mode="linear")
    one("opset13", x, scales=[1, 1, 2, 0.5], opset=13, mode="cubic")
    one("u8", rng.integers(0, 256, (1, 1, 4, 5)).astype("u1"), scales=[1, 1, 2, 0.5], mode="nearest")
    for op, opset, scales in [("Resize", 10, [1, 1, 2, 1.5]), ("Resize", 10, [1, 1, 0.6, 0.5]), ("Upsample", 9, [1, 1, 2, 1.5])]:
        for mode in ["nearest", "linear"]:
            case(f"{mode}_{scales[2]}", op, [x, np.array(scales, "f4")], opset=opset, atol=1e-5, mode=mode)
    case("attribute", "Upsample", [x], opset=7, scales=[1.0, 1.0, 2.0, 3.0], mode="linear", atol=1e-5)
    y = np.repeat(np.repeat(rng.standard_normal((1, 1, 2, 3)), 2, 2), 3, 3)
    case("f64", "Resize", [y[:, :, ::2, ::3], None, np.array([1, 1, 2, 3], "f4")], opset=19, want=[y], rtol=0, atol=0)


def sample():
    x = f32(2, 2, 4, 5)
    grid = (rng.random((2, 3, 4, 2)) * 2.8 - 1.4).astype("f4")
    for mode in ["linear", "nearest", "cubic"]:
        for padding in ["zeros", "border", "reflection"]:
            for corners in [0, 1]:
                case(f"{mode}_{padding}_{corners}", "GridSample", [x, grid], opset=20, mode=mode, padding_mode=padding, align_corners=corners, atol=1e-5)
    case("bicubic", "GridSample", [x, grid], opset=16, mode="bicubic", atol=1e-5)
    volume, places = f32(1, 2, 3, 4, 3), (rng.random((1, 2, 3, 2, 3)) * 2.4 - 1.2).astype("f4")
    for mode in ["linear", "nearest"]:
        for padding in ["zeros", "border", "reflection"]:
            case(f"3d_{mode}_{padding}", "GridSample", [volume, places], opset=20, mode=mode, padding_mode=padding, atol=1e-5)
    rois = np.array([[0, 0, 3, 2], [1.5, 0.5, 6, 7], [-2, -1, 2.5, 3], [3, 3, 3.1, 3.2]], "f4")
    image = np.array([0, 1, 0, 1])
    for mode in ["avg", "max"]:
        for ratio in [0, 2]:
            for opset, how in [(10, {}), (16, {}), (16, dict(coordinate_transformation_mode="output_half_pixel"))]:
                case(f"{mode}{ratio}_opset{opset}_{len(how)}", "RoiAlign", [x, rois, image], opset=opset, mode=mode, sampling_ratio=ratio,
                     output_height=2, output_width=3, spatial_scale=0.7, atol=1e-5, **how)
    numbered = np.concatenate([image[:, None].astype("f4"), rois], 1)
    case("scaled", "MaxRoiPool", [x, numbered], pooled_shape=[2, 3], spatial_scale=0.7)
    case("small", "MaxRoiPool", [x, numbered], pooled_shape=[4, 1])


def einsum():
    def one(equation, *shapes, dtype="f4"):
        operands = [(rng.standard_normal(s) * 3).astype(dtype) for s in shapes]
        want = np.asarray(np.einsum(equation, *[o.astype("f8") for o in operands], optimize=False)).astype(dtype)
        case(equation.replace(" ", ""), "Einsum", operands, opset=12, want=[want], atol=1e-4, equation=equation.replace(" ", ""))

    for equation, *shapes in [
        ("ij->ji", (3, 4)), ("ij->", (3, 4)), ("ij->j", (3, 4)), ("ii->i", (4, 4)), ("ii->", (4, 4)), ("ii", (4, 4)), ("ji", (3, 4)),
        ("bii->bi", (2, 3, 3)), ("iij->j", (3, 3, 2)), ("i,i->", (5,), (5,)), ("i,j->ij", (3,), (4,)), ("i,j", (3,), (4,)),
        ("ij,jk", (3, 4), (4, 5)), ("ij,jk->ki", (3, 4), (4, 5)), ("ij,ij->ij", (3, 4), (3, 4)), ("ij,ij->", (3, 4), (3, 4)),
        ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)), ("bhwc,hkc->bhwk", (2, 3, 2, 4), (3, 5, 4)), ("bqhd,bkhd->bhqk", (2, 3, 2, 4), (2, 5, 2, 4)),
        ("...ij,...jk->...ik", (2, 3, 2, 4), (2, 3, 4, 3)), ("...ij,jk", (2, 3, 4), (4, 3)), ("i...->...", (3, 2, 4)), ("i...j->j...i", (3, 2, 4)),
        ("...,...->...", (2, 3), (2, 3)), ("...,...", (2, 1), (3,)), ("ij,kl->ij", (2, 3), (4, 2)), ("ij,jk,kl->il", (2, 3), (3, 4), (4, 2)),
        ("a,b,c->", (2,), (3,), (4,)), ("ab,bc,ac->b", (2, 3), (3, 4), (2, 4)), (",ij->ij", (), (2, 3)), ("->", ()), ("i,i,i->i", (4,), (4,), (4,)),
        ("ij->i", (3, 0)), ("ij,jk->ik", (2, 0), (0, 3)), ("Ab,bA->A", (2, 3), (3, 2)), ("zA", (3, 2)),
    ]:
        one(equation, *shapes)
    one("ij,jk->ik", (3, 4), (4, 2), dtype="i4")
    one("ij,j->i", (3, 4), (4,), dtype="i1")
    one("ij,jk->ik", (3, 4), (4, 2), dtype="f8")
    case("spaces", "Einsum", [f32(3, 4)], opset=12, equation="ij->ji")


def fourier():
    def parts(z, dtype="f4"):
        return np.stack([z.real, z.imag], -1).astype(dtype)

    for n in [8, 7, 10]:
        z = rng.standard_normal((2, n)) + 1j * rng.standard_normal((2, n))
        x = parts(z)
        z = x[..., 0].astype("f8") + 1j * x[..., 1]
        real = x[..., :1]
        for opset, axis in [(17, dict(axis=1)), (20, {})]:
            one = lambda label, op_inputs, want, **attrs: case(f"{label}{n}", "DFT", op_inputs, opset=opset, want=[want], atol=1e-5, **axis, **attrs)
            one("complex", [x], parts(np.fft.fft(z)))
            one("inverse", [x], parts(np.fft.ifft(z)), inverse=1)
            one("longer", [x, np.array(n + 3)], parts(np.fft.fft(z, n + 3)))
            one("shorter", [x, np.array(n - 3)], parts(np.fft.fft(z, n - 3)))
            one("real", [real], parts(np.fft.fft(real[..., 0])))
            one("onesided", [real], parts(np.fft.rfft(real[..., 0])), onesided=1)
            one("back", [x], np.fft.irfft(z)[..., None].astype("f4"), onesided=1, inverse=1)
            one("back_odd", [x, np.array(2 * n - 1)], np.fft.irfft(z, 2 * n - 1)[..., None].astype("f4"), onesided=1, inverse=1)
            one("back_shorter", [x, np.array(n)], np.fft.irfft(z, n)[..., None].astype("f4"), onesided=1, inverse=1)
    x = f32(3, 4, 5, 1)
    case("axis0", "DFT", [x, None, np.array(0)], opset=20, want=[parts(np.fft.fft(x[..., 0], axis=0))], atol=1e-5)
    case("axis1", "DFT", [x, np.array(6), np.array(-3)], opset=20, onesided=1, want=[parts(np.fft.rfft(x[..., 0], 6, axis=1))], atol=1e-5)
    x = rng.standard_normal((2, 6, 2))
    case("f64", "DFT", [x], opset=20, want=[parts(np.fft.fft(x[..., 0] + 1j * x[..., 1]), "f8")], rtol=1e-13, atol=1e-13)
    signal, window = f32(2, 20, 1), f32(7)
    frames = np.stack([signal[:, i:i + 7, 0] for i in range(0, 14, 3)], 1)
    args = dict(opset=17, atol=1e-5)
    case("window", "STFT", [signal, np.array(3), window], want=[parts(np.fft.rfft(frames * window))], **args)
    case("frames", "STFT", [signal, np.array(3), None, np.array(7)], onesided=0, want=[parts(np.fft.fft(frames))], **args)
    case("both", "STFT", [signal, np.array(3), window, np.array(7)], want=[parts(np.fft.rfft(frames * window))], **args)
    for bands, n, rate, low, high in [(8, 64, 8000, 0.0, 4000.0), (5, 31, 16000, 300.0, 6000.0)]:
        numbers = [np.array(v) for v in (bands, n, rate)] + [np.array(v, "f4") for v in (low, high)]
        case("mel", "MelWeightMatrix", numbers, opset=17)


def boxes():
    corners = rng.random((2, 12, 4)).astype("f4")
    scores = rng.random((2, 3, 12)).astype("f4")
    limits = lambda n, iou, score: [np.array([n]), np.array([iou], "f4"), np.array([score], "f4")]
    for center in [0, 1]:
        for n, iou, score in [(3, 0.3, 0.2), (20, 0.05, 0.0), (20, 0.9, 0.5), (0, 0.5, 0.5)]:
            case(f"{center}_{n}", "NonMaxSuppression", [corners, scores, *limits(n, iou, score)], opset=11, center_point_box=center)
    case("ties", "NonMaxSuppression", [corners, np.round(scores, 1), *limits(20, 0.2, 0.3)], opset=11)
    case("no_limits", "NonMaxSuppression", [corners, scores], opset=11)


def ms(label, op, inputs, **attrs):
    """A case of an op of the com.microsoft domain, as ONNX Runtime computes it."""
    case(label, op, inputs, opset=1, domain="com.microsoft", **attrs)


def ms_rotary():
    cos, sin = np.cos(f32(11, 4)), np.sin(f32(11, 4))
    positions = rng.integers(0, 11, (2, 3))
    for interleaved in [0, 1]:
        ms(f"3d_{interleaved}", "RotaryEmbedding", [f32(2, 3, 32), positions, cos, sin], interleaved=interleaved)
        ms(f"offset_{interleaved}", "RotaryEmbedding", [f32(2, 3, 32), np.array([5]), cos, sin], interleaved=interleaved)
        ms(f"4d_{interleaved}", "RotaryEmbedding", [f32(2, 4, 3, 8), positions, cos, sin], interleaved=interleaved)
        ms(f"part_{interleaved}", "RotaryEmbedding", [f32(2, 3, 48), positions, cos, sin], interleaved=interleaved, num_heads=4,
           rotary_embedding_dim=8)


def ms_gelu():
    x, bias = 2 * f32(2, 3, 8), f32(8)
    ms("plain", "Gelu", [x])
    ms("bias", "BiasGelu", [x, bias])
    ms("plain", "FastGelu", [x], atol=2e-6)
    ms("bias", "FastGelu", [x, bias], atol=2e-6)
    ms("plain", "QuickGelu", [x])
    ms("alpha", "QuickGelu", [x], alpha=0.7)


def ms_skip_norm():
    x, skip, gain, offset, bias = f32(2, 3, 16), f32(2, 3, 16), f32(16), f32(16), f32(16)
    keep = dict(outputs=4, compare=[0, 3], atol=2e-6)
    ms("plain", "SkipLayerNormalization", [x, skip, gain, offset], epsilon=1e-5, **keep)
    ms("bias", "SkipLayerNormalization", [x, skip, gain, offset, bias], epsilon=1e-5, **keep)
    ms("no_offset", "SkipLayerNormalization", [x, skip[:1], gain], **keep)
    ms("rows", "SkipLayerNormalization", [x, skip[0], gain, None, bias], epsilon=0.1, **keep)
    ms("plain", "SkipSimplifiedLayerNormalization", [x, skip, gain], epsilon=1e-5, **keep)
    ms("bias", "SkipSimplifiedLayerNormalization", [x, skip, gain, bias], epsilon=0.1, **keep)
    ms("2d", "SkipSimplifiedLayerNormalization", [x[0], skip[0], gain], **keep)
    ms("one_result", "SkipSimplifiedLayerNormalization", [x, skip, gain], atol=2e-6)
    ms("f16", "SkipSimplifiedLayerNormalization", [a.astype("f2") for a in [x, skip, gain]], outputs=4, compare=[0, 3],
       rtol=3e-3, atol=3e-3)
    z = x.astype("f8")
    inverse = 1 / np.sqrt((z * z).mean(-1, keepdims=True) + 1e-3)
    case("both_results", "SimplifiedLayerNormalization", [x, gain], outputs=2, opset=1, epsilon=1e-3,
         want=[(z * inverse * gain).astype("f4"), inverse.astype("f4")])


def ms_embed():
    ids, segments = rng.integers(0, 9, (2, 5)).astype("i4"), rng.integers(0, 2, (2, 5)).astype("i4")
    words, positions, kinds, gain, offset = f32(9, 16), f32(7, 16), f32(2, 16), f32(16), f32(16)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], "i4")
    keep = dict(outputs=3, epsilon=1e-5, atol=2e-6)
    ms("all", "EmbedLayerNormalization", [ids, segments, words, positions, kinds, gain, offset, mask], **keep)
    ms("no_mask", "EmbedLayerNormalization", [ids, segments, words, positions, kinds, gain, offset], **keep)
    ms("no_segments", "EmbedLayerNormalization", [ids, None, words, positions, None, gain, offset, mask], **keep)
    own = rng.integers(0, 7, (2, 5)).astype("i4")
    ms("positions", "EmbedLayerNormalization", [ids, None, words, positions, None, gain, offset, None, own], **keep)
    ms("shared_positions", "EmbedLayerNormalization", [ids, None, words, positions, None, gain, offset, None, own[:1]], **keep)


def ms_fused():
    for label, a, b, attrs in [
        ("plain", (2, 3, 4), (4, 5), dict(alpha=0.5)),
        ("a", (2, 4, 3), (2, 4, 5), dict(transA=1)),
        ("b", (2, 3, 4), (5, 4), dict(transB=1, alpha=2.0)),
        ("both", (4, 3), (5, 4), dict(transA=1, transB=1)),
        ("batch_a", (3, 2, 6, 4), (2, 6, 4, 5), dict(transBatchA=1)),
        ("batch_b", (2, 6, 3, 4), (4, 2, 6, 5), dict(transBatchB=1)),
        ("batch_both", (3, 2, 4), (4, 2, 5), dict(transBatchA=1, transBatchB=1)),
        ("batch_turned", (4, 2, 6, 3), (2, 6, 4, 5), dict(transBatchA=1, transA=1)),
    ]:
        ms(label, "FusedMatMul", [f32(*a), f32(*b)], **attrs)
    a, b, c = f32(3, 4), f32(5, 4), f32(5)
    ms("relu", "FusedGemm", [a, b, c], transB=1, activation="Relu")
    ms("leaky", "FusedGemm", [a, b, c], transB=1, alpha=0.5, activation="LeakyRelu", activation_alpha=0.3)
    x, w, bias = f32(1, 2, 6, 5), f32(3, 2, 3, 3), f32(3)
    for activation, params in [("Relu", None), ("Sigmoid", None), ("Tanh", None), ("LeakyRelu", [0.2]), ("Clip", [-0.5, 0.5]),
                               ("HardSigmoid", [0.2, 0.5])]:
        more = {} if params is None else {"activation_params": params}
        ms(activation.lower(), "FusedConv", [x, w, bias], activation=activation, pads=[1, 1, 1, 1], atol=1e-5, **more)
    ms("sum", "FusedConv", [x, w, bias, f32(1, 3, 4, 3)], activation="Relu", atol=1e-5)


def ms_integer():
    u8 = lambda *shape: rng.integers(0, 256, shape).astype("u1")
    # Of 7 bits: without VNNI, the runtime's sums of two products of u8 and i8 saturate at 16 bits.
    i8 = lambda *shape: rng.integers(-64, 64, shape).astype("i1")
    s = lambda *shape: (rng.random(shape) + 0.5).astype("f4") * np.float32(0.1)
    close = dict(rtol=1e-5, atol=1e-4)
    for b, zb in [(u8(8, 5), u8()), (i8(8, 5), i8()), (i8(8, 5), i8(5)), (u8(8, 5), None)]:
        scale = s(*(zb.shape if zb is not None else ()))
        label = f"{b.dtype}_{'none' if zb is None else zb.ndim}"
        ms(label, "DynamicQuantizeMatMul", [f32(2, 3, 8), b, scale] + ([] if zb is None else [zb]), **close)
        ms(label + "_bias", "DynamicQuantizeMatMul", [f32(3, 8), b, scale, zb, f32(5)], **close)
        ms(label, "MatMulIntegerToFloat", [u8(2, 3, 8), b, s(), scale, u8()] + ([] if zb is None else [zb]), **close)
        ms(label + "_bias", "MatMulIntegerToFloat", [u8(3, 8), b, s(), scale, None, zb, f32(5)], **close)
    ms("signed", "MatMulIntegerToFloat", [i8(3, 8), i8(8, 5), s(), s(5), i8(), i8(5)], **close)
    for a, b, y in [(u8(3, 8), u8(8, 5), u8()), (u8(3, 8), i8(8, 5), u8()), (i8(3, 8), i8(8, 5), i8())]:
        za, zb = [rng.integers(0, 100, ()).astype(t.dtype) for t in [a, b]]
        c = rng.integers(-900, 900, (5,)).astype("i4")
        label = f"{a.dtype}_{b.dtype}"
        ms(label, "QGemm", [a, s(), za, b, s(), zb], **close)
        ms(label + "_bias", "QGemm", [a, s(), za, b, s(), zb, c], **close)
        ms(label + "_turned", "QGemm", [a.T.copy(), s(), za, b.T.copy(), s(5), rng.integers(0, 9, (5,)).astype(b.dtype), c, s() * 90, y],
           transA=1, transB=1, rtol=0, atol=0)
    ms("alpha", "QGemm", [u8(3, 8), s(), u8(), u8(8, 5), s(), u8()], alpha=0.5, **close)


def ms_qlinear():
    draw = {"u1": (0, 256), "i1": (-128, 128)}
    for kind in ["u1", "i1"]:
        q = lambda *shape: rng.integers(*draw[kind], shape).astype(kind)
        s = lambda of=0.05: np.float32((rng.random() + 0.5) * of)
        exact = dict(rtol=0, atol=0)
        for op, out in [("QLinearAdd", 0.1), ("QLinearMul", 0.2)]:
            ms(f"{kind}", op, [q(2, 3, 8), s(), q(), q(2, 3, 8), s(), q(), s(out), q()], **exact)
            ms(f"{kind}_row", op, [q(2, 3, 8), s(), q(), q(8), s(), q(), s(out), q()], **exact)
            ms(f"{kind}_scalar", op, [q(1), s(), q(), q(4, 8), s(), q(), s(out), q()], **exact)
        for op, attrs in [("QLinearSigmoid", {}), ("QLinearLeakyRelu", {"alpha": 0.2}), ("QLinearLeakyRelu", {})]:
            ms(f"{kind}{len(attrs)}", op, [q(4, 9), s(), q(), s(0.01 if "Sig" in op else 0.05), q()], **exact, **attrs)
            ms(f"{kind}{len(attrs)}_plain", op, [q(4, 9), s(), None, s(0.01), None], **exact, **attrs)
        zero = np.array(0 if kind == "u1" else -128, kind)
        for opset, axis in [(13, -1), (13, 1), (11, 1)]:
            # The runtime's table of exponentials moves some results by one code.
            ms(f"{kind}_{opset}_{axis}", "QLinearSoftmax", [q(2, 3, 5), s(0.02), q(), np.float32(1 / 256), zero], axis=axis,
               opset_=opset, rtol=0, atol=1)
        ms(f"{kind}", "QLinearAveragePool", [q(1, 2, 7, 6), s(), q(), s(), q()], kernel_shape=[3, 2], strides=[2, 1], **exact)
        ms(f"{kind}_pads", "QLinearAveragePool", [q(1, 2, 7, 6), s(), q(), s(), q()], kernel_shape=[3, 3], pads=[1, 1, 1, 1],
           count_include_pad=1, **exact)
        ms(f"{kind}", "QLinearGlobalAveragePool", [q(2, 3, 5, 4), s(), q(), s(), q()], channels_last=0, **exact)
        ms(f"{kind}", "QLinearConcat", [s(), q(), q(2, 3), s(), q(), q(2, 4), s(), q(), q(2, 1), s(), q()], axis=1, **exact)
        ms(f"{kind}", "QLinearWhere", [rng.random((3, 4)) < 0.5, q(3, 4), s(), q(), q(4), s(), q(), s(), q()], **exact)
        x, xs, xz, ys = q(2, 3, 5), s(), q(), s()
        # The runtime has no kernel for the mean: this is its definition.
        mean = np.rint(((x.astype("f8") - xz) * xs).mean(1) / ys)
        low, high = draw[kind]
        ms(f"{kind}", "QLinearReduceMean", [x, xs, xz, ys, q() * 0], axes=[1], keepdims=0, want=[np.clip(mean, low, high - 1).astype(kind)],
           **exact)
        scale, zeros = (rng.random(3) + 0.5).astype("f4"), q(3)
        ms(f"{kind}", "DequantizeLinear", [q(3, 5), scale, zeros], axis=0)
        ms(f"{kind}_scalar", "DequantizeLinear", [q(3, 5), s(), q()])
        ms(f"{kind}", "QuantizeLinear", [f32(5, 3) * 90, scale, zeros], axis=1, **exact)


def ms_attention():
    heads, size, rows, batch = 3, 4, 5, 2
    hidden = heads * size
    x, w, bias = f32(batch, rows, 8), f32(8, 3 * hidden), f32(3 * hidden)
    close = dict(num_heads=heads, atol=5e-6, rtol=2e-5)
    past = f32(2, batch, heads, 4, size)
    i4 = lambda *v: np.array(v, "i4")
    ms("plain", "Attention", [x, w, bias], **close)
    # Without a bias this version of the runtime crashes.
    want = run_ort("Attention", 1, dict(num_heads=heads, scale=0.3), [x, w, 0 * bias], 1, "com.microsoft")
    ms("no_bias", "Attention", [x, w], scale=0.3, want=want, **close)
    ms("causal", "Attention", [x, w, bias], unidirectional=1, **close)
    ms("ends", "Attention", [x, w, bias, i4(3, 5)], **close)
    ms("ends_and_starts", "Attention", [x, w, bias, i4(3, 5, 1, 2)], **close)
    mask = i4([1, 1, 0, 1, 0], [1, 1, 1, 1, 1])
    ms("mask", "Attention", [x, w, bias, mask], unidirectional=1, **close)
    ms("nothing_left", "Attention", [x, w, bias, mask * 0], **close)
    ms("nothing_left_causal", "Attention", [x, w, bias, mask * 0], unidirectional=1, **close)
    ms("mask_by_row", "Attention", [x, w, bias, (rng.random((batch, rows, rows)) < 0.7).astype("i4")], mask_filter_value=-2.0, **close)
    ms("sizes", "Attention", [x, f32(8, 2 * hidden + 18), f32(2 * hidden + 18), mask], qkv_hidden_sizes=[hidden, hidden, 18], **close)
    ms("scores", "Attention", [x, w, bias, mask, None, f32(1, heads, rows, rows)], **close)
    ms("past", "Attention", [x, w, bias, None, past], outputs=2, unidirectional=1, **close)
    ms("past_and_mask", "Attention", [x, w, bias, (rng.random((batch, rows + 4)) < 0.7).astype("i4"), past], outputs=2, **close)
    ms("empty_past", "Attention", [x, w, bias, mask, past[:, :, :, :0]], outputs=2, unidirectional=1, **close)
    u8, i8 = rng.integers(0, 256, (batch, rows, 8)).astype("u1"), rng.integers(-64, 64, (8, 3 * hidden)).astype("i1")
    s = lambda *shape: (rng.random(shape) + 0.5).astype("f4") * np.float32(0.02)
    close["atol"] = 2e-5
    ms("plain", "QAttention", [u8, i8, bias, s(), s(), None, np.array(120, "u1"), np.array(3, "i1")], **close)
    ms("columns", "QAttention", [u8, i8, bias, s(), s(3 * hidden), i4(3, 5), np.array(120, "u1"), np.zeros(3 * hidden, "i1")], **close)
    ms("past", "QAttention", [u8, i8, bias, s(), s(), None, np.array(9, "u1"), np.array(3, "i1"), past], outputs=2, unidirectional=1,
       **close)


def ms_multi_head():
    heads, size, rows, keys, batch = 3, 4, 5, 7, 2
    hidden, wide = heads * size, heads * 6
    q, k, v = f32(batch, rows, hidden), f32(batch, keys, hidden), f32(batch, keys, wide)
    close = dict(num_heads=heads, atol=5e-6, rtol=2e-5)
    bias = f32(2 * hidden + wide)
    ms("plain", "MultiHeadAttention", [q, k, v], **close)
    ms("bias", "MultiHeadAttention", [q, k, v, bias], scale=0.3, **close)
    ms("lengths", "MultiHeadAttention", [q, k, v, bias, np.array([4, 7], "i4")], **close)
    mask = (rng.random((batch, keys)) < 0.7).astype("i4")
    ms("mask", "MultiHeadAttention", [q, k, v, None, mask], **close)
    ms("mask_by_row", "MultiHeadAttention", [q, k, v, None, (rng.random((batch, rows, keys)) < 0.7).astype("i4")], **close)
    ms("scores", "MultiHeadAttention", [q, k, v, None, mask, f32(batch, 1, rows, keys)], **close)
    own = f32(batch, rows, hidden)
    ms("causal", "MultiHeadAttention", [q, own, own], unidirectional=1, **close)
    past = [f32(batch, heads, 3, size), f32(batch, heads, 3, size)]
    ms("past", "MultiHeadAttention", [q, own, own, f32(3 * hidden), None, None, *past], outputs=3, **close)
    ms("past_causal", "MultiHeadAttention", [q, own, own, None, None, f32(1, heads, rows, rows + 3), *past], outputs=3, unidirectional=1,
       **close)
    ms("empty_past", "MultiHeadAttention", [q, own, own, None, None, None, *[p[:, :, :0] for p in past]], outputs=3, unidirectional=1,
       **close)
    ms("present", "MultiHeadAttention", [q, own, own, f32(3 * hidden)], outputs=3, **close)
    four = [f32(batch, heads, keys, size), f32(batch, heads, keys, size)]
    ms("projected", "MultiHeadAttention", [q, *four], **close)
    # The runtime does not take packed forms on a CPU: they are what their parts give.
    parts = [f32(batch, rows, heads, size) for _ in range(3)]
    flat = [p.reshape(batch, rows, hidden) for p in parts]
    attrs = dict(close)
    bias = f32(3 * hidden)
    want = run_ort("MultiHeadAttention", 1, dict(num_heads=heads), [*flat, bias], 1, "com.microsoft")
    ms("packed", "MultiHeadAttention", [np.stack(parts, 3), None, None, bias], want=want, **attrs)
    ms("packed_kv", "MultiHeadAttention", [flat[0], np.stack(parts[1:], 3), None, bias], want=want, **attrs)


def ms_group_query():
    heads, kv, size, batch = 4, 2, 16, 2
    i4 = lambda *v: np.array(v, "i4")
    total = lambda n: np.array(n, "i4")
    cos, sin = np.cos(f32(10, size // 2)), np.sin(f32(10, size // 2))
    close = dict(num_heads=heads, kv_num_heads=kv, atol=5e-6, rtol=2e-5)

    def one(label, rows=3, old=0, buffer=None, batch=1, packed=False, lengths=None, rest=(), outputs=3, compare=None, half=False, **attrs):
        q, k, v = f32(batch, rows, heads * size), f32(batch, rows, kv * size), f32(batch, rows, kv * size)
        given = [np.concatenate([q, k, v], -1), None, None] if packed else [q, k, v]
        cache = [None, None] if buffer is None else [f32(batch, kv, buffer, size), f32(batch, kv, buffer, size)]
        lengths = [old + rows] * batch if lengths is None else lengths
        inputs = [*given, *cache, i4(*[n - 1 for n in lengths]), total(max(max(lengths), rows)), *rest]
        if half:
            inputs = [x.astype("f2") if x is not None and x.dtype == np.float32 else x for x in inputs]
            attrs |= dict(rtol=3e-3, atol=3e-3)
        ms(label, "GroupQueryAttention", inputs, outputs=outputs, compare=compare, **(close | attrs))

    angles = [cos, sin]
    one("prompt", batch=2)
    one("packed", packed=True)
    one("rotary", rest=angles, do_rotary=1)
    one("rotary_packed", batch=2, rest=angles, packed=True, do_rotary=1, rotary_interleaved=1)
    one("empty_past", buffer=0, rest=angles, do_rotary=1)
    # What of a buffer lies behind the last position is not defined.
    one("buffer", batch=2, buffer=6, rest=angles, do_rotary=1, compare=[0])
    one("token", rows=1, old=4, buffer=4, rest=angles, do_rotary=1)
    one("token_packed", rows=1, old=4, buffer=4, rest=angles, packed=True, do_rotary=1, scale=0.3)
    one("token_in_buffer", rows=1, old=4, buffer=6, rest=angles, do_rotary=1, compare=[0])
    one("ragged_tokens", batch=2, rows=1, old=4, buffer=6, lengths=[3, 5], rest=angles, do_rotary=1, compare=[0])
    one("ragged_prompt", batch=2, lengths=[3, 2], rest=angles, do_rotary=1)
    one("several", rows=2, old=3, buffer=3, rest=angles, do_rotary=1)
    for window in [1, 2]:
        one(f"window{window}", local_window_size=window)
        one(f"window{window}_token", rows=1, old=4, buffer=4, local_window_size=window)
    one("softcap", softcap=1.5)
    one("softcap_bias", softcap=1.5, rest=[None, None, None, f32(1, heads, 3, 3)])
    one("bias", batch=2, rest=[None, None, None, f32(batch, 1, 3, 3)])
    one("bias_past", rows=2, old=3, buffer=3, rest=[None, None, None, f32(1, heads, 2, 5)])
    one("smooth", smooth_softmax=1)
    one("sinks", rest=[None, None, None, None, f32(heads)])
    one("sinks_window", rest=[None, None, None, None, f32(heads)], local_window_size=2, softcap=2.0)
    positions = np.tile(np.arange(3), (batch, 1))
    one("positions", batch=2, rest=[*angles, positions], do_rotary=1)
    one("first_position", batch=2, rest=[*angles, positions + 2], do_rotary=1)
    one("token_positions", batch=2, rows=1, old=4, buffer=4, rest=[*angles, np.array([[3], [9]])], do_rotary=1)
    one("scores", qk_output=1, outputs=4)
    one("scores_biased", qk_output=1, outputs=4, softcap=2.0, rest=[None, None, None, f32(1, heads, 3, 3)])
    one("weights", qk_output=2, outputs=4, softcap=2.0)
    one("bidirectional", causal=0)
    one("half", rows=2, old=3, buffer=3, rest=angles, do_rotary=1, half=True)


FAMILIES = [matmul, softmax, normalization, dequantize, matmul_nbits, attention, rotary, conv, pool, channel_norm, recurrent, qdq,
             integer, gather_block, conv_transpose, integer_conv, resize, sample, einsum, fourier, boxes, ms_rotary, ms_gelu,
             ms_skip_norm, ms_embed, ms_fused, ms_integer, ms_qlinear, ms_attention, ms_multi_head, ms_group_query]

if __name__ == "__main__":
    for family in FAMILIES:
        if len(sys.argv) > 1 and family.__name__ not in sys.argv[1:]:
            continue
        rng = np.random.default_rng(7)
        lines = []
        family()
        path = OUT / f"{family.__name__}.cases"
        path.write_text("\n".join(lines) + "\n")
        print(path.name, sum(line.startswith("case ") for line in lines), "cases,", path.stat().st_size, "bytes")
