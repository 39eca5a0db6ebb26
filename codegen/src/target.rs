//! The machine that code is made for: an architecture and the instruction-set features that may be used.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use thiserror::Error;

pub use runtime::cpu::{Arch, Feature};

/// The names that LLVM knows a feature by.
fn llvm(feature: Feature) -> &'static str {
    match feature {
        Feature::Avx2 => "+avx2",
        Feature::Fma => "+fma",
        Feature::F16c => "+f16c",
        Feature::Avx512 => "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd",
        Feature::Avx512Vnni => "+avx512vnni",
        Feature::AmxInt8 => "+amx-tile,+amx-int8",
        Feature::DotProd => "+dotprod",
        Feature::I8mm => "+i8mm",
    }
}

/// What code is made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The name by which it was asked for.
    pub name: String,
    /// The architecture.
    pub arch: Arch,
    /// The features that may be used.
    pub features: BTreeSet<Feature>,
    /// What runs the code, where that is another machine: see [`Target::emulated`].
    #[serde(default)]
    machine: Option<Box<Target>>,
}

/// Targets that cannot be built for.
#[derive(Clone, Debug, Error)]
pub enum TargetError {
    /// There is none of that name.
    #[error("unknown CPU {found:?}, expected one of: {}", known.join(", "))]
    Unknown {
        /// What was asked for.
        found: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// One library has code for one architecture.
    #[error("{first} and {second} are of different architectures, expected CPUs of one")]
    Architectures {
        /// One target.
        first: String,
        /// Another one.
        second: String,
    },
    /// The same code twice.
    #[error("{second} has the features of {first}, expected each CPU once")]
    Twice {
        /// One target.
        first: String,
        /// Another one.
        second: String,
    },
}

use Feature::{AmxInt8, Avx2, Avx512, Avx512Vnni, DotProd, F16c, Fma, I8mm};

/// The targets that have a name, each with its features.
const NAMED: &[(&str, Arch, &[Feature])] = &[
    ("x86-64", Arch::X86_64, &[]),
    ("x86-64-v3", Arch::X86_64, &[Avx2, Fma, F16c]),
    ("x86-64-v4", Arch::X86_64, &[Avx2, Fma, F16c, Avx512]),
    ("avx512-vnni", Arch::X86_64, &[Avx2, Fma, F16c, Avx512, Avx512Vnni]),
    ("sapphire-rapids", Arch::X86_64, &[Avx2, Fma, F16c, Avx512, Avx512Vnni, AmxInt8]),
    ("aarch64", Arch::Aarch64, &[]),
    ("aarch64-dotprod", Arch::Aarch64, &[DotProd]),
    ("aarch64-i8mm", Arch::Aarch64, &[DotProd, I8mm]),
];

impl Target {
    /// The target `name`: one of a list, or `native`, this machine.
    pub fn parse(name: &str) -> Result<Target, TargetError> {
        if name == "native" {
            return Ok(Target::native());
        }
        let known = || std::iter::once("native").chain(NAMED.iter().map(|t| t.0)).collect();
        let &(_, arch, features) = NAMED
            .iter()
            .find(|t| t.0 == name)
            .ok_or_else(|| TargetError::Unknown { found: name.to_owned(), known: known() })?;
        Ok(Target {
            name: name.to_owned(),
            arch,
            features: features.iter().copied().collect(),
            machine: None,
        })
    }

    /// Targets for one library, sorted by how much they ask for.
    pub fn parse_list<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Target>, TargetError> {
        let mut all: Vec<Target> = names.into_iter().map(Target::parse).collect::<Result<_, _>>()?;
        all.sort_by_key(|t| t.features.len());
        for (i, second) in all.iter().enumerate() {
            for first in &all[..i] {
                let [a, b] = [first, second].map(|t| t.name.clone());
                if first.arch != second.arch {
                    return Err(TargetError::Architectures { first: a, second: b });
                }
                if first.features == second.features {
                    return Err(TargetError::Twice { first: a, second: b });
                }
            }
        }
        Ok(all)
    }

    /// The names of all targets of an architecture, the least first.
    pub fn names(arch: Arch) -> impl Iterator<Item = &'static str> {
        NAMED.iter().filter(move |t| t.1 == arch).map(|t| t.0)
    }

    /// This machine, as its processor describes itself; without tiles, whose code no processor has run yet: they are used
    /// where they are asked for by name.
    pub fn native() -> Target {
        let (arch, mut features) = runtime::cpu::native();
        features.remove(&AmxInt8);
        Target { name: "native".to_owned(), arch, features, machine: None }
    }

    /// The same kernels with the same lanes and layouts, as code for this machine, in which portable arithmetic stands in
    /// for every instruction that is asked for by name: so kernels are tested where their processor is not at hand.
    pub fn emulated(self) -> Target {
        Target {
            name: format!("{} (emulated)", self.name),
            machine: Some(Box::new(Target::native())),
            ..self
        }
    }

    /// Whether instructions that are asked for by name are stood in for.
    pub fn is_emulated(&self) -> bool {
        self.machine.is_some()
    }

    /// Any processor of the architecture of what runs the code.
    pub fn baseline(&self) -> Target {
        Target::baseline_of(self.machine().arch)
    }

    /// Any processor of an architecture.
    pub fn baseline_of(arch: Arch) -> Target {
        Target { name: "baseline".to_owned(), arch, features: BTreeSet::new(), machine: None }
    }

    /// The name, as a part of a symbol.
    pub fn symbol(&self) -> String {
        self.name.replace(|c: char| !c.is_ascii_alphanumeric(), "_")
    }

    /// What runs the code.
    pub fn machine(&self) -> &Target {
        self.machine.as_deref().unwrap_or(self)
    }

    /// Whether code may use `feature`.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.contains(&feature)
    }

    /// The features that this machine lacks to run code for the target; `None` for another architecture.
    pub fn missing_here(&self) -> Option<Vec<Feature>> {
        runtime::cpu::missing(self.machine().arch, &self.machine().features)
    }

    /// LLVM's triple.
    pub fn triple(&self) -> &'static str {
        match self.machine().arch {
            Arch::X86_64 => "x86_64-unknown-linux-gnu",
            Arch::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// LLVM's name of the baseline CPU.
    pub fn llvm_cpu(&self) -> &'static str {
        let machine = self.machine();
        match machine.arch {
            Arch::X86_64 if machine.has(Avx512) => "x86-64-v4",
            Arch::X86_64 if machine.has(Avx2) => "x86-64-v3",
            Arch::X86_64 => "x86-64",
            Arch::Aarch64 => "generic",
        }
    }

    /// LLVM's list of features. Vectors are as wide as the registers, which LLVM avoids by itself with 512 bits.
    pub fn llvm_features(&self) -> String {
        let machine = self.machine();
        let features = machine.features.iter().map(|&f| llvm(f));
        let wide = machine.has(Avx512).then_some("-prefer-256-bit");
        features.chain(wide).collect::<Vec<_>>().join(",")
    }

    /// Floats in a vector register.
    pub fn lanes(&self) -> usize {
        match self.arch {
            Arch::X86_64 if self.has(Avx512) => 16,
            Arch::X86_64 if self.has(Avx2) => 8,
            _ => 4,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
