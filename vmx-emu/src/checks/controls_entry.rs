//! Checks on VM-entry control fields (SDM Vol. 3C §27.2.1.3).

use x86_spec::controls::{EntryControls as N, PrimaryControls as C};
use x86_spec::exception::{self, AC, DF, GP, NP, PF, SS, TS};
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::reg::cr0;

use super::{Context, Findings, rules};
use crate::Field::*;
use crate::capabilities::{self, misc};

/// Reserved bits in the VM-entry controls must be set properly (§27.2.1.3, A.5).
pub(super) fn entry_controls_reserved(c: &Context, f: &mut Findings) {
    rules::control_field(c, f, EntryControls, c.caps.entry, capabilities::ENTRY);
}

/// The type of an injected event is not reserved: 1 always is; 7 is on processors without
/// "monitor trap flag" (§27.2.1.3).
pub(super) fn injection_type(c: &Context, f: &mut Findings) {
    let Some(event) = c.injection() else { return };
    let reserved = match event.event_type() {
        EventType::Reserved => true,
        EventType::Other => !c.caps.has_primary(C::MONITOR_TRAP_FLAG),
        _ => false,
    };
    f.require(
        !reserved,
        &[EntryInterruptionInfo],
        "the event's type is reserved",
        "bits 10:8 other than 1, and 7 only where the monitor trap flag is supported",
    );
}

/// The vector of an injected event fits its type: 2 for an NMI, at most 31 for a hardware
/// exception, 0 for a pending MTF exit (§27.2.1.3).
pub(super) fn injection_vector(c: &Context, f: &mut Findings) {
    let Some(event) = c.injection() else { return };
    let fits = match event.event_type() {
        EventType::Nmi => event.vector() == exception::NMI,
        EventType::HardwareException => event.vector() <= 31,
        EventType::Other => event.vector() == 0,
        _ => true,
    };
    f.require(
        fits,
        &[EntryInterruptionInfo],
        "the event's vector does not fit its type",
        "bits 7:0 = 2 for an NMI, at most 31 for a hardware exception, 0 for other events",
    );
}

/// Exceptions that deliver an error code. #CP is not among them: where it exists,
/// IA32_VMX_BASIC bit 56 is 1, which L1 is not offered.
fn delivers_error_code(event: InterruptionInfo) -> bool {
    event.event_type() == EventType::HardwareException
        && matches!(event.vector(), DF | TS | NP | SS | GP | PF | AC)
}

/// The guest can be in real-address mode, where no error code is delivered. It takes an
/// unrestricted guest: without that control CR0.PE counts as 1 whatever the field holds, and
/// the check on guest CR0 finds it.
fn real_mode(c: &Context) -> bool {
    c.unrestricted() && c.get(GuestCr0) & cr0::PE == 0
}

/// Deliver-error-code is 1 for hardware exceptions #DF, #TS, #NP, #SS, #GP, #PF and #AC in
/// protected mode (§27.2.1.3; IA32_VMX_BASIC bit 56 is 0).
pub(super) fn injection_error_code_required(c: &Context, f: &mut Findings) {
    let Some(event) = c.injection() else { return };
    f.require(
        event.has_error_code() || !delivers_error_code(event) || real_mode(c),
        &[EntryInterruptionInfo, GuestCr0],
        "an exception that has an error code is injected without one",
        "deliver error code (bit 11) = 1",
    );
}

/// Deliver-error-code is 0 for anything but these exceptions, and in real-address mode
/// (§27.2.1.3; IA32_VMX_BASIC bit 56 is 0).
pub(super) fn injection_error_code_forbidden(c: &Context, f: &mut Findings) {
    let Some(event) = c.injection() else { return };
    f.require(
        !event.has_error_code() || delivers_error_code(event) && !real_mode(c),
        &[EntryInterruptionInfo, GuestCr0],
        "an event that has no error code is injected with one",
        "deliver error code (bit 11) = 0",
    );
}

/// Reserved bits of the interruption information, 30:12, are 0 (§27.2.1.3).
pub(super) fn injection_reserved_bits(c: &Context, f: &mut Findings) {
    let Some(event) = c.injection() else { return };
    f.require(
        event.0 & 0x7fff_f000 == 0,
        &[EntryInterruptionInfo],
        "reserved bits of the interruption information",
        "bits 30:12 = 0",
    );
}

/// With deliver-error-code, bits 31:16 of the error code are 0 (§27.2.1.3).
pub(super) fn injection_error_code_value(c: &Context, f: &mut Findings) {
    let Some(event) = c.injection() else { return };
    f.require(
        !event.has_error_code() || c.get(EntryErrorCode) >> 16 == 0,
        &[EntryInterruptionInfo, EntryErrorCode],
        "reserved bits of the error code",
        "bits 31:16 = 0",
    );
}

/// For software interrupts and exceptions the instruction length is 1–15, or 0 where
/// IA32_VMX_MISC bit 30 is 1 (§27.2.1.3).
pub(super) fn injection_instruction_length(c: &Context, f: &mut Findings) {
    use EventType::{PrivilegedSoftwareException, SoftwareException, SoftwareInterrupt};
    let Some(event) = c.injection() else { return };
    let software =
        matches!(event.event_type(), SoftwareInterrupt | SoftwareException | PrivilegedSoftwareException);
    let least = u64::from(c.caps.misc & misc::ZERO_LENGTH_INJECTION == 0);
    if software && !(least..=15).contains(&c.get(EntryInstructionLength)) {
        f.fail(
            &[EntryInterruptionInfo, EntryInstructionLength],
            "no instruction has this length",
            format!("{least} to 15"),
        );
    }
}

/// With a VM-entry MSR-load count that is not 0, the area must be 16-byte aligned and within
/// the physical-address width to its last byte (§27.2.1.3).
pub(super) fn entry_msr_load_area(c: &Context, f: &mut Findings) {
    rules::msr_area(c, f, EntryMsrLoadAddress, EntryMsrLoadCount);
}

/// Outside SMM, where L1 always is, "entry to SMM" and "deactivate dual-monitor treatment"
/// must be 0 (§27.2.1.3).
pub(super) fn entry_smm_controls(c: &Context, f: &mut Findings) {
    f.require(
        !c.entry(N::ENTRY_TO_SMM) && !c.entry(N::DEACTIVATE_DUAL_MONITOR),
        &[EntryControls],
        "controls for SMM outside SMM",
        "entry to SMM (bit 10) = 0 and deactivate dual-monitor treatment (bit 11) = 0",
    );
}
