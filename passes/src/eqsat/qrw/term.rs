//! What the text of a rule says.

use std::ops::Range;
use thiserror::Error;

/// A variable's place among those of its rule.
pub type Var = usize;

/// A rule.
#[derive(Clone, Debug, PartialEq)]
pub struct TextRule {
    /// The name.
    pub name: String,
    /// The whole rule, as it was written.
    pub text: String,
    /// Where it stands in its file, in bytes.
    pub span: Range<usize>,
    /// What is matched: one of these.
    pub left: Vec<OpTerm>,
    /// What it equals.
    pub right: Term,
    /// All must hold.
    pub conditions: Vec<Condition>,
    /// Whether it says to hold where a value is infinite or no number.
    pub infinities: bool,
    /// Only for models that run on one of these; empty: on anything.
    pub profiles: Vec<String>,
    /// The names of the variables.
    pub vars: Vec<String>,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    /// Any value, or the one that the variable has.
    Var(Var),
    /// A constant that is this number throughout.
    Number(f64),
    /// A constant with these integers, `[n]`.
    Ints(Vec<Expr>),
    /// An operand that is left out.
    Absent,
    /// A term with a name: wherever the name stands, the same value is meant.
    Named(Var, Box<Term>),
    /// One of several terms.
    Any(Vec<Term>),
    /// A result of an op.
    Op(Box<OpTerm>),
}

/// A result of an op.
#[derive(Clone, Debug, PartialEq)]
pub struct OpTerm {
    /// The full name, such as `onnx.Mul`.
    pub name: String,
    /// Its operands; those after the last are left out.
    pub operands: Vec<Term>,
    /// Attributes. On the left, one that is not named has its default.
    pub attrs: Vec<(String, Expr)>,
    /// Which result.
    pub result: u32,
    /// How many results the op has, when that is said.
    pub outputs: Option<u32>,
}

/// A number, a list, a text, computed when a rule is applied.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A text, quoted or not.
    Str(String),
    /// An attribute's value, or the value that a function or predicate is asked about.
    Var(Var),
    /// A list of integers.
    List(Vec<Expr>),
    /// A function of these.
    Call(Function, Vec<Expr>),
    /// Arithmetic: `+`, `-`, `*` or `/`.
    Arithmetic(char, Box<Expr>, Box<Expr>),
}

macro_rules! functions {
    ($($variant:ident $name:literal $arity:literal $doc:literal)*) => {
        /// What expressions can ask.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Function {
            $(#[doc = $doc] $variant,)*
        }

        impl Function {
            /// All of them: name, how many arguments, meaning.
            pub const ALL: &'static [(&'static str, usize, &'static str, Function)] =
                &[$(($name, $arity, $doc, Function::$variant),)*];
        }
    };
}

functions! {
    Rank "rank" 1 "the number of dims of a value"
    Dim "dim" 2 "a dim of a value; from the last for a negative number"
    Shape "shape" 1 "the dims of a value"
    Elem "elem" 1 "the element type of a value, such as f32"
    Number "value" 1 "the number that a constant is throughout"
    Contents "ints" 1 "the contents of an integer constant"
    Len "len" 1 "the length of a list"
    Compose "compose" 2 "the permutation that transposes by the first, then by the second"
    Inverse "inverse" 1 "the permutation that undoes one"
    Axis "axis" 2 "an axis of a value counted from the first"
    Constant "constant" 1 "whether a value is made of constants alone"
    Splat "splat" 1 "whether a value is a constant that is one number throughout"
    Scalar "scalar" 1 "whether a value has one element, whatever its rank"
    Positive "positive" 1 "whether a value is a constant with positive elements only"
    Finite "finite" 1 "whether a value is a constant without infinities"
    Float "float" 1 "whether the elements of a value are floats"
    Integer "integer" 1 "whether the elements of a value are integers"
    Fits "fits" 2 "whether the first value broadcasts to the second without changing its shape"
    Last "last" 2 "whether a list of axes, or a constant, is the last axis of a value alone"
}

impl Function {
    /// The function of this name.
    pub fn find(name: &str) -> Option<(usize, Function)> {
        Self::ALL.iter().find(|f| f.0 == name).map(|f| (f.1, f.3))
    }

    /// Whether it answers yes or no.
    pub fn is_predicate(self) -> bool {
        use Function::*;
        matches!(self, Constant | Splat | Scalar | Positive | Finite | Float | Integer | Fits | Last)
    }

    /// Whether it is about constants only.
    pub fn wants_constant(self) -> bool {
        use Function::*;
        matches!(self, Number | Contents | Constant | Splat | Positive | Finite)
    }
}

/// How two expressions compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Compare {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

/// What must hold for a rule to be applied. What is not known does not hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// It must not hold instead.
    pub not: bool,
    /// What is asked.
    pub test: Test,
}

/// What a condition asks.
#[derive(Clone, Debug, PartialEq)]
pub enum Test {
    /// A predicate of these.
    Holds(Function, Vec<Expr>),
    /// A comparison.
    Compare(Expr, Compare, Expr),
}

impl Term {
    /// The op, if it is one.
    pub fn op(&self) -> Option<&OpTerm> {
        match self {
            Term::Op(op) => Some(op),
            _ => None,
        }
    }
}

/// Why a text of rules cannot be used. The span is in bytes.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{message}")]
pub struct RuleError {
    /// What is wrong.
    pub message: String,
    /// Where.
    pub span: Range<usize>,
    /// What stands there, or what was expected.
    pub label: String,
    /// What to do about it.
    pub help: Option<String>,
}
