//! L1's physical memory and MSRs, as VM entries and exits use them.

use engine::{GuestRegs, GuestState};
use memory::{L1Gpa, L1Ram, MachineAddr};

/// L1-physical memory. Accesses never fail, as on a bus: what is not RAM reads as ones, and
/// writes to it are lost.
pub trait L1Physical {
    /// Reads `buf.len()` bytes at `at`.
    fn read(&self, at: L1Gpa, buf: &mut [u8]);
    /// Writes `buf` at `at`.
    fn write(&self, at: L1Gpa, buf: &[u8]);
    /// The machine address behind the 4 KiB page of `at`; `None` where L1 has no RAM.
    fn machine(&self, at: L1Gpa) -> Option<MachineAddr>;

    /// Whether `bytes` are what a read at `at` would give.
    fn holds(&self, at: L1Gpa, bytes: &[u8]) -> bool {
        let mut buf = [0; 256];
        bytes.chunks(buf.len()).zip(0u64..).all(|(chunk, i)| {
            let Some(part) = buf.get_mut(..chunk.len()) else { return false };
            self.read(at.offset(i * 256), part);
            part == chunk
        })
    }

    /// Reads a little-endian 64-bit word.
    fn read_u64(&self, at: L1Gpa) -> u64 {
        let mut b = [0; 8];
        self.read(at, &mut b);
        u64::from_le_bytes(b)
    }
    /// Reads a byte.
    fn read_u8(&self, at: L1Gpa) -> u8 {
        let mut b = [0];
        self.read(at, &mut b);
        let [byte] = b;
        byte
    }
}

impl L1Physical for L1Ram {
    fn read(&self, at: L1Gpa, buf: &mut [u8]) {
        if Self::read(self, at, buf).is_err() {
            buf.fill(0xff);
        }
    }
    fn write(&self, at: L1Gpa, buf: &[u8]) {
        // Lost where there is no RAM.
        let _ = Self::write(self, at, buf);
    }
    fn holds(&self, at: L1Gpa, bytes: &[u8]) -> bool {
        match self.translate(at) {
            Some((machine, room)) if room >= bytes.len() as u64 => {
                self.memory().holds(machine, bytes) == Ok(true)
            }
            _ => bytes.iter().all(|b| *b == 0xff),
        }
    }
    fn machine(&self, at: L1Gpa) -> Option<MachineAddr> {
        self.translate(at.page_base()).filter(|(_, room)| *room >= memory::PAGE_SIZE).map(|(m, _)| m)
    }
}

/// The #GP(0) that RDMSR or WRMSR would raise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("RDMSR or WRMSR would raise #GP(0)")]
pub struct MsrFault;

/// MSRs of one logical processor of L1, for the MSR lists of VM entries and exits.
///
/// `guest` and `regs` are the context that the access belongs to: what a VMCS or
/// [`GuestRegs`] holds (IA32_EFER, IA32_PAT, SYSENTER, FS and GS bases, IA32_LSTAR …) is
/// read and written there, everything else in the processor itself.
pub trait Msrs {
    /// RDMSR at CPL 0.
    ///
    /// # Errors
    /// [`MsrFault`].
    fn read_msr(&mut self, guest: &GuestState, regs: &GuestRegs, index: u32) -> Result<u64, MsrFault>;

    /// WRMSR at CPL 0.
    ///
    /// # Errors
    /// [`MsrFault`].
    fn write_msr(
        &mut self,
        guest: &mut GuestState,
        regs: &mut GuestRegs,
        index: u32,
        value: u64,
    ) -> Result<(), MsrFault>;

    /// The local APIC is in x2APIC mode.
    fn x2apic(&self) -> bool;
}
