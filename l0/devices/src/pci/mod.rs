//! PCI Express as a PC has it: a root complex with a host bridge, endpoints on the root bus and endpoints behind root
//! ports; configuration through ports 0xCF8/0xCFC (PCI Local Bus Specification 3.0 §3.2.2.3.2) and through memory
//! (ECAM, PCI Express Base Specification 6.0 §7.2.2).
//!
//! Each endpoint is a device of its own, with function 0 only, and is either on the root bus or alone behind a port with
//! access control services: so a system can give each to another guest.
//!
//! Not supported: more than one segment, switches, bridges to conventional PCI, I/O space, hot plug, error reporting.

pub mod config;
pub mod endpoint;
pub mod express;
pub mod port;
pub mod root;
pub mod signals;

pub use config::{Bar, Identity};
pub use endpoint::{Endpoint, EndpointConfig, MsixLayout, Registers};
pub use root::{PciPorts, PciRoot, PciWindows};
pub use signals::{SharedWire, Signals};

/// Port of the configuration address register, which takes 32-bit accesses only.
pub const ADDRESS_PORT: u16 = 0xcf8;
/// First of the four ports of the configuration data window.
pub const DATA_PORT: u16 = 0xcfc;
/// Number of ports of that window.
pub const DATA_PORTS: u16 = 4;

/// Where configuration space is in memory: 1 MiB for each of 256 buses.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Size of configuration space in memory.
pub const ECAM_SIZE: u64 = 256 << 20;

#[cfg(test)]
pub(crate) mod testing {
    //! What tests of functions share.

    use std::sync::Mutex;

    use memory::dma::MessageSink;
    use x86_spec::pci::Bdf;

    use crate::device::lock;

    /// Records messages.
    #[derive(Default)]
    pub struct Messages(Mutex<Vec<(Bdf, u64, u32)>>);

    impl Messages {
        /// The messages since the last call.
        pub fn take(&self) -> Vec<(Bdf, u64, u32)> {
            std::mem::take(&mut lock(&self.0))
        }
    }

    impl MessageSink for Messages {
        fn send(&self, requester: Bdf, address: u64, data: u32) {
            lock(&self.0).push((requester, address, data));
        }
    }
}
