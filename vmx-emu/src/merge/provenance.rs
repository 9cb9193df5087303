//! Where a control bit of VMCS02 comes from.

use std::fmt;

/// The origin of one bit of a control field of VMCS02.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Provenance {
    /// L0 needs it to run any guest.
    L0Needs,
    /// L1 asked for it in VMCS12.
    L1Wants,
    /// Both.
    Both,
    /// The engine does not allow another value.
    Forced,
    /// L1 asked for it; it is 0 in VMCS02 because L0 does it in software, or because the
    /// combination with L0's own settings brings the same exits.
    Emulated,
    /// It is 0, and nobody asked for it.
    Off,
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::L0Needs => "L0 needs it",
            Self::L1Wants => "L1 wants it",
            Self::Both => "L0 and L1",
            Self::Forced => "forced",
            Self::Emulated => "L0 emulates it",
            Self::Off => "off",
        })
    }
}

/// The bits of one control field and their origins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    /// The value in VMCS02.
    pub value: u32,
    /// Bits that L0 needs.
    pub l0: u32,
    /// Bits that VMCS12 sets, without those that the capability MSRs fix to 1.
    pub l1: u32,
    /// Bits that the engine fixes to 1.
    pub forced: u32,
}

impl Origins {
    /// The origin of bit number `bit` (modulo 32).
    pub const fn of(&self, bit: u32) -> Provenance {
        let mask = 1u32 << (bit & 31);
        let (l0, l1) = (self.l0 & mask != 0, self.l1 & mask != 0);
        if self.value & mask == 0 {
            return if l1 { Provenance::Emulated } else { Provenance::Off };
        }
        match (l0, l1) {
            _ if self.forced & mask != 0 => Provenance::Forced,
            (true, true) => Provenance::Both,
            (true, false) => Provenance::L0Needs,
            _ => Provenance::L1Wants,
        }
    }
}

/// The origins of all control fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControlOrigins {
    /// Pin-based.
    pub pin: Origins,
    /// Primary processor-based.
    pub primary: Origins,
    /// Secondary processor-based.
    pub secondary: Origins,
    /// VM exit.
    pub exit: Origins,
    /// VM entry.
    pub entry: Origins,
}
