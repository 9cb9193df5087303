//! Interrupt messages between I/O APIC and local APICs (Intel SDM Vol. 3A §11.6, §11.11).

/// How an interrupt is delivered (SDM Vol. 3A §11.6.1, ICR bits 10:8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// To all destinations, with the message's vector.
    Fixed,
    /// To the destination that runs at the lowest priority.
    LowestPriority,
    /// System management interrupt. There is no SMM here: it is dropped.
    Smi,
    /// Non-maskable interrupt; the vector is ignored.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI; the vector is the page to start at.
    StartUp,
    /// As if from an 8259: the vector comes from the 8259.
    ExtInt,
}

impl DeliveryMode {
    /// Decodes the three-bit field of ICR, LVT and redirection entries; `None` for 011b
    /// and, outside the ICR, for 110b, which the caller rejects.
    pub fn from_bits(bits: u64) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            2 => Some(Self::Smi),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::StartUp),
            7 => Some(Self::ExtInt),
            _ => None,
        }
    }
}

/// Which local APICs a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The one with this APIC ID.
    Physical(u32),
    /// Those whose logical destination register matches.
    Logical(u32),
    /// Every one.
    All,
    /// Every one but the one with this APIC ID.
    AllExcept(u32),
}

impl Destination {
    /// The destination of an 8-bit field: 0xFF is a broadcast in both modes (SDM Vol. 3A
    /// §11.6.2.1, §11.6.2.2).
    pub fn from_xapic(dest: u8, logical: bool) -> Self {
        match (dest, logical) {
            (0xff, _) => Self::All,
            (d, true) => Self::Logical(d.into()),
            (d, false) => Self::Physical(d.into()),
        }
    }

    /// The destination of a 32-bit field: 0xFFFF_FFFF is a broadcast in both modes (SDM
    /// Vol. 3A §11.12.9).
    pub fn from_x2apic(dest: u32, logical: bool) -> Self {
        match (dest, logical) {
            (u32::MAX, _) => Self::All,
            (d, true) => Self::Logical(d),
            (d, false) => Self::Physical(d),
        }
    }
}

/// One interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMessage {
    /// For whom.
    pub destination: Destination,
    /// How.
    pub delivery: DeliveryMode,
    /// Vector, or start page for a start-up IPI.
    pub vector: u8,
    /// Level-triggered (sets the TMR bit, so that its EOI is broadcast).
    pub level: bool,
}
