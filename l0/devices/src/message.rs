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

impl InterruptMessage {
    /// The interrupt that a device's write of `data` to `address` stands for (SDM Vol. 3A §11.11); `None` when it
    /// is none: another address, or a delivery mode that messages can't have.
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        const BASE: u64 = 0xfee0_0000;
        const LOGICAL: u64 = 1 << 2;
        const LEVEL: u32 = 1 << 15;
        const ASSERT: u32 = 1 << 14;
        if address & !0xf_ffff != BASE {
            return None;
        }
        let delivery = DeliveryMode::from_bits((data >> 8).into())?;
        let level = data & LEVEL != 0;
        // The end of a level-triggered interrupt is no message of its own for a local APIC.
        if delivery == DeliveryMode::StartUp || level && data & ASSERT == 0 {
            return None;
        }
        Some(Self {
            destination: Destination::from_xapic((address >> 12) as u8, address & LOGICAL != 0),
            delivery,
            vector: data as u8,
            level,
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_signalled_interrupts_are_decoded_as_the_manual_has_them() {
        // SDM Vol. 3A figures 11-24 and 11-25: destination in 19:12, mode in bit 2; vector, delivery mode in 10:8.
        let message = InterruptMessage::from_msi(0xfee0_3000, 0x0041).unwrap();
        assert_eq!(message.destination, Destination::Physical(3));
        assert_eq!((message.delivery, message.vector, message.level), (DeliveryMode::Fixed, 0x41, false));
        let message = InterruptMessage::from_msi(0xfee0_200c, 0x0142).unwrap();
        assert_eq!(message.destination, Destination::Logical(2));
        assert_eq!(message.delivery, DeliveryMode::LowestPriority);
        assert!(InterruptMessage::from_msi(0xfee0_0000, 0xc041).unwrap().level);
        for (address, data) in
            [(0xfed0_0000, 0x41), (0x1_fee0_0000, 0x41), (0xfee0_0000, 0x8041), (0xfee0_0000, 0x341)]
        {
            assert_eq!(InterruptMessage::from_msi(address, data), None, "{address:#x} {data:#x}");
        }
    }
}
