#!/usr/bin/env python3
"""Writes ONNX's own single-op node tests as cases for dialects/src/testing.rs.

Usage: scripts/node_cases.py OUT     then QCC_OP_CASES=OUT cargo test -p qcc-dialects
Only ops that dialects/src/onnx defines are written, and only cases of tensors without nested graphs.
"""
import pathlib
import re
import sys

import onnx
from onnx.backend.test.case.node import collect_testcases

from op_cases import NAMES, text

NAMES[onnx.TensorProto.FLOAT8E8M0] = "f8e8m0"
SOURCE = pathlib.Path(__file__).resolve().parent.parent / "dialects" / "src" / "onnx"
A = onnx.AttributeProto
KINDS = {A.FLOAT: "f", A.INT: "i", A.STRING: "s", A.FLOATS: "fs", A.INTS: "is", A.STRINGS: "ss"}


def defined():
    return set(re.findall(r'"onnx\.(\w+)"', "".join(f.read_text() for f in SOURCE.glob("*.rs"))))


def attribute(a):
    v = onnx.helper.get_attribute_value(a)
    plain = lambda x: x.decode() if isinstance(x, bytes) else repr(x)
    values = v if isinstance(v, (list, tuple)) else [v]
    return " ".join(["attr", a.name, KINDS[a.type], *map(plain, values)])


def lines(case):
    (node,) = case.model.graph.node
    opset = next(o.version for o in case.model.opset_import if not o.domain)
    inputs, outputs = map(list, case.data_sets[0])
    # One unit in the last place of a bfloat16 is 2^-8.
    coarse = any(str(getattr(x, "dtype", "")) == "bfloat16" for x in outputs)
    rtol = max(case.rtol, 1e-2 if coarse else 0)
    yield f"case {case.name} onnx.{node.op_type} {opset} {len(node.output)} {rtol:g} {case.atol:g}"
    yield from map(attribute, node.attribute)
    yield from ("in " + text(inputs.pop(0) if name else None) for name in node.input)
    yield from ("out " + text(outputs.pop(0) if name else None) for name in node.output)


if __name__ == "__main__":
    ops, written, left_out = defined(), 0, []
    with open(sys.argv[1], "w") as out:
        for case in collect_testcases(None):
            nodes = case.model.graph.node
            if len(nodes) != 1 or nodes[0].domain or nodes[0].op_type not in ops or "training_mode" in case.name:
                continue
            try:
                print(*lines(case), sep="\n", file=out)
                written += 1
            except (KeyError, AttributeError, ValueError, TypeError):
                left_out.append(case.name)
    print(f"{written} cases; left out for sequences, strings or graphs: {len(left_out)}")
