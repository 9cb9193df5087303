//! Local APICs that the engine has: the machine's interrupt messages in the format of devices' writes.

use std::sync::Arc;

use devices::{DeliveryMode, Destination, InterruptMessage, OtherApics};
use engine::{LocalApics, Message};

/// The engine's local APICs as the machine's interrupt controllers see them.
pub(crate) struct EngineApics(pub Arc<dyn LocalApics>);

impl OtherApics for EngineApics {
    fn deliver(&self, message: &InterruptMessage) -> bool {
        encode(message).is_some_and(|m| self.0.send(m))
    }
    fn set_level_messages(&self, messages: &[Option<InterruptMessage>; devices::ioapic::PINS]) {
        self.0.set_level_messages(&messages.map(|m| encode(&m?)));
    }
}

/// SDM Vol. 3A §11.11.1 and §11.11.2. `None` for what only processors can send: to an ID of more than 8 bits, or to all
/// but one.
fn encode(m: &InterruptMessage) -> Option<Message> {
    /// Destination mode: logical.
    const LOGICAL: u32 = 1 << 2;
    /// Level: assert.
    const ASSERT: u32 = 1 << 14;
    /// Trigger mode: level.
    const LEVEL: u32 = 1 << 15;
    let (id, mode) = match m.destination {
        Destination::Physical(id) => (u8::try_from(id).ok()?, 0),
        Destination::Logical(id) => (u8::try_from(id).ok()?, LOGICAL),
        Destination::All => (0xff, 0),
        Destination::AllExcept(_) => return None,
    };
    let delivery = match m.delivery {
        DeliveryMode::Fixed => 0,
        DeliveryMode::LowestPriority => 1,
        DeliveryMode::Smi => 2,
        DeliveryMode::Nmi => 4,
        DeliveryMode::Init => 5,
        DeliveryMode::StartUp => 6,
        DeliveryMode::ExtInt => 7,
    };
    let trigger = if m.level { LEVEL | ASSERT } else { 0 };
    Some(Message {
        address: 0xfee0_0000 | u32::from(id) << 12 | mode,
        data: u32::from(m.vector) | delivery << 8 | trigger,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_encoded_as_devices_write_them() {
        // SDM Vol. 3A figures 11-24 and 11-25.
        let fixed = InterruptMessage {
            destination: Destination::Physical(3),
            delivery: DeliveryMode::Fixed,
            vector: 0x41,
            level: false,
        };
        assert_eq!(encode(&fixed), Some(Message { address: 0xfee0_3000, data: 0x41 }));
        let logical = InterruptMessage {
            destination: Destination::Logical(0x81),
            delivery: DeliveryMode::LowestPriority,
            level: true,
            ..fixed
        };
        assert_eq!(encode(&logical), Some(Message { address: 0xfee8_1004, data: 0xc141 }));
        let nmi = InterruptMessage { destination: Destination::All, delivery: DeliveryMode::Nmi, ..fixed };
        assert_eq!(encode(&nmi), Some(Message { address: 0xfeef_f000, data: 0x441 }));
        for destination in [Destination::AllExcept(0), Destination::Physical(256)] {
            assert_eq!(encode(&InterruptMessage { destination, ..fixed }), None);
        }
    }
}
