//! I/O and MSR bitmaps of VMCS12, alone and combined with L0's.

use std::cell::Cell;
use std::fmt;

use memory::{L1Gpa, MachineAddr, MachineMemory, MemoryError};
use x86_spec::controls::{PrimaryControls, SecondaryControls};

use crate::fields::Field;
use crate::physical::L1Physical;
use crate::vmcs12::Vmcs12;

/// Size of a bitmap page in bytes.
pub const PAGE: usize = 4096;

/// Primary controls of VMCS12.
pub fn primary12(vmcs12: &Vmcs12) -> PrimaryControls {
    PrimaryControls::from_bits_truncate(vmcs12.get32(Field::PrimaryControls))
}

/// Secondary controls of VMCS12 as they act: all 0 where they are not activated (SDM Vol.
/// 3C §25.6.2).
pub fn secondary12(vmcs12: &Vmcs12) -> SecondaryControls {
    if primary12(vmcs12).contains(PrimaryControls::SECONDARY_CONTROLS) {
        SecondaryControls::from_bits_truncate(vmcs12.get32(Field::SecondaryControls))
    } else {
        SecondaryControls::empty()
    }
}

/// Which MSR accesses of L2 the processor virtualizes under VMCS12, so that they never
/// reach the MSRs of L1's local APIC (SDM Vol. 3C §30.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X2apicVirtualization {
    tpr: bool,
    registers: bool,
    delivery: bool,
}

impl X2apicVirtualization {
    /// As VMCS12's controls have it.
    pub fn of(vmcs12: &Vmcs12) -> Self {
        let s = secondary12(vmcs12);
        let tpr = s.contains(SecondaryControls::VIRTUALIZE_X2APIC);
        Self {
            tpr,
            registers: tpr && s.contains(SecondaryControls::VIRTUALIZE_APIC_REGISTER),
            delivery: tpr && s.contains(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY),
        }
    }

    /// Whether the access is virtualized: the TPR always, reads of all with APIC-register
    /// virtualization, writes of EOI and self-IPI with virtual-interrupt delivery.
    pub const fn covers(self, msr: u32, write: bool) -> bool {
        match msr {
            0x808 => self.tpr,
            0x80b | 0x83f if write => self.delivery,
            0x800..=0x8ff => !write && self.registers,
            _ => false,
        }
    }
}

/// Whether bit `n` of the bitmap page at `page` is set; a page that is not RAM has all set.
fn bit(l1: &dyn L1Physical, page: u64, n: u64) -> bool {
    let at = L1Gpa(page).page_base().offset(n / 8);
    l1.read_u8(at) & 1 << (n % 8) != 0
}

/// Whether an access of `size` bytes at `port` exits to L1 (§26.1.3, §25.6.4).
pub fn io_exits(vmcs12: &Vmcs12, l1: &dyn L1Physical, port: u16, size: u8) -> bool {
    let controls = primary12(vmcs12);
    if !controls.contains(PrimaryControls::USE_IO_BITMAPS) {
        return controls.contains(PrimaryControls::UNCOND_IO_EXITING);
    }
    // An access that wraps around the 16-bit port space exits.
    let last = u32::from(port) + u32::from(size.max(1)) - 1;
    last > 0xffff
        || (u32::from(port)..=last).any(|p| {
            let field = if p < 0x8000 { Field::IoBitmapA } else { Field::IoBitmapB };
            bit(l1, vmcs12.get(field), u64::from(p & 0x7fff))
        })
}

/// The bit of an MSR in the MSR bitmaps (§25.6.9); `None` outside both ranges, where all
/// accesses exit.
pub const fn msr_bit(msr: u32, write: bool) -> Option<u64> {
    let base = match msr {
        0..=0x1fff => 0,
        0xc000_0000..=0xc000_1fff => 0x400 * 8,
        _ => return None,
    };
    Some(base + (msr & 0x1fff) as u64 + if write { 0x800 * 8 } else { 0 })
}

/// Whether an access to `msr` exits to L1 (§26.1.3).
pub fn msr_exits(vmcs12: &Vmcs12, l1: &dyn L1Physical, msr: u32, write: bool) -> bool {
    if !primary12(vmcs12).contains(PrimaryControls::USE_MSR_BITMAPS) {
        return true;
    }
    match msr_bit(msr, write) {
        Some(n) => bit(l1, vmcs12.get(Field::MsrBitmap), n),
        None => true,
    }
}

/// Writes to `target` the bitmap in which a bit is set if it is set in L0's page at `l0` or in
/// L1's at `l1_page`: an access passes only if both let it pass.
///
/// # Errors
/// [`MemoryError`] when `l0` or `target` is not in machine memory.
pub fn combine(
    memory: &MachineMemory,
    l1: &dyn L1Physical,
    l0: MachineAddr,
    l1_page: u64,
    target: MachineAddr,
) -> Result<(), MemoryError> {
    let (mut ours, mut theirs) = ([0; PAGE], [0; PAGE]);
    memory.read(l0, &mut ours)?;
    l1.read(L1Gpa(l1_page).page_base(), &mut theirs);
    or_into(&mut ours, &theirs);
    memory.write(target, &ours)
}

/// MSR bitmaps combined, as [`combine`], but the accesses that VMCS12 has virtualized follow L1's
/// bitmap alone: they do not touch what L0 guards.
///
/// What was combined last is remembered: as long as L1's page holds the same, there is nothing to do. It
/// is compared at each entry, since L1 can write to it at any time.
#[derive(Default)]
pub struct MsrBitmaps(Cell<Option<Box<Combined>>>);

/// What the combined page was made of.
struct Combined {
    l0: MachineAddr,
    target: MachineAddr,
    virtualized: X2apicVirtualization,
    theirs: [u8; PAGE],
}

impl fmt::Debug for MsrBitmaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MsrBitmaps").finish_non_exhaustive()
    }
}

impl MsrBitmaps {
    /// Has `target` hold the combination of the page at `l0`, which must not change any more, with
    /// VMCS12's. Nobody else may write to `target`.
    ///
    /// # Errors
    /// As [`combine`].
    pub fn combine(
        &self,
        memory: &MachineMemory,
        l1: &dyn L1Physical,
        l0: MachineAddr,
        vmcs12: &Vmcs12,
        target: MachineAddr,
    ) -> Result<(), MemoryError> {
        let virtualized = X2apicVirtualization::of(vmcs12);
        let page = L1Gpa(vmcs12.get(Field::MsrBitmap)).page_base();
        let last = self.0.take();
        if let Some(c) = &last
            && (c.l0, c.target, c.virtualized) == (l0, target, virtualized)
            && l1.holds(page, &c.theirs)
        {
            self.0.set(last);
            return Ok(());
        }
        let new = || Box::new(Combined { l0, target, virtualized, theirs: [0; PAGE] });
        let mut combined = last.unwrap_or_else(new);
        (combined.l0, combined.target, combined.virtualized) = (l0, target, virtualized);
        l1.read(page, &mut combined.theirs);
        combine_msr(memory, l0, virtualized, &combined.theirs, target)?;
        self.0.set(Some(combined));
        Ok(())
    }
}

fn combine_msr(
    memory: &MachineMemory,
    l0: MachineAddr,
    virtualized: X2apicVirtualization,
    theirs: &[u8; PAGE],
    target: MachineAddr,
) -> Result<(), MemoryError> {
    let mut ours = [0; PAGE];
    memory.read(l0, &mut ours)?;
    if virtualized.tpr {
        for (msr, write) in (0x800..=0x8ff).flat_map(|m| [(m, false), (m, true)]) {
            if virtualized.covers(msr, write)
                && let Some(n) = msr_bit(msr, write)
                && let Some(byte) = ours.get_mut(n as usize / 8)
            {
                *byte &= !(1 << (n % 8));
            }
        }
    }
    or_into(&mut ours, theirs);
    memory.write(target, &ours)
}

fn or_into(ours: &mut [u8; PAGE], theirs: &[u8; PAGE]) {
    for (a, b) in ours.iter_mut().zip(theirs) {
        *a |= b;
    }
}
