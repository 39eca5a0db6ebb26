"""`qcc eval` gives the figures that ONNX Runtime and float64 give."""

import pathlib
import sys
import unittest

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import TESTDATA, divergence, logits, perplexity, qcc, scores, shared, top1

STORIES = ["model.onnx", "external/model.onnx", "dynamo_eager_op18.onnx", "dynamo_sdpa_op18.onnx", "dynamo_sdpa_op23.onnx"]


class Eval(unittest.TestCase):
    def agrees(self, model, tokens, rows, batch=8):
        ids = np.load(tokens)[:rows]
        x = logits(model, ids, batch)
        got = scores(model, "--tokens", tokens, "--rows", rows)
        self.assertEqual((got["rows"], got["positions"]), (rows, rows * (ids.shape[1] - 1)))
        self.assertAlmostEqual(got["perplexity"], perplexity(x, ids), delta=1e-3)
        self.assertAlmostEqual(got["top1"], top1(x, ids), delta=2e-3)
        return got

    def test_tinylm(self):
        got = self.agrees(TESTDATA / "tinylm.onnx", TESTDATA / "eval_ids.npy", 64)
        self.assertAlmostEqual(got["perplexity"], 87.85, delta=0.01)

    def test_stories_as_exported_by_everything(self):
        tokens = shared("stories260k/eval_ids.npy")
        for name in STORIES:
            with self.subTest(name):
                self.agrees(shared("stories260k") / name, tokens, 8, batch=1 if "op23" in name else 8)

    def test_a_model_that_fails_on_a_batch_is_fed_row_by_row_and_it_is_said(self):
        model, tokens = shared("stories260k/dynamo_sdpa_op23.onnx"), shared("stories260k/eval_ids.npy")
        out = qcc("eval", model, "--tokens", tokens, "--rows", 4)
        self.assertIn("one row at a time", out)

    def test_sorting(self):
        for name in ["legacy_sdpa_op17.onnx", "dynamo_sdpa_op18.onnx"]:
            with self.subTest(name):
                self.agrees(shared("nano_sort_gpt") / name, shared("nano_sort_gpt/eval_ids.npy"), 64, batch=1)

    def test_distance_from_a_baseline(self):
        """Of two different models: one export with 5 % of a weight taken off."""
        import tempfile

        import onnx
        from onnx import numpy_helper

        model = onnx.load(TESTDATA / "tinylm.onnx")
        w = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        w.raw_data = (numpy_helper.to_array(w) * np.float32(0.95)).tobytes()
        tokens = TESTDATA / "eval_ids.npy"
        ids = np.load(tokens)[:4]
        with tempfile.TemporaryDirectory() as folder:
            other = pathlib.Path(folder) / "other.onnx"
            onnx.save(model, other)
            got = scores(other, "--tokens", tokens, "--rows", 4, "--baseline", TESTDATA / "tinylm.onnx")
            q, p = logits(other, ids), logits(TESTDATA / "tinylm.onnx", ids)
        self.assertGreater(divergence(p, q), 1e-3)
        self.assertAlmostEqual(got["kl"], divergence(p, q), delta=1e-5)
        self.assertAlmostEqual(got["baseline_perplexity"], perplexity(p, ids), delta=1e-3)
        same = float((q[:, :-1].argmax(-1) == p[:, :-1].argmax(-1)).mean())
        self.assertAlmostEqual(got["agreement"], same, delta=2e-3)

    def test_it_does_not_depend_on_threads(self):
        args = ["eval", TESTDATA / "tinylm.onnx", "--tokens", TESTDATA / "eval_ids.npy", "--rows", 4, "--json"]
        self.assertEqual(qcc(*args, "--threads", 1), qcc(*args, "--threads", 3))

    def test_bad_input(self):
        import tempfile

        model = TESTDATA / "tinylm.onnx"
        with tempfile.TemporaryDirectory() as folder:
            tokens = pathlib.Path(folder) / "tokens.npy"

            def error(array):
                np.save(tokens, array)
                return qcc("eval", model, "--tokens", tokens, fails=1)

            self.assertIn("4096", error(np.full((2, 3), 4096)))
            self.assertIn("tokens.npy", error(np.zeros((2, 3))))
            self.assertIn("empty", error(np.zeros((0, 3), np.int64)))
            self.assertIn("tokens.npy", qcc("eval", model, "--tokens", TESTDATA / "tokens.npy", fails=1))


if __name__ == "__main__":
    unittest.main()
