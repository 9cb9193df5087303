//! VMREAD and VMWRITE in non-root operation against a shadow VMCS (SDM Vol. 3C §25.10, §26.1.3;
//! Vol. 3D chapter 31).
//!
//! The shadow VMCS is a page of machine memory whose layout L0 says ([`ShadowLayout`]); each field
//! has 8 bytes there.
//!
//! Not supported: read-only fields (VM-instruction error 13): L0 lets VMWRITE through its bitmap only
//! for fields that may be written.

use iced_x86::{Instruction, OpKind, Register};
use x86_spec::controls::SecondaryControls;
use x86_spec::reg::rflags;

use super::msr::bit;
use crate::cpu::{Cpu, Exec};

/// Encodings have 15 bits; bit 0 is the access type.
const ENCODINGS: usize = 1 << 15;
/// Encoding of the VM-instruction error field.
const INSTRUCTION_ERROR: u64 = 0x4400;
/// VM-instruction error: VMREAD or VMWRITE from or to an unsupported VMCS component.
const UNSUPPORTED_COMPONENT: u64 = 12;

/// A field of a shadow VMCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowField {
    /// Encoding for full access (SDM Vol. 3D appendix B).
    pub encoding: u32,
    /// Offset in the page.
    pub offset: u16,
    /// Width in bytes: 2, 4 or 8.
    pub width: u8,
}

/// Where fields are in a shadow VMCS.
#[derive(Clone, Debug, Default)]
pub struct ShadowLayout {
    /// Index into `fields` plus 1, by encoding bits 14:1.
    slots: Vec<u16>,
    fields: Vec<ShadowField>,
}

impl ShadowLayout {
    /// A layout of `fields`; those with encodings or offsets that can't be are left out.
    pub fn new(fields: impl IntoIterator<Item = ShadowField>) -> Self {
        let mut layout = Self { slots: vec![0; ENCODINGS / 2], fields: Vec::new() };
        for f in fields {
            let fits = f.encoding & 1 == 0 && f.offset <= 0xff8 && matches!(f.width, 2 | 4 | 8);
            if let Some(slot) = layout.slots.get_mut(f.encoding as usize / 2)
                && fits
            {
                layout.fields.push(f);
                *slot = layout.fields.len() as u16;
            }
        }
        layout
    }

    /// Whether there is no field, and so no VMCS shadowing.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }

    /// The field that `encoding` names, and whether it names the high half.
    fn find(&self, encoding: u64) -> Option<(ShadowField, bool)> {
        let slot = *self.slots.get(usize::try_from(encoding / 2).ok()?)?;
        let field = *self.fields.get((slot as usize).checked_sub(1)?)?;
        let high = encoding & 1 != 0;
        // Only 64-bit fields, width 1 in encoding bits 14:13, have a high half.
        (!high || field.encoding >> 13 & 3 == 1).then_some((field, high))
    }
}

/// What became of a VMREAD or VMWRITE that didn't exit.
enum Outcome {
    Succeed,
    FailInvalid,
    FailValid(u64),
}

impl Cpu {
    fn shadow_read(&self, f: ShadowField) -> u64 {
        let mut b = [0; 8];
        // L0 checked the page; were it outside memory, its fields would read as zero.
        let _ = self.memory.read(self.controls.shadow_vmcs.offset(f.offset as u64), &mut b);
        u64::from_le_bytes(b)
    }

    fn shadow_write(&mut self, f: ShadowField, value: u64) {
        let kept = if f.width == 8 { value } else { value & ((1 << (f.width * 8)) - 1) };
        let _ = self.memory.write(self.controls.shadow_vmcs.offset(f.offset as u64), &kept.to_le_bytes());
    }

    /// Flags after a VMX instruction (SDM Vol. 3D §31.2).
    fn vmx_outcome(&mut self, outcome: Outcome) {
        let flags = match outcome {
            Outcome::Succeed => 0,
            Outcome::FailInvalid => rflags::CF,
            Outcome::FailValid(error) => {
                if let Some((f, _)) = self.shadow_layout.find(INSTRUCTION_ERROR) {
                    self.shadow_write(f, error);
                }
                rflags::ZF
            }
        };
        self.set_status_flags(flags);
    }
}

/// The encoding operand: 64 bits in 64-bit mode, else 32.
fn encoding(cpu: &Cpu, r: Register) -> u64 {
    cpu.reg(r)
}

/// Whether VMREAD or VMWRITE of the field that `r` names exits (SDM Vol. 3C §26.1.3).
pub(super) fn exits(cpu: &Cpu, r: Register, write: bool) -> bool {
    let e = encoding(cpu, r);
    let bitmap = if write { cpu.controls.vmwrite_bitmap } else { cpu.controls.vmread_bitmap };
    !cpu.secondary(SecondaryControls::VMCS_SHADOWING)
        || e >> 15 != 0
        || bit(cpu, bitmap, 0, (e & 0x7fff) as u32)
}

fn operand_size(cpu: &Cpu) -> u8 {
    if cpu.is_64() { 8 } else { 4 }
}

/// VMREAD that doesn't exit.
///
/// # Errors
/// #GP(0), faults of the destination.
pub(super) fn vmread(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    cpu.vmcs_accesses.vmreads += 1;
    if cpu.controls.shadow_vmcs.0 == u64::MAX {
        cpu.vmx_outcome(Outcome::FailInvalid);
        return Ok(());
    }
    let outcome = match cpu.shadow_layout.find(encoding(cpu, i.op1_register())) {
        None => Outcome::FailValid(UNSUPPORTED_COMPONENT),
        Some((field, high)) => {
            let value = cpu.shadow_read(field);
            let size = operand_size(cpu);
            cpu.write_operand(i, 0, size, if high { value >> 32 } else { value })?;
            Outcome::Succeed
        }
    };
    cpu.vmx_outcome(outcome);
    Ok(())
}

/// VMWRITE that doesn't exit.
///
/// # Errors
/// #GP(0), faults of the source.
pub(super) fn vmwrite(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    cpu.vmcs_accesses.vmwrites += 1;
    if cpu.controls.shadow_vmcs.0 == u64::MAX {
        cpu.vmx_outcome(Outcome::FailInvalid);
        return Ok(());
    }
    let size = operand_size(cpu);
    debug_assert!(matches!(i.op_kind(1), OpKind::Memory | OpKind::Register));
    let source = cpu.read_operand(i, 1, size)?;
    let outcome = match cpu.shadow_layout.find(encoding(cpu, i.op0_register())) {
        None => Outcome::FailValid(UNSUPPORTED_COMPONENT),
        Some((field, false)) => {
            cpu.shadow_write(field, source);
            Outcome::Succeed
        }
        Some((field, true)) => {
            let low = cpu.shadow_read(field) & 0xffff_ffff;
            cpu.shadow_write(field, low | source << 32);
            Outcome::Succeed
        }
    };
    cpu.vmx_outcome(outcome);
    Ok(())
}
