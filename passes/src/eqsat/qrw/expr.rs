//! Computes expressions and conditions over what a rule matched. What is not known has no value, and a condition on
//! it does not hold.

use super::matching::{Binding, Found};
use super::parse::is_opset;
use super::term::{Compare, Condition, Expr, Function, Test};
use crate::eqsat::graph::{Graph, Id};
use dialects::ir::{Attr, Dim, Elem};

/// What an expression is.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A size, which may be a symbol.
    Dim(Dim),
    /// Sizes or integers.
    Dims(Vec<Dim>),
    /// An element type.
    Elem(Elem),
    /// A text.
    Str(String),
    /// A value of the graph.
    Class(Id),
    /// An attribute of another kind.
    Attr(Attr),
}

impl Value {
    fn of_attr(a: &Attr) -> Value {
        match a {
            Attr::Int(n) => Value::Int(*n),
            Attr::Float(x) => Value::Float((*x).into()),
            Attr::Ints(v) => Value::ints(v),
            Attr::Str(s) => match std::str::from_utf8(s) {
                Ok(s) => Value::Str(s.into()),
                Err(_) => Value::Attr(a.clone()),
            },
            _ => Value::Attr(a.clone()),
        }
    }

    fn ints(v: &[i64]) -> Value {
        Value::Dims(v.iter().map(|&n| Dim::Known(n)).collect())
    }

    /// The integer, if it is one.
    pub fn int(&self) -> Option<i64> {
        match self {
            Value::Int(n) | Value::Dim(Dim::Known(n)) => Some(*n),
            _ => None,
        }
    }

    fn float(&self) -> Option<f64> {
        match self {
            Value::Float(x) => Some(*x),
            v => v.int().map(|n| n as f64),
        }
    }

    fn dims(&self) -> Option<&[Dim]> {
        match self {
            Value::Dims(d) => Some(d),
            _ => None,
        }
    }

    /// The integers, if all are numbers.
    pub fn list(&self) -> Option<Vec<i64>> {
        self.dims()?.iter().map(Dim::known).collect()
    }

    fn class(&self) -> Option<Id> {
        match self {
            Value::Class(id) => Some(*id),
            _ => None,
        }
    }

    /// As an attribute of the kind `kind`, where that is known.
    pub fn attr(&self, kind: Option<&str>) -> Option<Attr> {
        Some(match self {
            Value::Int(n) if kind == Some("float") => Attr::Float(*n as f32),
            Value::Int(n) | Value::Dim(Dim::Known(n)) => Attr::Int(*n),
            Value::Float(x) => Attr::Float(*x as f32),
            Value::Dims(_) => Attr::Ints(self.list()?),
            Value::Elem(e) => Attr::Int(e.onnx().into()),
            Value::Str(s) => s.as_str().into(),
            Value::Attr(a) => a.clone(),
            Value::Dim(_) | Value::Class(_) => return None,
        })
    }
}

/// Whether two numbers are the same, as 32-bit floats spell them.
fn near(a: f64, b: f64) -> bool {
    a == b || (a - b).abs() <= 1e-6 * a.abs().max(b.abs())
}

/// What an expression is.
pub fn eval(g: &Graph, found: &Found, e: &Expr) -> Option<Value> {
    Some(match e {
        Expr::Int(n) => Value::Int(*n),
        Expr::Float(x) => Value::Float(*x),
        Expr::Str(s) if is_opset(s) => Value::Int(g.world().m.opset("onnx")),
        Expr::Str(s) => Elem::from_name(s).map_or_else(|| Value::Str(s.clone()), Value::Elem),
        Expr::Var(v) => match found.of(*v)? {
            Binding::Class(id) => Value::Class(*id),
            Binding::Attr(a) => Value::of_attr(a),
        },
        Expr::List(items) => {
            let item = |e: &Expr| match eval(g, found, e)? {
                Value::Int(n) => Some(Dim::Known(n)),
                Value::Dim(d) => Some(d),
                _ => None,
            };
            Value::Dims(items.iter().map(item).collect::<Option<_>>()?)
        }
        Expr::Arithmetic(sign, a, b) => {
            let (a, b) = (eval(g, found, a)?, eval(g, found, b)?);
            match (a.int(), b.int()) {
                (Some(a), Some(b)) => Value::Int(match sign {
                    '+' => a.checked_add(b)?,
                    '-' => a.checked_sub(b)?,
                    '*' => a.checked_mul(b)?,
                    // A quotient that is no integer has no value.
                    _ => a.checked_div(b).filter(|q| q.checked_mul(b) == Some(a))?,
                }),
                _ => {
                    let (a, b) = (a.float()?, b.float()?);
                    Value::Float(match sign {
                        '+' => a + b,
                        '-' => a - b,
                        '*' => a * b,
                        _ => a / b,
                    })
                }
            }
        }
        Expr::Call(f, _) if f.is_predicate() => return None,
        Expr::Call(f, args) => {
            let args = args.iter().map(|a| eval(g, found, a)).collect::<Option<Vec<_>>>()?;
            call(g, *f, &args)?
        }
    })
}

/// An index that may count from the last of `n`.
fn index(i: i64, n: usize) -> Option<usize> {
    usize::try_from(if i < 0 { i + n as i64 } else { i }).ok().filter(|&i| i < n)
}

fn call(g: &Graph, f: Function, args: &[Value]) -> Option<Value> {
    let class = |i: usize| args[i].class();
    Some(match f {
        Function::Rank => Value::Int(g.dims(class(0)?)?.len() as i64),
        Function::Dim => {
            let dims = g.dims(class(0)?)?;
            Value::Dim(dims[index(args[1].int()?, dims.len())?].clone())
        }
        Function::Shape => Value::Dims(g.dims(class(0)?)?),
        Function::Elem => Value::Elem(g.elem(class(0)?)?),
        Function::Number => Value::Float(g.splat(class(0)?)?.0),
        Function::Contents => Value::ints(&g.ints(class(0)?)?),
        Function::Len => Value::Int(args[0].dims()?.len() as i64),
        Function::Compose => {
            let (p, q) = (args[0].list()?, args[1].list()?);
            let at = |&i: &i64| p.get(usize::try_from(i).ok()?).copied();
            Value::ints(&q.iter().map(at).collect::<Option<Vec<_>>>().filter(|_| p.len() == q.len())?)
        }
        Function::Inverse => {
            let p = args[0].list()?;
            let at = |i: usize| p.iter().position(|&j| usize::try_from(j) == Ok(i)).map(|j| j as i64);
            Value::ints(&(0..p.len()).map(at).collect::<Option<Vec<_>>>()?)
        }
        Function::Axis => Value::Int(index(args[0].int()?, g.dims(class(1)?)?.len())? as i64),
        _ => return None,
    })
}

/// Whether a predicate holds; `None` where that is not known.
fn holds(g: &Graph, f: Function, args: &[Value]) -> Option<bool> {
    let id = args[0].class();
    Some(match f {
        Function::Constant => g.is_const(id?),
        Function::Splat => g.splat(id?).is_some(),
        Function::Scalar => g.shape(id?)?.iter().product::<usize>() == 1,
        Function::Positive => g.is_const(id?) && g.positive(id?),
        Function::Finite => g.is_const(id?) && g.finite(id?),
        Function::Float => g.elem(id?)?.is_float(),
        Function::Integer => g.elem(id?)?.is_int(),
        Function::Fits => fits(g, id?, args[1].class()?),
        Function::Last => {
            let axes = match id {
                Some(id) => g.ints(id)?,
                None => args[0].list().or_else(|| Some(vec![args[0].int()?]))?,
            };
            let rank = g.dims(args[1].class()?).map(|d| d.len() as i64);
            axes.len() == 1 && (axes[0] == -1 || rank? == axes[0] + 1)
        }
        _ => return None,
    })
}

/// Whether `a` broadcasts to `b` without changing its shape.
pub fn fits(g: &Graph, a: Id, b: Id) -> bool {
    let Some(a) = g.dims(a) else { return false };
    if a.is_empty() {
        return true;
    }
    let Some(b) = g.dims(b) else { return false };
    let lead = b.len().checked_sub(a.len());
    lead.is_some_and(|lead| a.iter().zip(&b[lead..]).all(|(a, b)| *a == Dim::Known(1) || a.same(b)))
}

fn compare(a: &Value, how: Compare, b: &Value) -> Option<bool> {
    use std::cmp::Ordering::{self, Equal, Greater, Less};
    let equal = matches!(how, Compare::Equal | Compare::NotEqual);
    if let (Some(x), Some(y)) = (a.float(), b.float()) {
        let order = if near(x, y) { Equal } else { x.partial_cmp(&y)? };
        return Some(match how {
            Compare::Equal => order == Equal,
            Compare::NotEqual => order != Equal,
            Compare::Less => order == Less,
            Compare::LessEqual => order != Greater,
            Compare::Greater => order == Greater,
            Compare::GreaterEqual => order != Less,
        });
    }
    let same: Option<bool> = match (a, b) {
        _ if !equal => None,
        (Value::Dim(_) | Value::Int(_), Value::Dim(_) | Value::Int(_)) => {
            let dim = |v: &Value| match v {
                Value::Dim(d) => d.clone(),
                v => Dim::Known(v.int().unwrap_or_default()),
            };
            // Two symbols may stand for one size: that they differ is not known.
            same_dims(&[dim(a)], &[dim(b)])
        }
        (Value::Dims(a), Value::Dims(b)) => same_dims(a, b),
        (Value::Elem(a), Value::Elem(b)) => Some(a == b),
        (Value::Str(a), Value::Str(b)) => Some(a == b),
        (Value::Attr(a), Value::Attr(b)) => Some(a == b),
        // The attribute of a Cast names a type by its number.
        (Value::Elem(e), v) | (v, Value::Elem(e)) => v.int().map(|n| n == i64::from(e.onnx())),
        _ => None,
    };
    let order: Option<Ordering> = same.map(|s| if s { Equal } else { Less });
    order.map(|o| (o == Equal) == (how == Compare::Equal))
}

fn same_dims(a: &[Dim], b: &[Dim]) -> Option<bool> {
    if a.len() != b.len() {
        return Some(false);
    }
    let differ = a.iter().zip(b).any(|(a, b)| matches!((a, b), (Dim::Known(x), Dim::Known(y)) if x != y));
    if differ {
        return Some(false);
    }
    a.iter().zip(b).all(|(a, b)| a.same(b)).then_some(true)
}

/// Whether an attribute of an op is this value.
pub fn is_attr(a: &Attr, b: &Value) -> bool {
    compare(&Value::of_attr(a), Compare::Equal, b) == Some(true)
}

/// Whether a condition surely holds.
pub fn condition(g: &Graph, found: &Found, c: &Condition) -> bool {
    let known = match &c.test {
        Test::Holds(f, args) => {
            let args: Option<Vec<Value>> = args.iter().map(|a| eval(g, found, a)).collect();
            args.and_then(|args| holds(g, *f, &args))
        }
        Test::Compare(a, how, b) => {
            let sides = eval(g, found, a).zip(eval(g, found, b));
            sides.and_then(|(a, b)| compare(&a, *how, &b))
        }
    };
    known == Some(!c.not)
}
