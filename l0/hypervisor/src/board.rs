//! What the vCPU loop needs of the machine: its buses, interrupts, timers and events.

use devices::{Interrupts, MachineEvent};
use engine::ExitBus;
use memory::{Gpa, L1Gpa, L1Ram};

/// The machine around the vCPUs.
pub trait Board: Send + Sync {
    /// Reads `size` (1, 2 or 4) bytes from an I/O port, zero-extended.
    fn pio_read(&self, port: u16, size: u8) -> u32;
    /// Writes to an I/O port.
    fn pio_write(&self, port: u16, size: u8, value: u32);
    /// Reads `size` (1, 2, 4 or 8) bytes of device memory as vCPU `cpu`, zero-extended.
    fn mmio_read(&self, cpu: usize, gpa: u64, size: u8) -> u64;
    /// Writes device memory as vCPU `cpu`.
    fn mmio_write(&self, cpu: usize, gpa: u64, size: u8, value: u64);
    /// The interrupt controllers.
    fn interrupts(&self) -> &Interrupts;
    /// Nanoseconds since power-on.
    fn now_ns(&self) -> u64;
    /// Lets timers expire whose time has come.
    fn tick(&self);
    /// When [`Self::tick`] is wanted next, in nanoseconds since power-on.
    fn next_deadline(&self) -> Option<u64>;
    /// Takes what the guest asked of the machine as a whole.
    fn take_event(&self) -> Option<MachineEvent>;
}

/// The buses as one vCPU sees them. RAM is there too, for instructions that access a device and memory
/// which exits (a page that is write-protected).
pub(crate) struct CpuBus<'a> {
    pub board: &'a dyn Board,
    pub cpu: usize,
    pub ram: &'a L1Ram,
}

impl ExitBus for CpuBus<'_> {
    fn mmio_read(&mut self, gpa: Gpa, size: u8) -> u64 {
        let mut bytes = [0; 8];
        let len = usize::from(size).min(bytes.len());
        match bytes.get_mut(..len).map(|b| self.ram.read(L1Gpa(gpa.0), b)) {
            Some(Ok(())) => u64::from_le_bytes(bytes),
            _ => self.board.mmio_read(self.cpu, gpa.0, size),
        }
    }
    fn mmio_write(&mut self, gpa: Gpa, size: u8, value: u64) {
        let bytes = value.to_le_bytes();
        let bytes = bytes.get(..usize::from(size)).unwrap_or(&bytes);
        if self.ram.write(L1Gpa(gpa.0), bytes).is_err() {
            self.board.mmio_write(self.cpu, gpa.0, size, value);
        }
    }
    fn pio_read(&mut self, port: u16, size: u8) -> u32 {
        self.board.pio_read(port, size)
    }
    fn pio_write(&mut self, port: u16, size: u8, value: u32) {
        self.board.pio_write(port, size, value);
    }
}

/// The same without RAM: accesses to that exit.
pub(crate) struct DeviceBus<'a>(pub CpuBus<'a>);

impl ExitBus for DeviceBus<'_> {
    fn is_device(&mut self, gpa: Gpa, _: bool) -> bool {
        self.0.ram.translate(L1Gpa(gpa.0)).is_none()
    }
    fn mmio_read(&mut self, gpa: Gpa, size: u8) -> u64 {
        self.0.mmio_read(gpa, size)
    }
    fn mmio_write(&mut self, gpa: Gpa, size: u8, value: u64) {
        self.0.mmio_write(gpa, size, value);
    }
    fn pio_read(&mut self, port: u16, size: u8) -> u32 {
        self.0.pio_read(port, size)
    }
    fn pio_write(&mut self, port: u16, size: u8, value: u32) {
        self.0.pio_write(port, size, value);
    }
}

impl Board for machine::Pc {
    fn pio_read(&self, port: u16, size: u8) -> u32 {
        self.pio_read(port, size)
    }
    fn pio_write(&self, port: u16, size: u8, value: u32) {
        self.pio_write(port, size, value);
    }
    fn mmio_read(&self, cpu: usize, gpa: u64, size: u8) -> u64 {
        self.mmio_read(cpu, L1Gpa(gpa), size)
    }
    fn mmio_write(&self, cpu: usize, gpa: u64, size: u8, value: u64) {
        self.mmio_write(cpu, L1Gpa(gpa), size, value);
    }
    fn interrupts(&self) -> &Interrupts {
        self.interrupts()
    }
    fn now_ns(&self) -> u64 {
        self.now_ns()
    }
    fn tick(&self) {
        self.tick(self.now_ns());
    }
    fn next_deadline(&self) -> Option<u64> {
        self.next_deadline()
    }
    fn take_event(&self) -> Option<MachineEvent> {
        self.take_event()
    }
}
