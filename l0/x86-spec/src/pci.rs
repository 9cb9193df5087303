//! What names a PCI function: bus, device, function (PCI Express Base Specification 6.0 §2.2.4.2). It is also
//! the requester ID of the function's own transactions, by which a DMA remapping unit tells devices
//! apart (Intel VT-d specification §3.4.1).

use core::fmt;

/// Bus, device and function of a PCI function: its requester ID.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf(u16);

impl Bdf {
    /// Function `function` (0–7) of device `device` (0–31) of bus `bus`; higher bits are dropped.
    pub const fn new(bus: u8, device: u8, function: u8) -> Self {
        Self((bus as u16) << 8 | (device as u16 & 31) << 3 | function as u16 & 7)
    }

    /// From a requester ID: bus in bits 15:8, device in 7:3, function in 2:0.
    pub const fn from_requester_id(id: u16) -> Self {
        Self(id)
    }

    /// The requester ID: bus in bits 15:8, device in 7:3, function in 2:0.
    pub const fn requester_id(self) -> u16 {
        self.0
    }

    /// The bus number.
    pub const fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// The device number, 0–31.
    pub const fn device(self) -> u8 {
        self.0 as u8 >> 3
    }

    /// The function number, 0–7.
    pub const fn function(self) -> u8 {
        self.0 as u8 & 7
    }

    /// Device and function, as the index of a VT-d context-table entry (VT-d §9.3).
    pub const fn devfn(self) -> u8 {
        self.0 as u8
    }
}

impl fmt::Display for Bdf {
    /// As Linux and lspci write it: `00:1f.2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus(), self.device(), self.function())
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bdf({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_a_requester_id_has_them() {
        let bdf = Bdf::new(0x12, 0x1f, 2);
        assert_eq!(bdf.requester_id(), 0x12fa);
        assert_eq!(Bdf::from_requester_id(0x12fa), bdf);
        assert_eq!((bdf.bus(), bdf.device(), bdf.function(), bdf.devfn()), (0x12, 0x1f, 2, 0xfa));
        assert_eq!(bdf.to_string(), "12:1f.2");
    }
}
