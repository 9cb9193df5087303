//! L1's MSRs, for the MSR lists of its VM entries and exits.

use devices::{GpFault, LocalApic};
use engine::{GuestRegs, GuestState};
use vmx_emu::physical::{MsrFault, Msrs};
use x86_spec::msr;

use crate::board::Board;
use crate::exits::CpuApic;
use crate::msr::{MsrContext, MsrState};

/// The MSRs of one vCPU.
pub(super) struct MsrView<'a> {
    msrs: &'a mut MsrState,
    apic: CpuApic<'a>,
}

impl<'a> MsrView<'a> {
    pub fn new(msrs: &'a mut MsrState, board: &'a dyn Board, cpu: usize) -> Self {
        Self { msrs, apic: CpuApic { board, cpu } }
    }
}

/// IA32_APIC_BASE: x2APIC mode.
const X2APIC_MODE: u64 = 3 << 10;

impl Msrs for MsrView<'_> {
    fn read_msr(&mut self, guest: &GuestState, regs: &GuestRegs, index: u32) -> Result<u64, MsrFault> {
        // Reading changes nothing in the context; the copies are for the one signature.
        let (mut guest, mut regs) = (guest.clone(), regs.clone());
        let mut cx = MsrContext { guest: &mut guest, regs: &mut regs, apic: &mut self.apic };
        self.msrs.read(index, &mut cx).map_err(|GpFault| MsrFault)
    }

    fn write_msr(
        &mut self,
        guest: &mut GuestState,
        regs: &mut GuestRegs,
        index: u32,
        value: u64,
    ) -> Result<(), MsrFault> {
        let mut cx = MsrContext { guest, regs, apic: &mut self.apic };
        self.msrs.write(index, value, &mut cx).map_err(|GpFault| MsrFault)
    }

    fn x2apic(&self) -> bool {
        debug_assert!(LocalApic::is_apic_msr(msr::IA32_APIC_BASE));
        let base = self.apic.board.interrupts().read_msr(self.apic.cpu, msr::IA32_APIC_BASE);
        base.is_ok_and(|v| v & X2APIC_MODE == X2APIC_MODE)
    }
}
