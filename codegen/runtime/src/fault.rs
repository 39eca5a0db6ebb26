//! What kernels report of data that they must not use.

use std::fmt;

/// A fault, as the number that a kernel writes. `qcc_run` returns -1 less the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An index that points outside of what it selects from.
    Index = 1,
    /// A length computed from the inputs that is not the one which the model declares.
    Length = 2,
}

impl Fault {
    /// The fault of this number.
    pub fn of(number: i32) -> Option<Fault> {
        [Fault::Index, Fault::Length].into_iter().find(|&f| f as i32 == number)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Index => "an index is out of range",
            Fault::Length => "a length that is computed is not the declared one",
        })
    }
}
