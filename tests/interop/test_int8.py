"""Weights and activations in 8 bits: what ONNX Runtime fuses of them, what they cost, and ranges against numpy's."""

import collections
import gzip
import json
import pathlib
import re
import tempfile
import unittest

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from common import TESTDATA, logits, perplexity, qcc, session, shared

WEIGHTS = "rtn{bits=7, group=-1, symmetric=true, narrow=true}"
CALIB = ["--calib", TESTDATA / "calib_ids.npy", "--calib-samples", 16]
# Small products too.
INSERT = "insert-fake-quant{min_size=0}"


def fused(path, folder):
    """How many ops of each type ONNX Runtime runs for a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return collections.Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


def product(folder, x, w=None):
    """A model of one product, and the file of its inputs."""
    if w is None:
        w = np.random.default_rng(1).standard_normal((x.shape[1], 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", x.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", w.shape[1]])],
        [numpy_helper.from_array(w, "w")],
    )
    model, data = folder / "product.onnx", folder / "x.npz"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), model)
    np.savez(data, x=x)
    return model, data


class Int8(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def quantized(self, model, calib, samples, calibrate="calibrate", insert=INSERT):
        out = self.folder / "int8.onnx"
        passes = f"{WEIGHTS},{calibrate},{insert},pack-qdq"
        qcc(model, "--pass", passes, "--calib", calib, "--calib-samples", samples, "--check", "--quiet", "-o", out)
        return out

    def grid(self, x, calibrate, insert=INSERT):
        """Scale and zero point of the input of a product."""
        model, data = product(self.folder, x)
        m = onnx.load(self.quantized(model, data, len(x), calibrate, insert))
        held = {i.name: numpy_helper.to_array(i) for i in m.graph.initializer}
        node = next(n for n in m.graph.node if n.op_type == "QuantizeLinear")
        return float(held[node.input[1]]), int(held[node.input[2]])

    def test_ranges(self):
        x = np.random.default_rng(0).gamma(2.0, 1.0, (4096, 16)).astype(np.float32) - 1.0
        low, high = float(x.min()), float(x.max())
        scale, zero = self.grid(x, "calibrate")
        self.assertAlmostEqual(scale, (high - low) / 255, delta=1e-6)
        self.assertEqual(zero, round(-low / scale))
        scale, zero = self.grid(x, "calibrate", "insert-fake-quant{activations=int8, symmetric=true, min_size=0}")
        self.assertAlmostEqual(scale, max(high, -low) / 127, delta=1e-6)
        self.assertEqual(zero, 0)
        low, high = np.percentile(x, [0.5, 99.5])
        scale, _ = self.grid(x, "calibrate{method=percentile, percentile=99}")
        self.assertAlmostEqual(scale, (high - low) / 255, delta=0.01 * scale)
        # A brute-force search over ranges finds none whose rounding errs by 1 % less.
        scale, zero = self.grid(x, "calibrate{method=mse}")
        error = lambda s, z: float(((np.clip(np.rint(x / s) + z, 0, 255) - z) * s - x).__pow__(2).mean())
        best = min(error((h + 1.0) / 255, round(255 / (h + 1.0))) for h in np.linspace(2, x.max(), 200))
        self.assertLess(error(scale, zero), 1.01 * best)

    def test_a_convolutional_net_runs_in_integers(self):
        folder = shared("mnist")
        read = lambda name, skip: np.frombuffer(gzip.open(folder / name).read()[skip:], np.uint8)
        pictures = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
        pictures = ((pictures / 255 - 0.1307) / 0.3081).astype(np.float32)
        labels = read("t10k-labels-idx1-ubyte.gz", 8)
        np.savez(self.folder / "calib.npz", **{"input.1": pictures[9872:]})
        for method in ("minmax", "percentile", "mse", "entropy"):
            calibrate = f"calibrate{{method={method}}}"
            out = self.quantized(folder / "mnist.onnx", self.folder / "calib.npz", 128, calibrate)
            ops = fused(out, self.folder)
            self.assertEqual((ops["QLinearConv"], ops["QGemm"], ops["Conv"], ops["Gemm"]), (3, 2, 0, 0), ops)
            s = session(out)
            found = [s.run(None, {"input.1": pictures[i : i + 1]})[0].argmax() for i in range(1000)]
            self.assertGreaterEqual(np.mean(found == labels[:1000]), 0.97, method)

    def test_sums_and_pools_of_a_residual_net_are_integers(self):
        model = shared("resnet20/resnet20.onnx")
        x = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
        np.savez(self.folder / "calib.npz", **{session(model).get_inputs()[0].name: x})
        ops = fused(self.quantized(model, self.folder / "calib.npz", 16), self.folder)
        self.assertEqual((ops["QLinearConv"], ops["Conv"]), (19, 0), ops)
        self.assertGreaterEqual(ops["QLinearAdd"], 7)

    def test_every_product_of_a_language_model_is_one_of_integers(self):
        model = TESTDATA / "tinylm.onnx"
        out = self.quantized(model, TESTDATA / "calib_ids.npy", 16, "calibrate{method=percentile}")
        ops = fused(out, self.folder)
        weights = sum(n.op_type == "DequantizeLinear" and len(n.attribute) > 0 for n in onnx.load(out).graph.node)
        self.assertEqual(ops["MatMulIntegerToFloat"], weights, ops)
        ids = np.load(TESTDATA / "eval_ids.npy")[:16]
        float_, int8 = (perplexity(logits(path, ids), ids) for path in (model, out))
        self.assertLess(int8, 1.02 * float_)

    def pictures(self):
        """Noise for resnet20, and the file of it."""
        x = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
        np.savez(self.folder / "calib.npz", input=x)
        return x, self.folder / "calib.npz"

    def test_the_runtime_fuses_what_the_report_says(self):
        _, calib = self.pictures()
        out = self.folder / "said.onnx"
        how = ["--pass", f"{WEIGHTS},calibrate,{INSERT},pack-qdq", "--calib", calib, "-o", out, "--json"]
        notes = json.loads(qcc(shared("resnet20/resnet20.onnx"), *how))["notes"]
        (said,) = [n for n in notes if n.startswith("ONNX Runtime fuses the islands into")]
        found = {name: int(n) for n, name in re.findall(r"(\d+) x (\w+)", said)}
        ops = fused(out, self.folder)
        self.assertGreaterEqual(found["QLinearAdd"], 9)
        self.assertEqual({name: ops[name] for name in found}, found, ops)
        floats = ("Conv", "Add", "AveragePool", "Gemm", "MatMul")
        self.assertEqual(sum(n for name, n in ops.items() if name in floats), 0, ops)

    def test_operators_are_what_the_runtime_fuses(self):
        x, calib = self.pictures()
        model, both = shared("resnet20/resnet20.onnx"), []
        for packer in ("pack-qdq", "pack-operators"):
            out = self.folder / f"{packer}.onnx"
            passes = f"{WEIGHTS},calibrate,{INSERT},{packer}"
            qcc(model, "--pass", passes, "--calib", calib, "--calib-samples", 2, "--check", "-o", out)
            both.append(session(out).run(None, {"input": x})[0])
        written = collections.Counter(n.op_type for n in onnx.load(out).graph.node)
        self.assertEqual((written["QLinearConv"], written["QLinearAdd"], written["QGemm"]), (19, 9, 1), written)
        self.assertEqual(written["Conv"] + written["Gemm"] + written["Add"], 0)
        # Codes between two values may be rounded either way.
        off = np.linalg.norm(both[0] - both[1]) / np.linalg.norm(both[0])
        self.assertLess(off, 1e-2)

    def sizes(self, model):
        """The nodes of products with constant weights, those of at least 2^15 elements and the others."""
        graph = onnx.load(model).graph
        count = {i.name: np.prod(i.dims) for i in graph.initializer if len(i.dims) == 2}
        count |= {n.output[0]: count[n.input[0]] for n in graph.node if n.op_type == "Transpose" and n.input[0] in count}
        found = [(count[n.input[1]], n.name) for n in graph.node if n.op_type == "MatMul" and n.input[1] in count]
        return [{name for size, name in found if (size >= 1 << 15) == large} for large in (True, False)]

    def test_small_products_stay_float_and_are_named(self):
        model, out = TESTDATA / "tinylm.onnx", self.folder / "out.onnx"
        large, small = self.sizes(model)
        said = qcc(model, "--preset", "static-int8", *CALIB, "--json", "-o", out)
        left = {l["node"]: l["why"] for l in json.loads(said)["float"]}
        self.assertLessEqual(small, set(left))
        self.assertFalse(large & set(left))
        for name in small:
            self.assertRegex(left[name], r"128 x (64|128) weights are fewer than 32768, and slower in 8 bits")
        ops = fused(out, self.folder)
        self.assertEqual(ops["MatMulIntegerToFloat"], len(large), ops)
        # Their weights are what they were: nothing is dequantized as the model runs.
        self.assertEqual(ops["DequantizeLinear"], 0, ops)
        # A model of nothing else stays what it is, and says so.
        model = shared("nano_sort_gpt/legacy_sdpa_op17.onnx")
        said = qcc(model, "--preset", "static-int8", "--calib", "random", "-o", out)
        self.assertIn("weights stay float, for the reasons that are listed", " ".join(said.split()))

    def test_a_relu_behind_a_gemm_leaves_it_one_of_integers(self):
        """The runtime makes a Gemm and a Relu or Clip whose result stays float one op of floats."""
        rng = np.random.default_rng(2)
        x, w = (rng.standard_normal(s).astype(np.float32) for s in ((64, 32), (32, 24)))
        held = [w, np.ones(24, np.float32), np.float32(0), np.float32(6)]
        held = [numpy_helper.from_array(v, name) for v, name in zip(held, ("w", "b", "low", "high"))]
        node = helper.make_node
        gemm = [node("Gemm", ["x", "w", "b"], ["h"])]
        sum_ = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["h"])]
        for front in (gemm, sum_):
            for back in (["h"], ["h", "low", "high"]):
                # In the middle of a graph, and at its end.
                for last, result in ([node("Softmax", ["a"], ["y"])], "y"), ([], "a"):
                    nodes = [*front, node("Relu" if len(back) == 1 else "Clip", back, ["a"]), *last]
                    end = lambda name, k: [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", k])]
                    graph = helper.make_graph(nodes, "gemm", end("x", 32), end(result, 24), held)
                    model, data = self.folder / "gemm.onnx", self.folder / "x.npz"
                    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
                    onnx.save(made, model)
                    np.savez(data, x=x)
                    out = self.quantized(model, data, 64)
                    ops = fused(out, self.folder)
                    self.assertEqual((ops["QGemm"], ops["Gemm"], ops["FusedGemm"]), (1, 0, 0), ops)
                    found, exact = (session(p).run(None, {"x": x})[0] for p in (out, model))
                    self.assertLess(np.linalg.norm(found - exact) / np.linalg.norm(exact), 0.03)

    def test_dynamic(self):
        model = TESTDATA / "tinylm.onnx"
        out = self.folder / "dynamic.onnx"
        qcc(model, "--preset", "dynamic-int8", "--quiet", "-o", out)
        large, small = self.sizes(model)
        self.assertEqual((len(large), len(small)), (13, 16))
        written = collections.Counter(n.op_type for n in onnx.load(out).graph.node)
        self.assertEqual(written["MatMulInteger"], len(large), written)
        ops = fused(out, self.folder)
        self.assertEqual(ops["MatMulInteger"], 0, ops)
        self.assertEqual(ops["DynamicQuantizeMatMul"] + ops["MatMulIntegerToFloat"], len(large), ops)
        ids = np.load(TESTDATA / "eval_ids.npy")[:16]
        float_, int8 = (perplexity(logits(path, ids), ids) for path in (model, out))
        self.assertLess(int8, 1.01 * float_)

    def test_a_convolution_in_floats_is_one_of_integers_inside(self):
        """The last convolution's result is an output: ConvInteger, in either way of finding ranges."""
        rng = np.random.default_rng(3)
        x, w = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3, 8, 8), (5, 3, 3, 3)))
        graph = helper.make_graph(
            [helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1])],
            "conv",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 8, 8])],
            [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.arange(5, dtype=np.float32), "b")],
        )
        model, data = self.folder / "conv.onnx", self.folder / "x.npz"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), model)
        np.savez(data, x=x)
        exact = session(model).run(None, {"x": x})[0]
        for passes in (f"calibrate,{INSERT}", "insert-fake-quant{dynamic=true, min_size=0}"):
            out = self.folder / "out.onnx"
            passes = f"{WEIGHTS},{passes},pack-operators"
            qcc(model, "--pass", passes, "--calib", data, "--calib-samples", 4, "--check", "--quiet", "-o", out)
            self.assertEqual(sum(n.op_type == "ConvInteger" for n in onnx.load(out).graph.node), 1)
            found = session(out).run(None, {"x": x})[0]
            self.assertLess(np.linalg.norm(found - exact) / np.linalg.norm(exact), 0.03, passes)

    def test_nothing_overflows_in_a_reduced_range(self):
        """All neighbours large: sums of 16 bits that saturate are off by far more than rounding."""
        rng = np.random.default_rng(5)
        w = rng.uniform(0.9, 1.0, (64, 8)).astype(np.float32) * np.where(np.arange(8) % 2, 1, -1).astype(np.float32)
        x = rng.uniform(0.9, 1.0, (16, 64)).astype(np.float32)
        model, data = product(self.folder, x, w)
        out = self.folder / "out.onnx"
        passes = f"{WEIGHTS.replace('7', '8')},reduce-range,calibrate,{INSERT},pack-qdq"
        qcc(model, "--pass", passes, "--calib", data, "--calib-samples", 16, "--quiet", "-o", out)
        m = onnx.load(out)
        held = {i.name: numpy_helper.to_array(i) for i in m.graph.initializer}
        (codes,) = [v.astype(np.int64) for v in held.values() if v.dtype == np.int8 and v.ndim == 2]
        self.assertLessEqual(np.abs(codes[1:] + codes[:-1]).max(), 128)
        found = session(out).run(None, {"x": x})[0]
        self.assertLess(np.abs(found - x.astype(np.float64) @ w).max() / np.abs(found).max(), 0.01)

    def test_statistics_are_saved_and_taken(self):
        model, ids, kept = TESTDATA / "tinylm.onnx", TESTDATA / "calib_ids.npy", self.folder / "stats.json"
        first, again = self.folder / "first.onnx", self.folder / "again.onnx"
        passes = f"calibrate{{method=entropy}},{WEIGHTS},{INSERT},pack-qdq"
        data = ["--calib", ids, "--calib-samples", 4]
        qcc(model, "--pass", passes, *data, "--stats-out", kept, "--quiet", "-o", first)
        qcc(model, "--pass", passes, "--stats-in", kept, "--quiet", "-o", again)
        graphs = [onnx.load(path).graph.SerializeToString() for path in (first, again)]
        self.assertEqual(*graphs)
        # Another way of choosing ranges needs no run either.
        qcc(model, "--pass", passes.replace("entropy", "mse"), "--stats-in", kept, "--quiet", "-o", again)
        self.assertNotEqual(graphs[0], onnx.load(again).graph.SerializeToString())
        refused = lambda *how: " ".join(qcc(model, *how, "--quiet", "-o", again, fails=1).replace("│", " ").split())
        # Quantized weights first: another model.
        other = f"{WEIGHTS},calibrate,{INSERT},pack-qdq"
        self.assertIn("they are of another model", refused("--pass", other, "--stats-in", kept))
        text = kept.read_text()
        kept.write_text(re.sub(r'"min":-?[0-9.e-]+', '"min":-1e39', text, count=1))
        self.assertIn("expected a finite range", refused("--pass", passes, "--stats-in", kept))
        kept.write_text(text[: len(text) // 2])
        self.assertIn("holds no statistics", refused("--pass", passes, "--stats-in", kept))

    def test_statistics_of_channels(self):
        """Of a convolution's input, along dim 1, against numpy's."""
        x, calib = self.pictures()
        model, kept = shared("resnet20/resnet20.onnx"), self.folder / "stats.json"
        flags = ["--calib", calib, "--calib-samples", 16, "--dry-run", "--quiet"]
        qcc(model, "--pass", "calibrate{per=channel, axis=1}", *flags, "--stats-out", kept, "--allow-noop")
        text = kept.read_text()
        found = json.loads(text)["channels"]
        self.assertEqual(len(found), len(json.loads(text)["tensors"]))
        of = found["input"]
        self.assertEqual(of["axis"], 1)
        by_channel = x.transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64)
        np.testing.assert_array_equal(np.float32(of["min"]), np.float32(by_channel.min(1)))
        np.testing.assert_array_equal(np.float32(of["max"]), np.float32(by_channel.max(1)))
        np.testing.assert_allclose(of["magnitude"], np.abs(by_channel).mean(1), rtol=1e-6)
        # What is saved is taken, and the same when it is saved again. Along another axis there are none.
        again = self.folder / "again.json"
        how = ["--stats-in", kept, "--dry-run", "--quiet", "--allow-noop"]
        qcc(model, "--pass", "calibrate{per=channel, axis=1}", *how, "--stats-out", again)
        self.assertEqual(json.loads(again.read_text())["channels"], found)
        said = qcc(model, "--pass", "calibrate{per=channel, axis=2}", *how, fails=1)
        self.assertIn("do not have its 32 channels along dim 2", " ".join(said.replace("│", " ").split()))
        said = qcc(model, "--pass", "calibrate{per=channel, axis=9}", *flags, fails=2)
        self.assertIn("no activation has a known number of channels", " ".join(said.replace("│", " ").split()))

    def test_tensorrt(self):
        x, calib = self.pictures()
        out = self.folder / "trt.onnx"
        preset = ["--preset", "static-int8", "--profile", "tensorrt", "--calib", calib]
        qcc(shared("resnet20/resnet20.onnx"), *preset, "--quiet", "-o", out)
        m = onnx.load(out)
        held = {i.name: numpy_helper.to_array(i) for i in m.graph.initializer}
        nodes = [n for n in m.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        self.assertGreater(len(nodes), 60)
        for n in nodes:
            zero = held.get(n.input[2]) if len(n.input) > 2 else held[n.input[0]][:0]
            self.assertEqual((zero.dtype, np.abs(zero).sum()), (np.int8, 0), n.name)
        biases = [n.input[2] for n in m.graph.node if n.op_type == "Conv"]
        self.assertTrue(all(held[b].dtype == np.float32 for b in biases))
        self.assertEqual(session(out).run(None, {"input": x})[0].shape, (16, 10))

    def test_codes_of_other_widths_raise_the_opset(self):
        x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
        model, data = product(self.folder, x)
        exact = session(model).run(None, {"x": x})[0]
        for kind, most in (("int16", 0.01), ("uint16", 0.01), ("int4", 0.2), ("uint4", 0.2)):
            out = self.folder / "out.onnx"
            passes = f"{WEIGHTS},calibrate,insert-fake-quant{{activations={kind}, min_size=0}},pack-qdq"
            how = ["--pass", passes, "--calib", data, "--calib-samples", 64]
            qcc(model, *how, "--check", "--quiet", "-o", out)
            m = onnx.load(out)
            self.assertEqual(m.opset_import[0].version, 21)
            elem = {i.name: i.data_type for i in m.graph.initializer}
            node = next(n for n in m.graph.node if n.op_type == "QuantizeLinear")
            self.assertEqual(elem[node.input[2]], TensorProto.DataType.Value(kind.upper()))
            found = session(out).run(None, {"x": x})[0]
            self.assertLess(np.linalg.norm(found - exact) / np.linalg.norm(exact), most, kind)
            said = qcc(model, *how, "--keep-opset", "-o", out, fails=1)
            self.assertIn("raising it was forbidden", " ".join(said.replace("│", " ").split()))

    def test_what_is_not_finite_is_refused(self):
        x = np.ones((64, 8), np.float32)
        x[5, 5] = np.nan
        model, data = product(self.folder, x)
        out = self.folder / "out.onnx"
        said = qcc(model, "--preset", "static-int8", "--calib", data, "--calib-samples", 64, "-o", out, fails=1)
        self.assertIn("1 of its values are NaN or infinite", " ".join(said.replace("│", " ").split()))
        self.assertFalse(out.exists())


if __name__ == "__main__":
    unittest.main()
