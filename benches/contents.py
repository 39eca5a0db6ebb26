"""What a file holds of a model's linear layers: which are quantized, in how many bytes, and what is left over."""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}


@dataclass
class Contents:
    """Counts of linear layers and of their weights, and bytes.

    `rewritten` are the float ones that are not those of the original: only simulated. `bytes` are those of all that the
    layers' weights are made from (codes, scales, zero points); `unused` those of tensors that no op reads.
    """

    layers: int
    quantized: int
    rewritten: int
    weights: int
    quantized_weights: int
    bytes: int
    unused: int


class Graph:
    """The constants of a graph, and what is computed from constants alone."""

    def __init__(self, path):
        self.nodes = onnx.load(path).graph
        self.tensors = {t.name: t for t in self.nodes.initializer}
        for node in self.nodes.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.tensors[node.output[0]] = node.attribute[0].t
        self.makers = {o: n for n in self.nodes.node for o in n.output if n.op_type != "Constant"}
        self.memo = {}

    def origin(self, name):
        """The names of the constants that a value is made from, or None if it depends on anything else."""
        if name in self.tensors:
            return {name}
        if name not in self.makers:
            return None
        if name not in self.memo:
            found = [self.origin(i) for i in self.makers[name].input if i]
            self.memo[name] = None if None in found or not found else set().union(*found)
        return self.memo[name]

    def linears(self):
        """Of each linear layer the origin of its weight, codes, scales and zero points."""
        for node in self.nodes.node:
            if node.op_type in ("MatMul", "Gemm") and self.origin(node.input[0]) is None:
                origin = self.origin(node.input[1])
            elif node.op_type == "MatMulNBits":
                origin = set().union(*(self.origin(i) for i in node.input[1:] if i))
            else:
                continue
            if origin is not None:
                yield node, origin


def attribute(node, name):
    return next(a.i for a in node.attribute if a.name == name)


def digests(graph):
    """The values of all float matrices, by which a weight is known again, transposed or not."""
    arrays = [numpy_helper.to_array(t) for t in graph.tensors.values() if t.data_type in FLOATS and len(t.dims) == 2]
    return {np.ascontiguousarray(view).tobytes() for a in arrays for view in (a, a.T)}


def contents(path, original):
    """What is in a file, beside the float model that it was made from."""
    graph, before = Graph(path), digests(Graph(original))
    layers = quantized = rewritten = weights = quantized_weights = 0
    needed = set()
    for node, origin in graph.linears():
        needed |= origin
        tensors = [graph.tensors[n] for n in origin]
        main = max(tensors, key=lambda t: len(t.raw_data))
        packed = node.op_type == "MatMulNBits"
        size = attribute(node, "K") * attribute(node, "N") if packed else int(np.prod(main.dims))
        layers, weights = layers + 1, weights + size
        if main.data_type not in FLOATS:
            quantized, quantized_weights = quantized + 1, quantized_weights + size
        elif numpy_helper.to_array(main).tobytes() not in before:
            rewritten += 1
    used = {i for n in graph.nodes.node for i in n.input}
    unused = sum(size_of(t) for t in graph.nodes.initializer if t.name not in used)
    total = sum(size_of(graph.tensors[n]) for n in needed)
    return Contents(layers, quantized, rewritten, weights, quantized_weights, total, unused)


def size_of(tensor):
    """Bytes of a tensor's values, two 4-bit ones in each."""
    return len(tensor.raw_data) or numpy_helper.to_array(tensor).nbytes
