//! The ACPI tables that describe the PC (ACPI Specification 6.5 ch. 5): RSDP, XSDT, FADT, FACS, DSDT,
//! MADT and MCFG, placed in the firmware area below 1 MiB.
//!
//! Not supported: tables for HPET, NUMA (SRAT), firmware logs; sleep states other than S5.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as RegisterSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use devices::ioapic::IOAPIC_BASE;
use devices::lapic::DEFAULT_APIC_BASE;
use devices::pci::{ADDRESS_PORT, ECAM_BASE, ECAM_SIZE, PciWindows};
use devices::pm::{PM_BASE, PM_TIMER, PM1_CONTROL, PM1_EVENT, SLP_TYP_S5};
use devices::reset::{RESET_PORT, RESET_VALUE};
use devices::rtc::REG_CENTURY;
use iommu_emu::Dmar;
use memory::L1Gpa;

use crate::pc::{SCI_IRQ, SERIAL_IRQ, SERIAL_PORT};
use crate::pci::{SLOTS, wire_of};

const OEM_ID: [u8; 6] = *b"NESTVM";
const OEM_TABLE_ID: [u8; 8] = *b"NESTVMM ";
const OEM_REVISION: u32 = 1;

/// Where the RSDP is: the start of the area that systems search for it (§5.2.5.1).
pub const RSDP_ADDRESS: L1Gpa = L1Gpa(0xe_0000);
/// The end of the firmware area.
const AREA_END: u64 = 0x10_0000;
/// The FACS must be aligned to 64 bytes (§5.2.10); the others may as well be.
const ALIGNMENT: u64 = 64;

/// IAPC_BOOT_ARCH (§5.2.9.3): legacy devices, 8042, no VGA.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 1 | 1 << 2;
/// A latency above which an operating system takes C2 and C3 as absent (§5.2.9).
const NO_C_STATE: u16 = 0xfff;

/// The tables, ready to be written into L1's memory.
#[derive(Clone, Debug)]
pub struct AcpiTables {
    /// Where the RSDP is, for PVH start information and Linux boot parameters.
    pub rsdp: L1Gpa,
    /// The tables' bytes and where they belong, in order of address.
    pub blobs: Vec<(L1Gpa, Vec<u8>)>,
}

/// The tables do not fit into the firmware area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ACPI tables of {cpus} CPUs do not fit below 1 MiB")]
pub struct AcpiError {
    /// The number of CPUs asked for.
    pub cpus: u16,
}

/// Places blobs one after the other.
struct Placer {
    next: u64,
    blobs: Vec<(L1Gpa, Vec<u8>)>,
}

impl Placer {
    fn place(&mut self, bytes: Vec<u8>) -> u64 {
        let at = self.next;
        self.next = (at + bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.blobs.push((L1Gpa(at), bytes));
        at
    }
}

/// Builds the tables of a PC with `cpus` vCPUs, whose APIC IDs are 0 to `cpus - 1`, and PCI devices in `windows`; `iommu`
/// says what remaps DMA and interrupts.
///
/// # Errors
/// [`AcpiError`] when so many vCPUs do not fit.
pub fn build(cpus: u16, windows: &PciWindows, iommu: Option<&Dmar>) -> Result<AcpiTables, AcpiError> {
    let rsdp_end = (RSDP_ADDRESS.0 + Rsdp::len() as u64).next_multiple_of(ALIGNMENT);
    let mut placer = Placer { next: rsdp_end, blobs: Vec::new() };
    let facs = placer.place(bytes_of(&FACS::new()));
    let dsdt = placer.place(dsdt(windows));
    let fadt = placer.place(fadt(facs, dsdt));
    let madt = placer.place(madt(cpus));
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 0xff);
    let mcfg = placer.place(bytes_of(&mcfg));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    xsdt.add_entry(mcfg);
    if let Some(dmar) = iommu {
        xsdt.add_entry(placer.place(dmar.to_bytes(OEM_ID, OEM_TABLE_ID, OEM_REVISION)));
    }
    let xsdt = placer.place(bytes_of(&xsdt));
    if placer.next > AREA_END {
        return Err(AcpiError { cpus });
    }
    let mut blobs = vec![(RSDP_ADDRESS, bytes_of(&Rsdp::new(OEM_ID, xsdt)))];
    blobs.append(&mut placer.blobs);
    Ok(AcpiTables { rsdp: RSDP_ADDRESS, blobs })
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A register in port space, `bytes` wide.
fn port_register(port: u16, bytes: u8) -> GAS {
    let access = match bytes {
        1 => AccessSize::ByteAccess,
        2 => AccessSize::WordAccess,
        _ => AccessSize::DwordAccess,
    };
    GAS::new(RegisterSpace::SystemIo, bytes * 8, 0, access, port.into())
}

/// A block of registers that are accessed `access` bytes at a time.
fn port_block(port: u16, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(RegisterSpace::SystemIo, bytes * 8, 0, access, port.into())
}

/// Fixed ACPI Description Table (§5.2.9). The 32-bit and 64-bit forms of an address agree, but the FACS has only
/// the 32-bit one: systems that find both list it twice.
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let event = PM_BASE + PM1_EVENT;
    let control = PM_BASE + PM1_CONTROL;
    let timer = PM_BASE + PM_TIMER;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::Desktop)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Fixed power button (flag clear), no sleep button, no RTC wake status.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    // The tables are below 1 MiB.
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();

    // No SMI command port: the machine is always in ACPI mode (§4.8.2.5).
    fadt.sci_int = (SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(event).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port_block(event, 4, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port_register(control, 2);
    fadt.pm_tmr_blk = u32::from(timer).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port_register(timer, 4);

    fadt.p_lvl2_lat = NO_C_STATE.into();
    fadt.p_lvl3_lat = NO_C_STATE.into();
    fadt.century = REG_CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port_register(RESET_PORT, 1);
    fadt.reset_value = RESET_VALUE;
    bytes_of(&fadt.finalize())
}

/// Multiple APIC Description Table (§5.2.12).
fn madt(cpus: u16) -> Vec<u8> {
    let mut entries: Vec<u8> = Vec::new();
    for cpu in 0..cpus {
        push_cpu(&mut entries, cpu);
    }
    push_io_apic(&mut entries);
    // ISA line 0 is pin 2, as the bus has it (conforming: edge, active high).
    push_override(&mut entries, 0, 2, 0);
    // The SCI is level-triggered and active high.
    push_override(&mut entries, SCI_IRQ as u8, SCI_IRQ, 0b1101);
    push_nmi(&mut entries, cpus);

    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, DEFAULT_APIC_BASE as u32);
    // PCAT_COMPAT: there are 8259s, too.
    madt.write_u32(40, 1);
    madt.append_slice(&entries);
    madt.as_slice().to_vec()
}

/// A processor's local APIC: the short form, or the x2APIC form for IDs that need it (§5.2.12.2,
/// §5.2.12.12). Flags: enabled.
fn push_cpu(out: &mut Vec<u8>, cpu: u16) {
    match u8::try_from(cpu) {
        Ok(id) if id < 0xff => out.extend([0, 8, id, id, 1, 0, 0, 0]),
        _ => {
            let id = u32::from(cpu).to_le_bytes();
            out.extend([9, 16, 0, 0]);
            out.extend(id);
            out.extend(1u32.to_le_bytes());
            out.extend(id);
        }
    }
}

/// The I/O APIC, from GSI 0 on (§5.2.12.3).
fn push_io_apic(out: &mut Vec<u8>) {
    out.extend([1, 12, 0, 0]);
    out.extend((IOAPIC_BASE as u32).to_le_bytes());
    out.extend(0u32.to_le_bytes());
}

/// An interrupt source override (§5.2.12.5).
fn push_override(out: &mut Vec<u8>, irq: u8, gsi: u32, flags: u16) {
    out.extend([2, 10, 0, irq]);
    out.extend(gsi.to_le_bytes());
    out.extend(flags.to_le_bytes());
}

/// NMI is LINT1 of every processor (§5.2.12.7, §5.2.12.13).
fn push_nmi(out: &mut Vec<u8>, cpus: u16) {
    out.extend([4, 6, 0xff, 0, 0, 1]);
    if cpus > 0xff {
        out.extend([0x0a, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
}

/// An ISA interrupt: edge-triggered, active high, exclusive.
fn isa_irq(irq: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, irq)
}

fn ports(first: u16, count: u8) -> IO {
    IO::new(first, first, 1, count)
}

/// The PCI host bridge (PCI Firmware Specification 3.3 §4.1): buses, configuration ports, the memory that devices may
/// have, and which interrupts their wires are.
fn host_bridge(windows: &PciWindows) -> Vec<u8> {
    let buses = AddressSpace::new_bus_number(0u16, 0xff);
    let config_ports = ports(ADDRESS_PORT, 8);
    let cacheable = AddressSpaceCacheable::NotCacheable;
    let (low_start, low_end) = (*windows.low.start() as u32, *windows.low.end() as u32);
    let low = AddressSpace::new_memory(cacheable, true, low_start, low_end, None);
    let high = AddressSpace::new_memory(cacheable, true, *windows.high.start(), *windows.high.end(), None);
    let routes: Vec<[u32; 2]> =
        (1..SLOTS).map(|device| [u32::from(device) << 16 | 0xffff, wire_of(device)]).collect();
    // Each: device, pin INTA, no link device, global system interrupt (§6.2.13).
    let routes: Vec<Package> =
        routes.iter().map(|[device, gsi]| Package::new(vec![device, &0u8, &0u8, gsi])).collect();
    let members = [
        Name::new("_HID".into(), &EISAName::new("PNP0A08")),
        Name::new("_CID".into(), &EISAName::new("PNP0A03")),
        Name::new("_UID".into(), &0u8),
        Name::new("_BBN".into(), &0u8),
        Name::new("_SEG".into(), &0u8),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &config_ports, &low, &high])),
        Name::new("_PRT".into(), &Package::new(routes.iter().map(|r| r as &dyn Aml).collect())),
    ];
    bytes_of(&device("PCI0", &members))
}

/// What belongs to the board: the memory that is PCI's configuration space (PCI Firmware Specification 3.3 §4.1.2).
fn board() -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, ECAM_BASE as u32, ECAM_SIZE as u32);
    let members = [
        Name::new("_HID".into(), &EISAName::new("PNP0C02")),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam])),
    ];
    bytes_of(&device("MBRD", &members))
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Differentiated System Description Table: the PCI host bridge, the ISA devices and `\_S5`.
fn dsdt(windows: &PciWindows) -> Vec<u8> {
    let hid = |id: &str| Name::new("_HID".into(), &EISAName::new(id));

    let com_ports = ports(SERIAL_PORT, 8);
    let com_irq = isa_irq(SERIAL_IRQ);
    let com = [
        hid("PNP0501"),
        Name::new("_UID".into(), &1u8),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&com_ports, &com_irq])),
    ];
    let rtc_ports = ports(0x70, 2);
    let rtc_irq = isa_irq(8);
    let rtc = [hid("PNP0B00"), Name::new("_CRS".into(), &ResourceTemplate::new(vec![&rtc_ports, &rtc_irq]))];
    let kbd_data = ports(0x60, 1);
    let kbd_command = ports(0x64, 1);
    let kbd_irq = isa_irq(1);
    let kbd = [
        hid("PNP0303"),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&kbd_data, &kbd_command, &kbd_irq])),
    ];
    let aux_irq = isa_irq(12);
    let aux = [hid("PNP0F13"), Name::new("_CRS".into(), &ResourceTemplate::new(vec![&aux_irq]))];

    let com = device("COM1", &com);
    let rtc = device("RTC_", &rtc);
    let kbd = device("KBD_", &kbd);
    let aux = device("MOU_", &aux);
    let (pci, board) = (Raw(host_bridge(windows)), Raw(board()));
    let bus = Scope::new("_SB_".into(), vec![&pci, &board, &com, &rtc, &kbd, &aux]);
    let s5 = Name::new("_S5_".into(), &Package::new(vec![&SLP_TYP_S5, &SLP_TYP_S5, &0u8, &0u8]));

    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&bytes_of(&s5));
    dsdt.append_slice(&bytes_of(&bus));
    dsdt.as_slice().to_vec()
}

fn device<'a>(name: &str, members: &'a [Name]) -> Device<'a> {
    Device::new(name.into(), members.iter().map(|m| m as &dyn Aml).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table<'a>(tables: &'a AcpiTables, signature: &[u8]) -> (u64, &'a [u8]) {
        tables
            .blobs
            .iter()
            .find(|(_, b)| b.starts_with(signature))
            .map(|(at, b)| (at.0, b.as_slice()))
            .unwrap()
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |acc, b| acc.wrapping_add(*b))
    }

    #[test]
    fn tables_are_linked_checked_and_apart() {
        let tables = build(1, &PciWindows::after_ram(1 << 30), None).unwrap();
        // RSDP: signature, both checksums, revision 2, XSDT address (§5.2.5.3).
        let (at, rsdp) = table(&tables, b"RSD PTR ");
        assert_eq!(at, 0xe_0000);
        assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp[15]), (0, 0, 2));
        let (xsdt_at, xsdt) = table(&tables, b"XSDT");
        assert_eq!(u64_at(rsdp, 24), xsdt_at);
        let (fadt_at, fadt) = table(&tables, b"FACP");
        let (madt_at, _) = table(&tables, b"APIC");
        assert_eq!((u64_at(xsdt, 36), u64_at(xsdt, 44)), (fadt_at, madt_at));
        let (facs_at, _) = table(&tables, b"FACS");
        let (dsdt_at, _) = table(&tables, b"DSDT");
        assert_eq!((u64_at(fadt, 132), u64_at(fadt, 140)), (0, dsdt_at));
        assert_eq!((u64::from(u32_at(fadt, 36)), u64::from(u32_at(fadt, 40))), (facs_at, dsdt_at));
        assert_eq!(facs_at % 64, 0);
        for signature in [b"XSDT", b"FACP", b"APIC", b"DSDT"] {
            let (_, bytes) = table(&tables, signature);
            assert_eq!(sum(bytes), 0);
            assert_eq!(u32_at(bytes, 4) as usize, bytes.len());
        }
        for pair in tables.blobs.windows(2) {
            assert!(pair[0].0.0 + pair[0].1.len() as u64 <= pair[1].0.0);
        }
    }

    #[test]
    fn fadt_says_what_the_machine_has() {
        let tables = build(1, &PciWindows::after_ram(1 << 30), None).unwrap();
        let (_, fadt) = table(&tables, b"FACP");
        // Offsets of §5.2.9, Table 5.9.
        assert_eq!(u16::from_le_bytes([fadt[46], fadt[47]]), 9, "SCI_INT");
        assert_eq!(u32_at(fadt, 48), 0, "SMI_CMD");
        assert_eq!((u32_at(fadt, 56), fadt[88]), (0x600, 4), "PM1a_EVT_BLK");
        assert_eq!((u32_at(fadt, 64), fadt[89]), (0x604, 2), "PM1a_CNT_BLK");
        assert_eq!((u32_at(fadt, 76), fadt[91]), (0x608, 4), "PM_TMR_BLK");
        assert_eq!(fadt[108], 0x32, "CENTURY");
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b111, "IAPC_BOOT_ARCH");
        let flags = u32_at(fadt, 112);
        assert_ne!(flags & 1 << 8, 0, "TMR_VAL_EXT");
        assert_ne!(flags & 1 << 10, 0, "RESET_REG_SUP");
        assert_eq!(flags & 1 << 20, 0, "HW_REDUCED_ACPI");
        assert_eq!(flags & 1 << 4, 0, "PWR_BUTTON: fixed hardware");
        assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0xcf9, 6), "RESET_REG, RESET_VALUE");
        // The extended forms agree: space, width in bits, address.
        assert_eq!((fadt[148], fadt[149], u64_at(fadt, 152)), (1, 32, 0x600));
        assert_eq!((fadt[172], fadt[173], u64_at(fadt, 176)), (1, 16, 0x604));
        assert_eq!((fadt[208], fadt[209], u64_at(fadt, 212)), (1, 32, 0x608));
    }

    /// The entries of a MADT, split by their lengths.
    fn madt_entries(madt: &[u8]) -> Vec<&[u8]> {
        let mut rest = &madt[44..];
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let (entry, after) = rest.split_at(rest[1].into());
            entries.push(entry);
            rest = after;
        }
        entries
    }

    #[test]
    fn madt_lists_controllers() {
        let tables = build(2, &PciWindows::after_ram(1 << 30), None).unwrap();
        let (_, madt) = table(&tables, b"APIC");
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
        let entries = madt_entries(madt);
        assert_eq!(entries[0], [0, 8, 0, 0, 1, 0, 0, 0]);
        assert_eq!(entries[1], [0, 8, 1, 1, 1, 0, 0, 0]);
        assert_eq!(entries[2], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        assert_eq!(entries[3], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
        assert_eq!(entries[4], [2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0]);
        assert_eq!(entries[5], [4, 6, 0xff, 0, 0, 1]);
        assert_eq!(entries.len(), 6);
    }

    #[test]
    fn a_dmar_is_there_with_an_iommu() {
        let tables = build(1, &PciWindows::after_ram(1 << 30), Some(&crate::iommu::dmar(46))).unwrap();
        let (_, dmar) = table(&tables, b"DMAR");
        let (_, xsdt) = table(&tables, b"XSDT");
        assert_eq!((sum(dmar), dmar[36], xsdt.len()), (0, 45, 36 + 4 * 8));
        // The scope of the I/O APIC has the MADT's ID and the unit's source ID for it.
        assert_eq!(dmar[64..], [3, 8, 0, 0, 0, 0xff, 0, 0]);
        let without = build(1, &PciWindows::after_ram(1 << 30), None).unwrap();
        assert!(without.blobs.iter().all(|(_, b)| !b.starts_with(b"DMAR")));
    }

    #[test]
    fn high_apic_ids_use_the_x2apic_form() {
        let tables = build(300, &PciWindows::after_ram(1 << 30), None).unwrap();
        let (_, madt) = table(&tables, b"APIC");
        let entries = madt_entries(madt);
        assert_eq!(entries[254], [0, 8, 254, 254, 1, 0, 0, 0]);
        assert_eq!(entries[255], [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0]);
        assert_eq!(
            build(u16::MAX, &PciWindows::after_ram(1 << 30), None).unwrap_err(),
            AcpiError { cpus: u16::MAX }
        );
    }
}
