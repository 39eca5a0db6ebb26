#!/usr/bin/env python3
"""Compares compiled code with ONNX Runtime, in the same run and with the same threads.

    codegen.py [--qcc target/release/qcc] [--size 4096] [--threads 1,2] [--levels 4,0,f32]
               [--lm packed.onnx --tokens eval_ids.npy] [--images mnist.onnx,resnet20.onnx]

Products by a constant matrix of `size` x `size`, for 1, 128 and 512 rows: packed in 4 bits, group 32, at accuracy_level 4
(int8 activations) and 0 (floats), or of f32; both sides take turns, and the best median of each counts. Of a packed language
model: reading a prompt and making tokens, ONNX Runtime on the form with a key/value cache that qcc writes. Of models with one
input of images: one image, both in this process on one thread, call after call in turns; a model's own numbers are of no matter.
qcc needs the feature mlir.
(`cargo bench -p qcc-codegen-mlir --features mlir --bench gemv` compares with plain reads of memory.)
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests/interop"))

from compiled import Library

GROUP = 32
TURNS = 3


def session(path, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def best(runs, f):
    """The least time of some runs, in seconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def median(runs, f):
    """The median time of some runs, in seconds: what `qcc run --repeat` says."""
    return float(np.median([best(1, f) for _ in range(runs)]))


def product(path, size, level):
    rng = np.random.default_rng(0)
    groups = size // GROUP
    constants = [
        numpy_helper.from_array(rng.integers(0, 256, (size, groups, GROUP // 2), dtype=np.uint8), "codes"),
        numpy_helper.from_array(rng.random(size * groups, dtype=np.float32) * 0.01, "scales"),
    ]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
    if level == "f32":
        constants = [numpy_helper.from_array(rng.standard_normal((size, size), dtype=np.float32), "w")]
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        graph = helper.make_graph([node], "product", [value("x")], [value("y")], constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return
    attributes = {"K": size, "N": size, "bits": 4, "block_size": GROUP, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph([node], "product", [value("x")], [value("y")], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def products(args, folder):
    print(f"{'rows':>5} {'level':>5} {'threads':>7} {'qcc ms':>9} {'ORT ms':>9} {'ORT / qcc':>9}")
    for level in args.levels:
        path, given = folder / f"level{level}.onnx", folder / "x.npy"
        product(path, args.size, level)
        for rows in (1, 128, 512):
            x = np.random.default_rng(rows).standard_normal((rows, args.size)).astype(np.float32)
            np.save(given, x)
            runs = 60 if rows == 1 else 8
            for threads in args.threads:
                ours, theirs = [], []
                s = session(path, threads)
                for _ in range(TURNS):
                    command = [args.qcc, "run", path, "--input", f"x={given}", "--executor", "cpu", "--quiet", "--json"]
                    out = subprocess.run(
                        [*map(str, command), "--threads", str(threads), "--repeat", str(runs)],
                        check=True,
                        capture_output=True,
                        text=True,
                    )
                    ours.append(json.loads(out.stdout)["seconds"])
                    theirs.append(median(runs, lambda: s.run(None, {"x": x})))
                a, b = min(ours) * 1e3, min(theirs) * 1e3
                print(f"{rows:>5} {level:>5} {threads:>7} {a:>9.3f} {b:>9.3f} {b / a:>9.2f}", flush=True)


class Cached:
    """A language model with a key/value cache, in ONNX Runtime."""

    def __init__(self, path, threads):
        self.session = session(path, threads)
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def empty(self):
        shape = lambda i: [1, *(d if isinstance(d, int) else 0 for d in i.shape[1:])]
        past = {n: i for n, i in self.inputs.items() if n.startswith("past")}
        return {n: np.zeros(shape(i), np.float32) for n, i in past.items()}

    def step(self, past, ids, total):
        feed = {**past, "input_ids": ids}
        if "attention_mask" in self.inputs:
            feed["attention_mask"] = np.ones((1, total), np.int64)
        out = dict(zip(self.outputs, self.session.run(None, feed)))
        return {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present")}


def language_model(args, folder):
    cached = folder / "cached.onnx"
    subprocess.run([args.qcc, args.lm, "--pass", "add-kv-cache", "-o", cached, "--quiet"], check=True)
    ids = np.load(args.tokens)[:1].astype(np.int64)
    prompts, decoded = (128, 512), 64
    print(f"{'':22} {'threads':>7} {'qcc ms':>9} {'ORT ms':>9} {'ORT / qcc':>9}")
    for threads in args.threads:
        command = [args.qcc, "bench", args.lm, "--tokens", args.tokens, "--rows", "1", "--executor", "cpu", "--json"]
        lengths = ",".join(map(str, prompts))
        command += ["--threads", str(threads), "--prefill", lengths, "--decode", str(decoded), "--quiet"]
        out = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        ours = json.loads(out.stdout)["models"][0]
        model = Cached(cached, threads)

        def tell(what, a, b):
            print(f"{what:22} {threads:>7} {a * 1e3:>9.2f} {b * 1e3:>9.2f} {b / a:>9.2f}", flush=True)

        for prefill in ours["prefill"]:
            n = prefill["tokens"]
            prompt = np.resize(ids, (1, n))
            tell(f"prompt of {n}", prefill["seconds"], best(5, lambda: model.step(model.empty(), prompt, n)))
        start = model.step(model.empty(), np.resize(ids, (1, prompts[0])), prompts[0])

        def decode():
            past = start
            for i in range(decoded):
                past = model.step(past, ids[:, i : i + 1], prompts[0] + 1 + i)

        tell("a token", ours["decode_seconds"], best(3, decode) / decoded)


def images(args, folder):
    print(f"{'':28} {'qcc ms':>9} {'ORT ms':>9} {'ORT / qcc':>9} {'difference':>10}")
    for i, path in enumerate(args.images):
        library = folder / f"images{i}.so"
        subprocess.run([args.qcc, "build", path, "-o", library, "--max-batch", "1"], check=True, capture_output=True)
        ours, theirs = Library(library), session(path, 1)
        given = theirs.get_inputs()[0]
        shape = [d if isinstance(d, int) else 1 for d in given.shape]
        feed = {given.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        call, found = ours.prepared(feed)
        expected = theirs.run(None, feed)[0]
        call()
        off = abs(next(iter(found.values())) - expected).max() / abs(expected).max()
        a, b = [], []
        for _ in range(600):
            a.append(best(1, call))
            b.append(best(1, lambda: theirs.run(None, feed)))
        a, b = (float(np.median(t)) * 1e3 for t in (a, b))
        print(f"{path.stem:28} {a:>9.3f} {b:>9.3f} {b / a:>9.2f} {off:>10.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = pathlib.Path(__file__).resolve().parent.parent
    parser.add_argument("--qcc", type=pathlib.Path, default=root / "target/release/qcc")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=lambda t: [int(n) for n in t.split(",")], default=[1, 2])
    levels = lambda t: [int(n) if n.isdigit() else n for n in t.split(",")]
    parser.add_argument("--levels", type=levels, default=[4, 0, "f32"])
    parser.add_argument("--lm", type=pathlib.Path)
    parser.add_argument("--tokens", type=pathlib.Path)
    files = lambda t: [pathlib.Path(n) for n in t.split(",")]
    parser.add_argument("--images", type=files, default=[], help="these alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.images:
            return images(args, pathlib.Path(folder))
        products(args, pathlib.Path(folder))
        if args.lm:
            language_model(args, pathlib.Path(folder))


if __name__ == "__main__":
    main()
