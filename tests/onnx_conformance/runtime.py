"""Small models of control flow, sequences, functions and old forms of ops, with what ONNX Runtime computes for them.

`models()` yields a name, a model and its inputs. They are what ONNX's own tests leave out: loops in loops that capture
values around them, loops that run no iteration, scans backwards and along other axes, and functions that call functions.
"""
import numpy as np
import onnx
from onnx import parser

f32 = lambda *shape: np.random.default_rng(sum(shape) + 7).standard_normal(shape).astype(np.float32)
i64 = lambda v: np.array(v, np.int64)
yes, no = np.array(True), np.array(False)


def model(signature, body, opset=18, functions="", domains=""):
    text = f'<ir_version: 8, opset_import: ["" : {opset}{domains}]> g {signature} {{ {body} }} {functions}'
    return parser.parse_model(text)


LOOP = """
  y, ys = Loop (n, go, x) <body = b (int64 i, bool c, float[2,3] v) => (bool d, float[2,3] w, float[2,3] s) {
    f = Cast <to = 1> (i)
    w = Add (v, f)
    s = Mul (w, x)
    total = ReduceSum <keepdims = 0> (w)
    d = Less (total, limit)
  }>
"""

NESTED = """
  y, ys = Loop (n, , x) <body = outer (int64 i, bool c, float[3] v) => (bool d, float[3] w, float[3] sum) {
    d = Identity (c)
    one = Constant <value = int64 {1}> ()
    inner_n = Add (i, one)
    w, rows = Loop (inner_n, c, v) <body = inner (int64 j, bool e, float[3] p) => (bool h, float[3] q, float[3] r) {
      h = Identity (e)
      t = Cast <to = 1> (inner_n)
      a = Mul (p, x)
      q = Div (a, t)
      r = Sub (q, v)
    }>
    first = Constant <value = int64[1] {0}> ()
    sum = ReduceSum <keepdims = 0> (rows, first)
  }>
"""

SEQUENCE = """
  empty = SequenceEmpty <dtype = 1> ()
  all, last = Loop (n, , empty, x) <body = b (int64 i, bool c, seq(float[K]) s, float[K] v)
      => (bool d, seq(float[K]) t, float[M] w) {
    d = Identity (c)
    w = Concat <axis = 0> (v, x)
    t = SequenceInsert (s, v)
  }>
  y = ConcatFromSequence <axis = 0> (all)
  size = SequenceLength (all)
  second = Constant <value = int64 {-2}> ()
  z = SequenceAt (all, second)
"""

SCAN = """
  final, ys, zs = Scan (s0, a, b) <num_scan_inputs = 2, ATTRIBUTES
    body = g2 (float[3] s, float[3] p, float[2] q) => (float[3] t, float[3] u, float[2] r) {
      t = Add (s, p)
      u = Mul (t, p)
      r = Neg (q)
    }>
"""

OLD_SCAN = """
  final, ys = Scan (lens, s0, a) <num_scan_inputs = 1, directions = [DIRECTION],
    body = g2 (float[2] s, float[2] p) => (float[2] t, float[2] u) {
      t = Add (s, p)
      u = Mul (t, t)
    }>
"""

IF = """
  y, k = If (c) <
    then_branch = t () => (float[M] u, int64 p) { u = Concat <axis = 0> (x, w)  p = Constant <value = int64 {1}> () },
    else_branch = e () => (float[M] v, int64 q) {
      q = Constant <value = int64 {2}> ()
      v = If (d) <
        then_branch = t2 () => (float[M] a) { a = Neg (w) },
        else_branch = e2 () => (float[M] b) { b = Add (x, w) }
      >
    }
  >
"""

FUNCTIONS = """
  <domain: "my", opset_import: ["" : 18, "my" : 1]> twice <slope> (p) => (q) {
    r = my.leaky <alpha: float = @slope> (p)
    q = my.leaky (r)
  }
  <domain: "my", opset_import: ["" : 18]> leaky <alpha: float = 0.5> (p) => (q) {
    q = LeakyRelu <alpha: float = @alpha> (p)
  }
"""

MAP = """
  s = SequenceConstruct (a, b)
  y = SequenceMap (s, x) <body = m (float[K] p, float[1] q) => (float[K] r) { t = Mul (p, q)  r = Add (t, w) }>
"""


def models():
    x, w = f32(2, 3), f32(3)
    sig = "(int64 n, bool go, float[2,3] x, float limit) => (float[2,3] y, float[L,2,3] ys)"
    limit = lambda v: np.array(v, np.float32)
    yield "loop", model(sig, LOOP), [i64(5), yes, x, limit(1e9)]
    yield "loop_ends_by_its_condition", model(sig, LOOP), [i64(50), yes, x, limit(20)]
    yield "loop_of_no_iteration", model(sig, LOOP), [i64(0), yes, x, limit(0)]
    yield "loop_that_may_not_begin", model(sig, LOOP), [i64(4), no, x, limit(0)]
    sig = "(int64 n, float[3] x) => (float[3] y, float[A,3] ys)"
    yield "loop_in_a_loop", model(sig, NESTED), [i64(4), f32(3)]
    sig = "(int64 n, float[2] x) => (float[T] y, int64 size, float[U] z)"
    yield "loop_collects_a_sequence", model(sig, SEQUENCE), [i64(4), f32(2)]
    sig = "(float[3] s0, float[4,3] a, float[4,2] b) => (float[3] final, float[A,B] ys, float[C,D] zs)"
    yield "scan", model(sig, SCAN.replace("ATTRIBUTES", "")), [f32(3), f32(4, 3), f32(4, 2)]
    flags = "scan_input_directions = [1, 0], scan_output_directions = [0, 1], scan_output_axes = [1, 0],"
    yield "scan_backwards", model(sig, SCAN.replace("ATTRIBUTES", flags)), [f32(3), f32(4, 3), f32(4, 2)]
    sig = "(float[3] s0, float[3,4] a, float[4,2] b) => (float[3] final, float[A,B] ys, float[C,D] zs)"
    flags = "scan_input_axes = [1, 0], scan_output_axes = [-1, 1],"
    yield "scan_along_other_axes", model(sig, SCAN.replace("ATTRIBUTES", flags)), [f32(3), f32(3, 4), f32(4, 2)]
    sig = "(int64[2] lens, float[2,2] s0, float[2,4,2] a) => (float[2,2] final, float[2,T,2] ys)"
    for name, direction in [("", "0"), ("_backwards", "1")]:
        m = model(sig, OLD_SCAN.replace("DIRECTION", direction), opset=8)
        yield "scan_of_opset_8" + name, m, [i64([4, 2]), f32(2, 2), f32(2, 4, 2)]
    sig = "(bool c, bool d, float[3] x, float[3] w) => (float[M] y, int64 k)"
    for c, d in [(yes, yes), (no, yes), (no, no)]:
        yield f"if_{c}_{d}".lower(), model(sig, IF), [c, d, f32(3), w]
    sig = "(float[2,3] x) => (float[2,3] y, float[2,3] z)"
    body = "y = my.twice <slope: float = 0.25> (x)  z = my.twice <slope = 2.0> (x)"
    yield "functions", model(sig, body, functions=FUNCTIONS, domains=', "my" : 1'), [x]
    sig = "(float[3] a, float[3] b, float[1] x, float[3] w) => (seq(float[3]) y)"
    yield "sequence_map", model(sig, MAP), [f32(3), 2 * f32(3), f32(1), w]
    sig = "(float[5,3] x, int64 n) => (seq(float[K,3]) y, float[5,3] z)"
    body = "y = SplitToSequence <axis = 0> (x, n)  z = ConcatFromSequence <axis = 0> (y)"
    yield "split_to_sequence", model(sig, body), [f32(5, 3), i64(2)]
    sig = "(float[5,3] x) => (seq(float[3]) y, float[3,5] z)"
    body = "y = SplitToSequence <axis = 0, keepdims = 0> (x)  z = ConcatFromSequence <axis = 1, new_axis = 1> (y)"
    yield "split_without_the_dim", model(sig, body), [f32(5, 3)]
    sig = "(float[3] a, float[2] b, int64 p) => (float[K] y, int64 n)"
    body = """s = SequenceConstruct (a, b, a)  t = SequenceErase (s, p)  u = SequenceInsert (t, b, p)  y = SequenceAt (u, p)
      n = SequenceLength (t)"""
    yield "sequence_positions", model(sig, body), [f32(3), f32(2), i64(-2)]
    sig = "(float[3] x) => (float[3] y, bool h)"
    body = "o = Optional (x)  h = OptionalHasElement (o)  y = OptionalGetElement (o)"
    yield "optional", model(sig, body), [f32(3)]
    sig = "(float[6,4] x) => (float[A,4] y, int64[B] i, int64[C] j, int64[D] k)"
    u = np.round(f32(6, 4))
    u[4], u[2] = u[1], u[0]
    for order in "01":
        body = f"y, i, j, k = Unique <axis = 0, sorted = {order}> (x)"
        yield f"unique_rows_{order}", model(sig, body), [u]
    sig = "(float[4,3,2] x, int64[3] n) => (float[4,3,2] y)"
    body = "y = ReverseSequence <time_axis = 0, batch_axis = 1> (x, n)"
    yield "reverse_sequence", model(sig, body), [f32(4, 3, 2), i64([4, 0, 3])]
    sig = "(float[2,5,3] x, int64[2,3] t, float[5] w) => (float l, float[2,5,3] p)"
    body = 'l, p = SoftmaxCrossEntropyLoss <reduction = "mean", ignore_index = 2> (x, t, w)'
    yield "cross_entropy", model(sig, body), [f32(2, 5, 3), i64([[0, 2, 4], [1, 2, 3]]), np.abs(f32(5))]


def expected(m, inputs):
    """What ONNX Runtime gives, in the order of the outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: v for i, v in zip(m.graph.input, inputs, strict=True)})


if __name__ == "__main__":
    for name, m, inputs in models():
        onnx.checker.check_model(m)
        print(name, [y if isinstance(y, list) else y.shape for y in expected(m, inputs)])
