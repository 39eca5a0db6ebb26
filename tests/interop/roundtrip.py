"""A model that goes through qcc without a pass is the same model, as the `onnx` package reads it.

usage: roundtrip.py QCC [MODEL...]

QCC is called as `QCC in.onnx -o out.onnx`. The models given and a set of synthetic ones (every element type, every
kind of attribute and type, functions, nested graphs, metadata in every place) must come out with every field equal.
Nothing is normalized but one thing: `onnx.load` marks tensors whose external data it has read with an explicit
`data_location: DEFAULT`, and that mark is removed.
"""

import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh


def load(path):
    external = set()
    for t in onnx.load(path, load_external_data=False).graph.initializer:
        if t.data_location == T.EXTERNAL:
            external.add(t.name)
    model = onnx.load(path)
    for t in model.graph.initializer:
        if t.name in external:
            t.ClearField("data_location")
    return model


def differences(a, b, path="model"):
    """Paths of fields that differ, presence and order included."""
    out = []
    for d in a.DESCRIPTOR.fields:
        p = f"{path}.{d.name}"
        if d.is_repeated:
            x, y = list(getattr(a, d.name)), list(getattr(b, d.name))
            if len(x) != len(y):
                out.append(f"{p}: {len(x)} against {len(y)} entries")
            for i, (u, v) in enumerate(zip(x, y)):
                if d.message_type:
                    out += differences(u, v, f"{p}[{i}]")
                elif u != v and not (u != u and v != v):
                    out.append(f"{p}[{i}]: {u!r} against {v!r}"[:200])
        elif a.HasField(d.name) != b.HasField(d.name):
            out.append(f"{p}: {'only before' if a.HasField(d.name) else 'only after'}")
        elif a.HasField(d.name):
            u, v = getattr(a, d.name), getattr(b, d.name)
            if d.message_type:
                out += differences(u, v, p)
            elif u != v and not (u != u and v != v):
                out.append(f"{p}: {u!r} against {v!r}"[:200])
    return out


def meta(message, *names):
    for name in names or ("key",):
        entry = message.metadata_props.add()
        entry.key, entry.value = name, f"value of {name}\nwith \"quotes\" and ünïcode"


def value(name, elem=T.FLOAT, shape=("batch", 3)):
    return h.make_tensor_value_info(name, elem, shape)


def model(graph, opsets=(("", 21),), ir=10, **fields):
    m = h.make_model(graph, opset_imports=[h.make_opsetid(d, v) for d, v in opsets], ir_version=ir, **fields)
    return m


DTYPES = [T.DataType.Value(n) for n in T.DataType.keys() if n not in ("UNDEFINED", "STRING")]
TYPED = {
    "float_data": [T.FLOAT, T.COMPLEX64],
    "double_data": [T.DOUBLE, T.COMPLEX128],
    "int64_data": [T.INT64],
    "uint64_data": [T.UINT32, T.UINT64],
}


def dtypes():
    """Every element type: raw, typed, empty raw and empty typed; and strings."""
    bits = {T.FLOAT: 32, T.DOUBLE: 64, T.COMPLEX64: 64, T.COMPLEX128: 128, T.INT64: 64, T.UINT64: 64, T.INT32: 32,
            T.UINT32: 32, T.INT16: 16, T.UINT16: 16, T.FLOAT16: 16, T.BFLOAT16: 16, T.INT4: 4, T.UINT4: 4,
            T.FLOAT4E2M1: 4, T.INT2: 2, T.UINT2: 2}
    inits = []
    for d in DTYPES:
        for count in (5, 0, None):
            n = 1 if count is None else count
            size = -(-n * bits.get(d, 8) // 8)
            raw = T(name=f"raw_{d}_{count}", data_type=d, dims=[] if count is None else [count])
            raw.raw_data = bytes((7 * i + 1) % (2 if d == T.BOOL else 256) for i in range(size))
            inits.append(raw)
            typed = T(name=f"typed_{d}_{count}", data_type=d, dims=[] if count is None else [count])
            field = next((f for f, ds in TYPED.items() if d in ds), "int32_data")
            if field == "int32_data":
                entries = size if bits.get(d, 8) < 8 else n
                top = {T.BOOL: 1, T.INT8: 127, T.INT16: 32767, T.INT32: 2**31 - 1}.get(d, 2 ** min(bits.get(d, 8), 16) - 1)
                if bits.get(d, 8) < 8:
                    top = 255
                low = -top - 1 if d in (T.INT8, T.INT16, T.INT32) else 0
                typed.int32_data.extend(([top, low, 1, 0, top] * 2)[:entries])
            elif field in ("float_data", "double_data"):
                per = 2 if d in (T.COMPLEX64, T.COMPLEX128) else 1
                getattr(typed, field).extend(([1.5, float("nan"), -0.0, float("inf"), 1e-40] * 2)[: n * per])
            else:
                top = {T.INT64: 2**63 - 1, T.UINT64: 2**64 - 1, T.UINT32: 2**32 - 1}[d]
                getattr(typed, field).extend([top, 0, 1, 2, top][:n])
            inits.append(typed)
    strings = T(name="strings", data_type=T.STRING, dims=[2, 2])
    strings.string_data.extend([b"one", b"", b"\xff\xfe not text", "zwölf".encode()])
    inits += [strings, T(name="no_strings", data_type=T.STRING, dims=[0])]
    plain = T(name="located", data_type=T.FLOAT, dims=[1], raw_data=b"1234", data_location=T.DEFAULT)
    plain.doc_string = "documented"
    plain.segment.begin, plain.segment.end = 3, 4
    meta(plain, "b", "a")
    inits.append(plain)
    for t in inits[:3]:
        t.doc_string = ""
    nodes = [h.make_node("Identity", ["located"], ["y"])]
    # value_info of weights, in an order of its own, one of them unknown, one listed twice, one an output.
    infos = [value("typed_1_5", T.FLOAT, [5]), value("raw_1_5", T.FLOAT, [5]), value("nothing", T.INT8, None),
             value("typed_1_5", T.FLOAT, ["again"]), value("y", T.FLOAT, ["other"])]
    g = h.make_graph(nodes, "dtypes", [], [value("y", T.FLOAT, [1])], inits, value_info=infos)
    return model(g, [("", 28)], ir=14)


def sparse(name):
    values = nh.from_array(np.array([1.5, 2.5], np.float32), name)
    indices = nh.from_array(np.array([3, 7], np.int64), "indices of " + name)
    return h.make_sparse_tensor(values, indices, [3, 4])


def all_types():
    """Every kind of type, with denotations, in every place a type can stand."""
    tensor = h.make_tensor_type_proto(T.FLOAT, ["n", 3, None])
    tensor.denotation = "IMAGE"
    tensor.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    negative = h.make_tensor_type_proto(T.INT64, [-1, 0])
    empty_name = h.make_tensor_type_proto(T.INT64, ["x"])
    empty_name.tensor_type.shape.dim[0].dim_param = ""
    odd_name = h.make_tensor_type_proto(T.INT64, ["2*n + \"1\"", "a b"])
    newer = onnx.TypeProto()
    newer.tensor_type.elem_type = 77
    opaque = onnx.TypeProto()
    opaque.opaque_type.domain, opaque.opaque_type.name = "d", "n"
    no_elem = onnx.TypeProto()
    no_elem.tensor_type.SetInParent()
    no_seq = onnx.TypeProto()
    no_seq.sequence_type.SetInParent()
    types = [
        tensor, negative, empty_name, odd_name, newer, opaque, no_elem, no_seq, onnx.TypeProto(),
        h.make_tensor_type_proto(T.STRING, None), h.make_tensor_type_proto(T.BOOL, []),
        h.make_sparse_tensor_type_proto(T.DOUBLE, [2, "k"]), h.make_sequence_type_proto(tensor),
        h.make_optional_type_proto(h.make_sequence_type_proto(tensor)), h.make_map_type_proto(T.STRING, tensor),
        h.make_sequence_type_proto(h.make_map_type_proto(T.INT64, h.make_tensor_type_proto(T.FLOAT, None))),
    ]
    inputs = [h.make_value_info(f"in{i}", t) for i, t in enumerate(types)]
    inputs.append(onnx.ValueInfoProto(name="untyped"))
    for i in inputs[:4]:
        i.doc_string = "doc of " + i.name
        meta(i)
    inputs[5].doc_string = ""
    node = h.make_node("Custom", [i.name for i in inputs], ["a", "b"], domain="my.domain")
    # The same output twice over, an output that is an input, and one with another declaration.
    outputs = [h.make_value_info("a", tensor), h.make_value_info("in0", tensor), h.make_value_info("in1", odd_name)]
    g = h.make_graph([node], "types", inputs, outputs, value_info=[h.make_value_info("b", t) for t in types[-1:]])
    return model(g, [("my.domain", 3), ("ai.onnx.ml", 5), ("", 20)], ir=9)


def attributes():
    """Every kind of attribute, documented and not, on ops of unknown domains; absent inputs and outputs."""
    inner = h.make_graph([h.make_node("Relu", ["x"], ["inner"])], "inner", [], [value("inner")])
    tensor = nh.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "named tensor")
    nameless = nh.from_array(np.arange(3, dtype=np.int8))
    types = [h.make_tensor_type_proto(T.FLOAT, ["n"]), h.make_sequence_type_proto(h.make_tensor_type_proto(T.INT8, None))]
    odd = h.make_tensor_type_proto(T.FLOAT, ["n"])
    odd.denotation = "odd"
    node = h.make_node("All", ["x", "", "w"], ["y", "", "z", ""], "", domain="unknown.domain", overload="v2",
                       f=float("-inf"), i=-(2**63), s=b"\xff\x00", t=tensor, g=inner, fs=[0.1, float("nan")],
                       ints=[1, -2], ss=["a", b"\xfe"], ts=[tensor, nameless], gs=[inner, inner],
                       sp=sparse("values"), sps=[sparse(""), sparse("v")], tp=types[1], tps=types, otp=odd, otps=[odd])
    node.domain = "unknown.domain"
    for kind in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS, onnx.AttributeProto.STRINGS,
                 onnx.AttributeProto.TENSORS, onnx.AttributeProto.GRAPHS, onnx.AttributeProto.SPARSE_TENSORS,
                 onnx.AttributeProto.TYPE_PROTOS):
        a = node.attribute.add()
        a.name, a.type = f"empty_{kind}", kind
    for a in list(node.attribute)[::2]:
        a.doc_string = "documented " + a.name
    node.doc_string = "a node"
    meta(node, "z", "a", "m")
    node.name = ""
    twice = h.make_node("Relu", ["y"], ["r"], "relu", domain="ai.onnx", doc_string="")
    for key, val in (("k", "1"), ("k", "2"), ("other", None)):
        e = twice.metadata_props.add()
        e.key = key
        if val:
            e.value = val
    default = h.make_node("Relu", ["r"], ["r2"])
    default.domain = ""
    g = h.make_graph([node, twice, default], "attributes", [value("x"), value("w")], [value("r2"), value("z")],
                     [nh.from_array(np.ones((1, 3), np.float32), "w")], doc_string="graph doc",
                     sparse_initializer=[sparse("sparse weight")])
    meta(g, "graph key")
    q = g.quantization_annotation.add(tensor_name="x")
    e = q.quant_parameter_tensor_names.add()
    e.key, e.value = "SCALE_TENSOR", "w"
    m = model(g, [("unknown.domain", 1), ("ai.onnx", 21)], doc_string="model doc", producer_name="p",
              producer_version="", domain="d", model_version=7)
    meta(m, "one", "two")
    return m


def nested():
    """If and Loop inside If: captured values, names used again in sibling graphs, weights inside."""
    def branch(tag, extra):
        w = nh.from_array(np.full((2,), len(tag), np.float32), "w")
        nodes = [h.make_node("Add", ["x", "w"], ["same"], f"{tag}/add"), *extra,
                 h.make_node("Mul", ["same", "outer"], ["out"])]
        g = h.make_graph(nodes, tag, [], [value("out", T.FLOAT, [2])], [w], value_info=[value("same", T.FLOAT, [2])])
        meta(g)
        return g

    body = h.make_graph(
        [h.make_node("Add", ["carried", "same"], ["next"]), h.make_node("Identity", ["cond_in"], ["cond_out"]),
         h.make_node("Identity", ["next"], ["scan"])], "body",
        [value("iter", T.INT64, []), value("cond_in", T.BOOL, []), value("carried", T.FLOAT, [2])],
        [value("cond_out", T.BOOL, []), value("next", T.FLOAT, [2]), value("scan", T.FLOAT, [2])])
    loop = h.make_node("Loop", ["", "c", "x"], ["last", "scans"], body=body)
    nodes = [h.make_node("Relu", ["x"], ["outer"]),
             h.make_node("If", ["c"], ["y"], then_branch=branch("then", [loop]), else_branch=branch("else", [])),
             h.make_node("If", ["c"], ["z"], then_branch=branch("then", []), else_branch=branch("else", [loop])),
             h.make_node("Add", ["y", "z"], ["same_1"])]
    g = h.make_graph(nodes, "nested", [value("x", T.FLOAT, [2]), value("c", T.BOOL, [])], [value("same_1", T.FLOAT, [2])])
    return model(g, [("", 17)], ir=8)


def functions():
    """Functions that call each other, with attributes by reference, defaults, overloads and value_info."""
    ref = h.make_node("LeakyRelu", ["x"], ["h"], "leaky")
    a = ref.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    a.doc_string = "by reference"
    inner = h.make_function("my.fn", "Inner", ["x"], ["y"], [ref, h.make_node("Relu", ["h"], ["y"])],
                            [h.make_opsetid("", 18)], ["slope"], overload="o1")
    default = h.make_node("Scale", ["x"], ["y"], domain="my.op")
    default.attribute.add(name="k", ref_attr_name="k", type=onnx.AttributeProto.TENSOR)
    outer = h.make_function("my.fn", "Outer", ["x", "w"], ["y", "x"],
                            [h.make_node("Inner", ["x"], ["t"], domain="my.fn", slope=0.5, overload="o1"), default,
                             h.make_node("Add", ["t", "w"], ["unused"])],
                            [h.make_opsetid("my.op", 2), h.make_opsetid("", 18), h.make_opsetid("my.fn", 1)], ["must"],
                            [h.make_attribute("k", nh.from_array(np.ones(2, np.float32)), "doc"), h.make_attribute("n", 3)])
    outer.doc_string = "outer"
    meta(outer, "f")
    outer.value_info.append(value("t", T.FLOAT, ["n"]))
    outer.value_info.append(value("x", T.FLOAT, ["n"]))
    empty = h.make_function("", "Nothing", [], [], [], [])
    g = h.make_graph([h.make_node("Outer", ["x", "x"], ["y", "h"], domain="my.fn", must=1)], "g", [value("x")], [value("y")])
    m = model(g, [("my.fn", 1), ("", 18)], functions=[inner, outer, empty])
    return m


def devices():
    """Device configurations, sharding and training: carried, not interpreted."""
    node = h.make_node("Relu", ["x"], ["y"])
    c = node.device_configurations.add(configuration_id="c", pipeline_stage=1)
    s = c.sharding_spec.add(tensor_name="x", device=[0, -1])
    e = s.index_to_device_group_map.add(key=-1, value=[0, 1])
    d = s.sharded_dim.add(axis=0)
    d.simple_sharding.add(dim_value=4, num_shards=2)
    d.simple_sharding.add(dim_param="n", num_shards=2)
    m = model(h.make_graph([node], "g", [value("x")], [value("y")]), [("", 23)], ir=11)
    m.configuration.add(name="c", num_devices=2, device=["a", "b"])
    t = m.training_info.add()
    t.initialization.CopyFrom(h.make_graph([], "init", [], [], [nh.from_array(np.ones(3, np.float32), "w")]))
    t.algorithm.CopyFrom(h.make_graph([h.make_node("Neg", ["y"], ["loss"])], "step", [], [value("loss")]))
    e = t.update_binding.add()
    e.key, e.value = "w", "loss"
    assert s.device[1] == -1
    return m


def bare():
    """The least a model can be."""
    m = onnx.ModelProto()
    m.graph.SetInParent()
    return m


def empty_texts():
    """Fields that are present and empty."""
    m = model(h.make_graph([], "", [], []), [("", 1)], producer_name="", producer_version="", domain="", doc_string="")
    m.model_version = 0
    return m


SYNTHETIC = [dtypes, all_types, attributes, nested, functions, devices, bare, empty_texts]


def main():
    qcc, paths = sys.argv[1], [pathlib.Path(p) for p in sys.argv[2:]]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for make in SYNTHETIC:
            path = folder / f"{make.__name__}.onnx"
            path.write_bytes(make().SerializeToString())
            paths.append(path)
        for path in paths:
            out = folder / "out.onnx"
            out.unlink(missing_ok=True)
            run = subprocess.run([qcc, str(path), "-o", str(out)], capture_output=True, text=True)
            if run.returncode:
                found = [f"exit code {run.returncode}: {run.stderr.strip()}"]
            else:
                found = differences(load(path), load(out))
                if not found and load(path).SerializeToString(deterministic=True) != load(out).SerializeToString(deterministic=True):
                    found = ["another encoding"]
            print("FAIL" if found else "ok", path.parent.name + "/" + path.name)
            for line in found[:20]:
                print("    ", line)
            failed += bool(found)
    print(f"{len(paths) - failed} of {len(paths)} models are the same")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
