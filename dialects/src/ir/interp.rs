//! The interpreter: a loop over [`OpDef::eval`], with every buffer freed at its last use.
//!
//! Constants are decoded when first read. Those that fit the budget (smallest first) stay decoded until the prepared
//! run is dropped; a larger one is decoded for each op that reads it and freed after it. So a prepared run holds at
//! most the budget, one constant more, and the live activations.

use super::calls::{self, Callee, Callees, Frame};
use super::{Attrs, ConstId, Function, Module, Op, OpData, Region, Symbol, Value, graph};
use crate::exec::{ExecError, Executor, Prepared, Sink};
use crate::kernels::buffers;
use crate::onnx::{attributes, functions};
use crate::ops::{EvalCx, Evaluated, Item, OpError, Ops};
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, OnceLock};

/// Bytes of decoded constants that a prepared run keeps, unless told otherwise.
const CONST_BUDGET: u64 = 1 << 30;

/// Iterations that a Loop makes at most, unless told otherwise: a loop over the samples of minutes of audio ends
/// before, one whose condition never fails is found within a minute. What the iterations collect, in scan outputs or in
/// a sequence, is bounded as the size of a tensor is.
pub const MAX_ITERATIONS: u64 = 1 << 20;

/// Ops that something else computes, compiled code for one.
pub trait Natives: Send + Sync {
    /// Begins a run in which these values are given.
    fn start<'a>(&'a self, given: &[(Value, Item)]) -> Box<dyn Calls + 'a>;
}

/// A run of [`Natives`].
pub trait Calls {
    /// The results of `op` of the top region on these operands; `None` for an op that is the interpreter's.
    fn call(&self, op: Op, operands: &[Option<Item>]) -> Option<Evaluated>;

    /// Has the interpreter compute `op`.
    fn leave(&self, op: Op, compute: &mut dyn FnMut());
}

/// Runs modules op by op.
pub struct Interpreter {
    ops: Ops,
    const_budget: u64,
    settings: Settings,
    natives: Option<Arc<dyn Natives>>,
}

/// What every op of a run is told.
#[derive(Clone, Copy)]
struct Settings {
    exact: bool,
    max_iterations: u64,
}

impl Interpreter {
    /// An interpreter of these ops.
    pub fn new(ops: Ops) -> Interpreter {
        let settings = Settings { exact: false, max_iterations: MAX_ITERATIONS };
        Interpreter { ops, const_budget: CONST_BUDGET, settings, natives: None }
    }

    /// The same, leaving out the roundings that a runtime may add (see [`EvalCx::exact`]) if `exact`.
    pub fn exact(mut self, exact: bool) -> Interpreter {
        self.settings.exact = exact;
        self
    }

    /// Leaves to `natives` the ops of the top region that it knows.
    pub fn natives(self, natives: Arc<dyn Natives>) -> Interpreter {
        Interpreter { natives: Some(natives), ..self }
    }

    /// Keeps at most `bytes` of decoded constants between the ops, and the runs, that read them.
    pub fn const_budget(self, bytes: u64) -> Interpreter {
        Interpreter { const_budget: bytes, ..self }
    }

    /// Refuses a Loop that has not ended after `n` iterations.
    pub fn max_iterations(mut self, n: u64) -> Interpreter {
        self.settings.max_iterations = n;
        self
    }

    /// The results of one op of the model's graph on these operands. It has no nested graphs that read values
    /// around them.
    pub fn evaluate(&self, m: &Module, op: Op, operands: &[Option<Item>]) -> Result<Vec<Item>, ExecError> {
        let mut planner = Planner::new(m, Callees::new(m, &self.ops));
        let callee = planner.callee(op, &m.opsets)?;
        let ready = planner.finish(self.settings);
        let env = Env::default();
        ready.eval(&Step { op, callee, frees: Vec::new() }, operands, &env, &Frame::top(m))
    }
}

/// One step of a plan: an op, what defines it, and the values that nobody reads afterwards.
struct Step<'m> {
    op: Op,
    callee: Callee<'m>,
    frees: Vec<Value>,
}

/// The ops of one region that its wanted values need.
#[derive(Default)]
struct Plan<'m> {
    steps: Vec<Step<'m>>,
    wanted: HashSet<Value>,
}

/// A module made ready: the model, or that of the bodies that specifications give.
struct Ready<'m> {
    m: &'m Module,
    settings: Settings,
    plan: Plan<'m>,
    /// Values of the top region that are given to each run beside the inputs.
    given: HashSet<Value>,
    /// Plans of nested regions and of functions.
    plans: HashMap<Region, Plan<'m>>,
    /// Constants that stay decoded once they have been read.
    kept: HashMap<ConstId, OnceLock<Tensor>>,
    /// The bodies that specifications give, where the model calls some.
    bodies: Option<Box<Ready<'static>>>,
    natives: Option<Arc<dyn Natives>>,
    /// What runs give back is freed with what was made ready for them.
    _buffers: buffers::Clear,
}

impl Executor for Interpreter {
    fn prepare_from<'m>(
        &'m self,
        m: &'m Module,
        given: &[Value],
        wanted: &[Value],
    ) -> Result<Box<dyn Prepared + 'm>, ExecError> {
        let mut planner = Planner::new(m, Callees::new(m, &self.ops));
        let given: HashSet<Value> = given.iter().copied().collect();
        let plan = planner.region(m.top, &given, wanted, &m.opsets)?;
        let natives = self.natives.clone();
        let mut ready = Ready { plan, given, natives, ..planner.finish(self.settings) };
        ready.keep(self.const_budget);
        Ok(Box::new(ready))
    }
}

/// Plans what a run needs of one module.
struct Planner<'m> {
    m: &'m Module,
    callees: Callees<'m>,
    plans: HashMap<Region, Plan<'m>>,
    /// The functions that are being planned, each called by the one before.
    chain: Vec<Region>,
    bodies: Option<Box<Planner<'static>>>,
}

impl<'m> Planner<'m> {
    fn new(m: &'m Module, callees: Callees<'m>) -> Planner<'m> {
        Planner { m, callees, plans: HashMap::new(), chain: Vec::new(), bodies: None }
    }

    fn finish(self, settings: Settings) -> Ready<'m> {
        let bodies = self.bodies.map(|b| Box::new(b.finish(settings)));
        let (plan, given, kept) = (Plan::default(), HashSet::new(), HashMap::new());
        Ready {
            m: self.m,
            settings,
            plan,
            given,
            plans: self.plans,
            kept,
            bodies,
            natives: None,
            _buffers: buffers::Clear,
        }
    }

    /// What `wanted` need, where `given` are there already.
    fn region(
        &mut self,
        region: Region,
        given: &HashSet<Value>,
        wanted: &[Value],
        versions: &BTreeMap<Symbol, i64>,
    ) -> Result<Plan<'m>, ExecError> {
        let m = self.m;
        let wanted: HashSet<Value> = wanted.iter().copied().collect();
        let mut needed = wanted.clone();
        let mut last: HashSet<Value> = wanted.clone();
        let mut steps = Vec::new();
        for &op in m.regions[region].ops.iter().rev() {
            let data = &m.ops[op];
            if !data.results.iter().flatten().any(|v| needed.contains(v) && !given.contains(v)) {
                continue;
            }
            // A Constant is read where it is used, as an initializer is.
            if m.is_const(op) {
                continue;
            }
            let callee = self.callee(op, versions)?;
            for r in data.attrs.regions() {
                let inner = self.region(r, &HashSet::new(), &m.regions[r].results, versions)?;
                self.plans.insert(r, inner);
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
            steps.push(Step { op, callee, frees });
        }
        steps.reverse();
        Ok(Plan { steps, wanted })
    }

    /// What defines an op; the body of one that is called is planned too.
    fn callee(&mut self, op: Op, versions: &BTreeMap<Symbol, i64>) -> Result<Callee<'m>, ExecError> {
        let data = &self.m.ops[op];
        let fail = |source| ExecError::Op { op: data.name.clone(), node: data.loc.clone(), source };
        let unknown = || ExecError::UnknownOp { op: data.name.clone(), node: data.loc.clone() };
        let callee = self.callees.of(data, versions).ok_or_else(unknown)?;
        if !matches!(callee, Callee::Function(_)) {
            let version = versions.get(data.name.dialect()).copied().unwrap_or(1);
            attributes::check(&data.name, version, &data.attrs).map_err(fail)?;
        }
        match callee {
            Callee::Native(_) => {}
            Callee::Function(f) => self.function(f, data)?,
            // Bodies call each other within their own module.
            Callee::Spec(f) if std::ptr::eq(self.m, functions::module()) => self.function(f, data)?,
            Callee::Spec(f) => {
                let new = || Box::new(Planner::new(functions::module(), Callees::of_specs(functions::ops())));
                self.bodies.get_or_insert_with(new).function(f, data)?;
            }
        }
        Ok(callee)
    }

    fn function(&mut self, f: &'m Function, call: &OpData) -> Result<(), ExecError> {
        if self.plans.contains_key(&f.body) {
            return Ok(());
        }
        let fail = |source| ExecError::Op { op: call.name.clone(), node: call.loc.clone(), source };
        calls::check_chain(&self.chain, &f.body, f).map_err(fail)?;
        self.chain.push(f.body);
        let plan = self.region(f.body, &HashSet::new(), &self.m.regions[f.body].results, &f.opsets)?;
        self.chain.pop();
        self.plans.insert(f.body, plan);
        Ok(())
    }
}

/// Values by name, and those of the regions around. `None` is an input that a call leaves out.
#[derive(Default)]
struct Env<'e> {
    own: RefCell<HashMap<Value, Option<Item>>>,
    outer: Option<&'e Env<'e>>,
    /// What else computes ops of this region.
    natives: Option<Box<dyn Calls + 'e>>,
}

impl Env<'_> {
    fn get(&self, v: Value) -> Option<Option<Item>> {
        let own = self.own.borrow().get(&v).cloned();
        own.or_else(|| self.outer?.get(v))
    }

    fn set(&self, v: Value, item: Option<Item>) {
        self.own.borrow_mut().insert(v, item);
    }
}

impl Prepared for Ready<'_> {
    fn run(&self, inputs: &[(Value, Item)], sink: &mut Sink) -> Result<(), ExecError> {
        let natives = self.natives.as_ref().map(|n| n.start(inputs));
        let env = Env { natives, ..Env::default() };
        for (v, item) in inputs {
            self.check_input(*v, item)?;
            env.set(*v, Some(item.clone()));
        }
        for &v in &self.m.regions[self.m.top].args {
            if env.get(v).is_none() && self.m.const_of(v).is_none() && self.reads_input(v) {
                let data = &self.m.values[v];
                return Err(ExecError::MissingInput { name: data.name.clone(), ty: data.ty.clone() });
            }
        }
        self.emit_given(&env, sink)?;
        self.steps(&self.plan, &env, &Frame::top(self.m), Some(sink))
    }
}

impl Ready<'_> {
    /// Keeps, of the constants that the plans read, the smallest ones that fit the budget together.
    fn keep(&mut self, budget: u64) {
        let plans = std::iter::once(&self.plan).chain(self.plans.values());
        let operands = plans.flat_map(|p| &p.steps).flat_map(|s| self.m.ops[s.op].operands.iter().flatten());
        let read: BTreeSet<ConstId> = operands.filter_map(|&v| self.m.const_of(v)).collect();
        // Decoded, an element takes a byte at least.
        let size = |c: ConstId| self.m.consts[c].byte_len().max(self.m.consts[c].count());
        let mut sized: Vec<(u64, ConstId)> = read.into_iter().map(|c| (size(c), c)).collect();
        sized.sort_unstable();
        let mut left = budget;
        let fits = sized.into_iter().take_while(|(n, _)| {
            let fits = *n <= left;
            left = left.saturating_sub(*n);
            fits
        });
        self.kept = fits.map(|(_, c)| (c, OnceLock::new())).collect();
    }

    fn check_input(&self, v: Value, item: &Item) -> Result<(), ExecError> {
        let data = &self.m.values[v];
        let found = item.ty();
        match data.ty.unify(&found) {
            Some(_) => Ok(()),
            None => Err(ExecError::WrongInput { name: data.name.clone(), ty: data.ty.clone(), found }),
        }
    }

    fn reads_input(&self, v: Value) -> bool {
        self.plan.wanted.contains(&v)
            || self.plan.steps.iter().any(|s| graph::reads(self.m, s.op).contains(&v))
    }

    /// Wanted values that no op computes: inputs, constants, and what is given beside them.
    fn emit_given(&self, env: &Env, sink: &mut Sink) -> Result<(), ExecError> {
        let given = |v: &Value| {
            self.given.contains(v) || self.m.def_op(*v).is_none() || self.m.const_of(*v).is_some()
        };
        let mut given: Vec<Value> = self.plan.wanted.iter().copied().filter(given).collect();
        given.sort();
        for v in given {
            sink(v, &self.lookup(v, env)?)?;
        }
        Ok(())
    }

    /// A value, which must be there.
    fn lookup(&self, v: Value, env: &Env) -> Result<Item, ExecError> {
        let left_out = || {
            let name = self.m.value_label(v);
            ExecError::Sink(format!("the input {name:?} is left out of the call, but is needed"))
        };
        self.find(v, env)?.ok_or_else(left_out)
    }

    /// A value that is in the environment, or a constant; `None` for an input that the call leaves out.
    fn find(&self, v: Value, env: &Env) -> Result<Option<Item>, ExecError> {
        if let Some(item) = env.get(v) {
            return Ok(item);
        }
        let Some(c) = self.m.const_of(v) else {
            let name = self.m.value_label(v);
            return Err(ExecError::Sink(format!("the value {name:?} is used before it is computed")));
        };
        let kept = self.kept.get(&c);
        if let Some(t) = kept.and_then(OnceLock::get) {
            return Ok(Some(t.clone().into()));
        }
        let decoded = Tensor::from_const(&self.m.consts[c]);
        let t = decoded.map_err(|source| ExecError::Const { name: self.m.value_label(v), source })?;
        Ok(Some(kept.map_or(t.clone(), |slot| slot.get_or_init(|| t).clone()).into()))
    }

    fn steps(
        &self,
        plan: &Plan,
        env: &Env,
        frame: &Frame,
        mut sink: Option<&mut Sink>,
    ) -> Result<(), ExecError> {
        for step in &plan.steps {
            let data = &self.m.ops[step.op];
            let operands = data.operands.iter();
            let operands: Vec<Option<Item>> =
                operands.map(|v| v.map_or(Ok(None), |v| self.find(v, env))).collect::<Result<_, _>>()?;
            let items = self.eval(step, &operands, env, frame)?;
            for (v, item) in data.results.iter().zip(items) {
                let Some(v) = *v else { continue };
                if plan.wanted.contains(&v)
                    && let Some(sink) = sink.as_deref_mut()
                {
                    sink(v, &item)?;
                }
                env.set(v, Some(item));
            }
            drop(operands);
            // Inside a nested region, values of the outer ones stay: the next iteration reads them again.
            for v in &step.frees {
                if let Some(Some(Item::Tensor(t))) = env.own.borrow_mut().remove(v) {
                    t.recycle();
                }
            }
        }
        Ok(())
    }

    fn eval(
        &self,
        step: &Step,
        operands: &[Option<Item>],
        env: &Env,
        frame: &Frame,
    ) -> Result<Vec<Item>, ExecError> {
        let data = &self.m.ops[step.op];
        let fail = |source| ExecError::Op { op: data.name.clone(), node: data.loc.clone(), source };
        let attrs = frame.attrs(&data.attrs).map_err(fail)?;
        let region = |r: Region, args: Vec<Item>| -> Evaluated { self.nested(r, args, env, frame) };
        let results_of = |r: Region| -> Vec<super::Type> {
            self.m.regions[r].results.iter().map(|&v| self.m.ty(v).clone()).collect()
        };
        let native = env.natives.as_ref().and_then(|n| n.call(step.op, operands));
        let compute = || match step.callee {
            Callee::Native(def) => (def.eval)(&EvalCx {
                name: &data.name,
                attrs: &attrs,
                opset: frame.version(data.name.dialect()),
                inputs: operands,
                outputs: data.results.len(),
                consts: &self.m.consts,
                max_iterations: self.settings.max_iterations,
                exact: self.settings.exact,
                results_of: &results_of,
                region: &region,
            }),
            Callee::Function(f) => self.call(f, operands, &attrs, &data.results),
            Callee::Spec(f) => match &self.bodies {
                Some(bodies) => bodies.call(f, operands, &attrs, &data.results),
                None => self.call(f, operands, &attrs, &data.results),
            },
        };
        let items = native.unwrap_or_else(|| match &env.natives {
            None => compute(),
            Some(natives) => {
                let mut items = Ok(Vec::new());
                natives.leave(step.op, &mut || items = compute());
                items
            }
        });
        let items = items.map_err(fail)?;
        let wanted = data.results.iter().rposition(Option::is_some).map_or(0, |i| i + 1);
        if items.len() < wanted {
            return Err(fail(OpError::Unsupported(format!("result {} is not computed", items.len()))));
        }
        Ok(items)
    }

    /// Runs a nested region, which sees the values around it.
    fn nested(&self, region: Region, args: Vec<Item>, outer: &Env, frame: &Frame) -> Evaluated {
        let data = &self.m.regions[region];
        let Some(plan) = self.plans.get(&region) else {
            return Err(OpError::Unsupported("a nested graph here".into()));
        };
        if data.args.len() != args.len() {
            let (found, expected) = (args.len(), data.args.len());
            return Err(OpError::invalid(format!("the graph takes {expected} inputs, but is given {found}")));
        }
        let env = Env { own: RefCell::default(), outer: Some(outer), natives: None };
        for (&v, item) in data.args.iter().zip(args) {
            env.set(v, Some(item));
        }
        self.steps(plan, &env, frame, None).map_err(inside)?;
        data.results.iter().map(|&v| self.lookup(v, &env).map_err(inside)).collect()
    }

    /// Runs the body of a function, which sees nothing of its caller.
    fn call(
        &self,
        f: &Function,
        given: &[Option<Item>],
        attrs: &Attrs,
        wanted: &[Option<Value>],
    ) -> Evaluated {
        let body = &self.m.regions[f.body];
        if given.len() > body.args.len() {
            let (most, found) = (body.args.len(), given.len());
            return Err(OpError::invalid(format!("expected at most {most} operands, found {found}")));
        }
        let arguments = calls::arguments(f, attrs);
        let env = Env::default();
        for (i, &v) in body.args.iter().enumerate() {
            env.set(v, given.get(i).cloned().flatten());
        }
        self.steps(&self.plans[&f.body], &env, &Frame::call(f, &arguments), None).map_err(inside)?;
        let results = wanted.iter().zip(&body.results).map(|(wanted, &v)| match wanted {
            Some(_) => self.lookup(v, &env).map_err(inside),
            None => Ok(Item::Optional(None)),
        });
        results.collect()
    }
}

/// The error of an op whose body failed; what is merely unsupported in there is so for the op.
fn inside(e: ExecError) -> OpError {
    match &e {
        ExecError::UnknownOp { .. } => OpError::Unsupported(e.to_string()),
        ExecError::Op { source: OpError::Unsupported(why), op, node } => {
            OpError::Unsupported(format!("{op} at node {node:?}: {why}"))
        }
        _ => OpError::Invalid(e.to_string()),
    }
}
