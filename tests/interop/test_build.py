"""Compiled models: what `qcc build` writes, run from C, against ONNX Runtime; and the compiled executor likewise."""

import pathlib
import subprocess
import tempfile
import unittest

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common import TESTDATA, logits, qcc, session

EXAMPLE = TESTDATA.parents[1] / "examples" / "c" / "run.c"


def perceptron(path, width=64, hidden=200):
    """`x + W2 gelu(W1 x + b1) * gate`, as an exporter writes it."""
    rng = np.random.default_rng(5)
    weight = lambda k, n, name: numpy_helper.from_array(
        (rng.standard_normal((k, n)) / k**0.5).astype(np.float32), name
    )
    constants = [
        weight(width, hidden, "w1"),
        weight(hidden, width, "w2"),
        numpy_helper.from_array(rng.standard_normal(hidden).astype(np.float32), "b1"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="up"),
        helper.make_node("Add", ["h", "b1"], ["hb"]),
        helper.make_node("Gelu", ["hb"], ["g"]),
        helper.make_node("MatMul", ["g", "w2"], ["d"], name="down"),
        helper.make_node("Mul", ["d", "gate"], ["m"]),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
    graph = helper.make_graph(nodes, "perceptron", [value("x"), value("gate")], [value("y")], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def at_level(path, level):
    """The packed products of a model with float (0) or int8 (4) activations."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("accuracy_level", level)])
    onnx.save(model, path)


class Build(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def compiled(self, model, *options):
        """The C example with the library of a model."""
        library = self.folder / "model.so"
        qcc("build", model, "-o", library, *options)
        command = ["cc", "-O2", "-Wall", "-Werror", "-include", self.folder / "model.h", EXAMPLE, library]
        subprocess.run([*command, "-lpthread", "-o", self.folder / "run"], check=True)
        return [self.folder / "run", self.folder / "model.weights"]

    def test_a_library_gives_what_onnx_runtime_gives(self):
        perceptron(self.folder / "float.onnx")
        packed = self.folder / "packed.onnx"
        qcc(self.folder / "float.onnx", "--pass", "rtn,pack-int4", "-o", packed)
        for level, tolerance in ((0, 1e-5), (4, 2e-3)):
            at_level(packed, level)
            run = self.compiled(packed, "--max", "rows=50")
            for rows in (1, 7, 50):
                rng = np.random.default_rng(rows)
                x, gate = (rng.standard_normal((rows, 64)).astype(np.float32) for _ in range(2))
                expected = session(packed).run(None, {"x": x, "gate": gate})[0]
                x.tofile(self.folder / "x.bin")
                gate.tofile(self.folder / "gate.bin")
                files = [self.folder / "x.bin", self.folder / "gate.bin", f"{self.folder / 'y.bin'}={x.nbytes}"]
                subprocess.run([*run, str(rows), *files], check=True)
                found = np.fromfile(self.folder / "y.bin", np.float32).reshape(rows, 64)
                self.assertLess(abs(found - expected).max(), tolerance * abs(expected).max(), (level, rows))
            refused = subprocess.run([*run, "51", *files], capture_output=True, text=True)
            self.assertEqual(refused.returncode, 1)
            self.assertIn("a dim beyond its bound", refused.stderr)

    def test_what_has_no_kernel_is_refused_by_name(self):
        said = qcc("build", TESTDATA / "tinylm.onnx", "-o", self.folder / "model.so", fails=1)
        self.assertIn("no kernel for", said)
        self.assertIn("at node", said)
        self.assertEqual(list(self.folder.iterdir()), [])
        said = qcc("build", TESTDATA / "tinylm.onnx", "--cpu", "z80", "-o", self.folder / "model.so", fails=2)
        self.assertIn("x86-64-v3", said)

    def test_the_compiled_executor_gives_what_onnx_runtime_gives(self):
        packed, out = self.folder / "packed.onnx", self.folder / "out.npz"
        qcc(TESTDATA / "tinylm.onnx", "--pass", "canonicalize,fuse,rtn,pack-int4", "-o", packed)
        at_level(packed, 0)
        ids = np.load(TESTDATA / "eval_ids.npy")[:2, :40].astype(np.int64)
        np.savez(self.folder / "in.npz", input_ids=ids, attention_mask=np.ones_like(ids))
        qcc("run", packed, "--input", self.folder / "in.npz", "--executor", "cpu", "-o", out)
        found, expected = np.load(out)["logits"], logits(packed, ids)
        self.assertLess(abs(found - expected).max(), 1e-5 * abs(expected).max())


if __name__ == "__main__":
    unittest.main()
