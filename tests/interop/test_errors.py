"""The errors that a report gives of each weight are those that numpy finds in float64, on the codes in the file and the
activations that ONNX Runtime computes."""

import json
import pathlib
import sys
import tempfile
import unittest

import numpy as np
import onnx
from onnx import numpy_helper

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import TESTDATA, qcc, session

MODEL = TESTDATA / "tinylm.onnx"
CALIB = TESTDATA / "calib_ids.npy"
ROWS = 4
DATA = ["--calib", CALIB, "--calib-samples", ROWS]


def arrays(graph):
    return {i.name: numpy_helper.to_array(i) for i in graph.initializer}


def originals():
    """Of each MatMul with a constant weight: its activation's name, and the weight as [K, N]."""
    graph = onnx.load(MODEL).graph
    known, made = arrays(graph), {o: n for n in graph.node for o in n.output}
    out = {}
    for node in (n for n in graph.node if n.op_type == "MatMul"):
        name = node.input[1]
        turned = name in made and made[name].op_type == "Transpose"
        name = made[name].input[0] if turned else name
        if name in known:
            out[node.name] = (node.input[0], known[name].T if turned else known[name])
    return out


def dequantized(path):
    """What the codes of each packed node stand for, [K, N]."""
    graph = onnx.load(path).graph
    known, out = arrays(graph), {}
    for node in (n for n in graph.node if n.op_type == "MatMulNBits"):
        k, n, bits, block = (next(a.i for a in node.attribute if a.name == key) for key in ["K", "N", "bits", "block_size"])
        per, blocks = 8 // bits, -(-k // block)
        unpack = lambda b, count: (b[..., None] >> (bits * np.arange(per, dtype=np.uint8)) & (2**bits - 1)).reshape(n, -1)[:, :count]
        codes = unpack(known[node.input[1]].reshape(n, -1), blocks * block).reshape(n, blocks, block)
        zeros = unpack(known[node.input[3]].reshape(n, -1), blocks)
        scales = known[node.input[2]].reshape(n, blocks)
        w = (codes.astype(np.float32) - zeros[..., None].astype(np.float32)) * scales[..., None]
        out[node.name] = w.reshape(n, -1)[:, :k].T
    return out


def activations(names):
    m = onnx.load(MODEL)
    known = {o.name for o in m.graph.output}
    m.graph.output.extend(onnx.ValueInfoProto(name=n) for n in sorted(set(names)) if n not in known)
    ids = np.load(CALIB)[:ROWS]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "m.onnx"
        onnx.save(m, path)
        s = session(path)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        found = s.run(sorted(set(names)), {i.name: feed[i.name] for i in s.get_inputs()})
    return {n: x.reshape(-1, x.shape[-1]).astype(np.float64) for n, x in zip(sorted(set(names)), found)}


class Errors(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.originals = originals()
        cls.x = activations([x for x, _ in cls.originals.values()])

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = pathlib.Path(folder.name) / "q.onnx"

    def report(self, passes, *flags):
        found = json.loads(qcc(MODEL, "--pass", f"{passes},pack-int4", "-o", self.out, "--json", *flags))
        self.assertEqual(len(found["weights"]), 29)
        return found["weights"], dequantized(self.out)

    def check(self, weights, found, outputs):
        for w in weights:
            x, float_w = self.originals[w["node"]]
            wide = float_w.astype(np.float64)
            e = found[w["node"]].astype(np.float64) - wide
            want = {
                "frobenius_error": np.linalg.norm(e),
                "weight_error": np.linalg.norm(e) / np.linalg.norm(wide),
                "max_error": np.abs(e).max(),
                "mean_error": np.abs(e).mean(),
            }
            for name, value in want.items():
                self.assertAlmostEqual(w[name] / value, 1, delta=1e-4, msg=f"{w['weight']}: {name}")
            if outputs:
                value = np.linalg.norm(self.x[x] @ e) / np.linalg.norm(self.x[x] @ wide)
                self.assertAlmostEqual(w["output_error"] / value, 1, delta=2e-3, msg=w["weight"])
            else:
                self.assertIsNone(w["output_error"])
            last = w["steps"][-1]
            self.assertEqual((last["weight_error"], last["output_error"]), (w["weight_error"], w["output_error"]))

    def test_rtn(self):
        self.check(*self.report("rtn"), outputs=False)

    def test_rtn_says_what_became_of_outputs_and_writes_the_same(self):
        self.report("rtn")
        plain = self.out.read_bytes()
        self.check(*self.report("rtn", *DATA), outputs=True)
        self.assertEqual(self.out.read_bytes(), plain)

    def test_steps_begin_with_rounding_to_nearest(self):
        rtn, _ = self.report("rtn", *DATA)
        for name in ["clip", "hqq"]:
            for flags in [[], DATA]:
                weights, found = self.report(f"rtn{{{name}=true}}", *flags)
                self.check(weights, found, outputs=bool(flags))
                for plain, w in zip(rtn, weights):
                    first, second = w["steps"]
                    self.assertEqual((first["step"], second["step"]), ("rtn", name))
                    self.assertAlmostEqual(first["weight_error"] / plain["weight_error"], 1, delta=1e-5)
                    if flags:
                        self.assertAlmostEqual(first["output_error"] / plain["output_error"], 1, delta=1e-6)
                    if name == "clip":
                        self.assertLess(second["weight_error"], first["weight_error"])

    def test_awq_without_scales(self):
        """A scale changes activation and weight together, so that codes alone do not tell the weight's error."""
        weights, found = self.report("awq{grid=0}", *DATA)
        self.check(weights, found, outputs=True)
        for w in weights:
            self.assertEqual([s["step"] for s in w["steps"]], ["rtn", "clip"])
            self.assertLess(w["steps"][1]["output_error"], w["steps"][0]["output_error"])

    def test_codes_in_a_larger_container_are_said_and_counted(self):
        for bits, container, article in [(3, 4, "a"), (5, 8, "an")]:
            run = qcc(MODEL, "--pass", f"rtn{{bits={bits}}},pack-int4", "-o", self.out, "--json")
            report = json.loads(run)
            note = f"{bits}-bit codes in {article} {container}-bit container"
            self.assertTrue(all(note in w["notes"] for w in report["weights"]))
            self.assertGreater(report["totals"]["bits_per_weight"], container)


if __name__ == "__main__":
    unittest.main()
