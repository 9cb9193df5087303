//! The cases, by group.

mod apic;
mod boot;
mod checks;
mod debug;
mod direct;
mod ept;
mod events;
mod exits;
mod instructions;
mod mwait;
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

/// Every case, by group.
pub const GROUPS: &[&[Case]] = &[
    boot::CASES,
    instructions::CASES,
    checks::CASES,
    events::CASES,
    debug::CASES,
    mwait::CASES,
    ept::CASES,
    apic::CASES,
    direct::CASES,
    pmu::CASES,
    state::CASES,
    exits::GROUPS[0],
    exits::GROUPS[1],
];

/// Calls `f` with every case.
pub fn all(f: &mut dyn FnMut(&Case)) {
    GROUPS.iter().for_each(|group| group.iter().for_each(&mut *f));
}
