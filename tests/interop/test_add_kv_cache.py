"""`add-kv-cache`: in ONNX Runtime, tokens one by one and in chunks give the logits of the whole sequence."""

import lzma
import pathlib
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import onnx

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from common import ROOT, TESTDATA, qcc, session, shared

TINY, TOKENS = TESTDATA / "tinylm.onnx", TESTDATA / "eval_ids.npy"
FUSED = "canonicalize,fuse"
RAISED = "canonicalize,raise-opset{version=23},fuse"
STORIES = ["model", "dynamo_eager_op18", "dynamo_sdpa_op18", "dynamo_sdpa_op23"]


def feed(s, ids, past, start):
    """What a cached model is fed with for `ids`, behind `start` positions."""
    rows, new = ids.shape
    known = {"input_ids": ids, "attention_mask": np.ones((rows, start + new), np.int64),
             "position_ids": np.tile(np.arange(start, start + new), (rows, 1))}
    return {i.name: known[i.name] for i in s.get_inputs() if i.name in known} | past


def empty(s, rows):
    """No past, and the names of outputs by those of inputs."""
    caches = [i for i in s.get_inputs() if i.name.startswith("past_key_values.")]
    past = {i.name: np.zeros((rows, i.shape[1], 0, i.shape[3]), np.float32) for i in caches}
    return past, {i.name: i.name.replace("past_key_values", "present") for i in caches}


def in_steps(s, ids, steps):
    """The logits of all positions, computed so many at a time."""
    past, present = empty(s, len(ids))
    logits, at = [], 0
    for n in steps:
        names = ["logits", *present.values()]
        got = dict(zip(names, s.run(names, feed(s, ids[:, at : at + n], past, at))))
        past = {old: got[new] for old, new in present.items()}
        logits.append(got["logits"])
        at += n
    assert at == ids.shape[1] and all(p.shape[2] == at for p in past.values())
    return np.concatenate(logits, 1)


class AddKvCache(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.dir = pathlib.Path(self.folder.name)

    def agrees(self, model, before="", after="", rows=2, length=24, vocabulary=512, heads=None, ids=None):
        """With and without a cache, `model` after the passes `before` is the same, and other passes may come `after`;
        returns the session with the cache."""
        plain, cached = model, self.dir / "cached.onnx"
        if before:
            plain = self.dir / "plain.onnx"
            # Codes of activations jump where their last bits do: those of packed ops are left out.
            qcc(model, "--pass", before, "--profile", "ort-cpu-exact", "-o", plain)
        qcc(plain, "--pass", "add-kv-cache" + after, "-o", cached)
        whole, s = session(plain), session(cached)
        if ids is None:
            ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length))
        names = {i.name for i in whole.get_inputs()}
        given = {k: v for k, v in feed(whole, ids, {}, 0).items() if k in names}
        expected = whole.run(["logits"], given)[0]
        length = ids.shape[1]
        most = np.abs(expected).max()
        third = length // 3
        for steps in [[1] * length, [third, length - third], [length], [2, 1, length - 4, 1]]:
            got = in_steps(s, ids, steps)
            self.assertLess(np.abs(got - expected).max() / most, 1e-4, f"{model} {before} {steps}")
        caches = [i for i in s.get_inputs() if i.name.startswith("past_key_values.")]
        self.assertTrue(caches)
        if heads is not None:
            self.assertEqual({i.shape[1] for i in caches}, {heads})
        return s

    def test_tinylm(self):
        for before in ["", FUSED, RAISED]:
            with self.subTest(before):
                s = self.agrees(TINY, before, vocabulary=4096, heads=2)
        names = [i.name for i in s.get_inputs()][-8:]
        self.assertEqual(names, [f"past_key_values.{i}.{part}" for i in range(4) for part in ["key", "value"]])
        self.assertEqual(s.get_inputs()[1].shape[1], "total_sequence_length")

    def test_passes_behind_it(self):
        for after in [",canonicalize", ",canonicalize,fuse", ",canonicalize,raise-opset{version=23},fuse"]:
            with self.subTest(after):
                self.agrees(TINY, after=after, vocabulary=4096, heads=2)

    def test_tinylm_quantized(self):
        for before in ["awq{grid=2,clip=false},pack-int4", "canonicalize,fuse,rtn,pack-int4", "rtn,pack-qdq"]:
            with self.subTest(before):
                self.agrees(TINY, before, vocabulary=4096, heads=2)

    def test_generated_llama(self):
        sizes = ["--width", 32, "--layers", 2, "--heads", 4, "--kv-heads", 2, "--ffn", 84, "--vocab", 64]
        for more in [[], ["--opset", 23], ["--tied"]]:
            model = self.dir / "llama.onnx"
            command = [sys.executable, ROOT / "benches/make_llama.py", model, *sizes, *more]
            subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
            for before in ["", FUSED, RAISED]:
                with self.subTest(f"{more} {before}"):
                    self.agrees(model, before, vocabulary=64, heads=2)

    def test_an_encoder_is_refused(self):
        for name, why in [("magika/standard_v3_3.onnx", "matched nothing"), ("silero_vad/silero_vad.onnx", '"sr": expected')]:
            message = qcc(shared(name), "--pass", "add-kv-cache", "-o", self.dir / "x.onnx", fails=1)
            self.assertIn(why, message)
        # The same model without its mask: attention looks both ways.
        model = onnx.load(TINY)
        scores = [n for n in model.graph.node if n.op_type == "Softmax"]
        made = {o: n for n in model.graph.node for o in n.output}
        for node in scores:
            add = made[node.input[0]]
            assert add.op_type == "Add"
            node.input[0] = next(i for i in add.input if made[i].op_type == "MatMul")
        onnx.save(model, self.dir / "encoder.onnx")
        message = qcc(self.dir / "encoder.onnx", "--pass", "add-kv-cache", "-o", self.dir / "x.onnx", fails=1)
        message = " ".join(message.replace("│", " ").split())
        self.assertIn("expected attention that sees no later position, found no mask", message)

    def test_stories(self):
        for name in STORIES:
            # Attention of this export is for one row only.
            rows = 1 if name.endswith("op23") else 2
            for before in ["", FUSED, RAISED, "rtn,pack-int4"]:
                with self.subTest(f"{name} {before}"):
                    self.agrees(shared(f"stories260k/{name}.onnx"), before, rows=rows, heads=4)

    def test_wikilm(self):
        model = self.dir / "wikilm.onnx"
        model.write_bytes(lzma.decompress(shared("wikilm/model.onnx.xz").read_bytes()))
        for before in ["", "canonicalize,fuse,rtn,pack-int4"]:
            with self.subTest(before):
                self.agrees(model, before, length=12, vocabulary=4096, heads=2)

    def test_sort_gpt(self):
        for name in ["legacy_sdpa_op17", "dynamo_sdpa_op18"]:
            for before in ["", FUSED, RAISED]:
                with self.subTest(f"{name} {before}"):
                    self.agrees(shared(f"nano_sort_gpt/{name}.onnx"), before, length=11, vocabulary=3)


if __name__ == "__main__":
    unittest.main()
