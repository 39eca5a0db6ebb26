//! MLIR as text: a function's body, written op by op in SSA form.
//!
//! Kernels are emitted in the dialects `arith`, `math`, `scf`, `vector` and `llvm` (for memory: pointers and offsets in
//! bytes, so that no memref has to be lowered). A [`Val`] carries its type, so every op here picks its own spelling;
//! what does not fit is a defect of the kernel and panics when the text is emitted, in every test of that kernel.

mod intrinsic;
mod memory;
mod tiles;

pub use intrinsic::{Intrinsic, stand_ins};
pub use tiles::Tiles;

use crate::target::{Feature, Target};
use std::fmt::{self, Write};

/// An element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Scalar {
    I1,
    I8,
    /// An i8 that counts from 0.
    U8,
    I16,
    I32,
    I64,
    F16,
    BF16,
    F32,
    F64,
    Ptr,
}

impl Scalar {
    /// Bytes in memory.
    pub fn bytes(self) -> usize {
        match self {
            Scalar::I1 | Scalar::I8 | Scalar::U8 => 1,
            Scalar::I16 | Scalar::F16 | Scalar::BF16 => 2,
            Scalar::I32 | Scalar::F32 => 4,
            Scalar::I64 | Scalar::F64 | Scalar::Ptr => 8,
        }
    }

    /// Whether it is a floating-point type.
    pub fn is_float(self) -> bool {
        matches!(self, Scalar::F16 | Scalar::BF16 | Scalar::F32 | Scalar::F64)
    }
}

/// A type: a scalar, or a vector of so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ty {
    /// The element type.
    pub elem: Scalar,
    /// Elements of a vector; 0 for a scalar.
    pub lanes: usize,
}

/// The scalar type.
pub const fn scalar(elem: Scalar) -> Ty {
    Ty { elem, lanes: 0 }
}

/// A vector type.
pub const fn vector(lanes: usize, elem: Scalar) -> Ty {
    Ty { elem, lanes }
}

impl Ty {
    /// The same with other elements.
    pub fn of(self, elem: Scalar) -> Ty {
        Ty { elem, ..self }
    }

    /// Bytes in memory.
    pub fn bytes(self) -> usize {
        self.elem.bytes() * self.lanes.max(1)
    }
}

impl fmt::Display for Ty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let elem = match self.elem {
            Scalar::I1 => "i1",
            Scalar::I8 | Scalar::U8 => "i8",
            Scalar::I16 => "i16",
            Scalar::I32 => "i32",
            Scalar::I64 => "i64",
            Scalar::F16 => "f16",
            Scalar::BF16 => "bf16",
            Scalar::F32 => "f32",
            Scalar::F64 => "f64",
            Scalar::Ptr => "!llvm.ptr",
        };
        match self.lanes {
            0 => f.write_str(elem),
            n => write!(f, "vector<{n}x{elem}>"),
        }
    }
}

/// A value of the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Val {
    id: u32,
    /// Its type.
    pub ty: Ty,
}

impl fmt::Display for Val {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.id)
    }
}

/// A comparison, of signed integers or ordered floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// A function that is being written.
pub struct Body<'t> {
    /// What it is written for.
    pub target: &'t Target,
    text: String,
    next: u32,
    depth: usize,
}

fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|i| i.to_string()).collect::<Vec<_>>().join(", ")
}

impl<'t> Body<'t> {
    /// The text of the function `name` of these parameters, without result. A function of the LLVM dialect: its address can
    /// be taken.
    pub fn function(
        target: &'t Target,
        name: &str,
        params: &[Ty],
        write: impl FnOnce(&mut Body, &[Val]),
    ) -> String {
        let mut b = Body { target, text: String::new(), next: 0, depth: 1 };
        let params: Vec<Val> = params.iter().map(|&ty| b.fresh(ty)).collect();
        let head = list(params.iter().map(|p| format!("{p}: {}", p.ty)));
        write(&mut b, &params);
        b.line("llvm.return");
        format!("llvm.func @{name}({head}) {{\n{}}}\n", b.text)
    }

    /// The text of the function `name` that returns what `write` gives.
    pub fn returning(
        target: &'t Target,
        name: &str,
        params: &[Ty],
        result: Ty,
        write: impl FnOnce(&mut Body, &[Val]) -> Val,
    ) -> String {
        let mut b = Body { target, text: String::new(), next: 0, depth: 1 };
        let params: Vec<Val> = params.iter().map(|&ty| b.fresh(ty)).collect();
        let head = list(params.iter().map(|p| format!("{p}: {}", p.ty)));
        let out = write(&mut b, &params);
        assert_eq!(out.ty, result, "{name} returns something else");
        b.line(format_args!("llvm.return {out} : {result}"));
        format!("llvm.func @{name}({head}) -> {result} {{\n{}}}\n", b.text)
    }

    fn fresh(&mut self, ty: Ty) -> Val {
        self.next += 1;
        Val { id: self.next - 1, ty }
    }

    /// A line of text: an op without result.
    pub fn line(&mut self, text: impl fmt::Display) {
        let pad = 2 * self.depth;
        writeln!(self.text, "{:pad$}{text}", "").expect("a String takes all");
    }

    /// One op with one result: `text` is what stands behind `=`.
    pub fn op(&mut self, ty: Ty, text: impl fmt::Display) -> Val {
        let v = self.fresh(ty);
        self.line(format_args!("{v} = {text}"));
        v
    }

    fn nested(&mut self, write: impl FnOnce(&mut Self)) {
        self.depth += 1;
        write(self);
        self.depth -= 1;
    }

    // Constants.

    /// An integer constant.
    pub fn int(&mut self, elem: Scalar, n: i64) -> Val {
        self.op(scalar(elem), format_args!("arith.constant {n} : {}", scalar(elem)))
    }

    /// An index or a size.
    pub fn size(&mut self, n: usize) -> Val {
        self.int(Scalar::I64, n as i64)
    }

    /// A constant of any type, the same in every lane. Floats are written by their bits, which are exact.
    pub fn splat(&mut self, ty: Ty, x: f64) -> Val {
        let one = match ty.elem {
            Scalar::F32 => format!("0x{:08X}", (x as f32).to_bits()),
            Scalar::F64 => format!("0x{:016X}", x.to_bits()),
            e if e.is_float() => format!("{x:e}"),
            Scalar::U8 => format!("{}", x as u8 as i8),
            _ => format!("{}", x as i64),
        };
        match ty.lanes {
            0 => self.op(ty, format_args!("arith.constant {one} : {ty}")),
            _ => self.op(ty, format_args!("arith.constant dense<{one}> : {ty}")),
        }
    }

    /// A constant integer, the same in every lane.
    pub fn integers(&mut self, ty: Ty, n: i64) -> Val {
        match ty.lanes {
            0 => self.op(ty, format_args!("arith.constant {n} : {ty}")),
            _ => self.op(ty, format_args!("arith.constant dense<{n}> : {ty}")),
        }
    }

    /// A constant bool, the same in every lane.
    pub fn flag(&mut self, ty: Ty, value: bool) -> Val {
        match ty.lanes {
            0 => self.op(ty, format_args!("arith.constant {value}")),
            _ => self.op(ty, format_args!("arith.constant dense<{value}> : {ty}")),
        }
    }

    /// A vector of these f32.
    pub fn floats(&mut self, values: &[f64]) -> Val {
        let ty = vector(values.len(), Scalar::F32);
        let bits = values.iter().map(|&x| format!("0x{:08X}", (x as f32).to_bits()));
        self.op(ty, format_args!("arith.constant dense<[{}]> : {ty}", list(bits)))
    }

    /// A vector of these integers.
    pub fn lanes_of(&mut self, elem: Scalar, values: &[i64]) -> Val {
        let ty = vector(values.len(), elem);
        self.op(ty, format_args!("arith.constant dense<[{}]> : {ty}", list(values)))
    }

    // Arithmetic.

    fn binary(&mut self, name: &str, a: Val, b: Val) -> Val {
        assert_eq!(a.ty, b.ty, "{name} of different types");
        self.op(a.ty, format_args!("{name} {a}, {b} : {}", a.ty))
    }

    fn by_kind(&mut self, float: &str, int: &str, a: Val, b: Val) -> Val {
        self.binary(if a.ty.elem.is_float() { float } else { int }, a, b)
    }

    /// a + b.
    pub fn add(&mut self, a: Val, b: Val) -> Val {
        self.by_kind("arith.addf", "arith.addi", a, b)
    }

    /// a - b.
    pub fn sub(&mut self, a: Val, b: Val) -> Val {
        self.by_kind("arith.subf", "arith.subi", a, b)
    }

    /// a b.
    pub fn mul(&mut self, a: Val, b: Val) -> Val {
        self.by_kind("arith.mulf", "arith.muli", a, b)
    }

    /// a / b, towards zero of integers.
    pub fn div(&mut self, a: Val, b: Val) -> Val {
        self.by_kind("arith.divf", "arith.divsi", a, b)
    }

    /// The remainder of an integer division.
    pub fn rem(&mut self, a: Val, b: Val) -> Val {
        self.binary("arith.remsi", a, b)
    }

    /// The larger; NaN where one is.
    pub fn max(&mut self, a: Val, b: Val) -> Val {
        self.by_kind("arith.maximumf", "arith.maxsi", a, b)
    }

    /// The smaller; NaN where one is.
    pub fn min(&mut self, a: Val, b: Val) -> Val {
        self.by_kind("arith.minimumf", "arith.minsi", a, b)
    }

    /// The larger where neither is NaN, in one instruction.
    pub fn max_finite(&mut self, a: Val, b: Val) -> Val {
        let gt = self.cmp(Cmp::Gt, a, b);
        self.select(gt, a, b)
    }

    /// The smaller where neither is NaN, in one instruction.
    pub fn min_finite(&mut self, a: Val, b: Val) -> Val {
        let lt = self.cmp(Cmp::Lt, a, b);
        self.select(lt, a, b)
    }

    /// Bits of both.
    pub fn and(&mut self, a: Val, b: Val) -> Val {
        self.binary("arith.andi", a, b)
    }

    /// Bits of either.
    pub fn or(&mut self, a: Val, b: Val) -> Val {
        self.binary("arith.ori", a, b)
    }

    /// Bits that differ.
    pub fn xor(&mut self, a: Val, b: Val) -> Val {
        self.binary("arith.xori", a, b)
    }

    /// Bits moved up by a constant.
    pub fn shl(&mut self, a: Val, by: usize) -> Val {
        let by = self.splat(a.ty, by as f64);
        self.binary("arith.shli", a, by)
    }

    /// Bits moved down by a constant, zeros coming in.
    pub fn shr(&mut self, a: Val, by: usize) -> Val {
        if by == 0 {
            return a;
        }
        let by = self.splat(a.ty, by as f64);
        self.binary("arith.shrui", a, by)
    }

    /// Bits moved down by a constant, the sign coming in.
    pub fn shr_signed(&mut self, a: Val, by: usize) -> Val {
        let by = self.splat(a.ty, by as f64);
        self.binary("arith.shrsi", a, by)
    }

    /// a b + c, rounded once where the target has the instruction.
    pub fn fma(&mut self, a: Val, b: Val, c: Val) -> Val {
        match self.target.has(Feature::Fma) || self.target.arch == crate::target::Arch::Aarch64 {
            true => self.op(a.ty, format_args!("math.fma {a}, {b}, {c} : {}", a.ty)),
            false => {
                let ab = self.mul(a, b);
                self.add(ab, c)
            }
        }
    }

    /// An op of one operand and its type, such as `math.sqrt`.
    pub fn unary(&mut self, name: &str, a: Val) -> Val {
        self.op(a.ty, format_args!("{name} {a} : {}", a.ty))
    }

    /// Compares.
    pub fn cmp(&mut self, cmp: Cmp, a: Val, b: Val) -> Val {
        let (name, prefix) = match a.ty.elem {
            e if e.is_float() => ("cmpf", "o"),
            Scalar::U8 => ("cmpi", "u"),
            _ => ("cmpi", "s"),
        };
        let how = match cmp {
            Cmp::Eq if prefix != "o" => "eq".to_owned(),
            Cmp::Ne if prefix != "o" => "ne".to_owned(),
            Cmp::Ne => "une".to_owned(),
            cmp => format!("{prefix}{}", format!("{cmp:?}").to_lowercase()),
        };
        self.op(a.ty.of(Scalar::I1), format_args!("arith.{name} {how}, {a}, {b} : {}", a.ty))
    }

    /// `a` where `cond`, else `b`.
    pub fn select(&mut self, cond: Val, a: Val, b: Val) -> Val {
        assert_eq!(a.ty, b.ty, "select of different types");
        match cond.ty.lanes {
            0 => self.op(a.ty, format_args!("arith.select {cond}, {a}, {b} : {}", a.ty)),
            _ => self.op(a.ty, format_args!("arith.select {cond}, {a}, {b} : {}, {}", cond.ty, a.ty)),
        }
    }

    // Conversions.

    fn convert(&mut self, name: &str, a: Val, to: Scalar) -> Val {
        let ty = a.ty.of(to);
        self.op(ty, format_args!("{name} {a} : {} to {ty}", a.ty))
    }

    /// A float or an integer as another one; towards zero from float to integer, and wrapping to fewer bits.
    pub fn cast(&mut self, a: Val, to: Scalar) -> Val {
        let (from, bytes) = (a.ty.elem, a.ty.elem.bytes());
        let name = match (from.is_float(), to.is_float()) {
            _ if from == to => return a,
            (false, true) if from == Scalar::U8 => "arith.uitofp",
            (false, true) => "arith.sitofp",
            (true, false) if to == Scalar::U8 => {
                let wide = self.cast(a, Scalar::I32);
                return self.cast(wide, to);
            }
            (true, false) => "arith.fptosi",
            (true, true) if bytes < to.bytes() => "arith.extf",
            (true, true) if bytes > to.bytes() => "arith.truncf",
            (true, true) => {
                let wide = self.cast(a, Scalar::F32);
                return self.cast(wide, to);
            }
            (false, false) if bytes == to.bytes() => return Val { ty: a.ty.of(to), ..a },
            (false, false) if bytes < to.bytes() && from == Scalar::U8 => "arith.extui",
            (false, false) if bytes < to.bytes() => "arith.extsi",
            (false, false) => "arith.trunci",
        };
        self.convert(name, a, to)
    }

    /// An unsigned integer as a wider one.
    pub fn widen_unsigned(&mut self, a: Val, to: Scalar) -> Val {
        self.convert("arith.extui", a, to)
    }

    /// The same bits as other elements.
    pub fn bitcast(&mut self, a: Val, ty: Ty) -> Val {
        assert_eq!(a.ty.bytes(), ty.bytes(), "a bitcast to another size");
        let name = match a.ty.lanes == ty.lanes {
            _ if a.ty == ty => return a,
            true => "arith.bitcast",
            false if a.ty.lanes > 0 && ty.lanes > 0 => "vector.bitcast",
            false => "llvm.bitcast",
        };
        self.op(ty, format_args!("{name} {a} : {} to {ty}", a.ty))
    }

    // Vectors.

    /// A scalar in every lane.
    pub fn broadcast(&mut self, a: Val, lanes: usize) -> Val {
        let ty = vector(lanes, a.ty.elem);
        self.op(ty, format_args!("vector.broadcast {a} : {} to {ty}", a.ty))
    }

    /// A scalar as a value of so many lanes, 0 for a scalar.
    pub fn spread(&mut self, a: Val, lanes: usize) -> Val {
        if lanes == 0 { a } else { self.broadcast(a, lanes) }
    }

    /// The first `there` lanes, and 0 in the others.
    pub fn keep(&mut self, v: Val, there: usize) -> Val {
        if there >= v.ty.lanes {
            return v;
        }
        let (mask, zero) = (self.first_lanes(v.ty.lanes, there), self.splat(v.ty, 0.0));
        self.select(mask, v, zero)
    }

    /// The lanes of `a` and then `b` that `order` picks.
    pub fn shuffle(&mut self, a: Val, b: Val, order: &[usize]) -> Val {
        let ty = vector(order.len(), a.ty.elem);
        self.op(ty, format_args!("vector.shuffle {a}, {b} [{}] : {}, {}", list(order), a.ty, b.ty))
    }

    /// One lane.
    pub fn extract(&mut self, a: Val, lane: usize) -> Val {
        self.op(
            scalar(a.ty.elem),
            format_args!("vector.extract {a}[{lane}] : {} from {}", scalar(a.ty.elem), a.ty),
        )
    }

    /// All lanes together: `add`, `maximumf`, `minimumf`, `mul`. Floats are combined pairwise, in a fixed order: the upper
    /// half with the lower one until one is left.
    pub fn fold(&mut self, mut a: Val, combine: impl Fn(&mut Self, Val, Val) -> Val) -> Val {
        while a.ty.lanes > 1 {
            let half = a.ty.lanes / 2;
            let low = self.shuffle(a, a, &(0..half).collect::<Vec<_>>());
            let high = self.shuffle(a, a, &(half..2 * half).collect::<Vec<_>>());
            a = combine(self, low, high);
        }
        self.extract(a, 0)
    }

    // Control.

    /// A loop over `from..to` in steps, carrying values from one turn to the next.
    pub fn repeat(
        &mut self,
        from: Val,
        to: Val,
        step: usize,
        carried: &[Val],
        body: impl FnOnce(&mut Self, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        self.loop_with("", from, to, step, carried, body)
    }

    /// The same, never unrolled: of a long stretch of code LLVM makes another order, in which registers do not suffice.
    pub fn rolled(
        &mut self,
        from: Val,
        to: Val,
        step: usize,
        carried: &[Val],
        body: impl FnOnce(&mut Self, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let attribute = " {loop_annotation = #llvm.loop_annotation<unroll = <disable = true>>}";
        self.loop_with(attribute, from, to, step, carried, body)
    }

    fn loop_with(
        &mut self,
        attribute: &str,
        from: Val,
        to: Val,
        step: usize,
        carried: &[Val],
        body: impl FnOnce(&mut Self, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let step = self.size(step);
        let i = self.fresh(scalar(Scalar::I64));
        let inner: Vec<Val> = carried.iter().map(|c| self.fresh(c.ty)).collect();
        let results: Vec<Val> = carried.iter().map(|c| self.fresh(c.ty)).collect();
        let types = list(carried.iter().map(|c| c.ty));
        match carried.is_empty() {
            true => self.line(format_args!("scf.for {i} = {from} to {to} step {step} : i64 {{")),
            false => {
                let args = list(inner.iter().zip(carried).map(|(i, c)| format!("{i} = {c}")));
                let names = list(&results);
                self.line(format_args!("{names} = scf.for {i} = {from} to {to} step {step} iter_args({args}) -> ({types}) : i64 {{"));
            }
        }
        self.nested(|b| {
            let next = body(b, i, &inner);
            assert_eq!(next.len(), carried.len(), "a loop that carries something else");
            if !next.is_empty() {
                b.line(format_args!("scf.yield {} : {types}", list(&next)));
            }
        });
        self.line(format_args!("}}{attribute}"));
        results
    }

    /// The furthest place from `from` on that whole steps reach without going beyond `to`.
    pub fn whole_steps(&mut self, from: Val, to: Val, step: usize) -> Val {
        let (count, width) = (self.sub(to, from), self.size(step));
        let whole = self.div(count, width);
        let whole = self.mul(whole, width);
        self.add(from, whole)
    }

    /// A loop that carries nothing.
    pub fn each(&mut self, from: Val, to: Val, step: usize, body: impl FnOnce(&mut Self, Val)) {
        self.repeat(from, to, step, &[], |b, i, _| {
            body(b, i);
            Vec::new()
        });
    }

    /// Runs one or the other.
    pub fn when_else(&mut self, cond: Val, yes: impl FnOnce(&mut Self), no: impl FnOnce(&mut Self)) {
        self.line(format_args!("scf.if {cond} {{"));
        self.nested(yes);
        self.line("} else {");
        self.nested(no);
        self.line("}");
    }

    /// Runs `body` if `cond`.
    pub fn when(&mut self, cond: Val, body: impl FnOnce(&mut Self)) {
        self.line(format_args!("scf.if {cond} {{"));
        self.nested(body);
        self.line("}");
    }
}
