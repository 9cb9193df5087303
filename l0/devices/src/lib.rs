//! The devices of a PC, each a model of its datasheet behind two small traits
//! ([`PioDevice`], [`MmioDevice`]), and the interrupt fabric that connects them to
//! the vCPUs' local APICs.
//!
//! Devices never block (what may take long, a [`worker`] does) and never call the hypervisor directly. They take the time from a
//! [`Clock`], raise interrupts through an [`IrqLine`], and report what ends the
//! machine through an [`EventSink`]. Locks are taken in one order: a device's own,
//! then the interrupt controllers', then a local APIC's.

pub mod clock;
pub mod debug_exit;
pub mod device;
pub mod disk;
pub mod fabric;
pub mod fw_cfg;
pub mod i8042;
pub mod ioapic;
pub mod lapic;
pub mod message;
pub mod nvme;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod testdev;
pub mod virtio;
pub mod worker;

pub use clock::{Clock, ClockTsc, ManualClock, MonotonicClock, TscSource};
pub use device::{EventSink, IrqLine, IrqSink, MachineEvent, MmioDevice, PioDevice, TimedDevice, lock};
pub use fabric::{Interrupts, OtherApics, Waiting};
pub use lapic::{ApicAction, GpFault, LapicConfig, LocalApic};
pub use message::{DeliveryMode, Destination, InterruptMessage};
