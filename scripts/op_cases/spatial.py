"""Convolution, pooling, resampling, transforms and contractions."""
import numpy as np

from harness import case, f32, rng, run_ort


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


FAMILIES = [conv, pool, channel_norm, conv_transpose, integer_conv, resize, sample, einsum, fourier, boxes]
