//! L1 as `vmx-emu` sees it: the registers of VMCS01 and L1's memory.

use engine::{EngineVmcs, ExitBus, GuestRegs, GuestState, LinearFault, Vcpu};
use memory::{Gpa, L1Ram, PAGE_SIZE};
use vmx_emu::{L1, L1Physical};
use x86_spec::exit::ExitReason;

/// One vCPU stopped at a VMX instruction of L1.
pub(crate) struct L1View<'a, V: Vcpu> {
    pub vcpu: &'a mut V,
    pub vmcs01: &'a mut EngineVmcs,
    pub regs: &'a mut GuestRegs,
    pub ram: &'a L1Ram,
    /// What is not memory: reads of nothing give ones there, writes are lost.
    pub bus: &'a mut dyn ExitBus,
}

/// Where an access of at most two pages is split: (offset, length) of each part.
fn parts(linear: u64, len: usize) -> [(usize, usize); 2] {
    let first = len.min(PAGE_SIZE as usize - (linear % PAGE_SIZE) as usize);
    [(0, first), (first, len - first)]
}

impl<V: Vcpu> L1View<'_, V> {
    /// Where on the bus an access that the engine refused is; other faults stay faults.
    fn on_bus(&mut self, done: Result<(), LinearFault>, write: bool) -> Result<Option<Gpa>, LinearFault> {
        match done {
            Ok(()) => Ok(None),
            Err(LinearFault::Exit(exit))
                if exit.reason == ExitReason::EptViolation
                    && self.bus.is_device(exit.guest_physical, write) =>
            {
                Ok(Some(exit.guest_physical))
            }
            Err(fault) => Err(fault),
        }
    }

    fn bus_read(&mut self, at: Gpa, buf: &mut [u8]) {
        for (i, byte) in buf.iter_mut().enumerate() {
            *byte = self.bus.mmio_read(Gpa(at.0.wrapping_add(i as u64)), 1) as u8;
        }
    }

    fn bus_write(&mut self, at: Gpa, buf: &[u8]) {
        match <[u8; 4]>::try_from(buf) {
            Ok(word) => self.bus.mmio_write(at, 4, u32::from_le_bytes(word).into()),
            Err(_) => {
                for (i, byte) in buf.iter().enumerate() {
                    self.bus.mmio_write(Gpa(at.0.wrapping_add(i as u64)), 1, (*byte).into());
                }
            }
        }
    }
}

/// What a guest reads of a control register: host-owned bits come from the read shadow (SDM
/// Vol. 3C §25.6.6).
const fn visible(real: u64, mask: u64, shadow: u64) -> u64 {
    real & !mask | shadow & mask
}

impl<V: Vcpu> L1 for L1View<'_, V> {
    fn guest(&self) -> &GuestState {
        &self.vmcs01.guest
    }
    fn guest_mut(&mut self) -> &mut GuestState {
        &mut self.vmcs01.guest
    }
    fn regs(&self) -> &GuestRegs {
        self.regs
    }
    fn regs_mut(&mut self) -> &mut GuestRegs {
        self.regs
    }
    fn cr0(&self) -> u64 {
        let c = &self.vmcs01.controls;
        visible(self.vmcs01.guest.cr0, c.cr0_mask, c.cr0_shadow)
    }
    fn cr4(&self) -> u64 {
        let c = &self.vmcs01.controls;
        visible(self.vmcs01.guest.cr4, c.cr4_mask, c.cr4_shadow)
    }
    fn physical(&self) -> &dyn L1Physical {
        self.ram
    }
    fn read_linear(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), LinearFault> {
        let done = self.vcpu.read_linear(self.vmcs01, self.regs, linear, buf);
        if self.on_bus(done, false)?.is_none() {
            return Ok(());
        }
        // Page by page; every fault comes before the first access to a device.
        let mut devices = [None; 2];
        for ((at, len), device) in parts(linear, buf.len()).into_iter().zip(&mut devices) {
            let part = &mut buf[at..at + len];
            if len != 0 {
                let linear = linear.wrapping_add(at as u64);
                let done = self.vcpu.read_linear(self.vmcs01, self.regs, linear, part);
                *device = self.on_bus(done, false)?;
            }
        }
        for ((at, len), device) in parts(linear, buf.len()).into_iter().zip(devices) {
            if let Some(gpa) = device {
                self.bus_read(gpa, &mut buf[at..at + len]);
            }
        }
        Ok(())
    }
    fn write_linear(&mut self, linear: u64, buf: &[u8]) -> Result<(), LinearFault> {
        let done = self.vcpu.write_linear(self.vmcs01, self.regs, linear, buf);
        if self.on_bus(done, true)?.is_none() {
            return Ok(());
        }
        // Each page is first written with what it holds, so that all faults come before the first change.
        let mut devices = [None; 2];
        let mut old = buf.to_vec();
        for ((at, len), device) in parts(linear, buf.len()).into_iter().zip(&mut devices) {
            let part = &mut old[at..at + len];
            if len != 0 {
                let linear = linear.wrapping_add(at as u64);
                let done = self.vcpu.read_linear(self.vmcs01, self.regs, linear, part);
                self.on_bus(done, false)?;
                let done = self.vcpu.write_linear(self.vmcs01, self.regs, linear, part);
                *device = self.on_bus(done, true)?;
            }
        }
        for ((at, len), device) in parts(linear, buf.len()).into_iter().zip(devices) {
            let part = &buf[at..at + len];
            match device {
                Some(gpa) => self.bus_write(gpa, part),
                None if len != 0 => {
                    let linear = linear.wrapping_add(at as u64);
                    self.vcpu.write_linear(self.vmcs01, self.regs, linear, part)?;
                }
                None => {}
            }
        }
        Ok(())
    }
}
