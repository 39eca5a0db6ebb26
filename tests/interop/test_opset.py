"""raise-opset changes no output: ONNX Runtime runs a model and the raised one, and the new one is valid ONNX."""

import pathlib
import sys
import tempfile
import unittest

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import TESTDATA, qcc, session, shared

rng = np.random.default_rng(5)
SHARED = [
    "stories260k/model.onnx",
    "stories260k/dynamo_eager_op18.onnx",
    "stories260k/dynamo_sdpa_op18.onnx",
    "nano_sort_gpt/legacy_sdpa_op17.onnx",
    "nano_sort_gpt/dynamo_sdpa_op18.onnx",
    "silero_vad/silero_vad.onnx",
    "magika/standard_v3_3.onnx",
    "mnist/mnist.onnx",
    "resnet20/resnet20.onnx",
]
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
# Dims that a model leaves open, or needs at a certain size.
SIZES = {"silero_vad.onnx": {"input": (1, 576), "state": (2, 1, 128), "sr": ()}, "standard_v3_3.onnx": {"bytes": (2, 2048)}}


def feed(path):
    """Inputs of a whole model: noise, and token ids that every vocabulary has."""
    out = {}
    for i in session(path).get_inputs():
        dims = SIZES.get(path.name, {}).get(i.name) or [d if isinstance(d, int) else n for d, n in zip(i.shape, (2, 7, 5, 5))]
        if i.name == "sr":
            out[i.name] = np.array(16000)
        elif i.name == "attention_mask":
            out[i.name] = np.ones(dims, np.int64)
        elif i.type == "tensor(float)":
            out[i.name] = rng.standard_normal(dims).astype(np.float32)
        else:
            out[i.name] = rng.integers(0, 3, dims).astype(NUMPY[i.type])
    return out


def ints(name, *v):
    return nh.from_array(np.array(v, np.int64), name)


def floats(name, *shape):
    return nh.from_array(np.abs(rng.standard_normal(shape)).astype(np.float32), name)


def one(op, opset, inits=(), outputs=1, shape=(2, 3, 4, 6), **attrs):
    """A model of one node at an old opset."""
    names = [f"y{i}" for i in range(outputs)]
    node = h.make_node(op, ["x", *(t.name for t in inits)], names, op, **attrs)
    g = h.make_graph([node], "g", [h.make_tensor_value_info("x", T.FLOAT, shape)],
                     [h.make_value_info(n, onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=T.FLOAT))) for n in names],
                     list(inits))
    m = h.make_model(g, opset_imports=[h.make_opsetid("", opset)], ir_version=6)
    return onnx.shape_inference.infer_shapes(m)


# Forms that a later version of the op writes otherwise.
OLD = {
    "Squeeze": one("Squeeze", 11, shape=(2, 1, 3, 1), axes=[1, -1]),
    "Squeeze of all": one("Squeeze", 11, shape=(2, 1, 3, 1)),
    "Unsqueeze": one("Unsqueeze", 11, axes=[0, 3]),
    "ReduceSum": one("ReduceSum", 11, axes=[1, -1], keepdims=0),
    "ReduceSum of all": one("ReduceSum", 11),
    "Split by sizes": one("Split", 11, outputs=2, axis=3, split=[2, 4]),
    "Split into equal parts": one("Split", 11, outputs=3, axis=-1),
    "Split by an input": one("Split", 13, [ints("sizes", 1, 2)], outputs=2, axis=1),
    "Softmax": one("Softmax", 11, axis=-1),
    "LogSoftmax": one("LogSoftmax", 12, axis=3),
    "Hardmax": one("Hardmax", 11, axis=3),
    "BatchNormalization": one("BatchNormalization", 11, [floats(n, 3) for n in "abmv"]),
    "GridSample": one("GridSample", 16, [floats("grid", 2, 5, 5, 2)], mode="bilinear"),
    "GridSample by cubes": one("GridSample", 16, [floats("grid", 2, 5, 5, 2)], mode="bicubic"),
    "RoiAlign": one("RoiAlign", 11, [nh.from_array(np.float32([[0, 0, 3, 3], [1, 1, 4, 3]]), "rois"), ints("batch", 0, 1)],
                    output_height=2, output_width=2),
    "AveragePool": one("AveragePool", 11, kernel_shape=[2, 3], strides=[1, 2], pads=[0, 1, 1, 0]),
    "MaxPool": one("MaxPool", 11, kernel_shape=[2, 2], strides=[2, 2]),
    "LpPool": one("LpPool", 11, kernel_shape=[2, 2]),
    "Dropout": one("Dropout", 11),
    "Clip": one("Clip", 11, [nh.from_array(np.float32(-0.5), "low"), nh.from_array(np.float32(0.5), "high")]),
    "Pad": one("Pad", 11, [ints("pads", 0, 0, 1, 0, 0, 0, 0, 2)]),
    "CumSum": one("CumSum", 11, [nh.from_array(np.int64(1), "axis")]),
    "Resize": one("Resize", 11, [floats("roi", 0), nh.from_array(np.float32([1, 1, 2, 2]), "scales")], mode="linear"),
    "LSTM": one("LSTM", 11, [floats("w", 1, 8, 4), floats("r", 1, 8, 2)], shape=(3, 2, 4), hidden_size=2),
    **{op: one(op, 11, axes=[-1, 1]) for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
                                                "ReduceLogSumExp", "ReduceSumSquare")},
}

REFUSED = {
    "Softmax over several dims": (one("Softmax", 11, axis=1), 13, "dims 1 to 3 together"),
    "Softmax over several dims by default": (one("Softmax", 12), 13, "dims 1 to 3 together"),
    "AveragePool with ceil_mode": (one("AveragePool", 11, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), 21, "ceil_mode"),
    "Dropout with a ratio": (one("Dropout", 11, ratio=0.3), 13, "ratio"),
    "an opset too old": (one("Relu", 9), 21, "raised from 11"),
}


class Opset(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name)

    def same(self, path, inputs, version):
        out = self.path / "raised.onnx"
        qcc(path, "--pass", f"raise-opset{{version={version}}}", "-o", out, "--quiet")
        raised = onnx.load(out)
        onnx.checker.check_model(raised)
        self.assertEqual({o.version for o in raised.opset_import if o.domain == ""}, {version})
        for a, b in zip(session(path).run(None, inputs), session(out).run(None, inputs), strict=True):
            scale = np.abs(a).max(initial=1) if a.dtype.kind == "f" else 1
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * scale)

    def test_tinylm(self):
        path = TESTDATA / "tinylm.onnx"
        for version in (21, 25):
            self.same(path, feed(path), version)

    def test_models(self):
        for name in SHARED:
            path = shared(name)
            for version in (21, 25):
                with self.subTest(name, version=version):
                    self.same(path, feed(path), version)

    def test_old_forms(self):
        for name, m in OLD.items():
            path = self.path / "old.onnx"
            onnx.save(m, path)
            was = m.opset_import[0].version
            dims = [d.dim_value for d in m.graph.input[0].type.tensor_type.shape.dim]
            inputs = {"x": rng.standard_normal(dims).astype(np.float32)}
            for version in (13, 14, 18, 21, 22, 25):
                with self.subTest(name, version=version):
                    # ONNX Runtime has no kernel for RoiAlign of opset 22.
                    if version > was and (name, version > 21) != ("RoiAlign", True):
                        self.same(path, inputs, version)

    def test_what_cannot_be_raised_is_refused(self):
        for name, (m, version, why) in REFUSED.items():
            with self.subTest(name):
                onnx.save(m, self.path / "old.onnx")
                args = ["--pass", f"raise-opset{{version={version}}}", "-o", self.path / "raised.onnx"]
                said = qcc(self.path / "old.onnx", *args, fails=1)
                self.assertIn(why, " ".join(said.replace("│", " ").split()))
                self.assertFalse((self.path / "raised.onnx").exists())


if __name__ == "__main__":
    unittest.main()
