//! The executor that compiles: what is fused runs as machine code, every other op in the interpreter.

use crate::kernels::{Blob, Buffer, Lowered};
use crate::{Compiler, Size, Target, build, fuse, layout, lower, memory};
use dialects::exec::{ExecError, Executor, Prepared, Sink};
use dialects::ir::interp::{Calls, Interpreter, Natives};
use dialects::ir::{Elem, Module, Op, Value};
use dialects::ops::{Evaluated, Item, OpError, Ops};
use dialects::tensor::{Data, Tensor};
use runtime::{Call, Fault, Kernels, Team};
use self_cell::self_cell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tempfile::TempDir;

/// Compiles what it can and interprets the rest.
pub struct Native {
    ops: Ops,
    target: Target,
    compiler: Arc<dyn Compiler>,
    exact: bool,
    told: Option<Told>,
    clock: Option<Clock>,
}

/// Hears what became of each module that is prepared, and what its runs took.
type Told = Box<dyn Fn(&dyn fmt::Display) + Send + Sync>;

/// Nanoseconds since some moment.
pub type Clock = fn() -> u64;

/// What the ops that were left to the interpreter took.
#[derive(Clone, Debug, Default)]
pub struct Costs {
    /// Runs.
    pub runs: u64,
    /// Nanoseconds of all of them.
    pub total: u64,
    /// Nanoseconds by op.
    pub interpreted: BTreeMap<String, u64>,
}

impl fmt::Display for Costs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = |n: u64| n as f64 / 1e6 / self.runs.max(1) as f64;
        let left: u64 = self.interpreted.values().sum();
        let share = 100.0 * left as f64 / self.total.max(1) as f64;
        let total = milliseconds(self.total);
        write!(f, "interpreted ops take {share:.1} % of a run's {total:.3} ms")?;
        let mut each: Vec<_> = self.interpreted.iter().collect();
        each.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
        let each = each.iter().map(|(op, n)| format!("{op} {:.3} ms", milliseconds(**n)));
        write!(f, ": {}", each.collect::<Vec<_>>().join(", "))
    }
}

/// What became of a module.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Ops that run as machine code.
    pub compiled: usize,
    /// Kernels they are, of which so many are distinct.
    pub kernels: (usize, usize),
    /// Ops left to the interpreter, with their source nodes.
    pub interpreted: Vec<(String, String)>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (steps, distinct) = self.kernels;
        write!(f, "machine code: {} ops in {steps} kernels, {distinct} of them distinct", self.compiled)?;
        let mut by_op: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
        for (op, node) in &self.interpreted {
            by_op.entry(op).or_insert((0, node)).0 += 1;
        }
        if !by_op.is_empty() {
            let each = by_op.iter().map(|(op, (n, node))| format!("{n} x {op} (the first at node {node:?})"));
            write!(f, "; interpreted, for want of a kernel: {}", each.collect::<Vec<_>>().join(", "))?;
        }
        Ok(())
    }
}

impl Native {
    /// Compiles for this machine.
    pub fn new(ops: Ops, compiler: Arc<dyn Compiler>) -> Native {
        Native { ops, target: Target::native(), compiler, exact: false, told: None, clock: None }
    }

    /// The same, leaving out the roundings of activations that `accuracy_level` 4 allows, if `exact`.
    pub fn exact(self, exact: bool) -> Native {
        Native { exact, ..self }
    }

    /// Tells `told` what became of each module that is prepared; and, where ops were left to the interpreter, what they took
    /// by this clock once its runs are over.
    pub fn tells(self, clock: Clock, told: impl Fn(&dyn fmt::Display) + Send + Sync + 'static) -> Native {
        Native { told: Some(Box::new(told)), clock: Some(clock), ..self }
    }

    /// Compiles `m` for runs in which `given` are there beside the inputs, keeping these and the values of `keep`.
    pub fn compile(
        &self,
        m: &Module,
        given: &[Value],
        keep: &[Value],
    ) -> Result<(Module, Compiled, Summary), ExecError> {
        let mut m = m.clone();
        fuse::infer(&mut m, &self.ops);
        if self.exact {
            for op in m.live_ops() {
                if m.ops[op].is("com.microsoft.MatMulNBits") {
                    m.ops[op].attrs.remove("accuracy_level");
                }
            }
        }
        let keep = given.iter().chain(keep).copied().collect();
        fuse::fuse(&mut m, &self.target, &keep);
        let known = Named::of(&m, given);
        let mut summary = Summary::default();
        let mut lowered = Vec::new();
        let mut left = HashMap::new();
        for &op in &m.regions[m.top].ops {
            if m.is_const(op) {
                continue;
            }
            match lower::lower(&m, op, &self.target).filter(|l| known.all(&m, op, l)) {
                Some(l) => {
                    summary.compiled += fuse::members(&m, op).count();
                    lowered.push((op, l));
                }
                // A view computes nothing.
                None if layout::is_same(&m, op) => {}
                None => {
                    let members: Vec<_> = fuse::members(&m, op).collect();
                    left.extend(members.first().map(|(name, _)| (op, name.clone())));
                    summary.interpreted.extend(members);
                }
            }
        }
        let kernels: Vec<_> = lowered.iter().flat_map(|(_, l)| l.steps.iter().map(|s| &s.kernel)).collect();
        let failed = |e: &dyn std::fmt::Display| ExecError::Sink(format!("code generation: {e}"));
        let dir = tempfile::tempdir().map_err(|e| failed(&e))?;
        let path = dir.path().join("kernels.so");
        let mut names = Vec::new();
        if !kernels.is_empty() {
            names = build::library(&kernels, &self.target, &*self.compiler, dir.path(), &path)
                .map_err(|e| failed(&e))?;
        }
        summary.kernels = (kernels.len(), names.len());
        let loaded = (!names.is_empty()).then(|| load(&path, &names)).transpose().map_err(|e| failed(&e))?;
        let number: HashMap<&str, usize> = names.iter().enumerate().map(|(i, n)| (n.as_str(), i)).collect();
        let mut sizes = Sizes::default();
        let ops = lowered.into_iter().map(|(op, l)| {
            let steps = l.steps.into_iter().map(|s| NativeStep {
                kernel: number[s.kernel.name.as_str()],
                buffers: s.buffers,
                dims: sizes.all(s.dims),
                units: sizes.number(s.units),
                work: sizes.number(s.work),
            });
            let steps = steps.collect();
            let mut shape = |v: Value| Some(sizes.all(Size::shape(m.ty(v))?));
            let operands = m.ops[op].operands.iter().flatten().map(|&v| shape(v)).collect();
            let results = m.ops[op].results.iter().flatten().map(|&v| {
                let elem = m.ty(v).elem().expect("a kernel's result is a tensor");
                (elem, shape(v).expect("whose shape is known"))
            });
            let results = results.collect();
            (op, NativeOp { steps, temps: sizes.all(l.temps), blobs: l.blobs, operands, results })
        });
        let (ops, clock) = (ops.collect(), self.clock);
        let compiled =
            Compiled { ops, sizes, known, kernels: loaded, left, clock, costs: Mutex::default(), _dir: dir };
        Ok((m, compiled, summary))
    }
}

/// The shapes of what runs are given, in which named dims are seen: the inputs, and what else is given.
struct Named(Vec<(Value, Vec<Size>)>);

impl Named {
    fn of(m: &Module, given: &[Value]) -> Named {
        let args = m.regions[m.top].args.iter().filter(|&&v| m.const_of(v).is_none());
        Named(args.chain(given).filter_map(|&v| Some((v, Size::shape(m.ty(v))?))).collect())
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|(_, shape)| shape).filter_map(Size::name)
    }

    /// Whether every size that an op and its kernels need is known then.
    fn all(&self, m: &Module, op: Op, lowered: &Lowered) -> bool {
        let data = &m.ops[op];
        let values = data.operands.iter().chain(&data.results).flatten();
        let shapes: Vec<Size> = values.filter_map(|&v| Size::shape(m.ty(v))).flatten().collect();
        let mut names = shapes.iter().flat_map(Size::names).chain(lowered.names());
        names.all(|n| self.names().any(|known| known == n))
    }

    /// The dims of one run. A name that stands for two sizes is left out, and all are where a sum of them is another one.
    fn bind(&self, given: &[(Value, Item)]) -> HashMap<&str, u64> {
        let given: HashMap<Value, &Item> = given.iter().map(|(v, item)| (*v, item)).collect();
        let found = |v: Value, i: usize| Some(*given.get(&v)?.tensor().ok()?.shape().get(i)? as u64);
        let sizes = || self.0.iter().flat_map(|(v, shape)| shape.iter().enumerate().map(|(i, s)| (*v, i, s)));
        let mut dims: HashMap<&str, Option<u64>> = HashMap::new();
        for (v, i, size) in sizes() {
            if let (Some(name), Some(found)) = (size.name(), found(v, i)) {
                let known = dims.entry(name).or_insert(Some(found));
                *known = known.filter(|&k| k == found);
            }
        }
        let dims: HashMap<&str, u64> =
            dims.into_iter().filter_map(|(name, size)| Some((name, size?))).collect();
        let holds =
            |(v, i, size): (Value, usize, &Size)| match (size.eval(&|n| dims.get(n).copied()), found(v, i)) {
                (Some(expected), Some(found)) => expected == found,
                _ => true,
            };
        if sizes().all(holds) { dims } else { HashMap::new() }
    }
}

#[allow(unsafe_code)]
fn load(path: &std::path::Path, names: &[String]) -> Result<Kernels, runtime::KernelError> {
    // SAFETY: the library was made for this machine, with these kernels, by the caller.
    unsafe { Kernels::open(path, names) }
}

/// The sizes of a model, each once, by number: layers are alike, and each is worked out when a run begins.
#[derive(Default)]
struct Sizes(HashMap<Size, usize>);

impl Sizes {
    fn number(&mut self, size: Size) -> usize {
        let next = self.0.len();
        *self.0.entry(size).or_insert(next)
    }

    fn all(&mut self, sizes: Vec<Size>) -> Vec<usize> {
        sizes.into_iter().map(|s| self.number(s)).collect()
    }

    /// All of them, where the named dims are these.
    fn eval(&self, dims: &HashMap<&str, u64>) -> Vec<Option<u64>> {
        let mut out = vec![None; self.0.len()];
        self.0.iter().for_each(|(size, &i)| out[i] = size.eval(&|name| dims.get(name).copied()));
        out
    }
}

/// A step of an op. Sizes by number.
struct NativeStep {
    kernel: usize,
    buffers: Vec<Buffer>,
    dims: Vec<usize>,
    units: usize,
    work: usize,
}

/// An op. Sizes by number.
struct NativeOp {
    steps: Vec<NativeStep>,
    temps: Vec<usize>,
    blobs: Vec<Blob>,
    /// The dims of each operand; `None` where nothing is known of them, nor asked.
    operands: Vec<Option<Vec<usize>>>,
    results: Vec<(Elem, Vec<usize>)>,
}

/// The compiled ops of a module.
pub struct Compiled {
    ops: HashMap<Op, NativeOp>,
    sizes: Sizes,
    known: Named,
    kernels: Option<Kernels>,
    /// The ops that are the interpreter's, by name.
    left: HashMap<Op, String>,
    clock: Option<Clock>,
    costs: Mutex<Costs>,
    _dir: TempDir,
}

impl NativeOp {
    /// `None` where the operands have other sizes than was thought: a name stands for several.
    fn run(
        &self,
        kernels: (&Kernels, &Team),
        operands: &[Option<Item>],
        sizes: &[Option<u64>],
    ) -> Option<Evaluated> {
        let operands: Vec<&Tensor> =
            operands.iter().map(|o| o.as_ref()?.tensor().ok()).collect::<Option<_>>()?;
        for (shape, t) in self.operands.iter().zip(&operands) {
            let Some(shape) = shape else { continue };
            let same = |(&s, &n): (&usize, &usize)| sizes[s] == Some(n as u64);
            if shape.len() != t.rank() || !shape.iter().zip(t.shape()).all(same) {
                return None;
            }
        }
        let steps = self.steps.iter().flat_map(|s| s.dims.iter().chain([&s.units, &s.work]));
        let shapes = self.results.iter().flat_map(|r| &r.1);
        let mut used = self.temps.iter().chain(shapes).chain(steps);
        used.all(|&s| sizes[s].is_some()).then(|| self.compute(kernels, &operands, sizes))
    }

    /// Every size is known.
    fn compute(&self, kernels: (&Kernels, &Team), operands: &[&Tensor], sizes: &[Option<u64>]) -> Evaluated {
        let size = |&s: &usize| sizes[s].expect("a size that was looked at");
        let mut temps: Vec<Vec<u8>> = self.temps.iter().map(|s| vec![0u8; size(s) as usize]).collect();
        let mut results: Vec<(Data, Vec<usize>)> = self
            .results
            .iter()
            .map(|(elem, shape)| {
                let shape: Vec<usize> = shape.iter().map(|s| size(s) as usize).collect();
                let count = dialects::kernels::strided::count(&shape)?;
                let data =
                    memory::room(*elem, count).ok_or_else(|| OpError::invalid("an unknown element"))?;
                Ok((data, shape))
            })
            .collect::<Result<_, OpError>>()?;
        let fault = AtomicI32::new(0);
        for step in &self.steps {
            let mut buffers = Vec::with_capacity(step.buffers.len());
            for b in &step.buffers {
                // Kernels only read operands and blobs.
                buffers.push(match b {
                    Buffer::Operand(i) => {
                        let bytes = memory::bytes(operands[*i]);
                        let bytes =
                            bytes.ok_or_else(|| OpError::invalid("an element kernels do not know"))?;
                        bytes.as_ptr().cast_mut()
                    }
                    Buffer::Blob(i) => self.blobs[*i].bytes.as_ptr().cast_mut(),
                    Buffer::Temp(i) => temps[*i].as_mut_ptr(),
                    Buffer::Result(i) => memory::start(&mut results[*i].0),
                    Buffer::Fault => fault.as_ptr().cast(),
                });
            }
            let units = size(&step.units) as usize;
            if units > 0 {
                let dims: Vec<i64> = step.dims.iter().map(|s| size(s) as i64).collect();
                let work = size(&step.work);
                let call = Call { kernel: step.kernel, buffers: &buffers, dims: &dims, units, work };
                run(kernels, &call);
            }
            if let Some(fault) = Fault::of(fault.load(Ordering::Relaxed)) {
                return Err(OpError::invalid(fault.to_string()));
            }
        }
        results.into_iter().map(|(data, shape)| Ok(Tensor::new(&shape, data)?.into())).collect()
    }
}

#[allow(unsafe_code)]
fn run((kernels, team): (&Kernels, &Team), call: &Call) {
    // SAFETY: buffers and sizes come from the expressions that the kernel was generated from, and the operands were
    // checked to have the dims that these name.
    unsafe { kernels.call(call, team) }
}

impl Compiled {
    fn now(&self) -> u64 {
        self.clock.map_or(0, |clock| clock())
    }

    fn costs(&self) -> MutexGuard<'_, Costs> {
        self.costs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Natives for Compiled {
    fn start<'a>(&'a self, given: &[(Value, Item)]) -> Box<dyn Calls + 'a> {
        Box::new(Session {
            compiled: self,
            sizes: self.sizes.eval(&self.known.bind(given)),
            team: Team::new(),
            start: self.now(),
        })
    }
}

/// A run.
struct Session<'a> {
    compiled: &'a Compiled,
    sizes: Vec<Option<u64>>,
    team: Team,
    start: u64,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        let took = self.compiled.now() - self.start;
        let mut costs = self.compiled.costs();
        costs.runs += 1;
        costs.total += took;
    }
}

impl Calls for Session<'_> {
    fn call(&self, op: Op, operands: &[Option<Item>]) -> Option<Evaluated> {
        let native = self.compiled.ops.get(&op)?;
        native.run((self.compiled.kernels.as_ref()?, &self.team), operands, &self.sizes)
    }

    fn leave(&self, op: Op, compute: &mut dyn FnMut()) {
        // A view takes no time, and no threads.
        let Some(name) = self.compiled.left.get(&op) else { return compute() };
        self.team.dismiss();
        let start = self.compiled.now();
        compute();
        let took = self.compiled.now() - start;
        *self.compiled.costs().interpreted.entry(name.clone()).or_default() += took;
    }
}

struct Owner {
    module: Module,
    interpreter: Interpreter,
}

type Ready<'a> = Box<dyn Prepared + 'a>;

self_cell! {
    struct Running {
        owner: Owner,
        #[not_covariant]
        dependent: Ready,
    }
}

struct NativeRun<'m> {
    running: Running,
    compiled: Arc<Compiled>,
    told: Option<&'m Told>,
}

impl Prepared for NativeRun<'_> {
    fn run(&self, inputs: &[(Value, Item)], sink: &mut Sink) -> Result<(), ExecError> {
        self.running.with_dependent(|_, ready| ready.run(inputs, sink))
    }
}

impl Drop for NativeRun<'_> {
    fn drop(&mut self) {
        let costs = self.compiled.costs();
        if let Some(told) = self.told.filter(|_| !costs.interpreted.is_empty()) {
            told(&*costs);
        }
    }
}

impl Executor for Native {
    fn prepare_from<'m>(
        &'m self,
        m: &'m Module,
        given: &[Value],
        wanted: &[Value],
    ) -> Result<Box<dyn Prepared + 'm>, ExecError> {
        let (module, compiled, summary) = self.compile(m, given, wanted)?;
        let told = self.told.as_ref();
        if let Some(told) = told {
            told(&summary);
        }
        let compiled = Arc::new(compiled);
        let interpreter = Interpreter::new(self.ops.clone()).exact(self.exact).natives(compiled.clone());
        let owner = Owner { module, interpreter };
        let running = Running::try_new(owner, |o| o.interpreter.prepare_from(&o.module, given, wanted))?;
        Ok(Box::new(NativeRun { running, compiled, told }))
    }
}
