//! The cases, by group.

mod apic;
mod boot;
mod checks;
mod ept;
mod events;
mod exits;
mod instructions;
mod pmu;
mod state;

use super::suite::Case;

/// Makes a table of cases: name, section, function.
macro_rules! cases {
    ($vmx:literal; $($name:literal $section:literal $run:expr;)*) => {
        /// The cases of this module.
        pub const CASES: &[$crate::guest::suite::Case] = &[$(
            $crate::guest::suite::Case { name: $name, section: $section, vmx: $vmx, run: $run },
        )*];
    };
}
pub(crate) use cases;

/// Calls `f` with every case.
pub fn all(f: &mut dyn FnMut(&Case)) {
    let groups = [
        boot::CASES,
        instructions::CASES,
        checks::CASES,
        events::CASES,
        ept::CASES,
        apic::CASES,
        pmu::CASES,
        state::CASES,
    ];
    for group in groups.into_iter().chain(exits::GROUPS) {
        group.iter().for_each(&mut *f);
    }
}
