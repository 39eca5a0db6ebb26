"""What quantization costs at a model's task, through ONNX Runtime, and against ONNX Runtime's own quantizers.

- nano_sort_gpt (Gemm): sorts six digits; how many of all 729 inputs come out right.
- magika (Conv, MatMul): names the type of a file; how many of 76 labelled ones are right.
- silero_vad (If, LSTM, Conv, weights in Constant nodes): the probability of speech every 32 ms, against the float model.
"""

import json
import logging
import pathlib
import sys
import tempfile
import unittest
import wave

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import qcc, session, shared

logging.disable(logging.WARNING)
INT4 = "rtn,pack-int4"
INT8 = "rtn{bits=8},pack-int4"
QDQ8 = "rtn{bits=8},pack-qdq"
# 4 bits for products, 8 for the rest.
MIXED = "rtn,rtn{bits=8},pack-int4"


def sorted_right(path):
    """Of all inputs, those that greedy decoding sorts."""
    ids = np.load(shared("nano_sort_gpt/eval_ids.npy"))[:, :6]
    s = session(path)
    names = {i.name for i in s.get_inputs()}
    seq = ids
    for _ in range(ids.shape[1]):
        feed = {"input_ids": seq, "attention_mask": np.ones_like(seq)}
        logits = s.run(["logits"], {k: v for k, v in feed.items() if k in names})[0]
        seq = np.concatenate([seq, logits[:, -1].argmax(-1)[:, None]], 1)
    return int((seq[:, ids.shape[1] :] == np.sort(ids, 1)).all(1).sum())


def named_right(path):
    data = np.load(shared("magika/eval_feats_v3_3.npz"))
    labels = json.loads(shared("magika/standard_v3_3.config.min.json").read_text())["target_labels_space"]
    scores = session(path).run(None, {"bytes": data["bytes"]})[0]
    return int((np.array(labels)[scores.argmax(-1)] == data["labels"]).sum())


def speech(path):
    """The probability of speech in each window of 512 samples; a window is fed with the 64 samples before it."""
    with wave.open(str(shared("silero_vad/test.wav"))) as f:
        rate = np.array(f.getframerate())
        audio = np.frombuffer(f.readframes(f.getnframes()), np.int16).astype(np.float32) / 32768
    s = session(path)
    state, context, out = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32), []
    for i in range(0, len(audio) - 511, 512):
        x = np.concatenate([context, audio[None, i : i + 512]], 1)
        p, state = s.run(None, {"input": x, "state": state, "sr": rate})
        out.append(p[0, 0])
        context = x[:, -64:]
    return np.array(out)


class Accuracy(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name)

    def quantize(self, model, passes, *flags):
        out = self.path / "out.onnx"
        qcc(model, "--pass", passes, "-o", out, "--quiet", *flags)
        return out

    def dynamic(self, model, **options):
        out = self.path / "dynamic.onnx"
        quantize_dynamic(model, out, **options)
        return out

    def test_sort(self):
        # The dynamo export is mostly its exporter's notes.
        sizes = {"legacy_sdpa_op17.onnx": (0.5, 0.6), "dynamo_sdpa_op18.onnx": (0.65, 0.75)}
        for name, (four, eight) in sizes.items():
            model = shared("nano_sort_gpt") / name
            self.assertEqual(sorted_right(model), 729)
            self.assertEqual(sorted_right(self.dynamic(model)), 729)
            for passes, size in [(INT4, four), (INT8, eight), (QDQ8, eight)]:
                with self.subTest(name, passes=passes):
                    out = self.quantize(model, passes)
                    self.assertEqual(sorted_right(out), 729)
                    self.assertLess(out.stat().st_size, size * model.stat().st_size)

    def test_magika(self):
        model = shared("magika/standard_v3_3.onnx")
        self.assertEqual(named_right(model), 76)
        for passes, size in [(INT4, 0.90), (INT8, 0.27), (QDQ8, 0.27), (MIXED, 0.25)]:
            with self.subTest(passes=passes):
                out = self.quantize(model, passes)
                self.assertEqual(named_right(out), 76)
                self.assertLess(out.stat().st_size, size * model.stat().st_size)
        for kind in (QuantType.QInt8, QuantType.QUInt8):
            self.assertLessEqual(named_right(self.dynamic(model, weight_type=kind)), 76)

    def test_silero(self):
        model = shared("silero_vad/silero_vad.onnx")
        float_ = speech(model)
        for passes in [INT8, QDQ8]:
            with self.subTest(passes=passes):
                out = self.quantize(model, passes)
                found = speech(out)
                self.assertLess(np.abs(found - float_).max(), 0.05)
                self.assertGreater(((found > 0.5) == (float_ > 0.5)).mean(), 0.997)
                self.assertLess(out.stat().st_size, 0.31 * model.stat().st_size)
                ops = [n.op_type for n in nodes(onnx.load(out).graph)]
                self.assertEqual((ops.count("Conv"), ops.count("LSTM"), ops.count("DequantizeLinear")), (12, 4, 16))
        # ONNX Runtime's quantizer finds none of these weights.
        self.assertGreaterEqual(self.dynamic(model).stat().st_size, model.stat().st_size)


def nodes(g):
    for n in g.node:
        yield n
        for a in n.attribute:
            if a.type == a.GRAPH:
                yield from nodes(a.g)


if __name__ == "__main__":
    unittest.main()
