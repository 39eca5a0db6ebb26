"""A model that is quantized already keeps its codes, byte for byte, and its float part can be quantized further."""

import json
import logging
import pathlib
import sys
import tempfile
import unittest

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import TESTDATA, logits, perplexity, qcc, scores, session

logging.disable(logging.WARNING)
TINYLM = TESTDATA / "tinylm.onnx"
rng = np.random.default_rng(3)
X = rng.standard_normal((4, 64)).astype(np.float32)

# The pass lists that a quantized model goes through.
PASSES = ["rtn,pack-int4", "rtn{bits=8},pack-qdq", "const-fold,dce,fold-scales,raise-opset{version=21}", "awq,pack-int4"]


# The operand that is a weight, by op.
WEIGHTS = {"MatMulNBits": 1, "DequantizeLinear": 0, "MatMulInteger": 1, "QLinearMatMul": 3}


def codes(path):
    """The quantized weights of two or more dims, by their bytes."""
    graph = onnx.load(path).graph
    views = {n.output[0]: n.input[0] for n in graph.node if n.op_type in ("Transpose", "Reshape")}
    read = {n.input[WEIGHTS[n.op_type]] for n in graph.node if n.op_type in WEIGHTS}
    read = {views.get(name, name) for name in read}
    return {t.name: (tuple(t.dims), t.raw_data) for t in graph.initializer if t.name in read and len(t.dims) > 1}


def two_layers():
    """x -> MatMul -> Relu -> MatMul, small weights with names."""
    w = [(rng.standard_normal(s) * 0.2).astype(np.float32) for s in [(64, 48), (48, 32)]]
    nodes = [h.make_node("MatMul", ["x", "w0"], ["a"], "first"), h.make_node("Relu", ["a"], ["b"], "relu"),
             h.make_node("MatMul", ["b", "w1"], ["y"], "second")]
    g = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", T.FLOAT, [4, 64])],
                     [h.make_tensor_value_info("y", T.FLOAT, [4, 32])], [nh.from_array(a, f"w{i}") for i, a in enumerate(w)])
    return h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10)


class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": X}]

    def get_next(self):
        return self.left.pop() if self.left else None


class Already(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name)
        self.q = self.path / "q.onnx"

    def run_again(self, passes, *flags):
        args = ["--pass", passes, "-o", self.path / "again.onnx", "--allow-noop", "--json", "--profile", "ort-cpu-exact"]
        return json.loads(qcc(self.q, *args, *flags))

    def keeps(self, path, passes, *flags):
        """Runs passes on a quantized model: its codes are in the output, and so many weights are said to be kept."""
        before = codes(self.q)
        report = self.run_again(passes, *flags)
        after = codes(self.path / "again.onnx")
        for name, data in before.items():
            self.assertIn(data, after.values(), f"{path}: the codes {name} are not what they were")
        kept = [n for n in report["notes"] if n.startswith("already quantized")]
        self.assertEqual(kept, [f"already quantized: {len(before)} weight{'s'[: len(before) > 1]} kept"])
        return report

    def test_our_own_output(self):
        ids = np.load(TESTDATA / "eval_ids.npy")[:4]
        for first in ["rtn,pack-int4", "rtn,pack-qdq", "rtn{bits=8, only=[node_linear_1*]},pack-int4"]:
            qcc(TINYLM, "--pass", first, "-o", self.q, "--quiet", "--profile", "ort-cpu-exact")
            was = perplexity(logits(self.q, ids), ids)
            for passes in PASSES:
                with self.subTest(first=first, passes=passes):
                    report = self.keeps(first, passes, "--calib", TESTDATA / "calib_ids.npy", "--calib-samples", "2")
                    if "only" in first and "rtn" in passes:
                        self.assertGreater(len(report["weights"]), 0)
                    now = perplexity(logits(self.path / "again.onnx", ids), ids)
                    self.assertLess(abs(now / was - 1), 0.05 if report["weights"] else 1e-4)

    def test_nothing_left_is_an_error_that_says_so(self):
        qcc(TINYLM, "--pass", "rtn,pack-int4", "-o", self.q, "--quiet")
        said = qcc(self.q, "--pass", "rtn,pack-int4", "-o", self.path / "again.onnx", fails=1)
        self.assertIn("29 weights are quantized already", " ".join(said.replace("│", " ").split()))

    def quantizers(self):
        """Outputs of ONNX Runtime's quantizers, and how many weights they leave float."""
        plain = self.path / "plain.onnx"
        onnx.save(two_layers(), plain)
        exclude = {"nodes_to_exclude": ["second"]}
        for left, kw in [(0, {}), (1, exclude)]:
            quantize_dynamic(plain, self.q, **kw)
            yield "dynamic", left
            for form in (QuantFormat.QDQ, QuantFormat.QOperator):
                quantize_static(plain, self.q, Reader(), quant_format=form, **kw)
                yield f"static {form}", left
            for bits in (4, 8):
                for form in (QuantFormat.QOperator, QuantFormat.QDQ):
                    if (bits, form) == (8, QuantFormat.QDQ):
                        continue
                    made = MatMulNBitsQuantizer(onnx.load(plain), bits=bits, block_size=16, quant_format=form, **kw)
                    made.process()
                    made.model.save_model_to_file(self.q)
                    yield f"nbits {bits} {form}", left

    def test_runtime_quantizers(self):
        for what, left in self.quantizers():
            was = session(self.q).run(None, {"x": X})[0]
            for passes in PASSES:
                with self.subTest(what, left=left, passes=passes):
                    report = self.keeps(what, passes, "--calib", "random", "--calib-samples", "2")
                    quantizes = "rtn" in passes or "awq" in passes
                    self.assertEqual(len(report["weights"]), left if quantizes else 0)
                    now = session(self.path / "again.onnx").run(None, {"x": X})[0]
                    np.testing.assert_allclose(now, was, atol=0.3 * np.abs(was).max() if report["weights"] else 1e-4)

    def test_a_quantized_language_model_scores_alike(self):
        """ONNX Runtime's dynamic quantization of a language model, through a file of ours and evaluated by both."""
        quantize_dynamic(TINYLM, self.q)
        self.keeps("dynamic", "rtn,pack-int4")
        ids = np.load(TESTDATA / "eval_ids.npy")[:2]
        theirs = perplexity(logits(self.path / "again.onnx", ids), ids)
        ours = scores(self.path / "again.onnx", "--tokens", TESTDATA / "eval_ids.npy", "--rows", 2)["perplexity"]
        self.assertLess(abs(ours / theirs - 1), 2e-3)


if __name__ == "__main__":
    unittest.main()
