#!/usr/bin/env python3
"""Writes what dialects/src/onnx takes from the specifications of the pinned `onnx` package.

Usage: scripts/onnx_specs.py QCC     (the built program, which writes the text form)

`functions.qir`: the body of every op whose specification defines it by other ops, whatever its operands are; one
function for each version of the op, with that version as its overload.
`attributes.txt`: a line `OP SINCE NAME:KIND..` for each version of an op that has attributes in some version; a `!`
follows the kind of one that must be given, and `=VALUE` that of one with a default.
"""
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy
import onnx
from onnx import defs, helper

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "dialects" / "src" / "onnx"


def schemas():
    found = [s for s in defs.get_all_schemas_with_history() if s.domain == ""]
    return sorted(found, key=lambda s: (s.name, s.since_version))


def plain(graph):
    """Without fields that say nothing."""
    graph.ClearField("doc_string")
    for node in graph.node:
        if not node.domain:
            node.ClearField("domain")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                plain(attribute.g)


def body(schema):
    # The newest body of this version of the op; its ops are of the versions it imports.
    newest = max(schema.function_opset_versions)
    function = onnx.FunctionProto()
    function.ParseFromString(schema.get_function_with_opset_version(newest))
    function.overload = str(schema.since_version)
    plain(function)
    if not function.domain:
        function.ClearField("domain")
    function.ClearField("attribute")
    function.ClearField("attribute_proto")
    for name, attribute in sorted(schema.attributes.items()):
        if attribute.default_value.name:
            function.attribute_proto.append(attribute.default_value)
        else:
            function.attribute.append(name)
    return function


def functions(qcc):
    graph = helper.make_graph([], "bodies", [], [])
    model = helper.make_model(
        graph, functions=[body(s) for s in schemas() if s.has_function], opset_imports=[helper.make_opsetid("", 1)]
    )
    model.ClearField("producer_name")
    with tempfile.TemporaryDirectory() as folder:
        path, out = pathlib.Path(folder) / "bodies.onnx", pathlib.Path(folder) / "bodies.qir"
        path.write_bytes(model.SerializeToString())
        subprocess.run([qcc, path, "--emit", "qir", "-o", out], check=True, stdout=subprocess.DEVNULL)
        # Which values were declared is of no use here.
        return re.sub(r"\n *notes \{(?:[^{}]|\{[^{}]*\})*\}", "", out.read_text())


def default(attribute):
    """`=VALUE`, or nothing; no default of a specification holds a space."""
    if not attribute.default_value.name:
        return ""
    value = helper.get_attribute_value(attribute.default_value)
    if isinstance(value, float):
        # As short as names the 32-bit float.
        value = str(numpy.float32(value))
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    text = text.decode() if isinstance(text, bytes) else str(text)
    assert " " not in text and text, attribute
    return "=" + text


def attributes():
    some = {s.name for s in schemas() if s.attributes}
    for schema in schemas():
        words = [
            f"{name}:{a.type.name.lower()}{'!' if a.required else default(a)}"
            for name, a in sorted(schema.attributes.items())
        ]
        if schema.name in some:
            yield " ".join([schema.name, str(schema.since_version), *words])


if __name__ == "__main__":
    header = "Written by scripts/onnx_specs.py from onnx " + onnx.__version__
    (FOLDER / "functions.qir").write_text(f"; {header}.\n" + functions(sys.argv[1]))
    (FOLDER / "attributes.txt").write_text("\n".join([f"# {header}.", *attributes()]) + "\n")
