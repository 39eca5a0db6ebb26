//! The executor that compiles: what is fused runs as machine code, every other op in the interpreter.

use crate::kernels::{Blob, Buffer, Lowered};
use crate::{Compiler, Size, Target, build, fuse, lower, memory};
use dialects::exec::{ExecError, Executor, Prepared, Sink};
use dialects::ir::interp::{Interpreter, Natives};
use dialects::ir::{Elem, Module, Op, Value, infer};
use dialects::ops::{Evaluated, Item, OpError, Ops};
use dialects::tensor::{Data, Tensor};
use runtime::{Call, Fault, Kernels};
use self_cell::self_cell;
use std::collections::{BTreeMap, HashMap, HashSet};
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

    /// Compiles `m`, keeping the values of `keep`.
    pub fn compile(
        &self,
        m: &Module,
        keep: &HashSet<Value>,
    ) -> Result<(Module, Compiled, Summary), ExecError> {
        let mut m = m.clone();
        infer::infer(&mut m, &self.ops);
        if self.exact {
            for op in m.live_ops() {
                if m.ops[op].is("com.microsoft.MatMulNBits") {
                    m.ops[op].attrs.remove("accuracy_level");
                }
            }
        }
        fuse::fuse(&mut m, &self.target, keep);
        let mut summary = Summary::default();
        let mut lowered = Vec::new();
        for &op in &m.regions[m.top].ops {
            match lower::lower(&m, op, &self.target).filter(|l| closed(&m, op, l)) {
                Some(l) => {
                    summary.compiled += fuse::members(&m, op).count();
                    lowered.push((op, l));
                }
                None => {
                    summary.interpreted.extend(fuse::members(&m, op));
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
        let compiled = Compiled { ops: ops.collect(), kernels: loaded, _dir: dir };
        Ok((m, compiled, summary))
    }
}

/// Whether every size that the kernels and their results need is a dim of an operand: declared types may name a dim that
/// no operand has.
fn closed(m: &Module, op: Op, lowered: &Lowered) -> bool {
    let sizes = |values: &[Option<Value>]| -> Vec<Size> {
        values.iter().flatten().filter_map(|&v| Size::shape(m.ty(v))).flatten().collect()
    };
    let (given, made) = (sizes(&m.ops[op].operands), sizes(&m.ops[op].results));
    let given: HashSet<&str> = given.iter().flat_map(Size::names).collect();
    made.iter().flat_map(Size::names).chain(lowered.names()).all(|n| given.contains(n))
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
    kernels: Option<Kernels>,
    _dir: TempDir,
}

impl NativeOp {
    /// The named dims, as the operands have them.
    fn bind(&self, operands: &[&Tensor]) -> Result<HashMap<&str, u64>, OpError> {
        let mut dims: HashMap<&str, u64> = HashMap::new();
        for (i, (shape, t)) in self.operands.iter().zip(operands).enumerate() {
            let Some(shape) = shape else { continue };
            let wrong = || {
                let expected = shape.iter().map(Size::to_string).collect::<Vec<_>>().join("x");
                OpError::invalid(format!("operand {i} has shape {:?}, expected {expected}", t.shape()))
            };
            if shape.len() != t.rank() {
                return Err(wrong());
            }
            for (size, &found) in shape.iter().zip(t.shape()) {
                let expected = match size {
                    Size::Dim(name) => *dims.entry(name).or_insert(found as u64),
                    Size::Known(n) => *n,
                    _ => continue,
                };
                if expected != found as u64 {
                    return Err(wrong());
                }
            }
        }
        Ok(dims)
    }

    fn run(&self, kernels: &Kernels, operands: &[Option<Item>]) -> Evaluated {
        let missing = || OpError::invalid("an operand is missing");
        let operands: Vec<&Tensor> = operands
            .iter()
            .map(|o| o.as_ref().ok_or_else(missing)?.tensor())
            .collect::<Result<_, OpError>>()?;
        let dims = self.bind(&operands)?;
        let unknown = |s: &Size| OpError::invalid(format!("the size {s} is not known here"));
        let eval = |s: &Size| s.eval(&|name| dims.get(name).copied()).ok_or_else(|| unknown(s));
        let mut temps: Vec<Vec<u8>> =
            self.temps.iter().map(|s| Ok(vec![0u8; eval(s)? as usize])).collect::<Result<_, OpError>>()?;
        let mut results: Vec<(Data, Vec<usize>)> = self
            .results
            .iter()
            .map(|(elem, shape)| {
                let shape: Vec<usize> =
                    shape.iter().map(|s| Ok(eval(s)? as usize)).collect::<Result<_, OpError>>()?;
                let count = dialects::kernels::strided::count(&shape)?;
                let data =
                    memory::zeros(*elem, count).ok_or_else(|| OpError::invalid("an unknown element"))?;
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
            let sizes: Vec<i64> =
                step.dims.iter().map(|s| Ok(eval(s)? as i64)).collect::<Result<_, OpError>>()?;
            let units = eval(&step.units)? as usize;
            let work = eval(&step.work)?;
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
    fn call(&self, op: Op, operands: &[Option<Item>]) -> Option<Evaluated> {
        let native = self.ops.get(&op)?;
        Some(native.run(self.kernels.as_ref()?, operands))
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
        let keep = given.iter().chain(wanted).copied().collect();
        let (module, compiled, summary) = self.compile(m, &keep)?;
        if let Some(told) = &self.told {
            told(&summary);
        }
        let interpreter = Interpreter::new(self.ops.clone()).exact(self.exact).natives(Arc::new(compiled));
        let owner = Owner { module, interpreter };
        let running = Running::try_new(owner, |o| o.interpreter.prepare_from(&o.module, given, wanted))?;
        Ok(Box::new(NativeRun(running)))
    }
}
