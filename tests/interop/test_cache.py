"""Models with a key/value cache give what the same model gives without one, and are quantized as far."""

import json
import pathlib
import sys
import tempfile
import unittest

import numpy as np
from onnx import TensorProto as T

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import cached
from common import TESTDATA, perplexity, qcc, scores, session

PLAIN, TOKENS = TESTDATA / "tinylm.onnx", TESTDATA / "eval_ids.npy"
ROWS = 4


class Cache(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.dir = pathlib.Path(self.folder.name)

    def build(self, **form):
        return cached.build(self.dir / "cached.onnx", **form)

    def evaluated(self, model):
        return scores(model, "--tokens", TOKENS, "--rows", ROWS)["perplexity"]

    def agrees(self, past=0, **form):
        model = self.build(**form, **({"past": past} if past else {}))
        got = self.evaluated(model)
        ids = np.load(TOKENS)[:ROWS]
        s = session(model)
        runtime = s.run(["logits"], cached.empty(s, ids, past))[0].astype(np.float64)
        self.assertAlmostEqual(got, perplexity(runtime, ids), delta=1e-3)
        self.assertAlmostEqual(got, self.evaluated(PLAIN), delta=1e-2)
        return model

    def test_concatenated(self):
        model = self.agrees()
        said = qcc("eval", model, "--tokens", TOKENS, "--rows", 1)
        self.assertIn('an empty key/value cache ("past_key_values.0.key" and 7 more)', said)
        self.assertIn("attention_mask with ones, position_ids with 0, 1, 2, ...", said)

    def test_of_another_name_and_type(self):
        self.agrees(names="past_{1}_{0}", kind=T.FLOAT16)

    def test_of_fixed_length(self):
        said = qcc("eval", self.agrees(past=16), "--tokens", TOKENS, "--rows", 1)
        self.assertIn("attention_mask with 16 zeros, then ones", said)

    def test_group_query(self):
        self.agrees(group_query=True)

    def test_group_query_with_lengths_as_inputs(self):
        self.agrees(group_query=True, lengths=True)

    def test_group_query_in_a_buffer(self):
        self.agrees(group_query=True, lengths=True, past=160)

    def quantized(self, model, *flags):
        out = self.dir / "q.onnx"
        report = qcc(model, "--pass", "awq{grid=2,clip=false},pack-int4", "-o", out, "--json", *flags)
        return out, json.loads(report)

    def test_as_many_weights_are_quantized(self):
        calib = ["--calib", TESTDATA / "calib_ids.npy", "--calib-samples", 4]
        plain, said = self.quantized(PLAIN, *calib)
        count, ppl = len(said["weights"]), self.evaluated(plain)
        self.assertEqual(count, 29)
        for form in [{}, {"group_query": True}]:
            with self.subTest(form):
                out, said = self.quantized(self.build(**form), *calib)
                self.assertEqual(len(said["weights"]), count)
                self.assertTrue(any("empty key/value cache" in note for note in said["notes"]))
                self.assertAlmostEqual(self.evaluated(out), ppl, delta=0.02 * ppl)

    def test_a_scale_finds_its_place_in_a_fused_norm(self):
        _, said = self.quantized(self.build(group_query=True), "--calib", TESTDATA / "calib_ids.npy", "--calib-samples", 4)
        notes = {w["weight"]: " ".join(w["notes"]) for w in said["weights"]}
        for i in range(cached.LAYERS):
            for role in ["q", "k", "v", "gate", "up"]:
                self.assertNotIn("lets no scale through", notes[f"{i}.{role}"])

    def test_calibration_sampled_from_the_model_itself(self):
        _, said = self.quantized(self.build(group_query=True), "--calib-samples", 2, "--seq-len", 32)
        self.assertIn("sampled from the model itself", said["calibration"])
        self.assertTrue(any("empty key/value cache" in note for note in said["notes"]))

    def test_arrays_of_tokens_alone(self):
        ids, npz = np.load(TESTDATA / "calib_ids.npy")[:4], self.dir / "inputs.npz"
        np.savez(npz, input_ids=ids)
        model = self.build()
        _, said = self.quantized(model, "--calib", npz)
        self.assertTrue(any("empty key/value cache" in note and "attention_mask with ones" in note for note in said["notes"]))
        np.savez(npz, input_ids=ids, **{"past_key_values.0.key": np.zeros((4, 2, 3, 32), np.float32)})
        message = qcc(model, "--pass", "awq", "-o", self.dir / "q.onnx", "--calib", npz, fails=1)
        self.assertIn("expected an array for the input", " ".join(message.replace("│", " ").split()))

    def test_what_cannot_be_fed_is_named(self):
        message = qcc("eval", self.build(heads="heads"), "--tokens", TOKENS, fails=1)
        self.assertIn('"past_key_values.0.key"', message)
        self.assertIn("heads and size fixed", " ".join(message.replace("│", " ").split()))


if __name__ == "__main__":
    unittest.main()
