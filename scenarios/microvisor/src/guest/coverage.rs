//! What the cases cause: exit reasons and VM-instruction errors that came while a case ran, against the
//! tables that say which cases are for which.

use super::cases::GROUPS;
use super::suite::{Outcome, fail};

include!("../coverage.rs");

// Each case that the tables name exists.
const _: () = {
    all_exist(EXITS);
    all_exist(ERRORS);
};

const fn all_exist(table: &[Covered]) {
    let mut i = 0;
    while i < table.len() {
        let mut k = 0;
        while k < table[i].causes.len() {
            assert!(exists(table[i].causes[k]), "coverage.rs names a case that does not exist");
            k += 1;
        }
        k = 0;
        while k < table[i].passes.len() {
            assert!(exists(table[i].passes[k]), "coverage.rs names a case that does not exist");
            k += 1;
        }
        i += 1;
    }
}

const fn exists(name: &str) -> bool {
    let mut group = 0;
    while group < GROUPS.len() {
        let mut i = 0;
        while i < GROUPS[group].len() {
            if same(GROUPS[group][i].name, name) {
                return true;
            }
            i += 1;
        }
        group += 1;
    }
    false
}

/// Sets of numbers: what came in the present case, and in the whole run.
#[derive(Clone, Copy)]
struct Seen {
    exits: u128,
    errors: u128,
}

static mut NOW: Seen = Seen { exits: 0, errors: 0 };
static mut EVER: Seen = Seen { exits: 0, errors: 0 };

/// An exit with this reason came; the flags above the basic reason do not matter.
pub fn exit(reason: u32) {
    unsafe { NOW.exits |= 1_u128.checked_shl(reason & 0xffff).unwrap_or(0) };
}

/// A VMX instruction failed with this error.
pub fn error(number: u32) {
    unsafe { NOW.errors |= 1_u128.checked_shl(number).unwrap_or(0) };
}

/// A case starts.
pub fn start() {
    unsafe { NOW = Seen { exits: 0, errors: 0 } };
}

/// A case has passed: what it is listed for has come.
pub fn passed(case: &str) -> Outcome {
    let now = unsafe { NOW };
    for (what, table, seen) in
        [("exit reason", EXITS, now.exits), ("VM-instruction error", ERRORS, now.errors)]
    {
        for row in table.iter().filter(|row| row.causes.contains(&case)) {
            if seen >> row.number & 1 == 0 {
                fail!("{what} {} did not come, which the case is listed for", row.number)
            }
        }
    }
    unsafe {
        EVER.exits |= now.exits;
        EVER.errors |= now.errors;
    }
    Ok(())
}

/// Prints how much of the tables has come in passed cases.
pub fn summary() {
    let ever = unsafe { EVER };
    let count =
        |table: &[Covered], seen: u128| table.iter().filter(|row| seen >> row.number & 1 != 0).count();
    println!(
        "coverage: {} of {} exit reasons, {} of {} VM-instruction errors",
        count(EXITS, ever.exits),
        EXITS.len(),
        count(ERRORS, ever.errors),
        ERRORS.len()
    );
}
