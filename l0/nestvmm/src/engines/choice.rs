//! Which engine `--engine auto` takes: a rule from what is known of KVM to an engine and the reason for it.

use std::fmt;

use engine_kvm::Flaw;

use super::Findings;

/// What the guest to be run needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing that KVM does not have.
    Plain,
    /// VMX, to be a hypervisor.
    Vmx,
    /// Single pages of its memory write-protected (`--ept-sync write-protect`).
    WriteProtection,
}

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Taken {
    /// The software engine.
    Soft,
    /// KVM.
    Kvm,
}

impl Taken {
    /// The name that `--engine` knows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Soft => "soft",
            Self::Kvm => "kvm",
        }
    }
}

/// Why an engine is taken.
#[derive(Clone, Debug, PartialEq)]
pub enum Why {
    /// KVM can't be used.
    Unusable(String),
    /// With KVM, VMX is incomplete.
    Vmx,
    /// KVM can't write-protect pages.
    WriteProtection,
    /// KVM gets these wrong.
    Flawed(Vec<Flaw>),
    /// KVM is the faster one, or not; in guest instructions a second.
    Speed {
        /// KVM's.
        kvm: f64,
        /// The software engine's.
        soft: f64,
    },
    /// KVM works; nobody asked how well.
    Unknown,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unusable(why) => write!(f, "KVM can't be used: {why}"),
            Self::Vmx => {
                f.write_str("the guest is offered VMX, which is complete in the software engine only")
            }
            Self::WriteProtection => {
                f.write_str("KVM can't write-protect single pages for --ept-sync write-protect")
            }
            Self::Flawed(flaws) => f.write_str(&crate::run::without_kvm(flaws)),
            Self::Speed { kvm, soft } => write!(
                f,
                "KVM runs {:.0} million guest instructions a second in a small loop, the software engine {:.0}",
                kvm / 1e6,
                soft / 1e6
            ),
            Self::Unknown => f.write_str("KVM was not looked at closely"),
        }
    }
}

/// An engine, and why it is taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The engine.
    pub engine: Taken,
    /// The reason.
    pub why: Why,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--engine auto takes {}: {}", self.engine.name(), self.why)
    }
}

/// The engine that is right for what the guest needs and, of those, the one that will be faster.
pub fn choose(need: Need, kvm: &Findings) -> Choice {
    let soft = |why| Choice { engine: Taken::Soft, why };
    match (need, kvm) {
        (_, Findings::Unusable(why)) => soft(Why::Unusable(why.clone())),
        (Need::Vmx, _) => soft(Why::Vmx),
        (Need::WriteProtection, _) => soft(Why::WriteProtection),
        (Need::Plain, Findings::Opened) => soft(Why::Unknown),
        (Need::Plain, Findings::Flawed(flaws)) => soft(Why::Flawed(flaws.clone())),
        (Need::Plain, &Findings::Measured { kvm, soft }) => {
            let engine = if kvm > soft { Taken::Kvm } else { Taken::Soft };
            Choice { engine, why: Why::Speed { kvm, soft } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule() {
        let absent =
            Findings::Unusable("opening /dev/kvm failed: No such file or directory (os error 2)".into());
        let flawed = Findings::Flawed(vec![Flaw::KernelCode, Flaw::Tsc]);
        let fast = Findings::Measured { kvm: 3e9, soft: 2e8 };
        let slow = Findings::Measured { kvm: 1.5e6, soft: 2e8 };
        let equal = Findings::Measured { kvm: 2e8, soft: 2e8 };
        let broken = Findings::Measured { kvm: f64::NAN, soft: 2e8 };
        // What the guest needs, what KVM is, the engine, and what the reason says.
        let table = [
            (Need::Plain, &absent, Taken::Soft, "opening /dev/kvm failed: No such file"),
            (Need::Vmx, &absent, Taken::Soft, "No such file or directory (os error 2)"),
            (Need::WriteProtection, &absent, Taken::Soft, "No such file"),
            (Need::Plain, &flawed, Taken::Soft, "emulates guests' kernel code"),
            (Need::Vmx, &flawed, Taken::Soft, "VMX"),
            (Need::Plain, &fast, Taken::Kvm, "KVM runs 3000 million"),
            (Need::Vmx, &fast, Taken::Soft, "complete in the software engine only"),
            (Need::WriteProtection, &fast, Taken::Soft, "--ept-sync write-protect"),
            (Need::Plain, &slow, Taken::Soft, "the software engine 200"),
            (Need::Plain, &equal, Taken::Soft, "KVM runs 200 million"),
            (Need::Plain, &broken, Taken::Soft, "the software engine 200"),
            (Need::Vmx, &Findings::Opened, Taken::Soft, "VMX"),
            (Need::Plain, &Findings::Opened, Taken::Soft, "not looked at"),
        ];
        for (need, kvm, engine, words) in table {
            let choice = choose(need, kvm);
            assert_eq!(choice.engine, engine, "{need:?}, {kvm:?}");
            let line = choice.to_string();
            assert!(line.starts_with(&format!("--engine auto takes {}: ", engine.name())), "{line}");
            assert!(line.contains(words) && line.lines().count() == 1, "{line}");
        }
    }
}
