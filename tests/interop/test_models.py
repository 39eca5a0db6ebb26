"""Every model of the models folder runs, on real inputs, and agrees with ONNX Runtime."""

import gzip
import lzma
import pathlib
import tempfile
import unittest
import wave

import numpy as np

from common import TESTDATA, qcc, session, shared

# Of the largest value of an output.
TOLERANCE = 1e-4


def tokens(ids, rows):
    ids = np.load(ids)[:rows].astype(np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def digits(count):
    raw = gzip.decompress(shared("mnist/t10k-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 1, 28, 28)[:count]
    return [{"input.1": ((i / 255 - 0.1307) / 0.3081).astype(np.float32)} for i in images]


def pictures():
    """Smooth images with edges, as photographs have them, normalized: no images come with this model."""
    rng = np.random.default_rng(3)
    low = rng.standard_normal((4, 3, 8, 8)).astype(np.float32)
    return {"input": low.repeat(4, 2).repeat(4, 3)}


def speech(chunks):
    """Consecutive chunks of a recording; the state of each is what the reference gave for the one before."""
    with wave.open(str(shared("silero_vad/test.wav"))) as w:
        rate, raw = w.getframerate(), w.readframes(w.getnframes())
    x = np.frombuffer(raw, np.int16).astype(np.float32) / 32768
    s, state = session(shared("silero_vad/silero_vad.onnx")), np.zeros((2, 1, 128), np.float32)
    size = 512 if rate == 16000 else 256
    for i in range(chunks):
        feed = {"input": x[None, i * size : (i + 1) * size], "state": state, "sr": np.array(rate, np.int64)}
        yield feed
        state = s.run(None, feed)[1]


class Models(unittest.TestCase):
    def agrees(self, path, feeds):
        s = session(path)
        known = [i.name for i in s.get_inputs()]
        with tempfile.TemporaryDirectory() as folder:
            given, out = pathlib.Path(folder) / "in.npz", pathlib.Path(folder) / "out.npz"
            for feed in feeds if isinstance(feeds, list) else [feeds]:
                feed = {k: v for k, v in feed.items() if k in known}
                np.savez(given, **feed)
                qcc("run", path, "--input", given, "-o", out, "-q")
                found = np.load(out)
                for o, want in zip(s.get_outputs(), s.run(None, feed), strict=True):
                    got = found[o.name]
                    self.assertEqual((got.dtype, got.shape), (want.dtype, want.shape))
                    error = np.abs(got - want).max() / np.abs(want).max()
                    self.assertLessEqual(error, TOLERANCE, f"{path} {o.name}")

    def test_tinylm(self):
        self.agrees(TESTDATA / "tinylm.onnx", tokens(TESTDATA / "eval_ids.npy", 4))

    def test_wikilm(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "wikilm.onnx"
            path.write_bytes(lzma.decompress(shared("wikilm/model.onnx.xz").read_bytes()))
            self.agrees(path, tokens(shared("wikilm/eval_ids.npy"), 2))

    def test_stories260k(self):
        folder = shared("stories260k")
        ids = folder / "eval_ids.npy"
        for path in sorted(folder.rglob("*.onnx")):
            # The export with the opset 23 ops takes one row at a time.
            self.agrees(path, tokens(ids, 1 if "op23" in path.name else 2))

    def test_nano_sort_gpt(self):
        for path in sorted(shared("nano_sort_gpt").glob("*.onnx")):
            self.agrees(path, tokens(path.parent / "eval_ids.npy", 64))

    def test_magika(self):
        features = np.load(shared("magika/eval_feats_v3_3.npz"))
        s = session(shared("magika/standard_v3_3.onnx"))
        (name,) = [i.name for i in s.get_inputs()]
        x = next(features[k] for k in features.files if features[k].ndim == 2 and features[k].shape[1] == 2048)
        self.agrees(shared("magika/standard_v3_3.onnx"), {name: x[:16].astype(np.int32)})

    def test_mnist(self):
        self.agrees(shared("mnist/mnist.onnx"), digits(8))

    def test_resnet20(self):
        self.agrees(shared("resnet20/resnet20.onnx"), pictures())

    def test_silero_vad(self):
        self.agrees(shared("silero_vad/silero_vad.onnx"), list(speech(40))[::4])


if __name__ == "__main__":
    unittest.main()
