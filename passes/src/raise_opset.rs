//! `raise-opset`: writes a model against a newer operator set of ONNX, op by op.
//!
//! Most versions of an op only admit more element types or add attributes whose defaults mean what was meant before.
//! [`RULES`] lists the others, up to [`NEWEST`]: each either rewrites the op into its new form or refuses it with the
//! reason. The list was made by comparing the schemas of every op between its versions (inputs, attributes, defaults)
//! and from the changes of meaning that the operators' documentation states.

use crate::{Changed, Exactness, Pass, PassCx, PassError};
use dialects::ir::{Attr, ConstData, Elem, Module, Op, OpBuilder, Region, Type, Value};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const NAME: &str = "raise-opset";

/// The oldest operator set that can be raised.
pub const OLDEST: i64 = 11;

/// The newest one that the rules reach.
pub const NEWEST: i64 = 25;

/// Writes a model against a newer operator set.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaiseOpset {
    /// The operator set to raise to; a newer model is left as it is.
    pub version: i64,
}

impl Default for RaiseOpset {
    fn default() -> Self {
        RaiseOpset { version: 21 }
    }
}

impl Pass for RaiseOpset {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "writes the model against a newer operator set of ONNX, op by op"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let before = m.opset("onnx");
        raise(m, cx, self.version, NAME)?;
        Ok(if m.opset("onnx") == before { Changed::No } else { Changed::Yes })
    }
}

/// What becomes of an op when its model is raised: it was rewritten, it means the same, or it cannot be carried over.
type Outcome = Result<bool, String>;

/// A change that is more than new element types: the ops, the version that brought it, and what to do.
type Rule = (&'static [&'static str], i64, fn(&mut Module, Op) -> Outcome);

const RULES: &[Rule] =
    &[
        (&["Dropout"], 12, |m, op| refuse_attr(m, op, "ratio", "an input")),
        (&["Softmax", "LogSoftmax", "Hardmax"], 13, softmax),
        (&["Squeeze", "Unsqueeze", "ReduceSum"], 13, |m, op| attr_to_input(m, op, "axes")),
        (&["Split"], 13, |m, op| attr_to_input(m, op, "split")),
        (&["BatchNormalization"], 14, batch_norm),
        (&["RoiAlign"], 16, |m, op| {
            m.ops[op].attrs.set("coordinate_transformation_mode", "output_half_pixel".into());
            Ok(true)
        }),
        (
            &[
                "ReduceL1",
                "ReduceL2",
                "ReduceLogSum",
                "ReduceLogSumExp",
                "ReduceMax",
                "ReduceMean",
                "ReduceMin",
                "ReduceProd",
                "ReduceSumSquare",
            ],
            18,
            |m, op| attr_to_input(m, op, "axes"),
        ),
        (&["Split"], 18, split),
        (&["AveragePool"], 19, ceil_mode),
        (&["DFT"], 20, |_, _| Err("its axis became an input with another default".into())),
        (&["GridSample"], 20, grid_sample),
        (&["GroupNormalization"], 21, |_, _| {
            Err("its scale and bias were per group, and are per channel".into())
        }),
        (&["AveragePool", "MaxPool", "LpPool"], 22, ceil_mode),
    ];

/// Raises the default domain to at least `needed` for the pass `pass`, functions included, and reports it. Fails when
/// the settings forbid it or an op's meaning cannot be carried over.
pub fn raise(m: &mut Module, cx: &mut PassCx, needed: i64, pass: &'static str) -> Result<(), PassError> {
    let have = m.opset("onnx");
    if have >= needed {
        return Ok(());
    }
    let fail = |why: String| Err(PassError::At { pass, what: "opset".into(), why });
    let both = format!("the model is of opset {have}, and {needed} is needed");
    if cx.settings.keep_opset && pass != NAME {
        return fail(format!("{both}: raising it was forbidden"));
    }
    if have < OLDEST || needed > NEWEST {
        return fail(format!("{both}: opsets are raised from {OLDEST} on, and up to {NEWEST}"));
    }
    let mut rewritten = raise_graph(m, m.top, have, needed, pass)?;
    m.opsets.insert("onnx".into(), needed);
    for i in 0..m.functions.len() {
        let function = &m.functions[i];
        let Some(&have) = function.opsets.get("onnx") else { continue };
        if have >= OLDEST && have < needed {
            rewritten += raise_graph(m, function.body, have, needed, pass)?;
            m.functions[i].opsets.insert("onnx".into(), needed);
        }
    }
    m.ir_version = m.ir_version.max(ir_version(needed));
    cx.report
        .notes
        .push(format!("opset raised from {have} to {needed} for {pass}; {rewritten} ops rewritten"));
    Ok(())
}

/// The IR version that ONNX released an operator set with.
fn ir_version(opset: i64) -> i64 {
    match opset {
        ..=14 => 7,
        15..=18 => 8,
        19..=20 => 9,
        21..=22 => 10,
        23 => 11,
        24 => 12,
        _ => 13,
    }
}

/// Raises the ops of a region and of those inside it. Returns how many were rewritten.
fn raise_graph(
    m: &mut Module,
    region: Region,
    have: i64,
    needed: i64,
    pass: &'static str,
) -> Result<u64, PassError> {
    let mut rewritten = 0;
    for op in m.regions[region].ops.clone() {
        for nested in m.ops[op].attrs.regions().collect::<Vec<_>>() {
            rewritten += raise_graph(m, nested, have, needed, pass)?;
        }
        if m.ops[op].name.dialect() != "onnx" {
            continue;
        }
        let mut changed = false;
        for (names, since, rule) in RULES {
            if have < *since && *since <= needed && names.contains(&m.ops[op].name.op()) {
                changed |= rule(m, op).map_err(|why| PassError::At {
                    pass,
                    what: m.ops[op].loc.to_string(),
                    why: format!("{} cannot go from opset {have} to {needed}: {why}", m.ops[op].name),
                })?;
            }
        }
        rewritten += u64::from(changed);
    }
    Ok(rewritten)
}

/// A list of integers that was an attribute and became the second input.
fn attr_to_input(m: &mut Module, op: Op, name: &str) -> Outcome {
    let Some(attr) = m.ops[op].attrs.remove(name) else { return Ok(false) };
    let Attr::Ints(list) = attr else { return Err(format!("expected integers in {name:?}")) };
    let list = integers(m, op, &list);
    let operands = &mut m.ops[op].operands;
    operands.resize(1, None);
    operands.push(Some(list));
    Ok(true)
}

/// A constant list of integers, made right before `op`, so that it stands in a function's body as well as in a graph.
fn integers(m: &mut Module, op: Op, list: &[i64]) -> Value {
    let bytes: Vec<u8> = list.iter().flat_map(|n| n.to_le_bytes()).collect();
    let data = ConstData::new(Elem::I64, vec![list.len() as u64], Arc::new(bytes::Bytes::from(bytes)));
    let id = m.consts.push(data.expect("eight bytes for each integer"));
    let loc = m.ops[op].loc.clone();
    let name = m.fresh_name(&format!("{loc}_axes"));
    let ty = Type::of_shape(Elem::I64, &[list.len()]);
    let made = OpBuilder::new("onnx.Constant", &loc).attr("value", Attr::Tensor(id)).named_result(name, ty);
    let made = m.insert_before(op, made);
    m.ops[made].result(0).expect("a Constant has a result")
}

fn refuse_attr(m: &mut Module, op: Op, name: &str, became: &str) -> Outcome {
    match m.ops[op].attrs.get(name) {
        Some(_) => Err(format!("its attribute {name:?} became {became}")),
        None => Ok(false),
    }
}

/// Before version 13 it normalized over all dims from `axis` (by default 1) on, and now over `axis` alone.
fn softmax(m: &mut Module, op: Op) -> Outcome {
    let axis = m.ops[op].attrs.int("axis").unwrap_or(1);
    let rank = m.ops[op].operand(0).and_then(|v| m.ty(v).dims()).map(<[_]>::len);
    let Some(rank) = rank else { return Err("it flattened its input, whose rank is unknown".into()) };
    let last = rank as i64 - 1;
    if axis != last && axis != -1 {
        return Err(format!("it normalized over dims {axis} to {last} together"));
    }
    m.ops[op].attrs.set("axis", Attr::Int(-1));
    Ok(true)
}

fn batch_norm(m: &mut Module, op: Op) -> Outcome {
    match m.ops[op].results.iter().flatten().count() {
        0 | 1 => Ok(false),
        _ => Err("it has the outputs of training".into()),
    }
}

/// Parts of equal size: how many was told by the outputs, and now by an attribute.
fn split(m: &mut Module, op: Op) -> Outcome {
    if m.ops[op].operand(1).is_some() {
        return Ok(false);
    }
    let parts = m.ops[op].results.len() as i64;
    m.ops[op].attrs.set("num_outputs", Attr::Int(parts));
    Ok(true)
}

fn grid_sample(m: &mut Module, op: Op) -> Outcome {
    let mode = match m.ops[op].attrs.str("mode") {
        Some("bilinear") => "linear",
        Some("bicubic") => "cubic",
        _ => return Ok(false),
    };
    m.ops[op].attrs.set("mode", mode.into());
    Ok(true)
}

/// Windows that start beyond the padding's end counted, and are now left out.
fn ceil_mode(m: &mut Module, op: Op) -> Outcome {
    match m.ops[op].attrs.int("ceil_mode") {
        None | Some(0) => Ok(false),
        Some(_) => Err("the output size of ceil_mode=1 changed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::NoData;
    use crate::{Report, Settings};
    use dialects::ir::Dim;
    use dialects::ops::Ops;

    fn model(opset: i64, op: OpBuilder, outputs: usize) -> (Module, Op) {
        let mut m = Module::default();
        m.opsets.insert("onnx".into(), opset);
        m.ir_version = 7;
        let top = m.top;
        let dims = [Dim::Known(2), Dim::Unknown, Dim::Known(6)];
        let x = m.add_arg(top, "x", Type::tensor(Elem::F32, dims));
        let mut op = op.operands([x]);
        for i in 0..outputs {
            op = op.named_result(format!("y{i}"), Type::Unknown);
        }
        let op = m.push(top, op);
        (m, op)
    }

    fn raised(m: &mut Module, to: i64) -> Result<Vec<String>, String> {
        let ops = Ops::default();
        let settings = Settings::default();
        let mut report = Report::default();
        let mut cx = PassCx { ops: &ops, env: &NoData, settings: &settings, report: &mut report, rest: &[] };
        raise(m, &mut cx, to, NAME).map_err(|e| e.to_string())?;
        Ok(report.notes)
    }

    fn at(name: &str) -> OpBuilder {
        OpBuilder::new(name, &"here".into())
    }

    #[test]
    fn axes_become_an_input_where_they_did() {
        let reduce = || at("onnx.ReduceMean").attr("axes", vec![-1]).attr("keepdims", 1);
        let (mut m, op) = model(17, reduce(), 1);
        assert_eq!(
            raised(&mut m, 21).unwrap(),
            ["opset raised from 17 to 21 for raise-opset; 1 ops rewritten"]
        );
        assert!(m.ops[op].attrs.get("axes").is_none());
        let axes = m.const_of(m.ops[op].operand(1).unwrap()).unwrap();
        assert_eq!((m.consts[axes].elem, &m.consts[axes].dims[..]), (Elem::I64, &[1][..]));
        assert_eq!(&m.consts[axes].read().unwrap()[..], (-1i64).to_le_bytes());
        assert_eq!((m.opset("onnx"), m.ir_version), (21, 10));
        // At 17 ReduceMean keeps its attribute; ReduceSum lost it at 13.
        let (mut m, op) = model(15, reduce(), 1);
        raised(&mut m, 17).unwrap();
        assert_eq!(m.ops[op].attrs.ints("axes"), Some(&[-1][..]));
        let (mut m, op) = model(11, at("onnx.ReduceSum").attr("axes", vec![0, 2]), 1);
        raised(&mut m, 13).unwrap();
        assert_eq!(m.ops[op].operands.len(), 2);
    }

    #[test]
    fn split_says_how_many() {
        let (mut m, op) = model(17, at("onnx.Split").attr("axis", 2), 3);
        raised(&mut m, 18).unwrap();
        assert_eq!(m.ops[op].attrs.int("num_outputs"), Some(3));
        // With sizes given it may not say.
        let (mut m, op) = model(11, at("onnx.Split").attr("split", vec![2, 2, 2]), 3);
        raised(&mut m, 21).unwrap();
        assert_eq!(m.ops[op].attrs.int("num_outputs"), None);
        assert_eq!(m.ops[op].operands.len(), 2);
    }

    #[test]
    fn what_changed_its_meaning_is_refused_by_name() {
        let refuse = |from, to, op| raised(&mut model(from, op, 1).0, to).unwrap_err();
        assert_eq!(
            refuse(12, 13, at("onnx.Softmax")),
            "raise-opset: \"here\": onnx.Softmax cannot go from opset 12 to 13: \
             it normalized over dims 1 to 2 together"
        );
        assert!(refuse(18, 21, at("onnx.GroupNormalization")).contains("per channel"));
        assert!(refuse(18, 22, at("onnx.AveragePool").attr("ceil_mode", 1)).contains("ceil_mode"));
        assert!(refuse(10, 21, at("onnx.Relu")).contains("raised from 11"));
        assert!(refuse(21, 26, at("onnx.Relu")).contains("up to 25"));
        // The last axis alone always meant the same, and other domains have versions of their own.
        let (mut m, op) = model(12, at("onnx.Softmax").attr("axis", 2), 1);
        raised(&mut m, 13).unwrap();
        assert_eq!(m.ops[op].attrs.int("axis"), Some(-1));
        assert!(raised(&mut model(18, at("other.GroupNormalization"), 1).0, 21).is_ok());
        assert!(raised(&mut model(18, at("onnx.AveragePool").attr("ceil_mode", 0), 1).0, 22).is_ok());
    }

    #[test]
    fn a_model_that_is_new_enough_is_left_alone() {
        let (mut m, op) = model(21, at("onnx.Split"), 2);
        assert_eq!(raised(&mut m, 18).unwrap(), [""; 0]);
        assert_eq!((m.opset("onnx"), m.ops[op].attrs.is_empty()), (21, true));
    }
}
