"""canonicalize changes no output: ONNX Runtime runs a model and the canonical one; and models become as short as it says."""

import collections
import lzma
import pathlib
import sys
import tempfile
import unittest

import numpy as np
import onnx

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import TESTDATA, qcc, session, shared
from test_opset import SHARED, feed

STORIES = ["model", "external/model", "dynamo_eager_op18", "dynamo_sdpa_op18", "dynamo_sdpa_op23"]


def histogram(path):
    return collections.Counter(n.op_type for n in onnx.load(path, load_external_data=False).graph.node)


class Canonicalize(unittest.TestCase):
    def canonical(self, path, folder):
        out = pathlib.Path(folder) / "out.onnx"
        qcc(path, "-p", "canonicalize", "-o", out, "-q")
        onnx.checker.check_model(out, full_check=True)
        return out

    def agrees(self, path, feeds=None):
        """The same outputs, to rounding; gives the histograms before and after."""
        with tempfile.TemporaryDirectory() as folder:
            out = self.canonical(path, folder)
            old, new = session(path), session(out)
            self.assertEqual([(o.name, o.type) for o in old.get_outputs()], [(o.name, o.type) for o in new.get_outputs()])
            for x in feeds or [feed(path)]:
                for a, b in zip(old.run(None, x), new.run(None, x)):
                    if a.dtype == np.float32:
                        size = max(np.abs(a[np.isfinite(a)]).max(initial=0), 1e-6)
                        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * size)
                    else:
                        np.testing.assert_array_equal(a, b)
            return histogram(path), histogram(out)

    def tokens(self, path, vocabulary):
        rng = np.random.default_rng(3)
        batch = 1 if "op23" in str(path) else 2
        for shape in [(batch, 9), (1, 1), (batch, 3)]:
            ids = rng.integers(0, vocabulary, shape)
            mask = np.ones_like(ids)
            yield {"input_ids": ids, "attention_mask": mask}
            if shape[1] > 4:
                # Padding in front of the first row.
                mask = mask.copy()
                mask[0, :3] = 0
                yield {"input_ids": ids, "attention_mask": mask}

    def test_exports_of_one_model(self):
        counts = {}
        for name in STORIES:
            with self.subTest(name):
                path = shared(f"stories260k/{name}.onnx")
                before, after = self.agrees(path, list(self.tokens(path, 512)))
                counts[name] = sum(before.values()), sum(after.values())
                # Shapes of the few tensors from which the mask is made, and nothing per layer.
                for op, most in [("Shape", 4), ("Identity", 0), ("Constant", 0), ("Reciprocal", 0), ("Equal", 0)]:
                    self.assertLessEqual(after[op], most, (op, after))
        # The legacy export comes out about as short as the other exports of the same form of attention.
        self.assertLessEqual(counts["model"][1], 1.1 * counts["dynamo_sdpa_op18"][1], counts)
        self.assertEqual(counts["model"], counts["external/model"])

    def test_wikilm(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "wikilm.onnx"
            path.write_bytes(lzma.decompress(shared("wikilm/model.onnx.xz").read_bytes()))
            before, after = self.agrees(path, list(self.tokens(path, 4096)))
            self.assertLess(sum(after.values()), 0.9 * sum(before.values()))

    def test_tinylm(self):
        path = TESTDATA / "tinylm.onnx"
        before, after = self.agrees(path, list(self.tokens(path, 4096)))
        self.assertLess(sum(after.values()), 0.9 * sum(before.values()))

    def test_other_models(self):
        for name in SHARED:
            with self.subTest(name):
                self.agrees(shared(name))


if __name__ == "__main__":
    unittest.main()
