"""Products, normalization, attention, recurrence and quantization of the default domain, and MatMulNBits."""
import ml_dtypes
import numpy as np
import onnx
import onnx.reference
from onnx import TensorProto as T, helper as h

from harness import NAMES, case, f32, rng


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


FAMILIES = [matmul, softmax, normalization, dequantize, matmul_nbits, attention, rotary, recurrent, qdq, integer,
            gather_block]
