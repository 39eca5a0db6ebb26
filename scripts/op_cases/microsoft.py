"""The com.microsoft ops of exported language models."""
import numpy as np

from harness import case, f32, rng, run_ort


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


FAMILIES = [ms_rotary, ms_gelu, ms_skip_norm, ms_embed, ms_fused, ms_integer, ms_qlinear, ms_attention, ms_multi_head,
            ms_group_query]
