//! FXSAVE, FXRSTOR and the XSAVE family (SDM Vol. 1 §10.5, chapter 13) for x87, SSE and AVX
//! state. Only the init optimization is made, not the modified one. Supervisor components:
//! none.

use iced_x86::{Code, Instruction};
use x86_spec::exception;
use x86_spec::exit::ExitReason;
use x86_spec::reg::gpr::{RAX, RDX};
use x86_spec::reg::{cr0, cr4, xcr0};

use super::simple::{MXCSR_MASK, vector_count};
use super::x87;
use crate::cpu::{Access, Cpu, Exec};
use crate::op::SimpleFn;
use crate::system;

/// Size of the legacy region.
const LEGACY: usize = 512;
/// End of the header.
const HEADER_END: usize = 576;
/// Size of the AVX component.
const AVX_SIZE: usize = 256;
/// Offset of the XMM registers in the legacy region.
const XMM: usize = 160;
/// XCOMP_BV\[63\]: compacted format.
const COMPACTED: u64 = 1 << 63;
/// MXCSR after initialisation.
const MXCSR_INIT: u32 = 0x1f80;

/// The function for `i`, if it saves or restores state.
pub(super) fn function(i: &Instruction) -> Option<SimpleFn> {
    Some(match i.code() {
        Code::Fxsave_m512byte | Code::Fxsave64_m512byte => fxsave,
        Code::Fxrstor_m512byte | Code::Fxrstor64_m512byte => fxrstor,
        Code::Xsave_mem | Code::Xsave64_mem => xsave,
        Code::Xsaveopt_mem | Code::Xsaveopt64_mem => xsaveopt,
        Code::Xsavec_mem | Code::Xsavec64_mem => xsavec,
        Code::Xsaves_mem | Code::Xsaves64_mem => xsaves,
        Code::Xrstor_mem | Code::Xrstor64_mem => xrstor,
        Code::Xrstors_mem | Code::Xrstors64_mem => xrstors,
        _ => return None,
    })
}

/// Whether the form has 64-bit instruction and data pointers (REX.W).
fn is_wide(i: &Instruction) -> bool {
    matches!(
        i.code(),
        Code::Fxsave64_m512byte
            | Code::Fxrstor64_m512byte
            | Code::Xsave64_mem
            | Code::Xsaveopt64_mem
            | Code::Xsavec64_mem
            | Code::Xsaves64_mem
            | Code::Xrstor64_mem
            | Code::Xrstors64_mem
    )
}

/// Linear address of an area of `size` bytes that has to be aligned to `alignment`.
fn area(cpu: &mut Cpu, i: &Instruction, size: usize, alignment: u64, access: Access) -> Exec<u64> {
    let linear = cpu.operand_linear(i, size as u32, access)?;
    if linear & (alignment - 1) != 0 {
        return Err(cpu.gp(0));
    }
    Ok(linear)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// x87 state for bytes 0–23 and 32–159.
fn x87_image(cpu: &Cpu, wide: bool) -> [u8; 160] {
    let mut image = [0; 160];
    x87::store(&cpu.fpu, &mut image, wide);
    image
}

/// MXCSR and MXCSR_MASK for bytes 24–31.
fn mxcsr_image(cpu: &Cpu) -> [u8; 8] {
    (u64::from(MXCSR_MASK) << 32 | u64::from(cpu.fpu.mxcsr)).to_le_bytes()
}

/// Low or high halves of the vector registers, 16 bytes each.
fn halves(cpu: &Cpu, high: bool) -> [u8; 256] {
    let mut out = [0; 256];
    let lane = if high { 2 } else { 0 };
    for (to, v) in out.chunks_exact_mut(16).zip(&cpu.fpu.vectors) {
        to[..8].copy_from_slice(&v[lane].to_le_bytes());
        to[8..].copy_from_slice(&v[lane + 1].to_le_bytes());
    }
    out
}

/// Loads low or high halves; `None` initialises them.
fn set_halves(cpu: &mut Cpu, high: bool, bytes: Option<&[u8]>) {
    let n = vector_count(cpu);
    let lane = if high { 2 } else { 0 };
    for (k, v) in cpu.fpu.vectors.iter_mut().take(n).enumerate() {
        v[lane] = bytes.map_or(0, |b| u64_at(b, 16 * k));
        v[lane + 1] = bytes.map_or(0, |b| u64_at(b, 16 * k + 8));
    }
}

/// FXSAVE (SDM Vol. 2A). Bytes 416–511 are software's.
fn fxsave(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_x87(false)?;
    let linear = area(cpu, i, LEGACY, 16, Access::Write)?;
    cpu.probe(linear, LEGACY as u32, Access::Write)?;
    let mut out = [0; 416];
    out[..160].copy_from_slice(&x87_image(cpu, is_wide(i)));
    out[24..32].copy_from_slice(&mxcsr_image(cpu));
    out[XMM..].copy_from_slice(&halves(cpu, false));
    let end = XMM + 16 * vector_count(cpu);
    cpu.write_bytes(linear, &out[..end])
}

/// FXRSTOR (SDM Vol. 2A).
fn fxrstor(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_x87(false)?;
    let linear = area(cpu, i, LEGACY, 16, Access::Read)?;
    let mut image = [0; LEGACY];
    cpu.read_bytes(linear, &mut image)?;
    let mxcsr = u32_at(&image, 24);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    load_x87(cpu, &image, is_wide(i));
    cpu.fpu.mxcsr = mxcsr;
    set_halves(cpu, false, image.get(XMM..));
    Ok(())
}

fn load_x87(cpu: &mut Cpu, image: &[u8], wide: bool) {
    if let Some(Ok(bytes)) = image.get(..160).map(<&[u8; 160]>::try_from) {
        x87::load(&mut cpu.fpu, bytes, wide);
    }
}

/// Checks common to the XSAVE family (SDM Vol. 1 §13.5.1 and following).
fn check(cpu: &mut Cpu, supervisor: bool) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    if cpu.cr0 & cr0::TS != 0 {
        return Err(cpu.fault(exception::NM));
    }
    if supervisor && cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

/// The requested-feature bitmap.
fn rfbm(cpu: &Cpu) -> u64 {
    let mask = cpu.gpr(RDX) << 32 | cpu.gpr(RAX) & 0xffff_ffff;
    cpu.xcr0 & mask
}

/// XINUSE: components that are not in their initial configuration (SDM Vol. 1 §13.6).
fn in_use(cpu: &Cpu) -> u64 {
    let n = vector_count(cpu);
    let vectors = || cpu.fpu.vectors.iter().take(n);
    let mut set = 0;
    if !x87::is_initial(&cpu.fpu) {
        set |= xcr0::X87;
    }
    if vectors().any(|v| v[0] | v[1] != 0) {
        set |= xcr0::SSE;
    }
    if vectors().any(|v| v[2] | v[3] != 0) {
        set |= xcr0::AVX;
    }
    set
}

/// Bytes that an area with these components spans.
fn span(components: u64) -> usize {
    if components & xcr0::AVX != 0 { HEADER_END + AVX_SIZE } else { HEADER_END }
}

/// Writes the chosen components; the AVX component lies right after the header in both
/// formats.
fn write_components(cpu: &mut Cpu, i: &Instruction, linear: u64, components: u64, mxcsr: bool) -> Exec {
    if components & xcr0::X87 != 0 {
        let image = x87_image(cpu, is_wide(i));
        cpu.write_bytes(linear, &image[..24])?;
        cpu.write_bytes(linear.wrapping_add(32), &image[32..])?;
    }
    if mxcsr {
        let image = mxcsr_image(cpu);
        cpu.write_bytes(linear.wrapping_add(24), &image)?;
    }
    let length = 16 * vector_count(cpu);
    if components & xcr0::SSE != 0 {
        let image = halves(cpu, false);
        cpu.write_bytes(linear.wrapping_add(XMM as u64), &image[..length])?;
    }
    if components & xcr0::AVX != 0 {
        let image = halves(cpu, true);
        cpu.write_bytes(linear.wrapping_add(HEADER_END as u64), &image[..length])?;
    }
    Ok(())
}

/// XSAVE and XSAVEOPT, which leaves out components in their initial configuration
/// (SDM Vol. 1 §13.7, §13.9).
fn save_standard(cpu: &mut Cpu, i: &Instruction, optimized: bool) -> Exec {
    check(cpu, false)?;
    let rfbm = rfbm(cpu);
    let size = span(rfbm);
    let linear = area(cpu, i, size, 64, Access::Write)?;
    cpu.probe(linear, size as u32, Access::Write)?;
    let header = linear.wrapping_add(LEGACY as u64);
    let mut old = [0; 8];
    cpu.read_bytes(header, &mut old)?;
    let used = in_use(cpu);
    let components = if optimized { rfbm & used } else { rfbm };
    write_components(cpu, i, linear, components, rfbm & (xcr0::SSE | xcr0::AVX) != 0)?;
    let bv = u64::from_le_bytes(old) & !rfbm | rfbm & used;
    cpu.write_bytes(header, &bv.to_le_bytes())
}

fn xsave(cpu: &mut Cpu, i: &Instruction) -> Exec {
    save_standard(cpu, i, false)
}

fn xsaveopt(cpu: &mut Cpu, i: &Instruction) -> Exec {
    save_standard(cpu, i, true)
}

/// XSAVEC and XSAVES (SDM Vol. 1 §13.10, §13.11).
fn save_compacted(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let rfbm = rfbm(cpu);
    let size = span(rfbm);
    let linear = area(cpu, i, size, 64, Access::Write)?;
    cpu.probe(linear, size as u32, Access::Write)?;
    let mut used = in_use(cpu);
    if cpu.fpu.mxcsr != MXCSR_INIT {
        used |= xcr0::SSE;
    }
    let bv = rfbm & used;
    write_components(cpu, i, linear, bv, bv & xcr0::SSE != 0)?;
    let mut header = [0; 16];
    header[..8].copy_from_slice(&bv.to_le_bytes());
    header[8..].copy_from_slice(&(rfbm | COMPACTED).to_le_bytes());
    cpu.write_bytes(linear.wrapping_add(LEGACY as u64), &header)
}

fn xsavec(cpu: &mut Cpu, i: &Instruction) -> Exec {
    check(cpu, false)?;
    save_compacted(cpu, i)
}

fn xsaves(cpu: &mut Cpu, i: &Instruction) -> Exec {
    system::require_xsaves(cpu)?;
    check(cpu, true)?;
    system::xss_exit(cpu, i, ExitReason::Xsaves)?;
    save_compacted(cpu, i)
}

/// Whether the header of an area may be restored (SDM Vol. 1 §13.8, §13.12).
fn header_valid(header: &[u8; 64], xcr0: u64, compacted_only: bool) -> bool {
    let (bv, comp) = (u64_at(header, 0), u64_at(header, 8));
    if comp & COMPACTED == 0 {
        !compacted_only && comp == 0 && u64_at(header, 16) == 0 && bv & !xcr0 == 0
    } else {
        let components = comp & !COMPACTED;
        components & !xcr0 == 0 && bv & !components == 0 && header[16..].iter().all(|b| *b == 0)
    }
}

/// XRSTOR and XRSTORS.
fn restore(cpu: &mut Cpu, i: &Instruction, compacted_only: bool) -> Exec {
    let rfbm = rfbm(cpu);
    let linear = area(cpu, i, HEADER_END, 64, Access::Read)?;
    let mut image = [0; HEADER_END + AVX_SIZE];
    cpu.read_bytes(linear, &mut image[..HEADER_END])?;
    let mut header = [0; 64];
    header.copy_from_slice(&image[LEGACY..HEADER_END]);
    if !header_valid(&header, cpu.xcr0, compacted_only) {
        return Err(cpu.gp(0));
    }
    let bv = u64_at(&header, 0);
    let compacted = u64_at(&header, 8) & COMPACTED != 0;
    let loads = bv & rfbm;
    if loads & xcr0::AVX != 0 {
        let linear = area(cpu, i, HEADER_END + AVX_SIZE, 64, Access::Read)?;
        cpu.read_bytes(linear.wrapping_add(HEADER_END as u64), &mut image[HEADER_END..])?;
    }
    // The standard form takes MXCSR from memory whatever XSTATE_BV says (SDM Vol. 1 §13.8.1).
    let mxcsr = if compacted { loads & xcr0::SSE != 0 } else { rfbm & (xcr0::SSE | xcr0::AVX) != 0 };
    if mxcsr {
        let value = u32_at(&image, 24);
        if value & !MXCSR_MASK != 0 {
            return Err(cpu.gp(0));
        }
        cpu.fpu.mxcsr = value;
    } else if rfbm & xcr0::SSE != 0 {
        cpu.fpu.mxcsr = MXCSR_INIT;
    }
    if loads & xcr0::X87 != 0 {
        load_x87(cpu, &image, is_wide(i));
    } else if rfbm & xcr0::X87 != 0 {
        x87::reset(&mut cpu.fpu);
    }
    if rfbm & xcr0::SSE != 0 {
        set_halves(cpu, false, (loads & xcr0::SSE != 0).then_some(&image[XMM..]));
    }
    if rfbm & xcr0::AVX != 0 {
        set_halves(cpu, true, (loads & xcr0::AVX != 0).then_some(&image[HEADER_END..]));
    }
    Ok(())
}

fn xrstor(cpu: &mut Cpu, i: &Instruction) -> Exec {
    check(cpu, false)?;
    restore(cpu, i, false)
}

fn xrstors(cpu: &mut Cpu, i: &Instruction) -> Exec {
    system::require_xsaves(cpu)?;
    check(cpu, true)?;
    system::xss_exit(cpu, i, ExitReason::Xrstors)?;
    restore(cpu, i, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(bv: u64, comp: u64) -> [u8; 64] {
        let mut h = [0; 64];
        h[..8].copy_from_slice(&bv.to_le_bytes());
        h[8..16].copy_from_slice(&comp.to_le_bytes());
        h
    }

    /// SDM Vol. 1 §13.8.1: standard form.
    #[test]
    fn standard_headers() {
        assert!(header_valid(&header(7, 0), 7, false));
        assert!(!header_valid(&header(7, 0), 3, false), "XSTATE_BV beyond XCR0");
        assert!(!header_valid(&header(3, 3), 7, false), "XCOMP_BV without bit 63");
        let mut h = header(3, 0);
        h[16] = 1;
        assert!(!header_valid(&h, 7, false), "byte 16");
        h[16] = 0;
        h[24] = 1;
        assert!(header_valid(&h, 7, false), "bytes 24 to 63 are ignored");
        assert!(!header_valid(&header(3, 0), 7, true), "XRSTORS wants the compacted form");
    }

    /// SDM Vol. 1 §13.8.2: compacted form.
    #[test]
    fn compacted_headers() {
        assert!(header_valid(&header(3, COMPACTED | 7), 7, false));
        assert!(header_valid(&header(3, COMPACTED | 7), 7, true));
        assert!(!header_valid(&header(7, COMPACTED | 3), 7, false), "XSTATE_BV beyond XCOMP_BV");
        assert!(!header_valid(&header(3, COMPACTED | 7), 3, false), "XCOMP_BV beyond XCR0");
        let mut h = header(3, COMPACTED | 3);
        h[63] = 1;
        assert!(!header_valid(&h, 7, false), "byte 63");
    }
}
