//! Masked stores and loads, and gathers: only enabled elements are accessed and may fault.

use iced_x86::{Code, Instruction, OpKind, Register};
use x86_spec::reg::gpr::RDI;

use super::x87;
use crate::cpu::{Access, Cpu, Exec};
use crate::op::SimpleFn;
use crate::operand::{memory_segment, segment_index, size_mask};

/// The function for `i`, if it accesses memory under a mask.
pub(super) fn function(i: &Instruction) -> Option<SimpleFn> {
    use Code as C;
    Some(match i.code() {
        C::Maskmovq_rDI_mm_mm => maskmovq,
        C::Maskmovdqu_rDI_xmm_xmm => maskmovdqu,
        C::VEX_Vmaskmovdqu_rDI_xmm_xmm => vmaskmovdqu,
        C::VEX_Vmaskmovps_xmm_xmm_m128
        | C::VEX_Vmaskmovps_ymm_ymm_m256
        | C::VEX_Vpmaskmovd_xmm_xmm_m128
        | C::VEX_Vpmaskmovd_ymm_ymm_m256 => masked_load::<4>,
        C::VEX_Vmaskmovpd_xmm_xmm_m128
        | C::VEX_Vmaskmovpd_ymm_ymm_m256
        | C::VEX_Vpmaskmovq_xmm_xmm_m128
        | C::VEX_Vpmaskmovq_ymm_ymm_m256 => masked_load::<8>,
        C::VEX_Vmaskmovps_m128_xmm_xmm
        | C::VEX_Vmaskmovps_m256_ymm_ymm
        | C::VEX_Vpmaskmovd_m128_xmm_xmm
        | C::VEX_Vpmaskmovd_m256_ymm_ymm => masked_store::<4>,
        C::VEX_Vmaskmovpd_m128_xmm_xmm
        | C::VEX_Vmaskmovpd_m256_ymm_ymm
        | C::VEX_Vpmaskmovq_m128_xmm_xmm
        | C::VEX_Vpmaskmovq_m256_ymm_ymm => masked_store::<8>,
        C::VEX_Vpgatherdd_xmm_vm32x_xmm
        | C::VEX_Vpgatherdd_ymm_vm32y_ymm
        | C::VEX_Vgatherdps_xmm_vm32x_xmm
        | C::VEX_Vgatherdps_ymm_vm32y_ymm => gather::<4, 4>,
        C::VEX_Vpgatherdq_xmm_vm32x_xmm
        | C::VEX_Vpgatherdq_ymm_vm32x_ymm
        | C::VEX_Vgatherdpd_xmm_vm32x_xmm
        | C::VEX_Vgatherdpd_ymm_vm32x_ymm => gather::<4, 8>,
        C::VEX_Vpgatherqd_xmm_vm64x_xmm
        | C::VEX_Vpgatherqd_xmm_vm64y_xmm
        | C::VEX_Vgatherqps_xmm_vm64x_xmm
        | C::VEX_Vgatherqps_xmm_vm64y_xmm => gather::<8, 4>,
        C::VEX_Vpgatherqq_xmm_vm64x_xmm
        | C::VEX_Vpgatherqq_ymm_vm64y_ymm
        | C::VEX_Vgatherqpd_xmm_vm64x_xmm
        | C::VEX_Vgatherqpd_ymm_vm64y_ymm => gather::<8, 8>,
        _ => return None,
    })
}

/// A vector register as bytes.
fn vector(cpu: &Cpu, r: Register) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (to, from) in bytes.chunks_exact_mut(8).zip(cpu.fpu.vectors[r.number() & 15]) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    bytes
}

fn set_vector(cpu: &mut Cpu, r: Register, bytes: &[u8; 32]) {
    for (to, from) in cpu.fpu.vectors[r.number() & 15].iter_mut().zip(bytes.as_chunks::<8>().0) {
        *to = u64::from_le_bytes(*from);
    }
}

/// Runs of adjacent enabled elements, as byte ranges: the sign bit of each `size`-byte
/// element of `mask` enables it.
fn runs(mask: &[u8], size: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
    let enabled = move |n: usize| mask.get((n + 1) * size - 1).is_some_and(|b| b & 0x80 != 0);
    let count = mask.len() / size;
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = (at..count).find(|n| enabled(*n))?;
        let end = (start..count).find(|n| !enabled(*n)).unwrap_or(count);
        at = end;
        Some((start * size, end * size))
    })
}

/// Linear address of the bytes `start..end` of an operand at offset `ea`.
fn part(cpu: &mut Cpu, i: &Instruction, ea: u64, (start, end): (usize, usize), access: Access) -> Exec<u64> {
    let segment = segment_index(memory_segment(i));
    let mask = size_mask(match i.op_kind(0) {
        OpKind::MemorySegDI => 2,
        OpKind::MemorySegEDI => 4,
        OpKind::MemorySegRDI => 8,
        _ => cpu.address_size(i),
    });
    cpu.segment_linear(segment, ea.wrapping_add(start as u64) & mask, (end - start) as u32, access)
}

/// Writes the enabled elements of `data`; nothing is written if any of them faults.
fn store(cpu: &mut Cpu, i: &Instruction, ea: u64, data: &[u8], mask: &[u8], size: usize) -> Exec {
    // A single run can't fault halfway.
    if runs(mask, size).nth(1).is_some() {
        for run in runs(mask, size) {
            let linear = part(cpu, i, ea, run, Access::Write)?;
            cpu.probe(linear, (run.1 - run.0) as u32, Access::Write)?;
        }
    }
    for run in runs(mask, size) {
        let linear = part(cpu, i, ea, run, Access::Write)?;
        if let Some(bytes) = data.get(run.0..run.1) {
            cpu.write_bytes(linear, bytes)?;
        }
    }
    Ok(())
}

/// The offset in rDI that MASKMOVQ and MASKMOVDQU use.
fn rdi_offset(cpu: &Cpu, i: &Instruction) -> u64 {
    let rdi = cpu.gpr(RDI);
    match i.op_kind(0) {
        OpKind::MemorySegDI => rdi & 0xffff,
        OpKind::MemorySegEDI => rdi & 0xffff_ffff,
        _ => rdi,
    }
}

fn maskmovq(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_mmx()?;
    let data = x87::mmx(&cpu.fpu, i.op1_register().number());
    let mask = x87::mmx(&cpu.fpu, i.op2_register().number());
    let ea = rdi_offset(cpu, i);
    store(cpu, i, ea, &data, &mask, 1)?;
    x87::enter_mmx(&mut cpu.fpu);
    Ok(())
}

fn maskmovdqu(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_sse()?;
    maskmov_bytes(cpu, i)
}

fn vmaskmovdqu(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_avx()?;
    maskmov_bytes(cpu, i)
}

fn maskmov_bytes(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let (data, mask) = (vector(cpu, i.op1_register()), vector(cpu, i.op2_register()));
    let ea = rdi_offset(cpu, i);
    store(cpu, i, ea, &data[..16], &mask[..16], 1)
}

/// Width of a vector register in bytes.
fn width(r: Register) -> usize {
    if r.is_ymm() { 32 } else { 16 }
}

fn masked_load<const SIZE: usize>(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_avx()?;
    let mask = vector(cpu, i.op1_register());
    let ea = cpu.effective_address(i);
    let mut out = [0; 32];
    for run in runs(&mask[..width(i.op0_register())], SIZE) {
        let linear = part(cpu, i, ea, run, Access::Read)?;
        cpu.read_bytes(linear, &mut out[run.0..run.1])?;
    }
    set_vector(cpu, i.op0_register(), &out);
    Ok(())
}

fn masked_store<const SIZE: usize>(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_avx()?;
    let mask = vector(cpu, i.op1_register());
    let data = vector(cpu, i.op2_register());
    let n = width(i.op2_register());
    let ea = cpu.effective_address(i);
    store(cpu, i, ea, &data[..n], &mask[..n], SIZE)
}

/// Address size in bytes of a VSIB operand.
fn vsib_address_size(cpu: &Cpu, i: &Instruction) -> u8 {
    match i.memory_base() {
        r if r.is_gpr64() => 8,
        r if r.is_gpr32() => 4,
        _ if cpu.is_64() && i.memory_displ_size() == 8 => 8,
        _ => 4,
    }
}

/// Gathers, lowest element first. A fault delivers the elements before it: their mask elements
/// are zero then and the others all ones, so that the restarted instruction goes on (SDM
/// Vol. 2C, VPGATHERDD).
fn gather<const INDEX: usize, const SIZE: usize>(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_avx()?;
    let (destination, mask_register, index_register) = (i.op0_register(), i.op2_register(), i.memory_index());
    let size_of_address = size_mask(vsib_address_size(cpu, i));
    let base = cpu.reg(i.memory_base()).wrapping_add(i.memory_displacement64());
    let scale = u64::from(i.memory_index_scale());
    let segment = segment_index(memory_segment(i));
    let count = (width(index_register) / INDEX).min(width(destination) / SIZE);

    let index = vector(cpu, index_register);
    let mut mask = vector(cpu, mask_register);
    let mut out = vector(cpu, destination);
    for element in mask[..count * SIZE].chunks_exact_mut(SIZE) {
        let enabled = element[SIZE - 1] & 0x80 != 0;
        element.fill(if enabled { 0xff } else { 0 });
    }
    mask[count * SIZE..].fill(0);
    let mut result = Ok(());
    for n in 0..count {
        let at = n * SIZE..(n + 1) * SIZE;
        if mask[at.end - 1] & 0x80 != 0 {
            let mut wide = [0; 8];
            wide[..INDEX].copy_from_slice(&index[n * INDEX..(n + 1) * INDEX]);
            let raw = u64::from_le_bytes(wide);
            let offset = if INDEX == 4 { raw as i32 as i64 as u64 } else { raw };
            let ea = base.wrapping_add(offset.wrapping_mul(scale)) & size_of_address;
            result = cpu
                .segment_linear(segment, ea, SIZE as u32, Access::Read)
                .and_then(|linear| cpu.read_bytes(linear, &mut out[at.clone()]));
            if result.is_err() {
                break;
            }
        }
        mask[at].fill(0);
    }
    out[count * SIZE..].fill(0);
    set_vector(cpu, destination, &out);
    set_vector(cpu, mask_register, &mask);
    result
}
