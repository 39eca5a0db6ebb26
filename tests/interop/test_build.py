"""Compiled models: what `qcc build` writes, run from C, against ONNX Runtime; and the compiled executor likewise."""

import pathlib
import platform
import shutil
import subprocess
import tempfile
import unittest

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common import TESTDATA, logits, qcc, session, shared
from compiled import Library

EXAMPLE = TESTDATA.parents[1] / "examples" / "c" / "run.c"


def perceptron(path, width=64, hidden=200):
    """`x + W2 gelu(W1 x + b1) * gate`, as an exporter writes it."""
    rng = np.random.default_rng(5)
    weight = lambda k, n, name: numpy_helper.from_array(
        (rng.standard_normal((k, n)) / k**0.5).astype(np.float32), name
    )
    constants = [
        weight(width, hidden, "w1"),
        weight(hidden, width, "w2"),
        numpy_helper.from_array(rng.standard_normal(hidden).astype(np.float32), "b1"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="up"),
        helper.make_node("Add", ["h", "b1"], ["hb"]),
        helper.make_node("Gelu", ["hb"], ["g"]),
        helper.make_node("MatMul", ["g", "w2"], ["d"], name="down"),
        helper.make_node("Mul", ["d", "gate"], ["m"]),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
    graph = helper.make_graph(nodes, "perceptron", [value("x"), value("gate")], [value("y")], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def pictures(path):
    """A network of convolutions: plain, by channel, with steps and a residual connection; pools, and a product at the end."""
    rng = np.random.default_rng(6)
    number = lambda shape, name, fan: numpy_helper.from_array(
        (rng.standard_normal(shape) / fan**0.5).astype(np.float32), name
    )
    constants = [
        number((12, 3, 3, 3), "w1", 9),
        number((12,), "b1", 4),
        number((12, 1, 3, 3), "w2", 9),
        number((12, 12, 1, 1), "w3", 12),
        number((10, 12, 3, 3), "w4", 60),
        number((10, 5), "w5", 10),
        number((5,), "b5", 4),
        number((12,), "scale", 1),
        number((12,), "shift", 1),
        number((12,), "mean", 1),
        numpy_helper.from_array(rng.uniform(0.5, 2, 12).astype(np.float32), "variance"),
    ]
    around = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="plain", **around),
        helper.make_node("BatchNormalization", ["c1", "scale", "shift", "mean", "variance"], ["n1"]),
        helper.make_node("Relu", ["n1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="by channel", group=12, **around),
        helper.make_node("Conv", ["c2", "w3"], ["c3"], name="one cell"),
        helper.make_node("Add", ["c3", "r1"], ["a3"]),
        helper.make_node("Relu", ["a3"], ["r3"]),
        helper.make_node("MaxPool", ["r3"], ["p3"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p3", "w4"], ["c4"], name="steps", strides=[2, 2], **around),
        helper.make_node("Relu", ["c4"], ["r4"]),
        helper.make_node("AveragePool", ["r4"], ["p4"], kernel_shape=[2, 2], **around),
        helper.make_node("GlobalAveragePool", ["p4"], ["g4"]),
        helper.make_node("Flatten", ["g4"], ["f4"]),
        helper.make_node("Gemm", ["f4", "w5", "b5"], ["y"]),
    ]
    value = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["images", *shape])
    graph = helper.make_graph(nodes, "pictures", [value("x", 3, 19, 22)], [value("y", 5)], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def at_level(path, level):
    """The packed products of a model with float (0) or int8 (4) activations."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("accuracy_level", level)])
    onnx.save(model, path)


class Build(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def compiled(self, model, *options, compiler="cc"):
        """The C example with the library of a model."""
        library = self.folder / "model.so"
        qcc("build", model, "-o", library, *options)
        command = [compiler, "-O2", "-Wall", "-Werror", "-include", self.folder / "model.h", EXAMPLE, library]
        subprocess.run([*command, "-lpthread", "-o", self.folder / "run"], check=True)
        return [self.folder / "run", self.folder / "model.weights"]

    def test_a_library_gives_what_onnx_runtime_gives(self):
        perceptron(self.folder / "float.onnx")
        packed = self.folder / "packed.onnx"
        qcc(self.folder / "float.onnx", "--pass", "rtn,pack-int4", "-o", packed)
        for level, tolerance in ((0, 1e-5), (4, 2e-3)):
            at_level(packed, level)
            run = self.compiled(packed, "--max", "rows=50")
            for rows in (1, 7, 50):
                rng = np.random.default_rng(rows)
                x, gate = (rng.standard_normal((rows, 64)).astype(np.float32) for _ in range(2))
                expected = session(packed).run(None, {"x": x, "gate": gate})[0]
                x.tofile(self.folder / "x.bin")
                gate.tofile(self.folder / "gate.bin")
                files = [self.folder / "x.bin", self.folder / "gate.bin", f"{self.folder / 'y.bin'}={x.nbytes}"]
                subprocess.run([*run, str(rows), *files], check=True)
                found = np.fromfile(self.folder / "y.bin", np.float32).reshape(rows, 64)
                self.assertLess(abs(found - expected).max(), tolerance * abs(expected).max(), (level, rows))
            refused = subprocess.run([*run, "51", *files], capture_output=True, text=True)
            self.assertEqual(refused.returncode, 1)
            self.assertIn("a dim beyond its bound", refused.stderr)

    def packed(self, level):
        """A packed perceptron, what the C example is to be given for 7 rows of it, and what ONNX Runtime makes of these."""
        perceptron(self.folder / "float.onnx")
        packed = self.folder / "packed.onnx"
        qcc(self.folder / "float.onnx", "--pass", "rtn,pack-int4", "-o", packed)
        at_level(packed, level)
        x, gate = (np.random.default_rng(i).standard_normal((7, 64)).astype(np.float32) for i in range(2))
        x.tofile(self.folder / "x.bin")
        gate.tofile(self.folder / "gate.bin")
        files = [self.folder / "x.bin", self.folder / "gate.bin", f"{self.folder / 'y.bin'}={x.nbytes}"]
        return packed, ["7", *files], session(packed).run(None, {"x": x, "gate": gate})[0]

    def emulated(self, run, emulator):
        """What the C example gives on another processor; what it says if it gives nothing."""
        ran = subprocess.run([*emulator, *run], capture_output=True, text=True)
        if ran.returncode:
            return ran.stderr
        return np.fromfile(self.folder / "y.bin", np.float32).reshape(7, 64)

    def test_processors_under_an_emulator(self):
        for needed in ("qemu-aarch64", "qemu-x86_64", "aarch64-linux-gnu-gcc"):
            if not shutil.which(needed):
                self.skipTest(f"{needed} is not installed")
        arm, intel = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"], ["qemu-x86_64"]
        known, old = ("aarch64", "aarch64-dotprod", "aarch64-i8mm"), "code for other processors"
        for level, tolerance in ((0, 1e-5), (4, 2e-3)):
            packed, files, expected = self.packed(level)

            def check(found, what):
                self.assertIsInstance(found, np.ndarray, (what, found))
                self.assertLess(abs(found - expected).max(), tolerance * abs(expected).max(), (what, level))

            for cpu in (*known, ",".join(known)):
                run = self.compiled(packed, "--max", "rows=7", "--cpu", cpu, compiler="aarch64-linux-gnu-gcc")
                check(self.emulated([*run, *files], arm), cpu)
                found = self.emulated([*run, *files], [*arm, "-cpu", "cortex-a53"])
                if cpu in known[1:]:
                    self.assertIn(old, found)
                else:
                    check(found, f"{cpu} on a processor without dot products")
            if platform.machine() != "x86_64":
                continue
            for cpu in ("x86-64-v3", "x86-64,x86-64-v3"):
                run = self.compiled(packed, "--max", "rows=7", "--cpu", cpu)
                check(self.emulated([*run, *files], [*intel, "-cpu", "Haswell"]), cpu)
                found = self.emulated([*run, *files], [*intel, "-cpu", "qemu64"])
                if cpu == "x86-64-v3":
                    self.assertIn(old, found)
                else:
                    check(found, "a processor without AVX")

    def test_one_library_for_several_processors(self):
        flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
        if not {"avx2", "fma", "f16c"} <= flags:
            self.skipTest("a processor without AVX2")
        packed, files, _ = self.packed(4)
        results = {}
        best = "avx512-vnni" if "avx512_vnni" in flags else "x86-64-v3"
        for cpus in ("x86-64,x86-64-v3,avx512-vnni", best):
            run = self.compiled(packed, "--max", "rows=7", "--cpu", cpus)
            subprocess.run([*run, *files], check=True)
            results[cpus] = (self.folder / "y.bin").read_bytes()
        self.assertEqual(*results.values())
        said = qcc("build", packed, "-o", self.folder / "model.so", "--multiversion")
        for name in ("x86-64-v4", "avx512-vnni", "weights of its own"):
            self.assertIn(name, said)
        said = qcc("build", packed, "--emit", "mlir", "--cpu", "x86-64,x86-64-v3", fails=2)
        self.assertIn("one processor", said)
        if "avx512_vnni" not in flags:
            run = self.compiled(packed, "--max", "rows=7", "--cpu", "avx512-vnni")
            refused = subprocess.run([*run, *files], capture_output=True, text=True)
            self.assertEqual(refused.returncode, 1)
            self.assertIn("returned -100: code for other processors", refused.stderr)

    def test_a_language_model_token_by_token(self):
        packed, library = self.folder / "packed.onnx", self.folder / "lm.so"
        qcc(TESTDATA / "tinylm.onnx", "--pass", "canonicalize,fuse,rtn,pack-int4", "-o", packed)
        at_level(packed, 0)
        qcc(packed, "--pass", "add-kv-cache", "-o", self.folder / "cache.onnx")
        qcc("build", self.folder / "cache.onnx", "-o", library, "--max-seq", "64")
        model = Library(library)
        ids = np.load(TESTDATA / "eval_ids.npy")[:1, :24].astype(np.int64)
        expected = logits(packed, ids)
        inputs = {p["name"]: p["shape"] for p in model.about["inputs"]}
        past = {n: np.zeros([1, s[1], 0, s[3]], np.float32) for n, s in inputs.items() if n.startswith("past")}
        at = 0
        for count in (9, 1, 1, 5, 1, 7):
            feed = past | {"input_ids": ids[:, at : at + count]}
            feed["attention_mask"] = np.ones([1, at + count], np.int64)
            out, code = model.run({n: feed[n] for n in inputs})
            self.assertEqual(code, 0)
            off = abs(out["logits"] - expected[:, at : at + count]).max()
            self.assertLess(off, 2e-5 * abs(expected).max(), at)
            past = {n.replace("present", "past_key_values"): a for n, a in out.items() if n != "logits"}
            at += count
        # A token that the vocabulary lacks is said, and nothing is read for it.
        feed["input_ids"] = np.full_like(feed["input_ids"], 1 << 40)
        self.assertNotEqual(model.run({n: feed[n] for n in inputs})[1], 0)

    def against(self, model, feeds, tolerance, *options):
        """A library gives what ONNX Runtime gives, but for `tolerance` of the largest."""
        # A process loads a library of one name once.
        library = self.folder / f"vision{len(list(self.folder.iterdir()))}.so"
        qcc("build", model, "-o", library, *options)
        ours, theirs = Library(library), session(model)
        for feed in feeds:
            out, code = ours.run(feed)
            self.assertEqual(code, 0)
            for expected, found in zip(theirs.run(None, feed), out.values()):
                self.assertLess(abs(found - expected).max(), tolerance * abs(expected).max(), len(expected))

    def test_convolutions_of_floats(self):
        pictures(self.folder / "pictures.onnx")
        rng = np.random.default_rng(1)
        feeds = [{"x": rng.standard_normal((n, 3, 19, 22)).astype(np.float32)} for n in (1, 4)]
        self.against(self.folder / "pictures.onnx", feeds, 1e-5, "--max", "images=4")

    def test_convolutions_of_codes(self):
        """A code near the middle of two may be the other one: a step of the last activation is seen in the result."""
        pictures(self.folder / "pictures.onnx")
        rng = np.random.default_rng(2)
        data = rng.standard_normal((64, 3, 19, 22)).astype(np.float32)
        np.savez(self.folder / "data.npz", x=data)
        passes = "rtn{bits=8, group=-1, symmetric=true, narrow=true},reduce-range,calibrate"
        quantized = self.folder / "quantized.onnx"
        for form in ("pack-qdq", "pack-operators"):
            how = [f"{passes},insert-fake-quant{{min_size=0}},{form}", "--calib", self.folder / "data.npz"]
            qcc(self.folder / "pictures.onnx", "--pass", *how, "-o", quantized)
            kinds = {n.op_type for n in onnx.load(quantized).graph.node}
            self.assertIn("QLinearConv" if form == "pack-operators" else "QuantizeLinear", kinds)
            feeds = [{"x": data[:1]}, {"x": data[1:4]}]
            self.against(quantized, feeds, 2e-2, "--max", "images=4")
            mlir = qcc("build", quantized, "--emit", "mlir", "--max", "images=4")
            self.assertIn("conv_int16", mlir)
            self.assertNotIn("conv_f32", mlir)

    def test_networks_that_see(self):
        for name, port, size in (("mnist", "input.1", (1, 28, 28)), ("resnet20", "input", (3, 32, 32))):
            model = shared(f"{name}/{name}.onnx")
            rng = np.random.default_rng(3)
            # Pictures of blocks in random colours.
            images = rng.standard_normal((24, size[0], 5, 5)).repeat(7, 2).repeat(7, 3)[..., : size[1], : size[2]]
            images = (images + 0.2 * rng.standard_normal(images.shape)).astype(np.float32)
            feeds = [{port: images[i : i + 1]} for i in range(4)]
            if name == "resnet20":
                feeds.append({port: images[4:7]})
            self.against(model, feeds, 1e-5, "--max-batch", "3")
            np.savez(self.folder / "images.npz", **{port: images})
            quantized = self.folder / f"{name}.q.onnx"
            qcc(model, "--preset", "static-int8", "--calib", self.folder / "images.npz", "-o", quantized)
            self.against(quantized, feeds, 2e-2, "--max-batch", "3")

    def test_what_has_no_kernel_is_refused_by_name(self):
        value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 4])
        axis = numpy_helper.from_array(np.array(0, np.int64), "axis")
        node = helper.make_node("CumSum", ["x", "axis"], ["y"], name="running sum")
        graph = helper.make_graph([node], "sums", [value("x")], [value("y")], [axis])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, self.folder / "sums.onnx")
        said = qcc("build", self.folder / "sums.onnx", "-o", self.folder / "model.so", fails=1)
        self.assertIn('no kernel for onnx.CumSum at node "running sum"', " ".join(said.split()))
        self.assertEqual([f.name for f in self.folder.iterdir()], ["sums.onnx"])
        said = qcc("build", TESTDATA / "tinylm.onnx", "--cpu", "z80", "-o", self.folder / "model.so", fails=2)
        self.assertIn("x86-64-v3", said)

    def test_the_compiled_executor_gives_what_onnx_runtime_gives(self):
        packed, out = self.folder / "packed.onnx", self.folder / "out.npz"
        qcc(TESTDATA / "tinylm.onnx", "--pass", "canonicalize,fuse,rtn,pack-int4", "-o", packed)
        at_level(packed, 0)
        ids = np.load(TESTDATA / "eval_ids.npy")[:2, :40].astype(np.int64)
        np.savez(self.folder / "in.npz", input_ids=ids, attention_mask=np.ones_like(ids))
        qcc("run", packed, "--input", self.folder / "in.npz", "--executor", "cpu", "-o", out)
        found, expected = np.load(out)["logits"], logits(packed, ids)
        self.assertLess(abs(found - expected).max(), 1e-5 * abs(expected).max())


if __name__ == "__main__":
    unittest.main()
