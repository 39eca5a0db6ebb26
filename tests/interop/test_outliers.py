"""Outliers of activations: made, found, moved into weights, kept in floating point; and biases that make up for rounding.
Activations and outputs are ONNX Runtime's, figures numpy's in float64."""

import json
import pathlib
import tempfile
import unittest

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common import TESTDATA, logits, perplexity, qcc, session

MODEL = TESTDATA / "tinylm.onnx"
CALIB = ["--calib", TESTDATA / "calib_ids.npy", "--calib-samples", 16]
# Weights of 7 bits: sums of pairs of products then fit 16 bits on every CPU.
STATIC = "rtn{bits=7, group=-1, symmetric=true, narrow=true},calibrate{method=percentile},insert-fake-quant{min_size=0},pack-qdq"


def watched(path, folder):
    """A model that also shows what its products with constants read, and the names of these values with their weights."""
    model = onnx.load(path)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    read = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            read.setdefault(node.input[0], []).append(constants[node.input[1]].astype(np.float64))
    shown = {o.name for o in model.graph.output}
    for name in read.keys() - shown:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    onnx.save(model, folder / "watched.onnx")
    return folder / "watched.onnx", read


def largest(path, folder, ids):
    """The largest magnitude of each channel of what products read, and the weights that multiply it."""
    path, read = watched(path, folder)
    names = list(read)
    found = session(path).run(names, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    most = [np.abs(x.astype(np.float64)).reshape(-1, x.shape[-1]).max(0) for x in found]
    return list(zip(most, (read[n] for n in names), strict=True))


def product(folder, weight, x, bias=None):
    """A model `Gemm(Mul(x, 1), weight, bias)`, whose Mul can take a scale, and the file of its inputs."""
    k, n = weight.shape
    constants = [numpy_helper.from_array(np.ones(k, np.float32), "c"), numpy_helper.from_array(weight, "w")]
    inputs = ["a", "w"]
    if bias is not None:
        constants.append(numpy_helper.from_array(bias, "b"))
        inputs.append("b")
    nodes = [helper.make_node("Mul", ["x", "c"], ["a"]), helper.make_node("Gemm", inputs, ["y"], name="product")]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
        constants,
    )
    model, data = folder / "product.onnx", folder / "x.npz"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), model)
    np.savez(data, x=x)
    return model, data


class Outliers(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def made(self, passes, model=MODEL, calib=CALIB, name="out.onnx"):
        out = self.folder / name
        qcc(model, "--pass", passes, *calib, "--quiet", "-o", out)
        return out

    def test_injected_channels(self):
        ids = np.load(TESTDATA / "eval_ids.npy")[:2]
        out = self.made("inject-outliers{channels=6, gain=64}")
        expected, found = logits(MODEL, ids), logits(out, ids)
        self.assertLess(np.abs(found - expected).max() / np.abs(expected).max(), 1e-5)
        before, after = largest(MODEL, self.folder, ids), largest(out, self.folder, ids)
        self.assertEqual(len(before), len(after))
        counts = []
        for (a, _), (b, _) in zip(before, after, strict=True):
            ratio = b / a
            self.assertTrue(np.all((np.abs(ratio - 1) < 1e-3) | (np.abs(ratio - 64) < 0.1)), ratio)
            counts.append(int((ratio > 2).sum()))
        # Heads that share a key and value are chosen whole; the head of the model shares its weight with the embedding.
        self.assertTrue(all(c >= 6 for c in counts[:-1]) and counts.count(6) >= 9, counts)

    def test_smoothing_balances_each_channel(self):
        ids = np.load(TESTDATA / "calib_ids.npy")[:16]
        for alpha in (0.5, 0.75):
            out = self.made(f"smooth-migrate{{alpha={alpha}}}")
            expected, found = logits(MODEL, ids[:2]), logits(out, ids[:2])
            self.assertLess(np.abs(found - expected).max() / np.abs(expected).max(), 1e-4)
            balanced = 0
            for x, weights in largest(out, self.folder, ids):
                w = np.abs(np.concatenate(weights, 1)).max(1)
                # x / s = (x w)^(1 - alpha) and s w = (x w)^alpha, so that these two agree; tied channels share a scale.
                a, b = alpha * np.log(x), (1 - alpha) * np.log(w)
                balanced += bool(np.abs(a - b).max() < 1e-2)
            self.assertGreaterEqual(balanced, 9)

    def test_smoothing_undoes_outliers(self):
        ids = np.load(TESTDATA / "eval_ids.npy")[:16]
        of = lambda passes, name: perplexity(logits(self.made(passes, name=name), ids), ids)
        inject = "inject-outliers{channels=6, gain=100}"
        plain = of(STATIC, "plain.onnx")
        self.assertGreater(of(f"{inject},{STATIC}", "spoiled.onnx"), 2 * plain)
        for alpha in ("0.5", "auto"):
            smooth = of(f"{inject},smooth-migrate{{alpha={alpha}}},{STATIC}", f"{alpha}.onnx")
            self.assertLess(smooth, 1.01 * plain, alpha)

    def test_outlier_channels_stay_float(self):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((64, 32)).astype(np.float32)
        x[:, [3, 17]] *= 50
        weight = rng.standard_normal((32, 8)).astype(np.float32)
        bias = rng.standard_normal(8).astype(np.float32)
        model, data = product(self.folder, weight, x, bias)
        out = self.made("llm-int8{threshold=6.0}", model, ["--calib", data, "--calib-samples", 64])
        kept = np.abs(x).max(0) >= 6
        self.assertTrue(kept[[3, 17]].all() and kept.sum() < 6)
        wide, w = x.astype(np.float64), weight.astype(np.float64)
        regular, scales = wide[:, ~kept], np.abs(w[~kept]).max(0) / 127
        rows = np.abs(regular).max(1, keepdims=True) / 127
        codes = np.rint(regular / rows), np.rint(w[~kept] / scales)
        expected = codes[0] @ codes[1] * rows * scales + wide[:, kept] @ w[kept] + bias
        found = session(out).run(None, {"x": x})[0]
        # A code in the middle between two may fall to either side.
        off = np.abs(found - expected)
        self.assertLess(np.median(off), 1e-4 * np.abs(expected).max())
        self.assertLess(off.max(), 2 * (rows * np.abs(w).max()).max())
        self.assertEqual({n.op_type for n in onnx.load(out).graph.node} & {"MatMulInteger", "Gemm"}, {"MatMulInteger"})

    def test_a_language_model_with_outliers_in_8_bits(self):
        ids = np.load(TESTDATA / "eval_ids.npy")[:16]
        out = self.made("inject-outliers,llm-int8{threshold=20}")
        self.assertLess(perplexity(logits(out, ids), ids), 1.01 * perplexity(logits(MODEL, ids), ids))

    def test_corrected_biases_keep_means(self):
        rng = np.random.default_rng(1)
        x = (rng.standard_normal((256, 16)) + 1).astype(np.float32)
        weight = rng.standard_normal((16, 8)).astype(np.float32)
        for bias in (None, rng.standard_normal(8).astype(np.float32)):
            model, data = product(self.folder, weight, x, bias)
            float_ = x.astype(np.float64) @ weight + (0 if bias is None else bias)
            off = []
            for passes in ("rtn{bits=4}", "bias-correct,rtn{bits=4}"):
                out = self.made(f"{passes},pack-qdq", model, ["--calib", data, "--calib-samples", 256])
                off.append(np.abs(session(out).run(None, {"x": x})[0].mean(0) - float_.mean(0)).max())
            self.assertLess(off[1], 1e-2 * off[0])

    def test_what_stands_out(self):
        rng = np.random.default_rng(2)
        x = rng.standard_normal((64, 32)).astype(np.float32)
        x[:, 5] *= 100
        weight = rng.standard_normal((32, 40)).astype(np.float32)
        weight[7, 9] = 40
        model, data = product(self.folder, weight, x)
        found = json.loads(qcc("outliers", model, "--calib", data, "--calib-samples", 64, "--json"))
        (w,), (a,) = found["weights"], found["activations"]
        wide = weight.astype(np.float64)
        self.assertAlmostEqual(w["deviation"], wide.std(), delta=1e-6)
        self.assertEqual(w["beyond"], int((np.abs(wide - wide.mean()) > 6 * wide.std()).sum()))
        codes = np.rint((wide - wide.min()) / ((wide.max() - wide.min()) / 255))
        self.assertAlmostEqual(w["wasted"], 1 - len(np.unique(codes)) / 256, delta=1e-9)
        self.assertIn("codes are unused", " ".join(w["alerts"]))
        most = np.abs(x).max(0)
        self.assertEqual([c["channel"] for c in a["outliers"]], list(np.flatnonzero(most > 10 * np.median(most))))
        self.assertEqual([c["channel"] for c in a["outliers"]], [5])
        self.assertAlmostEqual(a["max"], float(most.max()), delta=1e-3)
        self.assertAlmostEqual(a["mean"], np.abs(x.astype(np.float64)).mean(), delta=1e-6)
        self.assertIn("smooth-migrate moves it into c", a["alerts"][0])

    def test_what_is_not_finite_is_refused(self):
        x = np.ones((64, 8), np.float32)
        x[5, 5] = np.inf
        model, data = product(self.folder, np.ones((8, 2), np.float32), x)
        calib = ["--calib", data, "--calib-samples", 64]
        for passes in ("smooth-migrate", "smooth-migrate{alpha=auto}", "llm-int8", "bias-correct,rtn"):
            said = qcc(model, "--pass", passes, *calib, "-o", self.folder / "out.onnx", fails=1)
            self.assertIn("NaN or infinite", " ".join(said.replace("│", " ").split()), passes)
        self.assertIn("NaN or infinite", " ".join(qcc("outliers", model, *calib, fails=1).replace("│", " ").split()))


if __name__ == "__main__":
    unittest.main()
