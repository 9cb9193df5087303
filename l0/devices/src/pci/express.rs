//! The PCI Express capability, and Access Control Services (PCI Express Base Specification 6.0 §7.5.3, §7.7.11).
//!
//! Not supported: slots and hot plug, errors, links of more than one lane or other than the first speed (there is no
//! link whose width could matter).

use super::config::ConfigSpace;

const CAP_EXPRESS: u8 = 0x10;
const CAP_ACS: u16 = 0x000d;

/// Device control: initiate a function-level reset; reads as zero.
const INITIATE_RESET: u16 = 1 << 15;
/// Offset of device control in the capability.
const DEVICE_CONTROL: usize = 8;

/// What a function is in the hierarchy (§7.5.3.2, device/port type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortType {
    /// At the end of a link.
    Endpoint = 0,
    /// A port of the root complex.
    RootPort = 4,
    /// An endpoint on the root bus, without a link.
    RootComplexIntegratedEndpoint = 9,
}

/// Adds the capability; its offset. `port` is the number of a port.
pub fn add(c: &mut ConfigSpace, kind: PortType, port: u8) -> usize {
    const VERSION: u16 = 2;
    let is_port = kind == PortType::RootPort;
    let has_link = kind != PortType::RootComplexIntegratedEndpoint;
    let mut body = [0u8; 58];
    let mut writable = [0u8; 58];
    // Offsets in the capability; the body starts at 2.
    let mut set = |at: usize, value: u32, mask: u32| {
        let at = at - 2;
        body[at..at + 4].copy_from_slice(&value.to_le_bytes());
        writable[at..at + 4].copy_from_slice(&mask.to_le_bytes());
    };
    // Device capabilities: payloads of 128 bytes, role-based error reporting, function-level reset.
    let reset = if is_port { 0 } else { 1 << 28 };
    set(4, 1 << 15 | reset, 0);
    // Device control: reporting enables, relaxed ordering, payload size and so on.
    set(8, 0, if is_port { 0x7fff } else { 0xffff });
    if has_link {
        // 2.5 GT/s, one lane; the port's number; ports report whether the link is active.
        let reports = if is_port { 1 << 20 } else { 0 };
        set(12, 1 | 1 << 4 | reports | u32::from(port) << 24, 0);
        // Link control; link status: speed, width, active. Retrain (bit 5) reads as zero.
        let active = if is_port { 1 << 13 } else { 0 };
        set(16, (1 | 1 << 4 | active) << 16, 0x07db);
        // Link capabilities 2: 2.5 GT/s. Link control 2: target speed.
        set(44, 1 << 1, 0);
        set(48, 1, 0xf);
    }
    if is_port {
        // Root control.
        set(28, 0, 0x1f);
    }
    set(40, 0, 0x1f);
    let capabilities = VERSION | (kind as u16) << 4;
    body[..2].copy_from_slice(&capabilities.to_le_bytes());
    c.add_capability(CAP_EXPRESS, &body, &writable)
}

/// Whether a write to the capability at `at` asked for a function-level reset; forgets it.
pub fn take_function_reset(c: &mut ConfigSpace, at: usize) -> bool {
    let control = c.u16(at + DEVICE_CONTROL);
    if control & INITIATE_RESET == 0 {
        return false;
    }
    c.write(at + DEVICE_CONTROL, 2, u32::from(control & !INITIATE_RESET));
    true
}

/// Adds Access Control Services to a root port: source validation, translation blocking, redirection of requests and
/// completions, upstream forwarding. Transfers between devices are not done at all, so each holds by
/// construction, and the system can keep devices behind different ports apart.
pub fn add_access_control(c: &mut ConfigSpace) {
    const SERVICES: u8 = 0b1_1111;
    c.add_extended(CAP_ACS, &[SERVICES, 0, 0, 0], &[0, 0, SERVICES]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config::Identity;

    fn space(kind: PortType) -> (ConfigSpace, usize) {
        let identity =
            Identity { vendor: 1, device: 1, revision: 0, class: 0, subsystem_vendor: 0, subsystem: 0 };
        let mut c = ConfigSpace::endpoint(&identity);
        let at = add(&mut c, kind, 3);
        (c, at)
    }

    #[test]
    fn the_capability_says_what_the_function_is() {
        for (kind, bits, flr) in [
            (PortType::Endpoint, 0x0002, true),
            (PortType::RootPort, 0x0042, false),
            (PortType::RootComplexIntegratedEndpoint, 0x0092, true),
        ] {
            let (c, at) = space(kind);
            assert_eq!((c.read(at, 1), c.u16(at + 2)), (0x10, bits));
            assert_eq!(c.u32(at + 4) >> 28 & 1 == 1, flr);
            let link = kind != PortType::RootComplexIntegratedEndpoint;
            assert_eq!(c.u16(at + 18) & 0x3ff == 0x11, link, "link status of {kind:?}");
        }
    }

    #[test]
    fn a_reset_is_asked_for_once() {
        let (mut c, at) = space(PortType::Endpoint);
        c.write(at + 8, 2, 0xa000);
        assert!(take_function_reset(&mut c, at));
        assert_eq!(c.read(at + 8, 2), 0x2000);
        assert!(!take_function_reset(&mut c, at));
        let (mut c, at) = space(PortType::RootPort);
        c.write(at + 8, 2, 0xa000);
        assert!(!take_function_reset(&mut c, at));
    }
}
