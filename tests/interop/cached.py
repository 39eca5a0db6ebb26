"""tinylm.onnx built anew with a key/value cache, as exporters write such models."""

import numpy as np
import onnx
from common import TESTDATA
from onnx import TensorProto as T, helper as h, numpy_helper

HEADS, KV_HEADS, SIZE, LAYERS = 4, 2, 32, 4


def weights():
    """The weights of tinylm.onnx by their roles."""
    graph = onnx.load(TESTDATA / "tinylm.onnx").graph
    init = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    linears = [init[n.input[1]] for n in graph.node if n.op_type == "MatMul" and n.input[1] in init]
    roles = ["q", "k", "v", "o", "gate", "up", "down"]
    assert len(linears) == LAYERS * len(roles)
    w = {f"{i // 7}.{roles[i % 7]}": x for i, x in enumerate(linears)}
    for i in range(LAYERS):
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            w[f"{i}.{norm}"] = init[f"m.model.layers.{i}.{norm}.weight"]
    w |= {"norm": init["m.model.norm.weight"], "head": init["m.lm_head.weight"], "freq": init["m.model.rotary_emb.inv_freq"]}
    return w, float(init["val_72"])


class Builder:
    def __init__(self):
        self.nodes, self.inits, self.inputs, self.outputs = [], {}, [], []

    def const(self, value, dtype=np.int64):
        """A constant that is no weight, once each."""
        array = np.asarray(value, dtype)
        name = f"c_{array.dtype}_{'_'.join(map(str, array.reshape(-1)))}_{array.ndim}"
        self.inits[name] = array
        return name

    def weight(self, name, array):
        self.inits[name] = array
        return name

    def __call__(self, op, *inputs, outputs=None, domain="", **attrs):
        outs = outputs or [f"{op}_{len(self.nodes)}"]
        self.nodes.append(h.make_node(op, list(inputs), outs, name=f"/{op}_{len(self.nodes)}", domain=domain, **attrs))
        return outs[0] if len(outs) == 1 else outs

    def input(self, name, kind, dims):
        self.inputs.append(h.make_tensor_value_info(name, kind, dims))
        return name

    def output(self, name, kind, dims):
        self.outputs.append(h.make_tensor_value_info(name, kind, dims))

    def save(self, path):
        inits = [numpy_helper.from_array(a, n) for n, a in self.inits.items()]
        graph = h.make_graph(self.nodes, "tinylm", self.inputs, self.outputs, inits)
        opsets = [h.make_opsetid("", 18), h.make_opsetid("com.microsoft", 1)]
        onnx.save(h.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path


def build(path, group_query=False, names="past_key_values.{}.{}", kind=T.FLOAT, past="past", lengths=False, heads=KV_HEADS):
    """A model with caches `names`, of element type `kind` and length `past`.

    With `group_query`, attention is GroupQueryAttention, whose lengths come from the mask, or with `lengths` are inputs; norms
    are fused with the residual sums before them.
    """
    w, epsilon = weights()
    b = Builder()
    ids = b.input("input_ids", T.INT64, ["batch", "seq"])
    if lengths:
        seqlens = b.input("seqlens_k", T.INT32, ["batch"])
        total = b.input("total_sequence_length", T.INT32, [])
    else:
        mask = b.input("attention_mask", T.INT64, ["batch", "total"])
    if group_query:
        angles = np.outer(np.arange(512), w["freq"])
        cos, sin = b.weight("cos", np.cos(angles).astype("f4")), b.weight("sin", np.sin(angles).astype("f4"))
        if not lengths:
            count = b("ReduceSum", mask, b.const([1]), keepdims=0)
            seqlens = b("Cast", b("Sub", count, b.const(1)), to=T.INT32)
            total = b("Cast", b("Gather", b("Shape", mask), b.const(1)), to=T.INT32)
    else:
        positions = b.input("position_ids", T.INT64, ["batch", "seq"])
        column = b("Unsqueeze", b("Cast", positions, to=T.FLOAT), b.const([2]))
        angle = b("Mul", column, b.weight("inv_freq", w["freq"]))
        angle = b("Unsqueeze", b("Concat", angle, angle, axis=2), b.const([1]))
        cos, sin = b("Cos", angle), b("Sin", angle)
        rows, keys = b("Gather", b("Shape", ids), b.const(1)), b("Gather", b("Shape", mask), b.const(1))
        ahead = b("Range", b.const(0), keys, b.const(1))
        own = b("Unsqueeze", b("Range", b("Sub", keys, rows), keys, b.const(1)), b.const([1]))
        counts = b("Unsqueeze", b("Cast", mask, to=T.BOOL), b.const([1, 2]))
        allowed = b("And", b("LessOrEqual", ahead, own), counts)
        bias = b("Where", allowed, b.const(0, np.float32), b.const(-3e38, np.float32))

    def norm(x, name):
        gain = b.weight(name, w[name])
        if group_query:
            return b("SimplifiedLayerNormalization", x, gain, epsilon=epsilon)
        square = b("ReduceMean", b("Mul", x, x), b.const([-1]))
        return b("Mul", b("Div", x, b("Sqrt", b("Add", square, b.const(epsilon, np.float32)))), gain)

    def add_norm(x, y, name):
        """The norm of a residual sum, and the sum."""
        if not group_query:
            x = b("Add", x, y)
            return norm(x, name), x
        outputs = [f"normed.{name}", "", "", f"sum.{name}"]
        got = b("SkipSimplifiedLayerNormalization", x, y, b.weight(name, w[name]), outputs=outputs, domain="com.microsoft",
                epsilon=epsilon)
        return got[0], got[3]

    def split(x, n):
        return b("Transpose", b("Reshape", x, b.const([0, 0, n, SIZE])), perm=[0, 2, 1, 3])

    def rotate(x):
        half = SIZE // 2
        first = b("Slice", x, b.const([0]), b.const([half]), b.const([3]))
        second = b("Slice", x, b.const([half]), b.const([SIZE]), b.const([3]))
        return b("Add", b("Mul", x, cos), b("Mul", b("Concat", b("Neg", second), first, axis=3), sin))

    def repeat(x):
        wide = b("Expand", b("Unsqueeze", x, b.const([2])), b.const([1, 1, HEADS // KV_HEADS, 1, 1]))
        return b("Reshape", wide, b.const([0, HEADS, -1, SIZE]))

    x = b("Gather", b.weight("embedding", w["head"]), ids)
    y = norm(x, "0.input_layernorm")
    for i in range(LAYERS):
        linear = lambda role, x: b("MatMul", x, b.weight(f"{i}.{role}", w[f"{i}.{role}"]))
        caches = [b.input(names.format(i, part), kind, ["batch", heads, past, SIZE]) for part in ["key", "value"]]
        present = [f"present.{i}.{part}" for part in ["key", "value"]]
        for name in present:
            b.output(name, kind, ["batch", heads, "total", SIZE])
        q, k, v = linear("q", y), linear("k", y), linear("v", y)
        if group_query:
            y = b("GroupQueryAttention", q, k, v, *caches, seqlens, total, cos, sin, outputs=[f"attended.{i}", *present],
                  domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1)[0]
        else:
            q, k, v = rotate(split(q, HEADS)), rotate(split(k, KV_HEADS)), split(v, KV_HEADS)
            if kind != T.FLOAT:
                k, v = b("Cast", k, to=kind), b("Cast", v, to=kind)
            k, v = (b("Concat", c, new, outputs=[name], axis=2) for c, new, name in zip(caches, [k, v], present))
            if kind != T.FLOAT:
                k, v = b("Cast", k, to=T.FLOAT), b("Cast", v, to=T.FLOAT)
            scores = b("MatMul", q, b("Transpose", repeat(k), perm=[0, 1, 3, 2]))
            scores = b("Softmax", b("Add", b("Mul", scores, b.const(SIZE**-0.5, np.float32)), bias), axis=-1)
            y = b("Transpose", b("MatMul", scores, repeat(v)), perm=[0, 2, 1, 3])
            y = b("Reshape", y, b.const([0, 0, HEADS * SIZE]))
        y, x = add_norm(x, linear("o", y), f"{i}.post_attention_layernorm")
        gate = linear("gate", y)
        y = b("Mul", b("Mul", gate, b("Sigmoid", gate)), linear("up", y))
        y, x = add_norm(x, linear("down", y), f"{i + 1}.input_layernorm" if i + 1 < LAYERS else "norm")
    b("MatMul", y, b("Transpose", "embedding", perm=[1, 0]), outputs=["logits"])
    b.output("logits", T.FLOAT, ["batch", "seq", 4096])
    return b.save(path)


def empty(session, ids, past=0):
    """What ONNX Runtime is fed with: no past, or `past` zeros that do not count."""
    rows, seq = ids.shape
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feed = {"input_ids": ids, "attention_mask": np.tile(np.arange(past + seq) >= past, (rows, 1)).astype(np.int64),
            "position_ids": np.tile(np.arange(seq), (rows, 1)), "seqlens_k": np.full(rows, seq - 1, np.int32),
            "total_sequence_length": np.array(seq, np.int32)}
    names = {i.name: i.type for i in session.get_inputs()}
    feed = {name: value for name, value in feed.items() if name in names}
    caches = [name for name in names if name.startswith("past")]
    return feed | {name: np.zeros((rows, KV_HEADS, past, SIZE), dtypes[names[name]]) for name in caches}
