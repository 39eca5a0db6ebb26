#!/usr/bin/env python3
"""Writes the tests that the onnx package ships, and those of runtime.py, for tests/onnx_conformance/main.rs to judge
qcc by.

Usage: tests/onnx_conformance/generate.py OUT     then QCC_ONNX_TESTS=OUT cargo test --test onnx_conformance

OUT/KIND/CASE/ holds model.onnx and data folders test_data_set_N/ with input_N.pb and output_N.pb, as ONNX lays them out;
OUT/cases.tsv has one line a case: kind, name, the op it is about, rtol, atol. Only what changed since the last run with
the same versions is written: nothing.
"""
import pathlib
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests

import runtime

FOLDERS = ["simple", "pytorch-converted", "pytorch-operator"]


def message(value, info):
    if isinstance(value, onnx.TensorProto):
        return value
    kind = info.type.WhichOneof("value")
    write = {"sequence_type": numpy_helper.from_list, "optional_type": numpy_helper.from_optional,
             "tensor_type": lambda x, name: numpy_helper.from_array(np.asarray(x), name)}[kind]
    return write(value, info.name)


def node_case(case, folder):
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(case.model.SerializeToString())
    for n, (inputs, outputs) in enumerate(case.data_sets):
        data = folder / f"test_data_set_{n}"
        data.mkdir()
        for word, values, infos in [("input", inputs, case.model.graph.input), ("output", outputs, case.model.graph.output)]:
            for i, (value, info) in enumerate(zip(values, infos, strict=True)):
                (data / f"{word}_{i}.pb").write_bytes(message(value, info).SerializeToString())


def ops_of(graph):
    for node in graph.node:
        yield node.op_type
        for a in node.attribute:
            for inner in [a.g, *a.graphs]:
                yield from ops_of(inner)


def subject(case, by_name):
    """The op that a node test is about: that of the case it expands, or the one that its name tells."""
    whole = by_name.get(case.name.split("_expanded")[0], case)
    ops = [n.op_type for n in whole.model.graph.node]
    if len(set(ops)) == 1:
        return ops[0]
    flat = case.name.replace("_", "")
    named = [op for op in ops if op.lower() in flat]
    return max(named, key=len) if named else ops[-1]


def main(out):
    done = out / "done"
    sources = [pathlib.Path(file).read_text() for file in (__file__, runtime.__file__)]
    version = "\n".join([onnx.__version__, *sources])
    if done.exists() and done.read_text() == version:
        return
    shutil.rmtree(out, ignore_errors=True)
    lines = []
    cases = collect_testcases(None)
    by_name = {c.name: c for c in cases}
    for case in cases:
        node_case(case, out / "node" / case.name)
        every = sorted(set(ops_of(case.model.graph)) | {op for f in case.model.functions for op in ops_of(f)})
        lines.append(["node", case.name, subject(case, by_name), f"{case.rtol:g}", f"{case.atol:g}", ",".join(every)])
    for name, model, inputs in runtime.models():
        case = SimpleNamespace(model=model, data_sets=[(inputs, runtime.expected(model, inputs))])
        node_case(case, out / "runtime" / name)
        lines.append(["runtime", name, "runtime", "1e-5", "1e-6", ""])
    for kind in FOLDERS:
        for case in load_model_tests(kind=kind):
            shutil.copytree(case.model_dir, out / kind / case.name)
            lines.append([kind, case.name, kind, f"{case.rtol:g}", f"{case.atol:g}", ""])
    (out / "cases.tsv").write_text("".join("\t".join(line) + "\n" for line in sorted(lines)))
    done.write_text(version)
    print(f"{len(lines)} cases")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
