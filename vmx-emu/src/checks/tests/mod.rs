//! Cases for every registered check. A passing case is a VMCS that passes everything; a
//! failing one lists exactly the checks that fail. The expectations are those of the section
//! that the check's function cites.

mod controls;
mod guest;
mod host;
mod properties;
mod setup;

use std::collections::BTreeSet;

use x86_spec::exit::ExitReason;

use super::*;
use crate::InstructionError;
use setup::Setup;

/// A VMCS that passes all checks, or fails these.
struct Case {
    /// The check that the case is about.
    check: &'static str,
    /// All that fail; none in a passing case.
    failing: &'static [&'static str],
    change: fn(&mut Setup),
}

const fn pass(check: &'static str, change: fn(&mut Setup)) -> Case {
    Case { check, failing: &[], change }
}

/// The first of `failing` is what the case is about.
const fn fail(failing: &'static [&'static str], change: fn(&mut Setup)) -> Case {
    Case { check: failing[0], failing, change }
}

fn cases() -> impl Iterator<Item = &'static Case> {
    controls::CASES.iter().chain(host::CASES).chain(guest::CASES)
}

fn check(name: &str) -> &'static Check {
    CHECKS.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("no check is called {name}"))
}

#[test]
fn the_base_passes() {
    let report = Setup::base().run();
    assert!(report.passed(), "{report}");
    assert_eq!(report.architectural(), Answer::Enter);
}

#[test]
fn cases_pass_and_fail_as_listed() {
    let mut wrong = String::new();
    for (i, case) in cases().enumerate() {
        let mut setup = Setup::base();
        (case.change)(&mut setup);
        let report = setup.run();
        let found: BTreeSet<_> = report.failures().iter().map(|f| f.check).collect();
        let wanted: BTreeSet<_> = case.failing.iter().copied().collect();
        if found != wanted {
            wrong += &format!("case {i} of {}: {wanted:?} should fail\n{report}\n\n", case.check);
        }
        if let [one] = case.failing {
            let answer = match check(one).area {
                Area::HostState => Answer::FailValid(InstructionError::EntryInvalidHostState),
                Area::GuestState(cause) => {
                    Answer::FailEntry { reason: ExitReason::InvalidGuestState, qualification: cause as u64 }
                }
                _ => Answer::FailValid(InstructionError::EntryInvalidControls),
            };
            assert_eq!(report.architectural(), answer, "{one}");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn every_check_has_a_passing_and_a_failing_case() {
    let with = |passing: bool| -> BTreeSet<&str> {
        cases().filter(|c| c.failing.is_empty() == passing).map(|c| check(c.check).name).collect()
    };
    let all: BTreeSet<_> = CHECKS.iter().map(|c| c.name).collect();
    assert_eq!(all.len(), CHECKS.len(), "names are unique");
    let missing =
        |have: BTreeSet<&str>| all.iter().filter(|n| !have.contains(**n)).copied().collect::<Vec<_>>();
    assert_eq!(missing(with(true)), Vec::<&str>::new(), "without a passing case");
    assert_eq!(missing(with(false)), Vec::<&str>::new(), "without a failing case");
}

#[test]
fn failures_can_be_read() {
    let mut s = Setup::base();
    s.set(Field::Vpid, 0).set(Field::GuestRip, 1 << 63);
    let report = s.run();
    assert_eq!(
        report.to_string(),
        "vpid_not_zero (SDM Vol. 3C \u{a7}27.2.1.1): VPID 0 is the host's\n    \
         VIRTUAL_PROCESSOR_ID (Virtual-processor identifier) = 0x0000\n    \
         expected: 1 to FFFFH\n\
         guest_rip (SDM Vol. 3C \u{a7}27.3.1.4): RIP is beyond the linear-address width\n    \
         GUEST_RIP (Guest RIP) = 0x8000000000000000\n    \
         expected: bits 63:48 all equal"
    );
}

/// §27.2: failures of checks on controls and host state are VMfailValid; guest state and MSRs
/// are only looked at after them (§27.3, §27.4).
#[test]
fn answers_come_in_order() {
    let mut s = Setup::base();
    let msr = |s: &Setup, entry| {
        let mut r = s.run();
        r.msr_loading(&s.vmcs, entry, "no such MSR", "an MSR that exists");
        r.msr_loading(&s.vmcs, entry + 1, "no such MSR", "an MSR that exists");
        r
    };
    let entry_failure = |reason, qualification| Answer::FailEntry { reason, qualification };
    assert_eq!(msr(&s, 3).architectural(), entry_failure(ExitReason::MsrLoading, 3));
    s.set(Field::LinkPointer, 1);
    assert_eq!(msr(&s, 3).architectural(), entry_failure(ExitReason::InvalidGuestState, 4));
    s.set(Field::GuestRflags, 0);
    assert_eq!(msr(&s, 3).architectural(), entry_failure(ExitReason::InvalidGuestState, 0));
    s.set(Field::HostCsSelector, 0);
    assert_eq!(msr(&s, 3).architectural(), Answer::FailValid(InstructionError::EntryInvalidHostState));
    s.set(Field::EntryControls, 0);
    assert_eq!(msr(&s, 3).architectural(), Answer::FailValid(InstructionError::EntryInvalidControls));
    assert!(msr(&s, 3).failures().len() > 4, "all are kept for the user");
}
