"""One case of a file of dialects/testdata, and what ONNX Runtime says of it. The format is described in
dialects/src/testing.rs."""
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T, helper as h

NAMES = {T.FLOAT: "f32", T.DOUBLE: "f64", T.FLOAT16: "f16", T.BFLOAT16: "bf16", T.INT64: "i64", T.INT32: "i32",
         T.INT16: "i16", T.INT8: "i8", T.UINT64: "u64", T.UINT32: "u32", T.UINT16: "u16", T.UINT8: "u8",
         T.BOOL: "bool", T.INT4: "i4", T.UINT4: "u4", T.INT2: "i2", T.UINT2: "u2", T.FLOAT8E4M3FN: "f8e4m3fn",
         T.FLOAT8E4M3FNUZ: "f8e4m3fnuz", T.FLOAT8E5M2: "f8e5m2", T.FLOAT8E5M2FNUZ: "f8e5m2fnuz",
         T.FLOAT4E2M1: "f4e2m1"}

rng = np.random.default_rng(7)
lines = []


def restart():
    """Every family starts from the same random numbers, whichever others are written."""
    rng.bit_generator.state = np.random.default_rng(7).bit_generator.state
    lines.clear()


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def proto(x):
    """A TensorProto, whatever the element type: an ml_dtypes array keeps its own."""
    return x if isinstance(x, onnx.TensorProto) else onnx.numpy_helper.from_array(np.asarray(x), "x")


def text(x):
    if x is None:
        return "-"
    p = proto(x)
    if not p.HasField("raw_data"):
        p = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(p))
    dims = "x".join(map(str, p.dims)) or "."
    return f"{NAMES[p.data_type]} {dims} {p.raw_data.hex()}".rstrip()


def run_ort(op, opset, attrs, inputs, outputs, domain, level=None):
    """The op as a model of one node, run by ONNX Runtime."""
    protos = {f"i{i}": proto(x) for i, x in enumerate(inputs) if x is not None}
    names = [f"i{i}" if x is not None else "" for i, x in enumerate(inputs)]
    outs = [f"o{i}" for i in range(outputs)]
    node = h.make_node(op, names, outs, domain=domain, **attrs)
    inits = []
    for name, p in protos.items():
        q = onnx.TensorProto()
        q.CopyFrom(p)
        q.name = name
        inits.append(q)
    # Everything is a constant, as weights are: any element type can be given, and without optimizations nothing is folded.
    graph = h.make_graph([node], "g", [], [onnx.ValueInfoProto(name=o) for o in outs], inits)
    opsets = [h.make_opsetid("", opset if not domain else 21)] + ([h.make_opsetid(domain, opset)] if domain else [])
    model = h.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run_with_ort_values(None, {})
    return [to_numpy(v) for v in values]


def to_numpy(v):
    special = {T.BFLOAT16: ml_dtypes.bfloat16, T.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
               T.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz, T.FLOAT8E5M2: ml_dtypes.float8_e5m2,
               T.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz}
    kind = v.element_type()
    return v.numpy().view(special[kind]) if kind in special else v.numpy()


def case(label, op, inputs, outputs=1, opset=21, domain="", want=None, rtol=1e-5, atol=1e-6, compare=None, **attrs):
    """One case. `want` is the reference's results, else ONNX Runtime computes them."""
    # An attribute may be called what an argument of this function is called.
    attrs = {name.rstrip("_"): v for name, v in attrs.items()}
    if want is None:
        want = run_ort(op, opset, attrs, inputs, outputs, domain)
    if compare is not None:
        want = [w if i in compare else None for i, w in enumerate(want)]
    lines.append(f"case {label} {domain or 'onnx'}.{op} {opset} {outputs} {rtol:g} {atol:g}")
    for name, v in attrs.items():
        if isinstance(v, (list, tuple)):
            kind = "fs" if isinstance(v[0], float) else "ss" if isinstance(v[0], str) else "is"
            lines.append(f"attr {name} {kind} {' '.join(map(str, v))}")
        else:
            kind = "f" if isinstance(v, float) else "s" if isinstance(v, str) else "i"
            lines.append(f"attr {name} {kind} {v}")
    lines.extend("in " + text(x) for x in inputs)
    lines.extend("out " + text(x) for x in want)
