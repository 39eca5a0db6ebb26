"""Calibration data: what is taken from a file, and what is refused."""

import json
import pathlib
import sys
import tempfile
import unittest

import numpy as np
import onnx

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import TESTDATA, qcc, shared

MODEL = TESTDATA / "tinylm.onnx"


class Calibration(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.dir = pathlib.Path(self.folder.name)
        self.out = self.dir / "q.onnx"

    def args(self, *flags, model=MODEL):
        return [model, "--pass", "awq{grid=2,clip=false},pack-int4", "-o", self.out, "--json", *flags]

    def said(self, *flags, model=MODEL):
        return json.loads(qcc(*self.args(*flags, model=model)))

    def hash(self, *flags):
        self.said(*flags)
        return {p.key: p.value for p in onnx.load(self.out).metadata_props}["qcc.calibration"]

    def error(self, *flags, model=MODEL):
        self.out.unlink(missing_ok=True)
        message = qcc(*self.args(*flags, model=model), fails=1)
        self.assertFalse(self.out.exists())
        return " ".join(message.replace("│", " ").split())

    def save(self, name, array):
        np.save(self.dir / name, array)
        return self.dir / name

    def test_the_first_rows_of_a_file(self):
        ids = np.load(TESTDATA / "calib_ids.npy")
        four, whole = self.save("four.npy", ids[:4]), TESTDATA / "calib_ids.npy"
        said = self.said("--calib", whole, "--calib-samples", 4)
        self.assertTrue(said["calibration"].startswith("4 x 128 tokens"), said["calibration"])
        first = self.hash("--calib", whole, "--calib-samples", 4)
        self.assertEqual(first, self.hash("--calib", four))
        self.assertEqual(first, self.hash("--calib", self.save("four32.npy", ids[:4].astype(np.int32))))
        self.assertNotEqual(first, self.hash("--calib", whole, "--calib-samples", 4, "--calib-order", "random"))

    def test_a_stream_is_cut_into_windows(self):
        stream = self.save("stream.npy", np.load(TESTDATA / "calib_ids.npy").reshape(-1).astype(np.uint16))
        said = self.said("--calib", stream, "--calib-samples", 8, "--seq-len", 64)
        self.assertTrue(said["calibration"].startswith("8 x 64 tokens"))
        seeded = [self.hash("--calib", stream, "--seq-len", 64, "--calib-samples", 4, "--seed", s) for s in (0, 0, 1)]
        self.assertEqual(seeded[0], seeded[1])
        self.assertNotEqual(seeded[0], seeded[2])

    def test_text(self):
        text = self.dir / "text.txt"
        text.write_text("Once upon a time there was a little model that learned to count.\n" * 40)
        flags = ["--calib", text, "--tokenizer", TESTDATA / "tokenizer.json", "--calib-samples", 4, "--seq-len", 32]
        self.assertTrue(self.said(*flags)["calibration"].startswith("4 x 32 tokens"))

    def test_less_than_was_asked_for_is_said(self):
        said = self.said("--calib", TESTDATA / "calib_ids.npy", "--calib-samples", 99, "--seq-len", 500)
        self.assertTrue(any("32 calibration samples, 99 were asked for" in w for w in said["warnings"]))
        self.assertTrue(any("samples of 128 tokens, 500 were asked for" in w for w in said["warnings"]))

    def test_arrays_by_name_are_the_same_as_tokens(self):
        ids = np.load(TESTDATA / "calib_ids.npy")[:4]
        npz = self.dir / "inputs.npz"
        np.savez_compressed(npz, input_ids=ids, attention_mask=np.ones_like(ids), labels=ids)
        said = self.said("--calib", npz)
        self.assertTrue(said["calibration"].startswith("4 samples"))
        self.assertTrue(any("labels" in n for n in said["notes"]))

    def test_noise_has_to_be_asked_for(self):
        self.assertIn("random tokens", self.said("--calib", "random", "--calib-samples", 2)["calibration"])
        self.assertIn("--calib", self.error(model=shared("magika/standard_v3_3.onnx")))

    def test_a_short_context_is_found(self):
        """This model has 11 positions, which it does not say."""
        said = self.said(model=shared("nano_sort_gpt/legacy_sdpa_op17.onnx"))
        self.assertIn("32 x 8 tokens sampled from the model itself", said["calibration"])

    def test_a_file_that_is_not_there_is_missed_even_if_no_pass_reads_it(self):
        message = qcc(MODEL, "--pass", "rtn,pack-int4", "-o", self.out, "--calib", "none.npy", fails=1)
        self.assertIn("cannot read", message)

    def test_bad_input(self):
        calib = ["--calib", self.dir / "bad.npy"]
        self.save("bad.npy", np.full((1, 4), 4096))
        self.assertIn("found 4096 in row 0, column 0", self.error(*calib))
        self.save("bad.npy", np.full((1, 4), -1))
        self.assertIn("found -1", self.error(*calib))
        self.save("bad.npy", np.zeros((1, 4), np.float32))
        self.assertIn("found an array of f32", self.error(*calib))
        self.save("bad.npy", np.zeros((1, 2, 2), np.int64))
        self.assertIn("found the shape [1, 2, 2]", self.error(*calib))
        self.save("bad.npy", np.zeros((0, 4), np.int64))
        self.assertIn("empty", self.error(*calib))
        (self.dir / "bad.npy").write_bytes(b"")
        self.assertIn("empty file", self.error(*calib))
        (self.dir / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{")
        self.assertIn("ends inside its header", self.error(*calib))
        self.assertIn("cannot read", self.error("--calib", self.dir / "none.npy"))
        (self.dir / "text.txt").write_text("hello")
        self.assertIn("--tokenizer", self.error("--calib", self.dir / "text.txt"))

    def test_bad_arrays(self):
        ids, npz = np.zeros((2, 8), np.int64), self.dir / "bad.npz"

        def error(**arrays):
            np.savez(npz, **arrays)
            return self.error("--calib", npz)

        self.assertIn('did you mean "inputs_ids"', error(inputs_ids=ids, attention_mask=ids))
        self.assertIn("found i32 [2, 8]", error(input_ids=ids.astype(np.int32), attention_mask=ids))
        self.assertIn("found i64 [8]", error(input_ids=ids[0], attention_mask=ids))
        self.assertIn("has 2 samples", error(input_ids=ids, attention_mask=ids[:1]))
        self.assertIn("found 4096", error(input_ids=ids + 4096, attention_mask=ids))
        whole = npz.read_bytes()
        npz.write_bytes(whole[: len(whole) // 2])
        self.assertIn("not a .npz archive", self.error("--calib", npz))


if __name__ == "__main__":
    unittest.main()
