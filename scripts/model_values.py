#!/usr/bin/env python3
"""Writes what ONNX Runtime computes for every value of the models in $QCC_MODELS, for tests/values.rs to compare with.

Usage: QCC_MODELS=DIR scripts/model_values.py OUT     needs onnx, onnxruntime and numpy

Lines of tab-separated fields: `model PATH`; `input NAME ELEM DIMS HEX`; `value NAME ELEM DIMS NORM SAMPLES`, where
NORM is the Euclidean norm of the finite elements, and SAMPLES are up to 8 elements, evenly spaced. Most models come
twice, with inputs of other sizes: a dim that stays the same does not depend on the inputs.
"""
import os
import pathlib
import sys

import numpy as np
import onnx
import onnxruntime as ort

NAMES = {"float32": "f32", "float64": "f64", "float16": "f16", "int64": "i64", "int32": "i32", "bool": "bool",
         "uint8": "u8", "int8": "i8"}
rng = np.random.default_rng(11)


def tokens(vocabulary, batch, seq):
    mask = np.ones((batch, seq), np.int64)
    mask[batch - 1, :3] = 0 if batch > 1 else 1
    return {"input_ids": rng.integers(0, vocabulary, (batch, seq)), "attention_mask": mask}


def inputs(path):
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    match path.parts[0], path.name:
        case "stories260k", "dynamo_sdpa_op23.onnx":
            return [tokens(512, 1, 13), tokens(512, 1, 7)]
        case "stories260k", _:
            return [tokens(512, 2, 13), tokens(512, 3, 7)]
        case "nano_sort_gpt", _:
            return [tokens(3, 2, 9), tokens(3, 4, 7)]
        case "tinylm", _:
            return [tokens(4096, 2, 13), tokens(4096, 3, 7)]
        case "magika", _:
            return [{"bytes": rng.integers(0, 257, (2, 2048)).astype(np.int32)}]
        case "mnist", _:
            return [{"input.1": normal(1, 1, 28, 28)}]
        case "resnet20", _:
            return [{"input": normal(2, 3, 32, 32)}, {"input": normal(5, 3, 32, 32)}]
        case "silero_vad", _:
            feed = lambda rate, n: {"input": normal(1, n), "state": normal(2, 1, 128), "sr": np.array(rate, np.int64)}
            return [feed(16000, 512), feed(8000, 256)]
    return []


def fields(name, x):
    return [name, NAMES[x.dtype.name], "x".join(map(str, x.shape)) or "."]


def run(path, model, feed, out):
    known = {i.name for i in model.graph.input}
    feed = {k: v for k, v in feed.items() if k in known}
    names = [o for n in model.graph.node if n.op_type != "Constant" for o in n.output if o]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    print("model", path, sep="\t", file=out)
    for k, v in feed.items():
        print("input", *fields(k, v), v.tobytes().hex(), sep="\t", file=out)
    for name, x in zip(names, session.run(names, feed)):
        flat = x.reshape(-1).astype(np.float64)
        norm = np.sqrt(np.square(flat[np.isfinite(flat)]).sum())
        at = np.unique(np.linspace(0, len(flat) - 1, 8).astype(int)) if len(flat) else []
        print("value", *fields(name, x), f"{norm:.9g}", *(f"{flat[i]:.9g}" for i in at), sep="\t", file=out)


if __name__ == "__main__":
    root = pathlib.Path(os.environ["QCC_MODELS"])
    with open(sys.argv[1], "w") as out:
        for file in sorted(root.rglob("*.onnx")):
            path = file.relative_to(root)
            for feed in inputs(path):
                run(path, onnx.load(file), feed, out)
