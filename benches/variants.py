"""The models that quality.py measures on: the same function in forms that differ in what a quantizer makes of them."""

import numpy as np
import onnx
from make_model import build
from onnx import TensorProto, helper, numpy_helper, version_converter

OPSET = 21


def bare(model):
    """Without the exporter's notes, which would outweigh the codes of a small model; some quantizers drop them."""
    for part in [model.graph, *model.graph.node, *model.graph.value_info]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def raised(model):
    """Against opset 21: the oldest that has int4."""
    return version_converter.convert_version(model, OPSET)


def plain(model):
    """Also every product's weight a constant of its own: none is behind a Transpose, and none is an embedding too."""
    model = raised(model)
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in constants]:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        array = numpy_helper.to_array(constants[node.input[0]]).transpose(perm)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)
    return model


def outliers(model, channels=6, factors=(32.0, 64.0), seed=0):
    """The same function with outliers in the activations, as large language models have them.

    Some channels of every RMSNorm's gain are multiplied, and the rows of the products after it divided. The factors are
    powers of two, so that not even the rounding of the float model changes. A norm whose products share their weight with
    an embedding stays as it is.
    """
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer}
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    rng = np.random.default_rng(seed)
    for norm in [n for n in graph.node if n.op_type == "Mul" and any(is_gain(tensors.get(i)) for i in n.input)]:
        products = readers[norm.output[0]]
        if not all(p.op_type == "MatMul" and p.input[1] in tensors for p in products):
            continue
        gain = next(tensors[i] for i in norm.input if i in tensors)
        values = numpy_helper.to_array(gain).copy()
        chosen, scales = rng.choice(len(values), channels, replace=False), rng.choice(factors, channels)
        values[chosen] *= scales.astype(values.dtype)
        gain.CopyFrom(numpy_helper.from_array(values, gain.name))
        for product in products:
            weight = tensors[product.input[1]]
            values = numpy_helper.to_array(weight).copy()
            values[chosen] /= scales[:, None].astype(values.dtype)
            weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    return model


def is_gain(tensor):
    return tensor is not None and len(tensor.dims) == 1 and "norm" in tensor.name


def layer(size, rows, rank=256):
    """One product of `size` x `size`, and inputs [rows, size] whose channels are correlated and of unlike magnitude."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((rows, rank), np.float32) @ rng.standard_normal((rank, size), np.float32)
    x = mixed / np.float32(rank**0.5) + np.float32(0.3) * rng.standard_normal((rows, size), np.float32)
    return build(1, size), {"x": x * np.exp(rng.standard_normal(size)).astype(np.float32)}


def wide(inner, out, rows, tokens, width=32, vocabulary=256):
    """A product of `inner` x `out`, the weight "wide", whose inputs a small part of the graph makes from few bytes.

    Each position has two tokens, embedded and led through a gated product. Inputs are int64 [rows, tokens, 2].
    """
    rng = np.random.default_rng(2)

    def normal(name, rows, columns):
        w = rng.standard_normal((rows, columns), np.float32) / np.float32(rows**0.5)
        return numpy_helper.from_array(w, name)

    table = numpy_helper.from_array(rng.standard_normal((vocabulary, width), np.float32), "table")
    weights = [table, normal("up", 2 * width, inner), normal("wide", inner, out)]
    weights.append(numpy_helper.from_array(np.array([0, 0, 2 * width]), "flat"))
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["pairs"], name="/embed"),
        helper.make_node("Reshape", ["pairs", "flat"], ["embedded"], name="/flatten"),
        helper.make_node("MatMul", ["embedded", "up"], ["h"], name="/up"),
        helper.make_node("Sigmoid", ["h"], ["gate"], name="/gate"),
        helper.make_node("Mul", ["h", "gate"], ["x"], name="/silu"),
        helper.make_node("MatMul", ["x", "wide"], ["y"], name="/wide"),
    ]
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["rows", "tokens", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "tokens", out])]
    graph = helper.make_graph(nodes, "wide", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return model, {"tokens": rng.integers(0, vocabulary, (rows, tokens, 2))}


def save(model, path):
    onnx.save(model, path)
    return path
