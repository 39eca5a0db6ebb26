//! The executor that compiles: what is fused runs as machine code, every other op in the interpreter.

use crate::kernels::{Blob, Buffer, Lowered};
use crate::{Compiler, Size, Target, build, fuse, layout, lower, memory};
use dialects::exec::{ExecError, Executor, Prepared, Sink};
use dialects::ir::interp::{Calls, Interpreter, Natives};
use dialects::ir::{Elem, Module, Op, Value};
use dialects::ops::{Evaluated, Item, OpError, Ops};
use dialects::tensor::{Data, Tensor};
use runtime::{Call, Fault, Kernels};
use self_cell::self_cell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use tempfile::TempDir;

/// Compiles what it can and interprets the rest.
pub struct Native {
    ops: Ops,
    target: Target,
    compiler: Arc<dyn Compiler>,
    exact: bool,
    told: Option<Told>,
}

/// Hears what became of each module that is prepared.
type Told = Box<dyn Fn(&Summary) + Send + Sync>;

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
        Native { ops, target: Target::native(), compiler, exact: false, told: None }
    }

    /// The same, leaving out the roundings of activations that `accuracy_level` 4 allows, if `exact`.
    pub fn exact(self, exact: bool) -> Native {
        Native { exact, ..self }
    }

    /// Tells `told` what became of each module that is prepared.
    pub fn tells(self, told: impl Fn(&Summary) + Send + Sync + 'static) -> Native {
        Native { told: Some(Box::new(told)), ..self }
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
        for &op in &m.regions[m.top].ops {
            match lower::lower(&m, op, &self.target).filter(|l| known.all(&m, op, l)) {
                Some(l) => {
                    summary.compiled += fuse::members(&m, op).count();
                    lowered.push((op, l));
                }
                // A view computes nothing.
                None if layout::is_same(&m, op) => {}
                None => summary.interpreted.extend(fuse::members(&m, op)),
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
        let ops = lowered.into_iter().map(|(op, l)| {
            let steps = l.steps.into_iter().map(|s| NativeStep {
                kernel: number[s.kernel.name.as_str()],
                buffers: s.buffers,
                dims: s.dims,
                units: s.units,
                work: s.work,
            });
            let shape = |v: Value| Size::shape(m.ty(v));
            let operands = m.ops[op].operands.iter().flatten().map(|&v| shape(v)).collect();
            let results = m.ops[op].results.iter().flatten().map(|&v| {
                let elem = m.ty(v).elem().expect("a kernel's result is a tensor");
                (elem, shape(v).expect("whose shape is known"))
            });
            let results = results.collect();
            (op, NativeOp { steps: steps.collect(), temps: l.temps, blobs: l.blobs, operands, results })
        });
        let compiled = Compiled { ops: ops.collect(), known, kernels: loaded, _dir: dir };
        Ok((m, compiled, summary))
    }
}

/// Where the named dims of a run are seen: in the inputs, and in what else is given.
struct Named(Vec<(Value, usize, String)>);

impl Named {
    fn of(m: &Module, given: &[Value]) -> Named {
        let args = m.regions[m.top].args.iter().filter(|&&v| m.const_of(v).is_none());
        let dims = args.chain(given).flat_map(|&v| {
            let shape = Size::shape(m.ty(v)).unwrap_or_default();
            shape.into_iter().enumerate().filter_map(move |(i, s)| Some((v, i, s.name()?.to_owned())))
        });
        Named(dims.collect())
    }

    /// Whether every size that an op and its kernels need is known then.
    fn all(&self, m: &Module, op: Op, lowered: &Lowered) -> bool {
        let data = &m.ops[op];
        let values = data.operands.iter().chain(&data.results).flatten();
        let shapes: Vec<Size> = values.filter_map(|&v| Size::shape(m.ty(v))).flatten().collect();
        let mut names = shapes.iter().flat_map(Size::names).chain(lowered.names());
        names.all(|n| self.0.iter().any(|(_, _, known)| known == n))
    }

    /// The dims of one run. A name that stands for two sizes is left out.
    fn bind(&self, given: &[(Value, Item)]) -> HashMap<&str, u64> {
        let given: HashMap<Value, &Item> = given.iter().map(|(v, item)| (*v, item)).collect();
        let mut dims: HashMap<&str, Option<u64>> = HashMap::new();
        for (v, i, name) in &self.0 {
            let size = given.get(v).and_then(|item| item.tensor().ok()?.shape().get(*i).map(|&n| n as u64));
            if let Some(size) = size {
                let known = dims.entry(name).or_insert(Some(size));
                *known = known.filter(|&k| k == size);
            }
        }
        dims.into_iter().filter_map(|(name, size)| Some((name, size?))).collect()
    }
}

#[allow(unsafe_code)]
fn load(path: &std::path::Path, names: &[String]) -> Result<Kernels, runtime::KernelError> {
    // SAFETY: the library was made for this machine, with these kernels, by the caller.
    unsafe { Kernels::open(path, names) }
}

struct NativeStep {
    kernel: usize,
    buffers: Vec<Buffer>,
    dims: Vec<Size>,
    units: Size,
    work: Size,
}

struct NativeOp {
    steps: Vec<NativeStep>,
    temps: Vec<Size>,
    blobs: Vec<Blob>,
    /// The dims of each operand; `None` where nothing is known of them, nor asked.
    operands: Vec<Option<Vec<Size>>>,
    results: Vec<(Elem, Vec<Size>)>,
}

/// The compiled ops of a module.
pub struct Compiled {
    ops: HashMap<Op, NativeOp>,
    known: Named,
    kernels: Option<Kernels>,
    _dir: TempDir,
}

impl NativeOp {
    /// `None` where the operands have other sizes than was thought: a name stands for several.
    fn run(
        &self,
        kernels: &Kernels,
        operands: &[Option<Item>],
        dims: &HashMap<&str, u64>,
    ) -> Option<Evaluated> {
        let size = |s: &Size| s.eval(&|name| dims.get(name).copied());
        let operands: Vec<&Tensor> =
            operands.iter().map(|o| o.as_ref()?.tensor().ok()).collect::<Option<_>>()?;
        for (shape, t) in self.operands.iter().zip(&operands) {
            let Some(shape) = shape else { continue };
            let same = |(s, &n): (&Size, &usize)| size(s) == Some(n as u64);
            if shape.len() != t.rank() || !shape.iter().zip(t.shape()).all(same) {
                return None;
            }
        }
        let steps = self.steps.iter().flat_map(|s| s.dims.iter().chain([&s.units, &s.work]));
        let results = self.results.iter().flat_map(|r| &r.1);
        if !steps.chain(&self.temps).chain(results).all(|s| size(s).is_some()) {
            return None;
        }
        let size = |s: &Size| size(s).expect("every size was worked out above");
        Some(self.compute(kernels, &operands, &size))
    }

    fn compute(&self, kernels: &Kernels, operands: &[&Tensor], size: &dyn Fn(&Size) -> u64) -> Evaluated {
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
            let sizes: Vec<i64> = step.dims.iter().map(|s| size(s) as i64).collect();
            let units = size(&step.units) as usize;
            let work = size(&step.work);
            if units > 0 {
                let call = Call { kernel: step.kernel, buffers: &buffers, dims: &sizes, units, work };
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
fn run(kernels: &Kernels, call: &Call) {
    // SAFETY: buffers and sizes come from the expressions that the kernel was generated from, and the operands were
    // checked to have the dims that these name.
    unsafe { kernels.call(call) }
}

impl Natives for Compiled {
    fn start<'a>(&'a self, given: &[(Value, Item)]) -> Box<dyn Calls + 'a> {
        Box::new(Session { compiled: self, dims: self.known.bind(given) })
    }
}

/// A run.
struct Session<'a> {
    compiled: &'a Compiled,
    dims: HashMap<&'a str, u64>,
}

impl Calls for Session<'_> {
    fn call(&self, op: Op, operands: &[Option<Item>]) -> Option<Evaluated> {
        let native = self.compiled.ops.get(&op)?;
        native.run(self.compiled.kernels.as_ref()?, operands, &self.dims)
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

struct NativeRun(Running);

impl Prepared for NativeRun {
    fn run(&self, inputs: &[(Value, Item)], sink: &mut Sink) -> Result<(), ExecError> {
        self.0.with_dependent(|_, ready| ready.run(inputs, sink))
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
        if let Some(told) = &self.told {
            told(&summary);
        }
        let interpreter = Interpreter::new(self.ops.clone()).exact(self.exact).natives(Arc::new(compiled));
        let owner = Owner { module, interpreter };
        let running = Running::try_new(owner, |o| o.interpreter.prepare_from(&o.module, given, wanted))?;
        Ok(Box::new(NativeRun(running)))
    }
}
