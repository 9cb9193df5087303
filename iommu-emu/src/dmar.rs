//! The ACPI DMA Remapping Reporting table (chapter 8).
//!
//! Not supported: reserved memory regions (RMRR), ATS capability (ATSR), affinity (RHSA), name space
//! devices (ANDD): there are no such things here.

use acpi_tables::sdt::Sdt;
use x86_spec::pci::Bdf;

/// Remapping structure type of a DRHD (§8.2).
const TYPE_DRHD: u16 = 0;
/// Flags of the table: interrupt remapping (§8.1).
const INTR_REMAP: u8 = 1 << 0;
/// Flag of a DRHD: all PCI devices of the segment that no other unit has.
const INCLUDE_PCI_ALL: u8 = 1 << 0;
/// The table up to its structures: ACPI header, host address width, flags, 10 reserved bytes.
const HEADER: u32 = 48;

/// What a device scope entry names (§8.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ScopeKind {
    /// A PCI endpoint.
    Endpoint = 1,
    /// A PCI bridge and all below it.
    Bridge = 2,
    /// An I/O APIC; the enumeration ID is that of the MADT.
    IoApic = 3,
    /// An HPET that sends messages.
    Hpet = 4,
}

/// A device that a unit serves: on a root bus, so that its path is one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceScope {
    /// What it is.
    pub kind: ScopeKind,
    /// Enumeration ID; 0 for PCI devices.
    pub id: u8,
    /// By which source ID its requests are known.
    pub source: Bdf,
}

/// A remapping unit (§8.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drhd {
    /// Where its register window is.
    pub base: u64,
    /// It serves all PCI devices that no other unit names.
    pub include_all: bool,
    /// What it serves besides.
    pub scopes: Vec<DeviceScope>,
}

/// The table's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dmar {
    /// Width of physical addresses in bits.
    pub host_address_width: u8,
    /// The units, that with [`Drhd::include_all`] last.
    pub units: Vec<Drhd>,
}

impl Dmar {
    /// The table in bytes. Interrupt remapping is offered, x2APIC is not opted out of.
    pub fn to_bytes(&self, oem_id: [u8; 6], oem_table_id: [u8; 8], oem_revision: u32) -> Vec<u8> {
        let mut table = Sdt::new(*b"DMAR", HEADER, 1, oem_id, oem_table_id, oem_revision);
        table.write_u8(36, self.host_address_width.saturating_sub(1));
        table.write_u8(37, INTR_REMAP);
        for unit in &self.units {
            table.append_slice(&unit.to_bytes());
        }
        table.as_slice().to_vec()
    }
}

impl Drhd {
    fn to_bytes(&self) -> Vec<u8> {
        let scopes: Vec<u8> = self.scopes.iter().flat_map(|s| s.to_bytes()).collect();
        let mut bytes = Vec::new();
        bytes.extend(TYPE_DRHD.to_le_bytes());
        bytes.extend((16 + scopes.len() as u16).to_le_bytes());
        bytes.push(if self.include_all { INCLUDE_PCI_ALL } else { 0 });
        // The window is one page (2^0), the segment is 0.
        bytes.extend([0, 0, 0]);
        bytes.extend(self.base.to_le_bytes());
        bytes.extend(scopes);
        bytes
    }
}

impl DeviceScope {
    /// Type, length, flags and a reserved byte, enumeration ID, start bus, path.
    fn to_bytes(self) -> [u8; 8] {
        let path = [self.source.device(), self.source.function()];
        [self.kind as u8, 8, 0, 0, self.id, self.source.bus(), path[0], path[1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of §8.1 to §8.3.1, byte by byte.
    #[test]
    fn one_unit_for_everything() {
        let scope = DeviceScope { kind: ScopeKind::IoApic, id: 2, source: Bdf::new(0xf0, 0x1f, 7) };
        let unit = Drhd { base: 0xfed9_0000, include_all: true, scopes: vec![scope] };
        let table = Dmar { host_address_width: 46, units: vec![unit] }.to_bytes(*b"OEMID_", *b"TABLE_ID", 1);
        assert_eq!(table[..4], *b"DMAR");
        assert_eq!(u32::from_le_bytes(table[4..8].try_into().unwrap()), 48 + 16 + 8);
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum");
        assert_eq!(table[36..38], [45, 1], "host address width less one, INTR_REMAP without X2APIC_OPT_OUT");
        assert_eq!(table[38..48], [0; 10]);
        assert_eq!(table[48..56], [0, 0, 24, 0, 1, 0, 0, 0], "DRHD, length, INCLUDE_PCI_ALL, segment 0");
        assert_eq!(table[56..64], 0xfed9_0000u64.to_le_bytes());
        assert_eq!(table[64..72], [3, 8, 0, 0, 2, 0xf0, 0x1f, 7], "I/O APIC 2, bus, device and function");
        assert_eq!(table.len(), 72);
    }
}
