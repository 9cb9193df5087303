//! Operands of VMX instructions, from what the VM exit says of them (SDM Vol. 3C §28.2.5,
//! tables 28-13 and 28-14; the displacement is the exit qualification, §28.2.1).
//!
//! Segmentation is checked as the processor would (SDM Vol. 3A chapter 6, and the exception
//! lists in Vol. 3D chapter 31). Not here: paging, which [`L1`] does, and alignment checks,
//! which do not apply at CPL 0.

use engine::{LinearFault, Segment, VmExit};
use x86_spec::segment::seg;

use crate::l1::{Fault, L1, L1Ext};

/// Size of an address in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSize {
    /// 16 bits.
    Bits16,
    /// 32 bits.
    Bits32,
    /// 64 bits.
    Bits64,
}

impl AddressSize {
    const fn mask(self) -> u64 {
        match self {
            Self::Bits16 => 0xffff,
            Self::Bits32 => 0xffff_ffff,
            Self::Bits64 => u64::MAX,
        }
    }
}

/// VM-exit instruction information for VMREAD, VMWRITE, VMCLEAR, VMPTRLD, VMPTRST, VMXON,
/// INVEPT and INVVPID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstructionInfo(pub u32);

impl InstructionInfo {
    /// Scaling of the index: its shift count (bits 1:0).
    pub const fn scale(self) -> u32 {
        self.0 & 3
    }
    /// The register operand, where there is no memory operand (bits 6:3).
    pub const fn reg1(self) -> usize {
        (self.0 >> 3 & 15) as usize
    }
    /// Address size (bits 9:7). Values above 2 are not defined; they count as 2.
    pub const fn address_size(self) -> AddressSize {
        match self.0 >> 7 & 7 {
            0 => AddressSize::Bits16,
            1 => AddressSize::Bits32,
            _ => AddressSize::Bits64,
        }
    }
    /// The operand is a register (bit 10).
    pub const fn is_register(self) -> bool {
        self.0 >> 10 & 1 != 0
    }
    /// Segment register (bits 17:15). 6 and 7 are not defined; they count as DS.
    pub const fn segment(self) -> usize {
        let s = (self.0 >> 15 & 7) as usize;
        if s > seg::GS { seg::DS } else { s }
    }
    /// Index register (bits 21:18), unless bit 22 says there is none.
    pub const fn index(self) -> Option<usize> {
        if self.0 >> 22 & 1 != 0 { None } else { Some((self.0 >> 18 & 15) as usize) }
    }
    /// Base register (bits 26:23), unless bit 27 says there is none.
    pub const fn base(self) -> Option<usize> {
        if self.0 >> 27 & 1 != 0 { None } else { Some((self.0 >> 23 & 15) as usize) }
    }
    /// The second register operand (bits 31:28).
    pub const fn reg2(self) -> usize {
        (self.0 >> 28) as usize
    }
}

/// How memory is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryAccess {
    /// It is read.
    Read,
    /// It is written.
    Write,
}

/// The effective address of the memory operand: base + index · scale + displacement, cut to
/// the address size.
pub fn effective_address<T: L1 + ?Sized>(l1: &T, exit: &VmExit) -> u64 {
    let info = InstructionInfo(exit.instruction_info);
    let register = |r: Option<usize>| r.map_or(0, |r| l1.gpr(r));
    let address = exit
        .qualification
        .wrapping_add(register(info.base()))
        .wrapping_add(register(info.index()) << info.scale());
    address & info.address_size().mask()
}

/// Whether `linear` is canonical with 48 or, where CR4.LA57 is 1, 57 bits (SDM Vol. 1
/// §3.3.7.1).
pub const fn is_canonical(linear: u64, cr4: u64) -> bool {
    let unused = if cr4 & x86_spec::reg::cr4::LA57 != 0 { 7 } else { 16 };
    ((linear << unused) as i64 >> unused) as u64 == linear
}

/// The linear address of the memory operand of `size` bytes (at least 1).
///
/// # Errors
/// #GP(0) or #SS(0) by the rules of segmentation.
pub fn linear_address<T: L1 + ?Sized>(
    l1: &T,
    exit: &VmExit,
    access: MemoryAccess,
    size: u64,
) -> Result<u64, Fault> {
    let register = InstructionInfo(exit.instruction_info).segment();
    let segment = l1.guest().segments[register];
    let fault = if register == seg::SS { Fault::SS } else { Fault::GP };
    let effective = effective_address(l1, exit);
    let last = size.saturating_sub(1);
    if l1.is_64bit() {
        let base = if register >= seg::FS { segment.base } else { 0 };
        let linear = base.wrapping_add(effective);
        let canonical = |a: u64| is_canonical(a, l1.cr4());
        let end = linear.checked_add(last).filter(|end| canonical(linear) && canonical(*end));
        end.map(|_| linear).ok_or(fault)
    } else if type_allows(&segment, access) && limit_allows(&segment, effective, last) {
        Ok(segment.base.wrapping_add(effective) & 0xffff_ffff)
    } else {
        Err(fault)
    }
}

/// Whether a segment outside 64-bit mode can be accessed so: usable; not written if it is
/// code or read-only data, not read if it is execute-only code (SDM Vol. 3A §6.7.2).
fn type_allows(segment: &Segment, access: MemoryAccess) -> bool {
    let rights = segment.access;
    let by_type = match access {
        MemoryAccess::Read => !rights.is_code() || rights.read_write(),
        MemoryAccess::Write => !rights.is_code() && rights.read_write(),
    };
    !rights.unusable() && by_type
}

/// Whether the bytes from `effective` to `effective + last` lie within the segment's limit
/// (SDM Vol. 3A §6.3): up to the limit, or above it in an expand-down segment.
fn limit_allows(segment: &Segment, effective: u64, last: u64) -> bool {
    let limit = segment.limit as u64;
    let Some(end) = effective.checked_add(last) else { return false };
    if segment.access.expand_down() {
        let top = if segment.access.db() { 0xffff_ffff } else { 0xffff };
        effective > limit && end <= top
    } else {
        end <= limit
    }
}

/// Reads the memory operand.
///
/// # Errors
/// The exception or exit that the access causes.
pub fn read<T: L1 + ?Sized, const N: usize>(l1: &mut T, exit: &VmExit) -> Result<[u8; N], LinearFault> {
    let linear = linear_address(l1, exit, MemoryAccess::Read, N as u64)?;
    let mut buf = [0; N];
    l1.read_linear(linear, &mut buf)?;
    Ok(buf)
}

/// Writes the memory operand.
///
/// # Errors
/// The exception or exit that the access causes; nothing was written then.
pub fn write<T: L1 + ?Sized>(l1: &mut T, exit: &VmExit, value: &[u8]) -> Result<(), LinearFault> {
    let linear = linear_address(l1, exit, MemoryAccess::Write, value.len() as u64)?;
    l1.write_linear(linear, value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Machine;
    use x86_spec::exit::ExitReason;
    use x86_spec::reg::gpr;
    use x86_spec::segment::AccessRights;

    fn exit(info: u32, displacement: u64) -> VmExit {
        let mut e = VmExit::new(ExitReason::Vmptrld).qualified(displacement);
        e.instruction_info = info;
        e
    }

    /// Bits of instruction information for a memory operand.
    fn info(size: u32, segment: usize, base: Option<usize>, index: Option<(usize, u32)>) -> u32 {
        let base = base.map_or(1 << 27, |b| (b as u32) << 23);
        let index = index.map_or(1 << 22, |(i, scale)| (i as u32) << 18 | scale);
        size << 7 | (segment as u32) << 15 | base | index
    }

    const READ: MemoryAccess = MemoryAccess::Read;
    const WRITE: MemoryAccess = MemoryAccess::Write;

    /// SDM Vol. 3C table 28-14.
    #[test]
    fn parts_of_instruction_information() {
        let i = InstructionInfo(3 | 9 << 3 | 1 << 7 | 1 << 10 | 5 << 15 | 10 << 18 | 11 << 23 | 12 << 28);
        assert_eq!((i.scale(), i.reg1(), i.reg2()), (3, 9, 12));
        assert_eq!(i.address_size(), AddressSize::Bits32);
        assert!(i.is_register());
        assert_eq!((i.segment(), i.index(), i.base()), (seg::GS, Some(10), Some(11)));
        assert_eq!(InstructionInfo(1 << 22 | 1 << 27).index(), None);
        assert_eq!(InstructionInfo(1 << 22 | 1 << 27).base(), None);
    }

    #[test]
    fn effective_addresses_are_cut_to_the_address_size() {
        let mut m = Machine::long();
        m.l1.regs.gpr[gpr::RAX] = 0xffff_ffff_0001_fff0;
        m.l1.regs.gpr[gpr::RCX] = 8;
        let ea = |m: &Machine, size| {
            let i = info(size, seg::DS, Some(gpr::RAX), Some((gpr::RCX, 2)));
            effective_address(&m.l1, &exit(i, (-4i64) as u64))
        };
        assert_eq!(ea(&m, 2), 0xffff_ffff_0002_000c);
        assert_eq!(ea(&m, 1), 0x0002_000c);
        assert_eq!(ea(&m, 0), 0x000c);
    }

    #[test]
    fn bases_in_64_bit_mode_are_those_of_fs_and_gs() {
        let mut m = Machine::long();
        for s in &mut m.l1.guest.segments {
            s.base = 0x10_0000;
            // Limits and rights do not count.
            s.limit = 0;
            if s.access.is_code() {
                continue;
            }
            s.access = AccessRights(AccessRights::UNUSABLE);
        }
        for (s, expected) in
            [(seg::DS, 0x40), (seg::SS, 0x40), (seg::CS, 0x40), (seg::FS, 0x10_0040), (seg::GS, 0x10_0040)]
        {
            let e = exit(info(2, s, None, None), 0x40);
            assert_eq!(linear_address(&m.l1, &e, WRITE, 8), Ok(expected));
        }
    }

    /// #GP(0), or #SS(0) through SS, for a non-canonical address (SDM Vol. 3D §31.3, 64-bit
    /// mode exceptions).
    #[test]
    fn addresses_must_be_canonical() {
        let mut m = Machine::long();
        for (address, ok) in [
            (0x7fff_ffff_fff8, true),
            (0x7fff_ffff_fff9, false),
            (0x8000_0000_0000, false),
            (0xffff_8000_0000_0000, true),
            (0xffff_7fff_ffff_ffff, false),
            (u64::MAX, false),
        ] {
            for (s, fault) in [(seg::DS, Fault::GP), (seg::SS, Fault::SS), (seg::GS, Fault::GP)] {
                let e = exit(info(2, s, None, None), address);
                let expected = if ok { Ok(address) } else { Err(fault) };
                assert_eq!(linear_address(&m.l1, &e, READ, 8), expected, "{address:#x}");
            }
        }
        m.l1.guest.cr4 |= x86_spec::reg::cr4::LA57;
        let e = exit(info(2, seg::DS, None, None), 0x8000_0000_0000);
        assert_eq!(linear_address(&m.l1, &e, READ, 8), Ok(0x8000_0000_0000));
    }

    /// SDM Vol. 3A §6.3, §6.7.2; 8-byte accesses.
    #[test]
    fn segments_in_protected_mode() {
        // (access rights, limit, address, access, allowed)
        for (rights, limit, at, access, ok) in [
            (0xc093, 0xffff, 0xfff8, WRITE, true),
            (0xc093, 0xffff, 0xfff9, READ, false),
            (0xc093, 0xffff_ffff, 0xffff_fff8, READ, true),
            (0xc093, 0xffff_ffff, 0xffff_fff9, READ, false),
            // Read-only data, execute-only and readable code.
            (0xc091, 0xffff, 0, READ, true),
            (0xc091, 0xffff, 0, WRITE, false),
            (0xc099, 0xffff, 0, READ, false),
            (0xc09b, 0xffff, 0, READ, true),
            (0xc09b, 0xffff, 0, WRITE, false),
            // Expand-down, 32 and 16 bits.
            (0xc097, 0xffff, 0x1_0000, READ, true),
            (0xc097, 0xffff, 0xffff, READ, false),
            (0xc097, 0xffff, 0xffff_fff9, READ, false),
            (0x0097, 0x0fff, 0xfff8, READ, true),
            (0x0097, 0x0fff, 0xfff9, READ, false),
            // Unusable.
            (0x1_c093, 0xffff, 0, READ, false),
        ] {
            for (s, fault) in [(seg::ES, Fault::GP), (seg::SS, Fault::SS)] {
                let mut m = Machine::protected();
                let segment = &mut m.l1.guest.segments[s];
                (segment.access, segment.limit, segment.base) = (AccessRights(rights), limit, 0x100);
                let e = exit(info(1, s, None, None), at);
                let expected = if ok { Ok((at + 0x100) & 0xffff_ffff) } else { Err(fault) };
                assert_eq!(linear_address(&m.l1, &e, access, 8), expected, "{rights:#x} at {at:#x}");
            }
        }
    }
}
