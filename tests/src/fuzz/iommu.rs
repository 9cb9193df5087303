//! The IOMMU: register writes, tables and queues of any contents, DMA and interrupts.

use std::sync::Arc;

use iommu_emu::{Access, AddressType, Config, InterruptRequest, Iommu, Iova, Progress};
use memory::{L1Gpa, L1Ram, MachineMemory, RamLayout};
use x86_spec::pci::Bdf;

use super::Bytes;

/// Small, so that random addresses often hit it.
const RAM: u64 = 1 << 20;
/// Registers that do something.
const REGISTERS: [u64; 24] = [
    0x18, 0x18, 0x20, 0x28, 0x34, 0x38, 0x3c, 0x40, 0x44, 0x80, 0x88, 0x88, 0x90, 0x9c, 0xa0, 0xa4, 0xa8,
    0xac, 0xb8, 0xf0, 0xf8, 0x208, 0x278, 0x64,
];
/// IQT_REG.
const IQT: u64 = 0x88;
/// Where [`prepare`] puts the queue.
const QUEUE: u64 = 0x3000;
/// A queue has at most 2^15 descriptors, and 256 are executed at a time; each wait can end a piece.
const PIECES: u32 = 2 << 15;

/// Feeds `data` to an IOMMU. What it translates to must be in RAM if it says so, and no call may run without bound.
/// Returns how many accesses, interrupts and descriptors got through.
pub fn iommu(data: &[u8]) -> [u64; 3] {
    let mut b = Bytes(data);
    let options = b.u8();
    let config = Config {
        host_address_width: b.u8(),
        caching_mode: options & 1 != 0,
        extended_interrupts: options & 2 != 0,
        posted_interrupts: options & 4 != 0,
    };
    let memory = Arc::new(MachineMemory::new(RAM).expect("a megabyte"));
    let ram = L1Ram::new(memory, RamLayout::new(RAM)).expect("RAM inside memory");
    let mut unit = Iommu::new(config, ram.clone());
    if options & 8 != 0 {
        prepare(&mut unit, &ram);
    }
    let mut passed = [0; 3];
    while !b.0.is_empty() {
        let (what, which) = (b.u8(), b.u8());
        let source = Bdf::from_requester_id(u16::from(which) & 0x0f1f);
        match what & 7 {
            0 | 1 => {
                let at = L1Gpa(address(&mut b) & !7);
                let value = table_value(&mut b);
                let _ = ram.write(at, &value.to_le_bytes());
            }
            2 | 3 => {
                let offset = REGISTERS[usize::from(which) % REGISTERS.len()] + u64::from(what >> 6 & 1) * 4;
                let size = if what & 0x80 != 0 { 8 } else { 4 };
                // What is enabled stays so most of the time.
                let enables =
                    if offset == 0x18 && options & 8 != 0 && which & 0x40 != 0 { 0x86 << 24 } else { 0 };
                let value = table_value(&mut b) | enables;
                unit.write(offset, size, value);
                settle(&mut unit);
            }
            4 if what & 8 != 0 => {
                let (tail, kind) = (unit.read(IQT, 8), u64::from(which));
                let domain = b.u64() & [0, 0x1f_0000][usize::from(which >> 7)];
                let high = if what & 0x10 != 0 { 0 } else { table_value(&mut b) };
                let descriptor = [kind & 7 | (kind >> 3 & 3) << 4 | domain, high];
                // An error before is cleared, so that the queue goes on.
                unit.write(0x34, 4, 1 << 4);
                for (at, half) in (QUEUE + tail..).step_by(8).zip(descriptor) {
                    let _ = ram.write(L1Gpa(at), &half.to_le_bytes());
                }
                unit.write(IQT, 8, (tail + 0x10) & 0xff0);
                settle(&mut unit);
            }
            4 => {
                let offset = u64::from(which) << 2;
                let _ = unit.read(offset, 1 << (what >> 6));
            }
            5 => {
                let request =
                    InterruptRequest { address: 0xfee0_0000 | b.u64() & 0xf_ffff, data: b.u8().into() };
                passed[1] += u64::from(unit.remap(source, request).is_ok());
            }
            _ => {
                let access =
                    [Access::Read, Access::Write, Access::ZeroLengthRead][usize::from(what >> 6) % 3];
                let kind = if what & 0x38 == 0 { AddressType::Translated } else { AddressType::Untranslated };
                let iova = Iova(address(&mut b));
                if let Ok(to) = unit.translate_request(source, iova, access, kind) {
                    assert_ne!(to.len, 0);
                    if let Some(machine) = to.machine {
                        assert_eq!(ram.translate(to.gpa).map(|(at, _)| at), Some(machine));
                        let last = to.gpa.offset(to.len - 1);
                        assert!(to.len > RAM || ram.translate(last).is_some(), "{to:?}");
                    }
                    passed[0] += u64::from(unit.translation_enabled());
                }
            }
        }
        assert!(unit.take_events().count() <= 2);
    }
    passed[2] = unit.stats().descriptors;
    passed
}

/// Tables for every device in the first pages of RAM, and everything enabled: root, contexts, a table that leads to
/// itself, queue, interrupt entries.
fn prepare(unit: &mut Iommu<L1Ram>, ram: &L1Ram) {
    let poke = |at: u64, value: u64| {
        let _ = ram.write(L1Gpa(at), &value.to_le_bytes());
    };
    for i in 0..0x20 {
        poke(i * 16, 0x1001);
        poke(0x1000 + i * 16, 0x2001);
        poke(0x1008 + i * 16, i << 8 | 2);
        poke(0x4000 + i * 16, 1 | i << 16);
    }
    poke(0x2000, 0x2003);
    for (offset, value) in
        [(0x20, 0), (0x90, QUEUE), (0xb8, 0x4007), (0x18, 1 << 30 | 1 << 24), (0x18, 0x86 << 24)]
    {
        unit.write(offset, 8, value);
        settle(unit);
    }
}

/// Lets the unit do what it was told.
fn settle(unit: &mut Iommu<L1Ram>) {
    for _ in 0..PIECES {
        match unit.advance() {
            Progress::Idle => return,
            Progress::More => {}
            Progress::Drain(wait) => unit.drained(wait),
        }
    }
    panic!("the invalidation queue has no end");
}

/// An address in one of few places, or any.
fn address(b: &mut Bytes) -> u64 {
    let v = b.u64();
    match v & 3 {
        0 => v >> 8 & 0x3fff,
        1 => v >> 8 & 0xf_ffff,
        2 => (v >> 8 & 3) << 30 | (v >> 16 & 3) << 21 | v >> 24 & 0x3fff,
        _ => v,
    }
}

/// What tables, descriptors and registers hold: pointers to low pages with low bits, commands, or anything.
fn table_value(b: &mut Bytes) -> u64 {
    let v = b.u64();
    match v & 7 {
        0..=2 => (v >> 8 & 3) << 12 | v >> 16 & 0xfff & [0x3, 0x83, 0xf, 0xfff][v as usize >> 60 & 3],
        3 => (v >> 8 & 0xf) | (v >> 12 & 0xff) << 4 | (v >> 32 & 0xff) << 32,
        4 => v & 0xff80_0000,
        5 => (v >> 60 & 7) << 61 | v & 0x3_ffff_fff8,
        6 => v >> 8 & 0xff0,
        _ => v,
    }
}
