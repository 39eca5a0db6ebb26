"""Models in f16 and bf16 quantize as they are, and the output keeps their type.

ONNX Runtime runs f16 on the CPU. It has no bf16 kernels there, neither for the float model nor for MatMulNBits, so a
bf16 output is compared after its tensors and types have been widened to f32, which changes no weight.
"""

import pathlib
import sys
import tempfile
import unittest

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import TESTDATA, logits, perplexity, qcc, scores, session, shared

NUMPY = {T.FLOAT: np.float32, T.FLOAT16: np.float16, T.BFLOAT16: ml_dtypes.bfloat16}
NAMES = {T.FLOAT16: "f16", T.BFLOAT16: "bf16"}


def recast(path, was, to):
    """The model with every tensor, type and Cast of element type `was` in `to`. Masks of -inf stay finite."""
    model = onnx.load(path)

    def tensor(t):
        if t.data_type == was:
            a = nh.to_array(t).astype(np.float32)
            top = float(ml_dtypes.finfo(NUMPY[to]).max)
            a = np.clip(a, -top, top).astype(NUMPY[to])
            t.CopyFrom(h.make_tensor(t.name, to, a.shape, a.tobytes(), raw=True))

    def info(v):
        if v.type.tensor_type.elem_type == was:
            v.type.tensor_type.elem_type = to

    def graph(g):
        for t in g.initializer:
            tensor(t)
        for v in [*g.input, *g.output, *g.value_info]:
            info(v)
        for n in g.node:
            for a in n.attribute:
                if a.type == a.TENSOR:
                    tensor(a.t)
                elif a.type == a.GRAPH:
                    graph(a.g)
                elif a.name in ("to", "stash_type", "softmax_precision") and n.op_type in ("Cast", "Attention") and a.i == was:
                    a.i = to

    graph(model.graph)
    return model


class Half(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name)

    def quantize(self, model, passes, *flags):
        onnx.save(model, self.path / "in.onnx")
        return qcc(self.path / "in.onnx", "--pass", passes, "-o", self.path / "out.onnx", "--profile", "ort-cpu-exact", *flags)

    def test_every_level_of_optimization_computes_the_same(self):
        """By default packed ops ask for int8 activations, which the runtime gets wrong with scales that are no f32 constants."""
        ids = np.load(TESTDATA / "eval_ids.npy")[:2].astype(np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        f32 = onnx.load(TESTDATA / "tinylm.onnx")
        for model, flags in [(recast(TESTDATA / "tinylm.onnx", T.FLOAT, T.FLOAT16), []), (f32, ["--scale-type", "f16"])]:
            onnx.save(model, self.path / "in.onnx")
            qcc(self.path / "in.onnx", "--pass", "rtn,pack-int4", "-o", self.path / "out.onnx", *flags)
            want = session(TESTDATA / "tinylm.onnx").run(None, feed)[0]
            for level in ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"]:
                options = ort.SessionOptions()
                options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
                s = ort.InferenceSession(self.path / "out.onnx", options, providers=["CPUExecutionProvider"])
                got = s.run(None, feed)[0].astype(np.float32)
                self.assertLess(np.linalg.norm(got - want) / np.linalg.norm(want), 0.1, (flags, level))

    def check(self, path, tokens, rows, passes, expected, *flags):
        """Quantizes in both types; the perplexity is near that of the f32 model's quantization, `expected`."""
        ids = np.load(tokens)[:rows]
        for elem, near in [(T.FLOAT16, 0.01), (T.BFLOAT16, 0.03)]:
            with self.subTest(path=path, elem=NAMES[elem], passes=passes):
                said = self.quantize(recast(path, T.FLOAT, elem), passes, *flags)
                out = self.path / "out.onnx"
                model = onnx.load(out)
                kept = {t.name: t for t in model.graph.initializer}
                packed = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
                self.assertEqual(len(packed), expected[0])
                for n in packed:
                    self.assertEqual(kept[n.input[2]].data_type, elem, "scales are of the model's type")
                self.assertFalse([t.name for t in model.graph.initializer if t.data_type == T.FLOAT])
                if elem == T.BFLOAT16:
                    self.assertIn("no bf16 kernels", said)
                    onnx.save(recast(out, elem, T.FLOAT), self.path / "wide.onnx")
                    out = self.path / "wide.onnx"
                theirs = perplexity(logits(out, ids), ids)
                ours = scores(self.path / "out.onnx", "--tokens", tokens, "--rows", rows, "--exact")["perplexity"]
                self.assertLess(abs(ours / theirs - 1), near)
                self.assertLess(abs(theirs / expected[1] - 1), near)

    def expected(self, path, tokens, rows, passes, *flags):
        qcc(path, "--pass", passes, "-o", self.path / "f32.onnx", "--profile", "ort-cpu-exact", "--quiet", *flags)
        ids = np.load(tokens)[:rows]
        count = sum(n.op_type == "MatMulNBits" for n in onnx.load(self.path / "f32.onnx").graph.node)
        return count, perplexity(logits(self.path / "f32.onnx", ids), ids)

    def both(self, path, tokens, calib, rows):
        for passes, flags in [("rtn,pack-int4", []), ("awq,pack-int4", ["--calib", calib, "--calib-samples", 8])]:
            self.check(path, tokens, rows, passes, self.expected(path, tokens, rows, passes, *flags), *flags)

    def test_tinylm(self):
        self.both(TESTDATA / "tinylm.onnx", TESTDATA / "eval_ids.npy", TESTDATA / "calib_ids.npy", 4)

    def test_stories(self):
        folder = shared("stories260k")
        self.both(folder / "dynamo_sdpa_op18.onnx", folder / "eval_ids.npy", folder / "calib_ids.npy", 8)

    def test_qdq_form(self):
        """f16 scales of DequantizeLinear; ONNX Runtime multiplies this form by int8 activations."""
        self.quantize(recast(TESTDATA / "tinylm.onnx", T.FLOAT, T.FLOAT16), "rtn,pack-qdq")
        tokens = TESTDATA / "eval_ids.npy"
        ids = np.load(tokens)[:4]
        theirs = perplexity(logits(self.path / "out.onnx", ids), ids)
        ours = scores(self.path / "out.onnx", "--tokens", tokens, "--rows", 4, "--exact")["perplexity"]
        self.assertLess(abs(ours / theirs - 1), 0.02)


if __name__ == "__main__":
    unittest.main()
