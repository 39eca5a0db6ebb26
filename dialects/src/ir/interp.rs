//! The interpreter: a loop over [`OpDef::eval`], with every buffer freed at its last use.
//!
//! Constants are decoded when first read. Those that fit the budget (smallest first) stay decoded until the prepared
//! run is dropped; a larger one is decoded for each op that reads it and freed after it. So a prepared run holds at
//! most the budget, one constant more, and the live activations.

use super::{ConstId, Module, Op, Region, Value, graph};
use crate::exec::{ExecError, Executor, Prepared, Sink};
use crate::ops::{EvalCx, Evaluated, Item, OpDef, OpError, Ops};
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::OnceLock;

/// Bytes of decoded constants that a prepared run keeps, unless told otherwise.
const CONST_BUDGET: u64 = 1 << 30;

/// Runs modules op by op.
pub struct Interpreter {
    ops: Ops,
    exact: bool,
    const_budget: u64,
}

impl Interpreter {
    /// An interpreter of these ops.
    pub fn new(ops: Ops) -> Interpreter {
        Interpreter { ops, exact: false, const_budget: CONST_BUDGET }
    }

    /// The same, leaving out the roundings that a runtime may add (see [`EvalCx::exact`]) if `exact`.
    pub fn exact(self, exact: bool) -> Interpreter {
        Interpreter { exact, ..self }
    }

    /// Keeps at most `bytes` of decoded constants between the ops, and the runs, that read them.
    pub fn const_budget(self, bytes: u64) -> Interpreter {
        Interpreter { const_budget: bytes, ..self }
    }
}

/// One step of a plan: an op, its definition, and the values that nobody reads afterwards.
struct Step {
    op: Op,
    def: &'static OpDef,
    frees: Vec<Value>,
}

/// The ops of one region that its wanted values need.
struct Plan {
    steps: Vec<Step>,
    wanted: HashSet<Value>,
}

struct Ready<'m> {
    m: &'m Module,
    exact: bool,
    plan: Plan,
    /// Plans of nested regions.
    nested: HashMap<Region, Plan>,
    /// Constants that stay decoded once they have been read.
    kept: HashMap<ConstId, OnceLock<Tensor>>,
}

impl Executor for Interpreter {
    fn prepare<'m>(&'m self, m: &'m Module, wanted: &[Value]) -> Result<Box<dyn Prepared + 'm>, ExecError> {
        let mut nested = HashMap::new();
        let plan = plan(m, &self.ops, m.top, wanted, &mut nested)?;
        let kept = self.kept(m, std::iter::once(&plan).chain(nested.values()));
        Ok(Box::new(Ready { m, exact: self.exact, plan, nested, kept }))
    }
}

impl Interpreter {
    /// Of the constants that the plans read, the smallest ones that fit the budget together.
    fn kept<'p>(
        &self,
        m: &Module,
        plans: impl Iterator<Item = &'p Plan>,
    ) -> HashMap<ConstId, OnceLock<Tensor>> {
        let operands = plans.flat_map(|p| &p.steps).flat_map(|s| m.ops[s.op].operands.iter().flatten());
        let read: BTreeSet<ConstId> = operands.filter_map(|&v| m.const_of(v)).collect();
        // Decoded, an element takes a byte at least.
        let mut sized: Vec<(u64, ConstId)> =
            read.into_iter().map(|c| (m.consts[c].byte_len().max(m.consts[c].count()), c)).collect();
        sized.sort_unstable();
        let mut left = self.const_budget;
        let fits = sized.into_iter().take_while(|(n, _)| {
            let fits = *n <= left;
            left = left.saturating_sub(*n);
            fits
        });
        fits.map(|(_, c)| (c, OnceLock::new())).collect()
    }
}

fn plan(
    m: &Module,
    ops: &Ops,
    region: Region,
    wanted: &[Value],
    nested: &mut HashMap<Region, Plan>,
) -> Result<Plan, ExecError> {
    let wanted: HashSet<Value> = wanted.iter().copied().collect();
    let mut needed = wanted.clone();
    let mut last: HashSet<Value> = wanted.clone();
    let mut steps = Vec::new();
    for &op in m.regions[region].ops.iter().rev() {
        let data = &m.ops[op];
        if !data.results.iter().flatten().any(|v| needed.contains(v)) {
            continue;
        }
        // A Constant is read where it is used, as an initializer is.
        if data.result(0).is_some_and(|v| m.const_of(v).is_some()) {
            continue;
        }
        let unknown = || ExecError::UnknownOp { op: data.name.clone(), node: data.loc.clone() };
        let def = ops.get(&data.name).ok_or_else(unknown)?;
        for r in data.attrs.regions() {
            let inner = plan(m, ops, r, &m.regions[r].results, nested)?;
            nested.insert(r, inner);
        }
        // Results that nobody reads go at once; of what is read, the last reader frees it.
        let mut frees: Vec<Value> =
            data.results.iter().flatten().copied().filter(|v| !last.contains(v)).collect();
        for v in graph::reads(m, op) {
            needed.insert(v);
            if last.insert(v) {
                frees.push(v);
            }
        }
        steps.push(Step { op, def, frees });
    }
    steps.reverse();
    Ok(Plan { steps, wanted })
}

type Env = HashMap<Value, Item>;

impl Prepared for Ready<'_> {
    fn run(&self, inputs: &[(Value, Item)], sink: &mut Sink) -> Result<(), ExecError> {
        let mut env = Env::new();
        for (v, item) in inputs {
            self.check_input(*v, item)?;
            env.insert(*v, item.clone());
        }
        for &v in &self.m.regions[self.m.top].args {
            if !env.contains_key(&v) && self.m.const_of(v).is_none() && self.reads_input(v) {
                let data = &self.m.values[v];
                return Err(ExecError::MissingInput { name: data.name.clone(), ty: data.ty.clone() });
            }
        }
        self.emit_given(&env, sink)?;
        self.steps(&self.plan, &RefCell::new(env), Some(sink))
    }
}

impl Ready<'_> {
    fn check_input(&self, v: Value, item: &Item) -> Result<(), ExecError> {
        let data = &self.m.values[v];
        let Item::Tensor(t) = item else { return Ok(()) };
        let found = super::Type::of_shape(t.elem(), t.shape());
        match data.ty.unify(&found) {
            Some(_) => Ok(()),
            None => Err(ExecError::WrongInput { name: data.name.clone(), ty: data.ty.clone(), found }),
        }
    }

    fn reads_input(&self, v: Value) -> bool {
        self.plan.wanted.contains(&v)
            || self.plan.steps.iter().any(|s| graph::reads(self.m, s.op).contains(&v))
    }

    /// Wanted values that no op computes: inputs and constants.
    fn emit_given(&self, env: &Env, sink: &mut Sink) -> Result<(), ExecError> {
        let given = |v: &Value| self.m.def_op(*v).is_none() || self.m.const_of(*v).is_some();
        let mut given: Vec<Value> = self.plan.wanted.iter().copied().filter(given).collect();
        given.sort();
        for v in given {
            sink(v, &self.lookup(v, env)?)?;
        }
        Ok(())
    }

    /// A value that is in the environment, or a constant.
    fn lookup(&self, v: Value, env: &Env) -> Result<Item, ExecError> {
        if let Some(item) = env.get(&v) {
            return Ok(item.clone());
        }
        let Some(c) = self.m.const_of(v) else {
            let name = self.m.value_label(v);
            return Err(ExecError::Sink(format!("the value {name:?} is used before it is computed")));
        };
        let kept = self.kept.get(&c);
        if let Some(t) = kept.and_then(OnceLock::get) {
            return Ok(t.clone().into());
        }
        let decoded = Tensor::from_const(&self.m.consts[c]);
        let t = decoded.map_err(|source| ExecError::Const { name: self.m.value_label(v), source })?;
        Ok(kept.map_or(t.clone(), |slot| slot.get_or_init(|| t).clone()).into())
    }

    fn steps(&self, plan: &Plan, env: &RefCell<Env>, mut sink: Option<&mut Sink>) -> Result<(), ExecError> {
        for step in &plan.steps {
            let data = &self.m.ops[step.op];
            let items = self.eval(step, env)?;
            for (v, item) in data.results.iter().zip(items) {
                let Some(v) = *v else { continue };
                if plan.wanted.contains(&v)
                    && let Some(sink) = sink.as_deref_mut()
                {
                    sink(v, &item)?;
                }
                env.borrow_mut().insert(v, item);
            }
            // Inside a nested region, values of the outer ones stay: the next iteration reads them again.
            for v in &step.frees {
                env.borrow_mut().remove(v);
            }
        }
        Ok(())
    }

    fn eval(&self, step: &Step, env: &RefCell<Env>) -> Result<Vec<Item>, ExecError> {
        let data = &self.m.ops[step.op];
        let fail = |source| ExecError::Op { op: data.name.clone(), node: data.loc.clone(), source };
        let inputs: Vec<Option<Item>> = {
            let env = env.borrow();
            data.operands
                .iter()
                .map(|v| v.map(|v| self.lookup(v, &env)).transpose())
                .collect::<Result<_, _>>()?
        };
        let region = |r: Region, args: Vec<Item>| -> Evaluated { self.nested(r, args, env) };
        let cx = EvalCx {
            name: &data.name,
            attrs: &data.attrs,
            opset: self.m.opset(data.name.dialect()),
            inputs: &inputs,
            outputs: data.results.len(),
            consts: &self.m.consts,
            exact: self.exact,
            region: &region,
        };
        let items = (step.def.eval)(&cx).map_err(fail)?;
        let wanted = data.results.iter().rposition(Option::is_some).map_or(0, |i| i + 1);
        if items.len() < wanted {
            return Err(fail(OpError::Unsupported(format!("result {} is not computed", items.len()))));
        }
        Ok(items)
    }

    fn nested(&self, region: Region, args: Vec<Item>, outer: &RefCell<Env>) -> Evaluated {
        let data = &self.m.regions[region];
        let plan = &self.nested[&region];
        let mut env = outer.borrow().clone();
        env.extend(data.args.iter().copied().zip(args));
        let env = RefCell::new(env);
        let wrap = |e: ExecError| OpError::Invalid(e.to_string());
        self.steps(plan, &env, None).map_err(wrap)?;
        let env = env.into_inner();
        data.results.iter().map(|&v| self.lookup(v, &env).map_err(wrap)).collect()
    }
}
