//! What a compiled model says of itself: JSON in its library, under the symbol `qcc_model`.

use crate::cpu::{Arch, Feature};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

/// The version of this description, and of the interface of the library.
pub const VERSION: u32 = 3;

/// What `qcc_run` and `qcc_version` return where the processor runs no version.
pub const NO_VERSION: i32 = -100;

/// An element type of inputs and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Elem {
    F32,
    I64,
    I32,
    U8,
    I8,
    /// A byte, 0 or 1.
    Bool,
}

impl Elem {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Elem::I64 => 8,
            Elem::F32 | Elem::I32 => 4,
            Elem::U8 | Elem::I8 | Elem::Bool => 1,
        }
    }
}

/// A dim: a number, a name, or, of outputs, a sum of products of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dim {
    /// A number.
    Known(u64),
    /// One of [`About::dims`].
    Named(String),
    /// Products, each a factor and names.
    Sum(Vec<(i64, Vec<String>)>),
}

impl Dim {
    /// The size where named dims have these; `None` where that is no size.
    pub fn eval(&self, dim: impl Fn(&str) -> Option<u64>) -> Option<usize> {
        let sum = match self {
            Dim::Known(n) => i128::from(*n),
            Dim::Named(name) => i128::from(dim(name)?),
            Dim::Sum(terms) => terms.iter().try_fold(0i128, |sum, (factor, names)| {
                let product = names
                    .iter()
                    .try_fold(i128::from(*factor), |p, name| p.checked_mul(i128::from(dim(name)?)))?;
                sum.checked_add(product)
            })?,
        };
        usize::try_from(sum).ok()
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Known(n) => write!(f, "{n}"),
            Dim::Named(name) => f.write_str(name),
            Dim::Sum(terms) => {
                let product = |(factor, names): &(i64, Vec<String>)| match (*factor, names.is_empty()) {
                    (1, false) => names.join("*"),
                    (n, false) => format!("{n}*{}", names.join("*")),
                    (n, true) => n.to_string(),
                };
                f.write_str(&terms.iter().map(product).collect::<Vec<_>>().join(" + "))
            }
        }
    }
}

/// An input or output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// The name.
    pub name: String,
    /// The element type.
    pub elem: Elem,
    /// The dims.
    pub shape: Vec<Dim>,
}

/// The code for one kind of processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// What it was built for, by the name that was given.
    pub target: String,
    /// The features that the code uses.
    pub features: BTreeSet<Feature>,
}

/// The description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// [`VERSION`].
    pub version: u32,
    /// The architecture.
    pub arch: Arch,
    /// The versions of the code, the one that asks for most last.
    pub versions: Vec<Version>,
    /// Named dims with the greatest size of each, in the order of the library's first argument.
    pub dims: Vec<(String, u64)>,
    /// Inputs in order.
    pub inputs: Vec<Port>,
    /// Outputs in order.
    pub outputs: Vec<Port>,
    /// Bytes of working memory.
    pub arena: u64,
    /// Bytes of weights.
    pub weights: u64,
    /// The name of the file of weights beside the library; `None` where they are in it, under the symbol `qcc_weights`.
    pub weights_file: Option<String>,
    /// The hash of the weights behind their first 64 bytes, which begin with it: 64 hexadecimal digits.
    pub id: String,
}
