"""Weights are found wherever exporters leave them: each form gives the very outputs of the plain one's quantization."""

import json
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
from common import qcc, session

K, N, ROWS = 48, 40, 5
rng = np.random.default_rng(7)
# Numbers that half precision holds.
W = (rng.standard_normal((K, N)) * 0.3).astype(np.float16).astype(np.float32)
X = rng.standard_normal((ROWS, K)).astype(np.float32)
BIAS = rng.standard_normal(N).astype(np.float32)


def tensor(name, a):
    return nh.from_array(np.ascontiguousarray(a), name)


def constant(name, a):
    return h.make_node("Constant", [], [name], value=tensor("", a))


def model(nodes, inits=(), inputs=(), opset=18, functions=(), out=(ROWS, N)):
    x = [h.make_tensor_value_info("x", T.FLOAT, [ROWS, K]), *inputs]
    g = h.make_graph(list(nodes), "g", x, [h.make_tensor_value_info("y", T.FLOAT, out)], list(inits))
    opsets = [h.make_opsetid("", opset)] + [h.make_opsetid(f.domain, 1) for f in functions]
    return h.make_model(g, opset_imports=opsets, ir_version=9, functions=functions)


def product(weight="w"):
    return h.make_node("MatMul", ["x", weight], ["y"], "product")


def graph(name, nodes, inits=(), inputs=(), outputs=()):
    outputs = outputs or [h.make_tensor_value_info(f"{name}_y", T.FLOAT, [ROWS, N])]
    return h.make_graph(list(nodes), name, list(inputs), list(outputs), list(inits))


def through(op, a, extra=(), **attrs):
    """The weight behind one op."""
    inputs = ["stored", *(t.name for t in extra)]
    return model([h.make_node(op, inputs, ["w"], **attrs), product()], [tensor("stored", a), *extra])


def branches(inits_inside):
    """MatMul in both branches of an If, whose weight is inside each, or outside and shared."""
    def branch(name):
        inner = [tensor(f"{name}_w", W)] if inits_inside else []
        weight = f"{name}_w" if inits_inside else "w"
        return graph(name, [h.make_node("MatMul", ["x", weight], [f"{name}_y"], name)], inner)

    nodes = [constant("c", np.array(True)), h.make_node("If", ["c"], ["y"], then_branch=branch("then"), else_branch=branch("else"))]
    return model(nodes, [] if inits_inside else [tensor("w", W)])


def loop():
    scalar = lambda name, t: h.make_tensor_value_info(name, t, [])
    body = h.make_graph(
        [constant("w", W), h.make_node("MatMul", ["x", "w"], ["next"], "product"), h.make_node("Identity", ["go"], ["on"])],
        "body", [scalar("i", T.INT64), scalar("go", T.BOOL), h.make_tensor_value_info("state", T.FLOAT, [ROWS, N])],
        [scalar("on", T.BOOL), h.make_tensor_value_info("next", T.FLOAT, [ROWS, N])])
    nodes = [h.make_node("Loop", ["trips", "", "start"], ["y"], body=body)]
    return model(nodes, [tensor("trips", np.array(2)), tensor("start", np.zeros((ROWS, N), np.float32))])


def ints(name, *v):
    return tensor(name, np.array(v, np.int64))


def function():
    f = h.make_function("local", "Dense", ["x"], ["y"], [constant("w", W), product()], [h.make_opsetid("", 18)])
    return model([h.make_node("Dense", ["x"], ["y"], domain="local")], functions=[f])


FOUND = {
    "inside a function": function(),
    "an initializer": model([product()], [tensor("w", W)]),
    "a Constant node": model([constant("w", W), product()]),
    "an initializer that is an input too": model([product()], [tensor("w", W)], [h.make_tensor_value_info("w", T.FLOAT, [K, N])]),
    "behind Identity": through("Identity", W),
    "behind Cast from half precision": model(
        [h.make_node("Cast", ["stored"], ["w"], to=T.FLOAT), product()], [tensor("stored", W.astype(np.float16))]),
    "behind Transpose": through("Transpose", W.T),
    "behind Reshape": through("Reshape", W.reshape(K, 5, 8), [ints("shape", K, N)]),
    "behind Squeeze": through("Squeeze", W[None], [ints("axes", 0)]),
    "behind Unsqueeze": model(
        [h.make_node("Unsqueeze", ["stored", "axes"], ["w"]), h.make_node("Unsqueeze", ["x", "axes"], ["x3"]),
         h.make_node("MatMul", ["x3", "w"], ["y3"], "product"), h.make_node("Squeeze", ["y3", "axes"], ["y"])],
        [tensor("stored", W), ints("axes", 0)]),
    "behind Transpose and Reshape": model(
        [h.make_node("Transpose", ["stored"], ["t"], perm=[1, 0, 2]), h.make_node("Reshape", ["t", "shape"], ["w"]), product()],
        [tensor("stored", W.reshape(K, 5, 8).transpose(1, 0, 2)), ints("shape", K, N)]),
    "put together by Slice and Concat": model(
        [h.make_node("Slice", ["stored", "from", "mid", "axis"], ["a"]), h.make_node("Slice", ["stored", "mid", "to", "axis"], ["b"]),
         h.make_node("Concat", ["b", "a"], ["w"], axis=0), product()],
        [tensor("stored", np.concatenate([W[30:], W[:30]])), ints("from", 0), ints("mid", 18), ints("to", K), ints("axis", 0)]),
    "multiplied by a constant": model(
        [h.make_node("Mul", ["stored", "two"], ["w"]), product()], [tensor("stored", W / 2), tensor("two", np.float32(2))]),
    "inside both branches of an If": branches(True),
    "shared by both branches of an If": branches(False),
    "inside the body of a Loop": loop(),
    "Gemm": model([h.make_node("Gemm", ["x", "w"], ["y"])], [tensor("w", W)]),
    "Gemm with transB": model([h.make_node("Gemm", ["x", "w"], ["y"], transB=1)], [tensor("w", W.T)]),
    "Gemm with transA": model(
        [h.make_node("Transpose", ["x"], ["xt"]), h.make_node("Gemm", ["xt", "w"], ["y"], transA=1)], [tensor("w", W)]),
    "Gemm with alpha, beta and a bias": model(
        [h.make_node("Gemm", ["x", "w", "b"], ["g"], alpha=0.5, beta=2.0), h.make_node("Sub", ["g", "b"], ["h"]),
         h.make_node("Sub", ["h", "b"], ["i"]), h.make_node("Mul", ["i", "two"], ["y"])],
        [tensor("w", W), tensor("b", BIAS), tensor("two", np.float32(2))]),
}


# What stays float, and the words that say why.
NAMED = {
    "a batch of weights": (model([product()], [tensor("w", np.stack([W, W]))], out=(2, ROWS, N)), "a batch of weights"),
    "the left operand": (model([h.make_node("MatMul", ["w", "x"], ["y"])], [tensor("w", W[:, :ROWS])], out=(K, K)), "left operand"),
    "integers of someone's own": (model(
        [h.make_node("Cast", ["stored"], ["f"], to=T.FLOAT), h.make_node("Mul", ["f", "s"], ["w"]), product()],
        [tensor("stored", np.rint(W * 10).astype(np.int8)), tensor("s", np.float32(0.1))]), "computed from integers"),
    "a Conv at 4 bits": (model(
        [h.make_node("Reshape", ["x", "image"], ["i"]), h.make_node("Conv", ["i", "w"], ["y"])],
        [tensor("w", W.reshape(K, N, 1, 1)[:, :8]), ints("image", ROWS, 8, 6, 1)], out=(ROWS, K, 6, 1)), "rtn{bits=8}"),
}


class Weights(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name)

    def quantize(self, m, passes, *flags):
        """The quantized model's output, and qcc's report."""
        onnx.checker.check_model(m)
        onnx.save(m, self.path / "in.onnx")
        args = ["--pass", passes, "-o", self.path / "out.onnx", "--profile", "ort-cpu-exact", "--json", *flags]
        report = json.loads(qcc(self.path / "in.onnx", *args))
        return session(self.path / "out.onnx").run(None, {"x": X})[0], report

    def test_every_form_is_found(self):
        for passes in ["rtn,pack-int4", "rtn{bits=8},pack-qdq"]:
            plain, _ = self.quantize(FOUND["an initializer"], passes)
            float_error = np.abs(plain - X @ W).max()
            self.assertGreater(float_error, 1e-4)
            for name, m in FOUND.items():
                with self.subTest(name, passes=passes):
                    out, report = self.quantize(m, passes)
                    self.assertEqual([f for f in report["float"]], [])
                    # ONNX Runtime multiplies the QDQ form by int8 activations.
                    near = 0.02 if "qdq" in passes else 1e-4
                    np.testing.assert_allclose(out, plain, atol=near)
                    left = [t.name for t in nested_floats(onnx.load(self.path / "out.onnx").graph)]
                    self.assertEqual(left, [], "a float weight is left in the file")

    def test_a_weight_of_two_branches_is_stored_once(self):
        self.quantize(FOUND["shared by both branches of an If"], "rtn,pack-int4")
        self.assertEqual(len(onnx.load(self.path / "out.onnx").graph.initializer), 3)

    def test_an_input_that_is_a_weight_is_reported(self):
        _, report = self.quantize(FOUND["an initializer that is an input too"], "rtn,pack-int4")
        self.assertIn("inputs no more", " ".join(report["notes"]))
        self.assertEqual([i.name for i in onnx.load(self.path / "out.onnx").graph.input], ["x"])

    def test_awq_rounds_where_it_cannot_watch(self):
        for name in ["inside both branches of an If", "inside the body of a Loop", "Gemm with transA"]:
            with self.subTest(name):
                plain, _ = self.quantize(FOUND[name], "rtn,pack-int4")
                out, report = self.quantize(FOUND[name], "awq,pack-int4", "--calib", "random", "--calib-samples", "2")
                self.assertEqual({w["method"] for w in report["weights"]}, {"rtn"})
                self.assertIn("rounded to nearest", report["weights"][0]["notes"][0])
                np.testing.assert_allclose(out, plain, atol=1e-5)

    def test_what_stays_is_named(self):
        for name, (m, why) in NAMED.items():
            with self.subTest(name):
                onnx.save(m, self.path / "in.onnx")
                args = ["--pass", "rtn,pack-int4", "--allow-noop", "--dry-run", "--json"]
                report = json.loads(qcc(self.path / "in.onnx", *args))
                self.assertEqual(report["weights"], [])
                self.assertIn(why, " ".join(f["why"] for f in report["float"]))


def nested_floats(g):
    """Float tensors of more than a bias's size, in a graph and those inside it."""
    for t in g.initializer:
        if t.data_type in (T.FLOAT, T.FLOAT16) and np.prod(t.dims) >= K * N:
            yield t
    for n in g.node:
        for a in n.attribute:
            if a.type == a.GRAPH:
                yield from nested_floats(a.g)
            elif a.type == a.TENSOR and a.t.data_type in (T.FLOAT, T.FLOAT16) and np.prod(a.t.dims) >= K * N:
                yield a.t


if __name__ == "__main__":
    unittest.main()
