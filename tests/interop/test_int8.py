"""Weights and activations in 8 bits: what ONNX Runtime fuses of them, what they cost, and ranges against numpy's."""

import collections
import gzip
import pathlib
import tempfile
import unittest

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from common import TESTDATA, logits, perplexity, qcc, session, shared

WEIGHTS = "rtn{bits=7, group=-1, symmetric=true, narrow=true}"


def fused(path, folder):
    """How many ops of each type ONNX Runtime runs for a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return collections.Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


def product(folder, x):
    """A model of one product, and the file of its inputs."""
    w = np.random.default_rng(1).standard_normal((x.shape[1], 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", x.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])],
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

    def quantized(self, model, calib, samples, calibrate="calibrate", insert="insert-fake-quant"):
        out = self.folder / "int8.onnx"
        passes = f"{WEIGHTS},{calibrate},{insert},pack-qdq"
        qcc(model, "--pass", passes, "--calib", calib, "--calib-samples", samples, "--check", "--quiet", "-o", out)
        return out

    def grid(self, x, calibrate, insert="insert-fake-quant"):
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
        scale, zero = self.grid(x, "calibrate", "insert-fake-quant{activations=int8, symmetric=true}")
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

    def test_what_is_not_finite_is_refused(self):
        x = np.ones((64, 8), np.float32)
        x[5, 5] = np.nan
        model, data = product(self.folder, x)
        out = self.folder / "out.onnx"
        said = qcc(model, "--preset", "int8-static", "--calib", data, "--calib-samples", 64, "-o", out, fails=1)
        self.assertIn("1 of its values are NaN or infinite", " ".join(said.replace("│", " ").split()))
        self.assertFalse(out.exists())


if __name__ == "__main__":
    unittest.main()
