"""A model that goes through qcc without a pass stays the same, field for field and in what it computes."""

import contextlib
import io
import pathlib
import sys
import tempfile
import unittest

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import roundtrip
from common import QCC, TESTDATA, logits, qcc, shared

SHARED = [
    "stories260k/model.onnx",
    "stories260k/external/model.onnx",
    "stories260k/dynamo_eager_op18.onnx",
    "stories260k/dynamo_sdpa_op18.onnx",
    "stories260k/dynamo_sdpa_op23.onnx",
    "nano_sort_gpt/legacy_sdpa_op17.onnx",
    "nano_sort_gpt/dynamo_sdpa_op18.onnx",
    "silero_vad/silero_vad.onnx",
    "magika/standard_v3_3.onnx",
    "mnist/mnist.onnx",
    "resnet20/resnet20.onnx",
]


class RoundTrip(unittest.TestCase):
    def same(self, *paths):
        out = io.StringIO()
        argv, sys.argv = sys.argv, ["roundtrip.py", str(QCC), *map(str, paths)]
        try:
            with contextlib.redirect_stdout(out):
                failed = roundtrip.main()
        finally:
            sys.argv = argv
        self.assertFalse(failed, out.getvalue())

    def test_synthetic_models_and_ours(self):
        self.same(TESTDATA / "tinylm.onnx")

    def test_shared_models(self):
        self.same(*[shared(name) for name in SHARED])

    def test_it_computes_the_same(self):
        ids = np.load(TESTDATA / "eval_ids.npy")[:2]
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "out.onnx"
            qcc(TESTDATA / "tinylm.onnx", "-o", out)
            np.testing.assert_array_equal(logits(out, ids), logits(TESTDATA / "tinylm.onnx", ids))


if __name__ == "__main__":
    unittest.main()
