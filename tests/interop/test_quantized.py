"""Quantized models load in ONNX Runtime, and score what `qcc eval` says they score."""

import pathlib
import sys
import tempfile
import unittest

import numpy as np
import onnx

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import TESTDATA, logits, perplexity, qcc, scores, shared

STORIES = ["model.onnx", "external/model.onnx", "dynamo_eager_op18.onnx", "dynamo_sdpa_op18.onnx", "dynamo_sdpa_op23.onnx"]


class Quantized(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.out = pathlib.Path(self.folder.name) / "q.onnx"

    def quantize(self, model, passes, *flags):
        qcc(model, "--pass", passes, "-o", self.out, "--quiet", *flags)
        ops = [n.op_type for n in onnx.load(self.out, load_external_data=False).graph.node]
        return ops.count("MatMulNBits")

    def exact(self, tokens, rows, batch=8):
        """The perplexity, for which ONNX Runtime and `qcc eval --exact` must agree."""
        ids = np.load(tokens)[:rows]
        theirs = perplexity(logits(self.out, ids, batch), ids)
        ours = scores(self.out, "--tokens", tokens, "--rows", rows, "--exact")["perplexity"]
        self.assertAlmostEqual(ours, theirs, delta=1e-3)
        return theirs

    def float_perplexity(self, rows):
        ids = np.load(TESTDATA / "eval_ids.npy")[:rows]
        return perplexity(logits(TESTDATA / "tinylm.onnx", ids), ids)

    def test_tinylm_as_the_readme_has_it(self):
        tokens = TESTDATA / "eval_ids.npy"
        self.assertEqual(self.quantize(TESTDATA / "tinylm.onnx", "rtn,pack-int4", "--profile", "ort-cpu-exact"), 29)
        self.assertLess(self.exact(tokens, 16), 1.05 * self.float_perplexity(16))

    def test_stories_rtn(self):
        """5.2445 is round to nearest, asymmetric, group 32, computed by a float32 sketch and by ONNX Runtime's own
        quantizer; 5.296 is what its symmetric form gives."""
        tokens = shared("stories260k/eval_ids.npy")
        flags = ["--profile", "ort-cpu-exact"]
        self.assertEqual(self.quantize(shared("stories260k/dynamo_sdpa_op18.onnx"), "rtn,pack-int4", *flags), 36)
        self.assertAlmostEqual(self.exact(tokens, 128), 5.2445, delta=5e-4)
        self.quantize(shared("stories260k/dynamo_sdpa_op18.onnx"), "rtn{symmetric=true},pack-int4", *flags)
        self.assertLess(self.exact(tokens, 128), 5.296)

    def test_every_export_gives_the_same_weights(self):
        tokens = shared("stories260k/eval_ids.npy")
        found = []
        for name in STORIES:
            with self.subTest(name):
                model = shared("stories260k") / name
                self.assertEqual(self.quantize(model, "rtn,pack-int4", "--profile", "ort-cpu-exact"), 36)
                found.append(self.exact(tokens, 8, batch=1 if "op23" in name else 8))
        self.assertLess(max(found) - min(found), 0.02)

    def test_other_widths_and_groups(self):
        tokens = TESTDATA / "eval_ids.npy"
        for options in ["bits=8", "bits=2,group=16", "bits=3", "group=-1", "group=64,symmetric=true"]:
            with self.subTest(options):
                self.quantize(TESTDATA / "tinylm.onnx", f"rtn{{{options}}},pack-int4", "--profile", "ort-cpu-exact")
                self.exact(tokens, 4)

    def test_half_precision_scales(self):
        self.quantize(TESTDATA / "tinylm.onnx", "rtn,pack-int4", "--profile", "ort-cpu-exact", "--scale-type", "f16")
        self.exact(TESTDATA / "eval_ids.npy", 4)

    def test_qdq_form(self):
        qcc(TESTDATA / "tinylm.onnx", "--pass", "rtn,pack-qdq", "-o", self.out, "--quiet")
        onnx.checker.check_model(self.out)
        # ONNX Runtime fuses this form to int8 activations unless told otherwise, so this is close, not equal.
        ids = np.load(TESTDATA / "eval_ids.npy")[:4]
        theirs = perplexity(logits(self.out, ids), ids)
        ours = scores(self.out, "--tokens", TESTDATA / "eval_ids.npy", "--rows", 4, "--exact")["perplexity"]
        self.assertLess(abs(ours / theirs - 1), 0.02)

    def test_int8_activations_are_simulated(self):
        """`accuracy_level` 4: what `qcc eval` says without --exact is nearer to ONNX Runtime than with it."""
        tokens = TESTDATA / "eval_ids.npy"
        self.quantize(TESTDATA / "tinylm.onnx", "rtn,pack-int4")
        ids = np.load(tokens)[:8]
        theirs = perplexity(logits(self.out, ids), ids)
        ours = scores(self.out, "--tokens", tokens, "--rows", 8)["perplexity"]
        exact = scores(self.out, "--tokens", tokens, "--rows", 8, "--exact")["perplexity"]
        self.assertNotEqual(ours, exact)
        self.assertLess(abs(ours - theirs), abs(exact - theirs) + 1e-3)
        self.assertLess(abs(ours / theirs - 1), 2e-3)

    def test_threads_do_not_matter(self):
        files = []
        for threads in (1, 2, 7):
            self.quantize(TESTDATA / "tinylm.onnx", "rtn,pack-int4", "--threads", threads)
            files.append(self.out.read_bytes())
        self.assertTrue(files[0] == files[1] == files[2])

    def test_awq_calibrates_on_tokens_that_the_model_samples(self):
        args = ["--pass", "awq,pack-int4", "--profile", "ort-cpu-exact", "-o", self.out]
        said = qcc(TESTDATA / "tinylm.onnx", *args)
        self.assertIn("32 x 128 tokens sampled from the model itself (seed 0)", said)
        self.assertIn("attention_mask with ones", said)
        first = self.out.read_bytes()
        qcc(TESTDATA / "tinylm.onnx", *args, "--threads", 1)
        self.assertTrue(first == self.out.read_bytes())
        self.assertLess(self.exact(TESTDATA / "eval_ids.npy", 16), 1.05 * self.float_perplexity(16))
        props = {p.key: p.value for p in onnx.load(self.out).metadata_props}
        self.assertTrue(props["qcc.calibration"].startswith("blake3:"))

    def test_awq_on_stories(self):
        tokens, calib = shared("stories260k/eval_ids.npy"), shared("stories260k/calib_ids.npy")
        found = []
        for name in STORIES:
            with self.subTest(name):
                model = shared("stories260k") / name
                flags = ["--calib", calib, "--calib-samples", 64, "--profile", "ort-cpu-exact"]
                self.assertEqual(self.quantize(model, "awq{group=32},pack-int4", *flags), 36)
                found.append(self.exact(tokens, 128, batch=1 if "op23" in name else 8))
                self.assertLessEqual(found[-1], 5.10)
        self.assertLess(max(found) - min(found), 0.02)

    def test_gptq_on_stories(self):
        model, tokens = shared("stories260k/model.onnx"), shared("stories260k/eval_ids.npy")
        flags = ["--calib", shared("stories260k/calib_ids.npy"), "--calib-samples", 64, "--profile", "ort-cpu-exact"]
        for passes, most in [("gptq{sequential=off}", 4.99), ("gptq", 4.96), ("awq,gptq", 4.93)]:
            with self.subTest(passes):
                self.assertEqual(self.quantize(model, f"{passes},pack-int4", *flags), 36)
                self.assertLessEqual(self.exact(tokens, 128), most)

    def test_gptq_is_the_same_for_any_number_of_threads(self):
        files = []
        for threads in [1, 2, 7]:
            flags = ["--calib", TESTDATA / "calib_ids.npy", "--calib-samples", 2, "--threads", threads]
            self.quantize(TESTDATA / "tinylm.onnx", "gptq{bits=3},pack-int4", *flags)
            files.append(self.out.read_bytes())
        self.assertTrue(files[0] == files[1] == files[2])


if __name__ == "__main__":
    unittest.main()
