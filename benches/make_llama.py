"""Writes a Llama of any size with random weights, as exporters write trained ones: to measure speed, not quality.

    python benches/make_llama.py llama.onnx                      # 1.1 billion parameters, 4.4 GB
    python benches/make_llama.py small.onnx --width 64 --layers 2 --heads 4 --kv-heads 2 --ffn 172 --vocab 512

Weights come from a fixed seed, one after the other into the file beside the model: memory holds the largest of them.
With --opset 23 norms and attention are ops of their own, as newer exporters have them; below, they are written out.
"""

import argparse
import pathlib

import numpy as np
import onnx
from onnx import TensorProto as T, helper as h, numpy_helper

DATA_LIMIT = 1024
"""Constants of fewer bytes stay in the model file."""


class Graph:
    """Nodes and constants; large ones go to the data file as they are made."""

    def __init__(self, path):
        self.nodes, self.inits, self.names = [], [], set()
        self.data_path = path.with_name(path.name + ".data")
        self.data = open(self.data_path, "wb")

    def weight(self, name, array):
        if name in self.names:
            return name
        self.names.add(name)
        if array.nbytes < DATA_LIMIT:
            self.inits.append(numpy_helper.from_array(array, name))
            return name
        self.data.write(b"\0" * (-self.data.tell() % 4096))
        tensor = T(name=name, dims=array.shape, data_type=h.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = T.EXTERNAL
        for key, value in [("location", self.data_path.name), ("offset", self.data.tell()), ("length", array.nbytes)]:
            tensor.external_data.add(key=key, value=str(value))
        array.tofile(self.data)
        self.inits.append(tensor)
        return name

    def const(self, value, dtype=np.int64):
        array = np.asarray(value, dtype)
        return self.weight(f"c_{array.dtype}_{'_'.join(map(str, array.reshape(-1)))}_{array.ndim}", array)

    def __call__(self, op, *inputs, name=None, **attrs):
        out = name or f"{op}_{len(self.nodes)}"
        self.nodes.append(h.make_node(op, list(inputs), [out], name=f"/{out}", **attrs))
        return out


def llama(path, width, layers, heads, kv_heads, ffn, vocab, opset, seed, tied, theta=10000.0, epsilon=1e-5):
    """Writes the model to `path`, and its weights beside it; returns the number of parameters."""
    size = width // heads
    rng = np.random.default_rng(seed)
    g = Graph(path)
    count = 0

    def random(name, shape, scale):
        nonlocal count
        count += int(np.prod(shape))
        return g.weight(name, rng.standard_normal(shape, np.float32) * np.float32(scale))

    def norm(x, name):
        # Gains around one, as trained ones are.
        gain = g.weight(name, 1 + rng.standard_normal(width, np.float32) * np.float32(0.1))
        if opset >= 23:
            return g("RMSNormalization", x, gain, axis=-1, epsilon=epsilon)
        square = g("ReduceMean", g("Pow", x, g.const(2, np.float32)), g.const([-1]), keepdims=1)
        root = g("Sqrt", g("Add", square, g.const(epsilon, np.float32)))
        return g("Mul", g("Mul", x, g("Reciprocal", root)), gain)

    def linear(x, name, k, n):
        return g("MatMul", x, random(name, (k, n), k**-0.5))

    batch, seq = (g("Shape", "input_ids", start=i, end=i + 1) for i in range(2))
    positions = g("Range", g.const(0), g("Squeeze", seq, g.const([0])), g.const(1))
    column = g("Unsqueeze", positions, g.const([1]))
    frequencies = g.weight("inv_freq", (theta ** -(np.arange(0, size, 2) / size)).astype(np.float32))
    angles = g("Mul", g("Cast", column, to=T.FLOAT), frequencies)
    angles = g("Concat", angles, angles, axis=-1)
    cos, sin = g("Cos", angles), g("Sin", angles)
    causal = g("LessOrEqual", positions, column)
    real = g("Unsqueeze", g("Cast", "attention_mask", to=T.BOOL), g.const([1, 2]))
    mask = g("And", causal, real)
    if opset < 23:
        mask = g("Where", mask, g.const(0, np.float32), g.const(np.finfo(np.float32).min, np.float32))

    def split(x, n):
        shape = g("Concat", batch, seq, g.const([n, size]), axis=0)
        return g("Transpose", g("Reshape", x, shape), perm=[0, 2, 1, 3])

    def rotate(x):
        first = g("Slice", x, g.const([0]), g.const([size // 2]), g.const([3]))
        second = g("Slice", x, g.const([size // 2]), g.const([size]), g.const([3]))
        return g("Add", g("Mul", x, cos), g("Mul", g("Concat", g("Neg", second), first, axis=-1), sin))

    def repeat(x):
        if heads == kv_heads:
            return x
        wide = g("Concat", batch, g.const([kv_heads, heads // kv_heads]), seq, g.const([size]), axis=0)
        flat = g("Concat", batch, g.const([heads]), seq, g.const([size]), axis=0)
        return g("Reshape", g("Expand", g("Unsqueeze", x, g.const([2])), wide), flat)

    def attention(q, k, v):
        if opset >= 23:
            return g("Attention", q, k, v, mask, scale=size**-0.5)
        k, v = repeat(k), repeat(v)
        scores = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), g.const(size**-0.5, np.float32))
        return g("MatMul", g("Softmax", g("Add", scores, mask), axis=-1), v)

    # The head of a tied model reads the embedding: its logits are then of the size that others have.
    embedding = random("model.embed_tokens.weight", (vocab, width), width**-0.5 if tied else 1.0)
    x = g("Gather", embedding, "input_ids")
    for i in range(layers):
        p = f"model.layers.{i}"
        y = norm(x, f"{p}.input_layernorm.weight")
        q = rotate(split(linear(y, f"{p}.self_attn.q_proj.weight", width, width), heads))
        k = rotate(split(linear(y, f"{p}.self_attn.k_proj.weight", width, kv_heads * size), kv_heads))
        v = split(linear(y, f"{p}.self_attn.v_proj.weight", width, kv_heads * size), kv_heads)
        y = g("Transpose", attention(q, k, v), perm=[0, 2, 1, 3])
        y = g("Reshape", y, g("Concat", batch, seq, g.const([width]), axis=0))
        x = g("Add", x, linear(y, f"{p}.self_attn.o_proj.weight", width, width))
        y = norm(x, f"{p}.post_attention_layernorm.weight")
        gate = linear(y, f"{p}.mlp.gate_proj.weight", width, ffn)
        gate = g("Mul", g("Mul", gate, g("Sigmoid", gate)), linear(y, f"{p}.mlp.up_proj.weight", width, ffn))
        x = g("Add", x, linear(gate, f"{p}.mlp.down_proj.weight", ffn, width))
    y = norm(x, "model.norm.weight")
    if tied:
        g("MatMul", y, g("Transpose", embedding, perm=[1, 0]), name="logits")
    else:
        g("MatMul", y, random("lm_head.weight", (width, vocab), width**-0.5), name="logits")

    ids = [h.make_tensor_value_info(n, T.INT64, ["batch", "seq"]) for n in ["input_ids", "attention_mask"]]
    logits = h.make_tensor_value_info("logits", T.FLOAT, ["batch", "seq", vocab])
    graph = h.make_graph(g.nodes, "llama", ids, [logits], g.inits)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=10, producer_name="make_llama")
    g.data.close()
    path.write_bytes(model.SerializeToString())
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=pathlib.Path)
    sizes = {"width": 2048, "layers": 22, "heads": 32, "kv-heads": 4, "ffn": 5632, "vocab": 32000, "opset": 18, "seed": 0}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--tied", action="store_true", help="the head has the embedding's weights")
    args = vars(parser.parse_args())
    path, heads, kv_heads, width = args.pop("output"), args["heads"], args["kv_heads"], args["width"]
    if min(v for k, v in args.items() if k not in ("seed", "tied")) < 1:
        parser.error("sizes are at least 1")
    if args["opset"] < 18:
        parser.error(f"--opset {args['opset']}: 18 and newer are written")
    if width % heads or heads % kv_heads or width // heads % 2:
        parser.error(f"{width} wide with {heads} heads of an even size, in groups for {kv_heads}: sizes do not divide")
    count = llama(path, **args)
    print(f"{path}: {count / 1e6:.1f} million parameters, {path.with_name(path.name + '.data').stat().st_size} bytes")


if __name__ == "__main__":
    main()
