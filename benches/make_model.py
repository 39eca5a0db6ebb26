#!/usr/bin/env python3
"""Writes a model of chained MatMuls to measure with: by default 16 layers of 4096 x 4096, 1 GiB of float32.

    make_model.py big.onnx [--layers 16] [--size 4096] [--external]

Weights are normal with variance 1/size, so that activations keep their magnitude through any number of layers.
"""
import argparse
import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def build(layers, size):
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for i in range(layers):
        w = rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5)
        weights.append(numpy_helper.from_array(w, f"layer{i}.weight"))
        out = "y" if i == layers - 1 else f"h{i}"
        nodes.append(helper.make_node("MatMul", [name, f"layer{i}.weight"], [out], name=f"/layer{i}/MatMul"))
        name = out
    value = lambda n: helper.make_tensor_value_info(n, TensorProto.FLOAT, ["tokens", size])
    graph = helper.make_graph(nodes, "chain", [value("x")], [value("y")], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--external", action="store_true", help="weights in a file beside the model")
    args = parser.parse_args()
    data = args.output.name + ".data"
    model = build(args.layers, args.size)
    onnx.save(model, args.output, save_as_external_data=args.external, location=data, size_threshold=1024)


if __name__ == "__main__":
    main()
