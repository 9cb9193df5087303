//! The interruption-information format that VM entry, VM exit and IDT vectoring share
//! (SDM Vol. 3C §25.8.3, §25.9.2, §25.9.3).

/// Type of an event (bits 10:8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventType {
    /// External interrupt.
    External = 0,
    /// Reserved.
    Reserved = 1,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// Hardware exception.
    HardwareException = 3,
    /// Software interrupt (INT n).
    SoftwareInterrupt = 4,
    /// Privileged software exception (INT1).
    PrivilegedSoftwareException = 5,
    /// Software exception (INT3, INTO).
    SoftwareException = 6,
    /// Other event (MTF, only for injection).
    Other = 7,
}

/// An interruption-information field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    /// Bit 31: the field is valid.
    pub const VALID: u32 = 1 << 31;
    /// Bit 11: an error code goes with it.
    pub const ERROR_CODE: u32 = 1 << 11;
    /// Bit 12: NMI unblocking due to IRET (exit information only).
    pub const NMI_UNBLOCKING: u32 = 1 << 12;

    /// No event.
    pub const NONE: Self = Self(0);

    /// A valid field for `vector` of type `ty`.
    pub const fn new(vector: u8, ty: EventType, error_code: bool) -> Self {
        Self(Self::VALID | vector as u32 | (ty as u32) << 8 | if error_code { Self::ERROR_CODE } else { 0 })
    }
    /// Whether bit 31 is set.
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }
    /// The vector, bits 7:0.
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }
    /// The type, bits 10:8.
    pub const fn event_type(self) -> EventType {
        match (self.0 >> 8) & 7 {
            0 => EventType::External,
            1 => EventType::Reserved,
            2 => EventType::Nmi,
            3 => EventType::HardwareException,
            4 => EventType::SoftwareInterrupt,
            5 => EventType::PrivilegedSoftwareException,
            6 => EventType::SoftwareException,
            _ => EventType::Other,
        }
    }
    /// Whether an error code goes with it, bit 11.
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_fault_is_encoded_as_the_manual_says() {
        let i = InterruptionInfo::new(14, EventType::HardwareException, true);
        assert_eq!(i.0, 0x8000_0b0e);
        assert_eq!(i.event_type(), EventType::HardwareException);
        assert_eq!(i.vector(), 14);
        assert!(i.has_error_code() && i.is_valid());
    }
}
