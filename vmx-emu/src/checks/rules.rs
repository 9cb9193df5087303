//! What several checks have in common.

use super::{Context, Findings};
use crate::{Field, capabilities};

/// Whether `address` is canonical for linear addresses of `bits` bits (SDM Vol. 1 §3.3.7.1).
pub(super) const fn canonical(address: u64, bits: u8) -> bool {
    let unused = 64 - if bits == 0 || bits > 64 { 64 } else { bits as u32 };
    (((address << unused) as i64) >> unused) as u64 == address
}

/// Numbers of the bits in `mask`, lowest first: "3, 5".
pub(super) fn bit_list(mask: u64) -> String {
    let bits: Vec<String> = (0..64).filter(|b| mask >> b & 1 != 0).map(|b| b.to_string()).collect();
    bits.join(", ")
}

/// Names of the controls in `mask`; bits without a name by their number.
fn control_list(table: &[capabilities::Control], mask: u32) -> String {
    let name = |bit: u32| match table.iter().find(|c| c.bit == bit) {
        Some(c) => format!("{} (bit {bit})", c.name),
        None => format!("reserved bit {bit}"),
    };
    let names: Vec<String> = (0..32).filter(|b| mask >> b & 1 != 0).map(name).collect();
    names.join(", ")
}

/// What must change in a value for the bits `zeros` to become 1 and `ones` to become 0.
fn wanted(list: impl Fn(u64) -> String, zeros: u64, ones: u64) -> String {
    match (zeros, ones) {
        (_, 0) => format!("{} = 1", list(zeros)),
        (0, _) => format!("{} = 0", list(ones)),
        _ => format!("{} = 1; {} = 0", list(zeros), list(ones)),
    }
}

/// Bits of a control field are as the capability MSRs allow (SDM Vol. 3D appendix A.2).
pub(super) fn control_field(
    c: &Context,
    f: &mut Findings,
    field: Field,
    allowed: x86_spec::caps::AllowedControls,
    table: &[capabilities::Control],
) {
    let value = c.get32(field);
    let zeros = allowed.must_be_one & !value;
    let ones = value & !allowed.may_be_one;
    if zeros | ones != 0 {
        let expected = wanted(|m| control_list(table, m as u32), zeros as u64, ones as u64);
        f.fail(&[field], format!("{}: bits that the capability MSRs fix", field.sdm_name()), expected);
    }
}

/// A register field has the bits `zeros` at 0 that must be 1 and `ones` at 1 that must be 0.
pub(super) fn fixed_bits(f: &mut Findings, field: Field, zeros: u64, ones: u64, message: &str) {
    if zeros | ones != 0 {
        let expected = wanted(|m| format!("bits {}", bit_list(m)), zeros, ones);
        f.fail(&[field], format!("{}: {message}", field.sdm_name()), expected);
    }
}

/// A physical address has its low `align_bits` bits 0 and none beyond the
/// physical-address width. Returns whether it is so.
pub(super) fn address(c: &Context, f: &mut Findings, field: Field, align_bits: u32) -> bool {
    let value = c.get(field);
    let low = value & ((1 << align_bits) - 1);
    let within = c.caps.is_physical(value);
    if low != 0 || !within {
        let what = match (low != 0, within) {
            (true, true) => "is not aligned",
            (false, _) => "is beyond the physical-address width",
            (true, false) => "is not aligned and beyond the physical-address width",
        };
        let expected = format!("bits {}:0 = 0 and bits 63:{} = 0", align_bits - 1, c.caps.physical_bits);
        f.fail(&[field], format!("{} {what}", field.sdm_name()), expected);
    }
    low == 0 && within
}

/// An MSR area: with a count that is not 0, the address is 16-byte aligned, and neither it
/// nor the area's last byte is beyond the physical-address width.
pub(super) fn msr_area(c: &Context, f: &mut Findings, address_field: Field, count_field: Field) {
    let count = c.get(count_field);
    if count == 0 || !address(c, f, address_field, 4) {
        return;
    }
    // The count has 32 bits and the address is not beyond the width: 64 bits at most.
    let last = c.get(address_field).checked_add(count * 16 - 1);
    if !last.is_some_and(|l| c.caps.is_physical(l)) {
        f.fail(
            &[address_field, count_field],
            format!(
                "{}: the area's last byte is beyond the physical-address width",
                address_field.sdm_name()
            ),
            format!("address + 16 * count - 1 below 2^{}", c.caps.physical_bits),
        );
    }
}

/// Natural-width fields hold canonical addresses.
pub(super) fn canonical_fields(c: &Context, f: &mut Findings, fields: &[Field]) {
    for field in fields {
        if !canonical(c.get(*field), c.linear_bits) {
            f.fail(&[*field], format!("{} is not canonical", field.sdm_name()), canonical_text(c));
        }
    }
}

/// What a canonical address is.
pub(super) fn canonical_text(c: &Context) -> String {
    format!("bits 63:{} all equal", c.linear_bits.saturating_sub(1))
}

/// A CR3 field sets no bit beyond the physical-address width.
pub(super) fn cr3(c: &Context, f: &mut Findings, field: Field) {
    if !c.caps.is_physical(c.get(field)) {
        f.fail(
            &[field],
            format!("{} is beyond the physical-address width", field.sdm_name()),
            format!("bits 63:{} = 0", c.caps.physical_bits),
        );
    }
}

/// An IA32_PAT field: each byte is a memory type that the PAT can hold (SDM Vol. 3A
/// §12.12.2).
pub(super) fn pat(c: &Context, f: &mut Findings, field: Field) {
    let valid = |t: &u8| matches!(t, 0 | 1 | 4..=7);
    if !c.get(field).to_le_bytes().iter().all(valid) {
        f.fail(
            &[field],
            format!("{} has a reserved memory type", field.sdm_name()),
            "each byte 0 (UC), 1 (WC), 4 (WT), 5 (WP), 6 (WB) or 7 (UC-)",
        );
    }
}

/// A field that is loaded into an MSR sets none of the MSR's reserved bits.
pub(super) fn msr_reserved(c: &Context, f: &mut Findings, field: Field, allowed: u64) {
    fixed_bits(f, field, 0, c.get(field) & !allowed, "bits that are reserved in the MSR");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SDM Vol. 1 §3.3.7.1: bits 63 down to the most significant implemented one are equal.
    #[test]
    fn canonical_addresses() {
        for a in [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
            assert!(canonical(a, 48), "{a:#x}");
        }
        for a in [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63] {
            assert!(!canonical(a, 48), "{a:#x}");
        }
        assert!(canonical(0x8000_0000_0000, 57));
        assert!(!canonical(1 << 56, 57));
        assert!(canonical(1 << 63, 64) && canonical(1, 0));
    }

    #[test]
    fn bits_are_listed() {
        assert_eq!(bit_list(0x29), "0, 3, 5");
        assert_eq!(
            control_list(capabilities::PIN, 0x21),
            "External-interrupt exiting (bit 0), Virtual NMIs (bit 5)"
        );
        assert_eq!(control_list(capabilities::PIN, 2), "reserved bit 1");
    }
}
