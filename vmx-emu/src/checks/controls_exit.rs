//! Checks on VM-exit control fields (SDM Vol. 3C §27.2.1.2).

use x86_spec::controls::{ExitControls as X, PinbasedControls as P};

use super::{Context, Findings, rules};
use crate::Field::*;
use crate::capabilities;

/// Reserved bits in the VM-exit controls must be set properly (§27.2.1.2, A.4).
pub(super) fn exit_controls_reserved(c: &Context, f: &mut Findings) {
    rules::control_field(c, f, ExitControls, c.caps.exit, capabilities::EXIT);
}

/// Without "activate VMX-preemption timer", "save VMX-preemption timer value" must be 0
/// (§27.2.1.2).
pub(super) fn save_preemption_timer_needs_timer(c: &Context, f: &mut Findings) {
    f.require(
        c.pin(P::VMX_PREEMPTION_TIMER) || !c.exit(X::SAVE_VMX_PREEMPTION_TIMER),
        &[PinControls, ExitControls],
        "a preemption timer that is not active would be saved",
        "activate VMX-preemption timer (pin-based bit 6) = 1 or save its value (exit bit 22) = 0",
    );
}

/// With a VM-exit MSR-store count that is not 0, the area must be 16-byte aligned and within
/// the physical-address width to its last byte (§27.2.1.2).
pub(super) fn exit_msr_store_area(c: &Context, f: &mut Findings) {
    rules::msr_area(c, f, ExitMsrStoreAddress, ExitMsrStoreCount);
}

/// With a VM-exit MSR-load count that is not 0, the area must be 16-byte aligned and within
/// the physical-address width to its last byte (§27.2.1.2).
pub(super) fn exit_msr_load_area(c: &Context, f: &mut Findings) {
    rules::msr_area(c, f, ExitMsrLoadAddress, ExitMsrLoadCount);
}
