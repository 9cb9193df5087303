//! What failed, and what L1 gets to know of it.

use std::fmt;

use x86_spec::exit::ExitReason;

use super::{Area, Check};
use crate::{Field, InstructionError, Vmcs12, Width};

/// A check that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Name of the check.
    pub check: &'static str,
    /// Section of the SDM, volume 3C.
    pub section: &'static str,
    /// What it is about; decides the answer to L1.
    pub area: Area,
    /// What is wrong.
    pub message: String,
    /// The fields concerned, with their values.
    pub fields: Vec<(Field, u64)>,
    /// What would satisfy the check.
    pub expected: String,
}

fn hex_digits(field: Field) -> usize {
    match field.width() {
        Width::Bits16 => 4,
        Width::Bits32 => 8,
        Width::Bits64 | Width::Natural => 16,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} (SDM Vol. 3C \u{a7}{}): {}", self.check, self.section, self.message)?;
        for (field, value) in &self.fields {
            let digits = hex_digits(*field);
            writeln!(f, "    {} ({}) = 0x{value:0digits$x}", field.name(), field.sdm_name())?;
        }
        write!(f, "    expected: {}", self.expected)
    }
}

/// What the architecture lets L1 see of a VM entry's checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The VM entry goes on.
    Enter,
    /// VMfailValid: the instruction after VMLAUNCH or VMRESUME is next (SDM Vol. 3C §27.2).
    FailValid(InstructionError),
    /// A VM-entry failure: host state is loaded, exit reason bit 31 is set (§27.8).
    FailEntry {
        /// Basic exit reason.
        reason: ExitReason,
        /// Exit qualification.
        qualification: u64,
    },
}

/// All checks of one VM entry that failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    failures: Vec<Failure>,
    msr_index: Option<u32>,
}

/// What [`Report::msr_loading`] calls its check.
const MSR_LOADING: &str = "entry_msr_loading";

impl Report {
    /// Every failure, in the order of the registry.
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// Whether no check failed.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    /// Adds a failed load of an MSR from the VM-entry MSR-load area (SDM Vol. 3C §27.4).
    /// `entry` counts from 1, as the exit qualification does. The first one added counts.
    pub fn msr_loading(
        &mut self,
        vmcs: &Vmcs12,
        entry: u32,
        message: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.msr_index.get_or_insert(entry);
        let fields = [Field::EntryMsrLoadAddress, Field::EntryMsrLoadCount];
        self.failures.push(Failure {
            check: MSR_LOADING,
            section: "27.4",
            area: Area::MsrLoading,
            message: message.into(),
            fields: fields.map(|f| (f, vmcs.get(f))).to_vec(),
            expected: expected.into(),
        });
    }

    /// The one answer that L1 gets. Controls come first, then host state, guest state and MSR
    /// loading. Within the first two and within guest state the SDM leaves the order to the
    /// processor (§27.2, §27.8); here it is that of the registry, which is the manual's.
    pub fn architectural(&self) -> Answer {
        let first = |wanted: fn(Area) -> bool| self.failures.iter().find(|f| wanted(f.area));
        if first(Area::is_controls).is_some() {
            return Answer::FailValid(InstructionError::EntryInvalidControls);
        }
        if first(|a| a == Area::HostState).is_some() {
            return Answer::FailValid(InstructionError::EntryInvalidHostState);
        }
        for failure in &self.failures {
            if let Area::GuestState(cause) = failure.area {
                let reason = ExitReason::InvalidGuestState;
                return Answer::FailEntry { reason, qualification: cause as u64 };
            }
        }
        match self.msr_index {
            Some(entry) => Answer::FailEntry { reason: ExitReason::MsrLoading, qualification: entry as u64 },
            None => Answer::Enter,
        }
    }
}

impl fmt::Display for Report {
    /// All failures, one after the other, each on lines of its own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, failure) in self.failures.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{failure}")?;
        }
        Ok(())
    }
}

/// Where a running check puts its failures.
pub struct Findings<'a> {
    vmcs: &'a Vmcs12,
    check: &'static Check,
    report: &'a mut Report,
}

impl<'a> Findings<'a> {
    pub(super) fn new(vmcs: &'a Vmcs12, check: &'static Check, report: &'a mut Report) -> Self {
        Self { vmcs, check, report }
    }

    /// The check fails because of these fields. A check that looks at several registers
    /// fails once for each.
    #[cold]
    pub fn fail(&mut self, fields: &[Field], message: impl Into<String>, expected: impl Into<String>) {
        self.report.failures.push(Failure {
            check: self.check.name,
            section: self.check.section,
            area: self.check.area,
            message: message.into(),
            fields: fields.iter().map(|f| (*f, self.vmcs.get(*f))).collect(),
            expected: expected.into(),
        });
    }

    /// Fails unless `holds`. For texts that need no formatting.
    #[inline]
    pub fn require(&mut self, holds: bool, fields: &[Field], message: &'static str, expected: &'static str) {
        if !holds {
            self.fail(fields, message, expected);
        }
    }
}
