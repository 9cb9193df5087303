//! Checks on guest segment registers (SDM Vol. 3C §27.3.1.2).

use x86_spec::segment::{AccessRights, seg};

use super::rules::{canonical, canonical_text, fixed_bits};
use super::{Context, Findings};
use crate::Field;
use crate::Field::*;
use crate::fields::{GUEST_SEGMENTS, SegmentFields};

/// The access rights of every segment register in virtual-8086 mode: a present, accessed
/// read/write data segment of privilege level 3.
const V8086_ACCESS_RIGHTS: u32 = 0xf3;
/// Reserved bits 11:8 of access rights.
const RESERVED_LOW: u32 = 0xf00;
/// Reserved bits 31:17 of access rights.
const RESERVED_HIGH: u32 = 0xfffe_0000;

const NAMES: [&str; 8] = ["ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR"];
/// CS, SS, DS, ES, FS, GS: those with code and data.
const CODE_DATA: [usize; 6] = [seg::CS, seg::SS, seg::DS, seg::ES, seg::FS, seg::GS];
const DATA: [usize; 4] = [seg::DS, seg::ES, seg::FS, seg::GS];

/// A segment register of the guest.
struct Segment {
    name: &'static str,
    index: usize,
    fields: &'static SegmentFields,
    selector: u64,
    base: u64,
    limit: u32,
    access: AccessRights,
}

impl Segment {
    fn usable(&self) -> bool {
        !self.access.unusable()
    }
    /// CS or usable: the condition of most checks on code and data segments.
    fn counts(&self) -> bool {
        self.index == seg::CS || self.usable()
    }
    fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
    fn ti(&self) -> bool {
        self.selector & 4 != 0
    }
    /// G is 0 if a bit in 11:0 of the limit is 0, and 1 if a bit in 31:20 is 1.
    fn granularity_fits(&self) -> bool {
        if self.access.0 & AccessRights::G != 0 { self.limit & 0xfff == 0xfff } else { self.limit >> 20 == 0 }
    }
}

/// `index` as in [`seg`] (modulo 8).
fn segment(c: &Context, index: usize) -> Segment {
    let fields = &GUEST_SEGMENTS[index & 7];
    Segment {
        name: NAMES[index & 7],
        index,
        fields,
        selector: c.get(fields.selector),
        base: c.get(fields.base),
        limit: c.get32(fields.limit),
        access: AccessRights(c.get32(fields.access)),
    }
}

/// The code and data segments, if they are to be checked by the rules outside virtual-8086
/// mode, and of them those that are CS or usable.
fn protected_mode_segments(c: &Context, indices: &'static [usize]) -> impl Iterator<Item = Segment> {
    let indices: &[usize] = if c.virtual_8086() { &[] } else { indices };
    indices.iter().map(|i| segment(c, *i)).filter(Segment::counts)
}

fn fail(f: &mut Findings, s: &Segment, fields: &[Field], what: &str, expected: &str) {
    f.fail(fields, format!("{} {what}", s.name), expected);
}

/// LDTR if it is usable.
fn usable_ldtr(c: &Context) -> Option<Segment> {
    Some(segment(c, seg::LDTR)).filter(Segment::usable)
}

fn require_ldtr(c: &Context, f: &mut Findings, holds: fn(&Segment) -> bool, what: &str, expected: &str) {
    if let Some(s) = usable_ldtr(c).filter(|s| !holds(s)) {
        fail(f, &s, &[s.fields.access], what, expected);
    }
}

fn require_tr(c: &Context, f: &mut Findings, holds: fn(&Segment) -> bool, what: &str, expected: &str) {
    let s = segment(c, seg::TR);
    if !holds(&s) {
        fail(f, &s, &[s.fields.access], what, expected);
    }
}

fn require_code_data(c: &Context, f: &mut Findings, holds: fn(&Segment) -> bool, what: &str, expected: &str) {
    for s in protected_mode_segments(c, &CODE_DATA).filter(|s| !holds(s)) {
        fail(f, &s, &[s.fields.access], what, expected);
    }
}

const GRANULARITY: &str = "has a limit that does not fit its granularity";
const GRANULARITY_EXPECTED: &str =
    "G (bit 15) = 0 unless limit bits 11:0 are all 1; G = 1 if any of limit bits 31:20 is 1";

/// Selector of TR: TI must be 0 (§27.3.1.2).
pub(super) fn tr_selector_ti(c: &Context, f: &mut Findings) {
    f.require(!segment(c, seg::TR).ti(), &[GuestTrSelector], "TR is in the LDT", "bit 2 = 0");
}

/// Selector of LDTR: if it is usable, TI must be 0 (§27.3.1.2).
pub(super) fn ldtr_selector_ti(c: &Context, f: &mut Findings) {
    if let Some(s) = usable_ldtr(c).filter(Segment::ti) {
        fail(
            f,
            &s,
            &[s.fields.selector, s.fields.access],
            "is in the LDT",
            "selector bit 2 = 0, or unusable",
        );
    }
}

/// Selector of SS: outside virtual-8086 mode and without "unrestricted guest", RPL must
/// equal that of CS (§27.3.1.2).
pub(super) fn ss_selector_rpl(c: &Context, f: &mut Findings) {
    if !c.virtual_8086() && !c.unrestricted() {
        f.require(
            segment(c, seg::SS).rpl() == segment(c, seg::CS).rpl(),
            &[GuestSsSelector, GuestCsSelector],
            "SS and CS have different RPLs",
            "bits 1:0 of both equal",
        );
    }
}

/// Bases in virtual-8086 mode: the selector shifted left by 4 (§27.3.1.2).
pub(super) fn v8086_segment_bases(c: &Context, f: &mut Findings) {
    if !c.virtual_8086() {
        return;
    }
    for s in CODE_DATA.map(|i| segment(c, i)) {
        if s.base != s.selector << 4 {
            let what = "has a base that virtual-8086 mode does not allow";
            fail(f, &s, &[s.fields.base, s.fields.selector], what, "base = selector * 16");
        }
    }
}

fn require_canonical(c: &Context, f: &mut Findings, s: &Segment) {
    if !canonical(s.base, c.linear_bits) {
        fail(f, s, &[s.fields.base], "has a base that is not canonical", &canonical_text(c));
    }
}

/// Bases of TR, FS and GS must be canonical (§27.3.1.2).
pub(super) fn tr_fs_gs_bases_canonical(c: &Context, f: &mut Findings) {
    for s in [seg::TR, seg::FS, seg::GS].map(|i| segment(c, i)) {
        require_canonical(c, f, &s);
    }
}

/// Base of LDTR: if it is usable, canonical (§27.3.1.2).
pub(super) fn ldtr_base_canonical(c: &Context, f: &mut Findings) {
    if let Some(s) = usable_ldtr(c) {
        require_canonical(c, f, &s);
    }
}

/// Base of CS: bits 63:32 must be 0 (§27.3.1.2).
pub(super) fn cs_base_high(c: &Context, f: &mut Findings) {
    f.require(c.get(GuestCsBase) >> 32 == 0, &[GuestCsBase], "CS has a 64-bit base", "bits 63:32 = 0");
}

/// Bases of SS, DS and ES: if usable, bits 63:32 must be 0 (§27.3.1.2).
pub(super) fn ss_ds_es_bases_high(c: &Context, f: &mut Findings) {
    for s in [seg::SS, seg::DS, seg::ES].map(|i| segment(c, i)) {
        if s.usable() && s.base >> 32 != 0 {
            let fields = [s.fields.base, s.fields.access];
            fail(f, &s, &fields, "has a 64-bit base", "base bits 63:32 = 0, or unusable");
        }
    }
}

/// Limits in virtual-8086 mode: FFFFH (§27.3.1.2).
pub(super) fn v8086_segment_limits(c: &Context, f: &mut Findings) {
    if !c.virtual_8086() {
        return;
    }
    for s in CODE_DATA.map(|i| segment(c, i)) {
        if s.limit != 0xffff {
            fail(f, &s, &[s.fields.limit], "has a limit that virtual-8086 mode does not allow", "0000FFFFH");
        }
    }
}

/// Access rights in virtual-8086 mode: F3H (§27.3.1.2).
pub(super) fn v8086_segment_access_rights(c: &Context, f: &mut Findings) {
    if !c.virtual_8086() {
        return;
    }
    for s in CODE_DATA.map(|i| segment(c, i)) {
        if s.access.0 != V8086_ACCESS_RIGHTS {
            let what = "has access rights that virtual-8086 mode does not allow";
            fail(f, &s, &[s.fields.access], what, "000000F3H");
        }
    }
}

/// Type of CS: 9, 11, 13 or 15; with "unrestricted guest" also 3 (§27.3.1.2).
pub(super) fn cs_type(c: &Context, f: &mut Findings) {
    if c.virtual_8086() {
        return;
    }
    let s = segment(c, seg::CS);
    let allowed = matches!(s.access.ty(), 9 | 11 | 13 | 15) || s.access.ty() == 3 && c.unrestricted();
    if !allowed {
        let expected = if c.unrestricted() {
            "type (bits 3:0) 3, 9, 11, 13 or 15"
        } else {
            "type (bits 3:0) 9, 11, 13 or 15"
        };
        fail(f, &s, &[s.fields.access], "is not accessed code", expected);
    }
}

/// Type of SS: if usable, 3 or 7 (§27.3.1.2).
pub(super) fn ss_type(c: &Context, f: &mut Findings) {
    for s in protected_mode_segments(c, &[seg::SS]) {
        if !matches!(s.access.ty(), 3 | 7) {
            fail(
                f,
                &s,
                &[s.fields.access],
                "is not writable accessed data",
                "type (bits 3:0) 3 or 7, or unusable",
            );
        }
    }
}

/// Types of DS, ES, FS and GS: if usable, accessed (§27.3.1.2).
pub(super) fn data_segments_accessed(c: &Context, f: &mut Findings) {
    for s in protected_mode_segments(c, &DATA).filter(|s| s.access.ty() & 1 == 0) {
        fail(f, &s, &[s.fields.access], "is not accessed", "accessed (bit 0) = 1, or unusable");
    }
}

/// Types of DS, ES, FS and GS: if usable and code, readable (§27.3.1.2).
pub(super) fn data_segments_readable(c: &Context, f: &mut Findings) {
    for s in protected_mode_segments(c, &DATA).filter(|s| s.access.ty() & 0b1010 == 0b1000) {
        let expected = "readable (bit 1) = 1, or not code (bit 3 = 0), or unusable";
        fail(f, &s, &[s.fields.access], "is code that can't be read", expected);
    }
}

/// S of code and data segments that are CS or usable: 1 (§27.3.1.2).
pub(super) fn segments_not_system(c: &Context, f: &mut Findings) {
    require_code_data(c, f, |s| s.access.is_code_or_data(), "is a system segment", "S (bit 4) = 1");
}

/// DPL of CS: 0 for type 3; that of SS for types 9 and 11; at most that of SS for types 13
/// and 15 (§27.3.1.2).
pub(super) fn cs_dpl(c: &Context, f: &mut Findings) {
    if c.virtual_8086() {
        return;
    }
    let cs = segment(c, seg::CS);
    let (dpl, ss_dpl) = (cs.access.dpl(), segment(c, seg::SS).access.dpl());
    let (fits, expected) = match cs.access.ty() {
        3 => (dpl == 0, "DPL (bits 6:5) of CS = 0"),
        9 | 11 => (dpl == ss_dpl, "DPL (bits 6:5) of CS equal to that of SS"),
        13 | 15 => (dpl <= ss_dpl, "DPL (bits 6:5) of CS at most that of SS"),
        _ => return,
    };
    if !fits {
        fail(f, &cs, &[GuestCsAccessRights, GuestSsAccessRights], "has the wrong DPL", expected);
    }
}

/// DPL of SS: without "unrestricted guest", the RPL of its selector (§27.3.1.2).
pub(super) fn ss_dpl_rpl(c: &Context, f: &mut Findings) {
    if c.virtual_8086() || c.unrestricted() {
        return;
    }
    let s = segment(c, seg::SS);
    if s.access.dpl() != s.rpl() {
        let fields = [s.fields.access, s.fields.selector];
        fail(f, &s, &fields, "has a DPL that is not its RPL", "DPL (bits 6:5) = selector bits 1:0");
    }
}

/// DPL of SS: 0 if CS has type 3 or CR0.PE is 0 (§27.3.1.2).
pub(super) fn ss_dpl_zero(c: &Context, f: &mut Findings) {
    if c.virtual_8086() {
        return;
    }
    let real = c.get(GuestCr0) & x86_spec::reg::cr0::PE == 0;
    let s = segment(c, seg::SS);
    if (real || segment(c, seg::CS).access.ty() == 3) && s.access.dpl() != 0 {
        let fields = [s.fields.access, GuestCsAccessRights, GuestCr0];
        fail(f, &s, &fields, "has a DPL where there is but privilege level 0", "DPL (bits 6:5) = 0");
    }
}

/// DPL of DS, ES, FS and GS: without "unrestricted guest", if usable and of types 0–11, not
/// less than the RPL of the selector (§27.3.1.2).
pub(super) fn data_segments_dpl(c: &Context, f: &mut Findings) {
    if c.unrestricted() {
        return;
    }
    for s in protected_mode_segments(c, &DATA) {
        if s.access.ty() <= 11 && s.access.dpl() < s.rpl() {
            let fields = [s.fields.access, s.fields.selector];
            fail(f, &s, &fields, "has a DPL below its RPL", "DPL (bits 6:5) at least selector bits 1:0");
        }
    }
}

/// P of code and data segments that are CS or usable: 1 (§27.3.1.2).
pub(super) fn segments_present(c: &Context, f: &mut Findings) {
    require_code_data(c, f, |s| s.access.present(), "is not present", "P (bit 7) = 1");
}

fn reserved_low_clear(s: &Segment) -> bool {
    s.access.0 & RESERVED_LOW == 0
}

fn reserved_high_clear(s: &Segment) -> bool {
    s.access.0 & RESERVED_HIGH == 0
}

const RESERVED: &str = "has reserved bits in its access rights";

/// Bits 11:8 of code and data segments that are CS or usable: 0 (§27.3.1.2).
pub(super) fn segments_reserved_low(c: &Context, f: &mut Findings) {
    require_code_data(c, f, reserved_low_clear, RESERVED, "bits 11:8 = 0");
}

/// D/B of CS: 0 if the guest will be in IA-32e mode and L is 1 (§27.3.1.2).
pub(super) fn cs_default_size(c: &Context, f: &mut Findings) {
    if c.virtual_8086() || !c.ia32e_guest() {
        return;
    }
    let s = segment(c, seg::CS);
    if s.access.long() && s.access.db() {
        fail(f, &s, &[s.fields.access], "is 64-bit code with D", "D/B (bit 14) = 0 or L (bit 13) = 0");
    }
}

/// G of code and data segments that are CS or usable fits the limit (§27.3.1.2).
pub(super) fn segments_granularity(c: &Context, f: &mut Findings) {
    for s in protected_mode_segments(c, &CODE_DATA).filter(|s| !s.granularity_fits()) {
        fail(f, &s, &[s.fields.limit, s.fields.access], GRANULARITY, GRANULARITY_EXPECTED);
    }
}

/// Bits 31:17 of code and data segments that are CS or usable: 0 (§27.3.1.2).
pub(super) fn segments_reserved_high(c: &Context, f: &mut Findings) {
    require_code_data(c, f, reserved_high_clear, RESERVED, "bits 31:17 = 0");
}

/// Type of TR: busy 32-bit or 64-bit TSS (11); outside IA-32e mode also busy 16-bit TSS (3)
/// (§27.3.1.2).
pub(super) fn tr_type(c: &Context, f: &mut Findings) {
    let s = segment(c, seg::TR);
    if !(s.access.ty() == 11 || s.access.ty() == 3 && !c.ia32e_guest()) {
        let expected = if c.ia32e_guest() { "type (bits 3:0) 11" } else { "type (bits 3:0) 3 or 11" };
        fail(f, &s, &[s.fields.access, EntryControls], "is not a busy TSS", expected);
    }
}

/// S of TR: 0 (§27.3.1.2).
pub(super) fn tr_system(c: &Context, f: &mut Findings) {
    require_tr(c, f, |s| !s.access.is_code_or_data(), "is no system segment", "S (bit 4) = 0");
}

/// P of TR: 1 (§27.3.1.2).
pub(super) fn tr_present(c: &Context, f: &mut Findings) {
    require_tr(c, f, |s| s.access.present(), "is not present", "P (bit 7) = 1");
}

/// Bits 11:8 of TR: 0 (§27.3.1.2).
pub(super) fn tr_reserved_low(c: &Context, f: &mut Findings) {
    require_tr(c, f, reserved_low_clear, RESERVED, "bits 11:8 = 0");
}

/// G of TR fits the limit (§27.3.1.2).
pub(super) fn tr_granularity(c: &Context, f: &mut Findings) {
    let s = segment(c, seg::TR);
    if !s.granularity_fits() {
        fail(f, &s, &[s.fields.limit, s.fields.access], GRANULARITY, GRANULARITY_EXPECTED);
    }
}

/// TR must be usable (§27.3.1.2).
pub(super) fn tr_usable(c: &Context, f: &mut Findings) {
    require_tr(c, f, Segment::usable, "is unusable", "unusable (bit 16) = 0");
}

/// Bits 31:17 of TR: 0 (§27.3.1.2).
pub(super) fn tr_reserved_high(c: &Context, f: &mut Findings) {
    let reserved = c.get(GuestTrAccessRights) & u64::from(RESERVED_HIGH);
    fixed_bits(f, GuestTrAccessRights, 0, reserved, "reserved bits");
}

/// Type of LDTR: if usable, 2 (§27.3.1.2).
pub(super) fn ldtr_type(c: &Context, f: &mut Findings) {
    require_ldtr(c, f, |s| s.access.ty() == 2, "is no LDT", "type (bits 3:0) 2, or unusable");
}

/// S of LDTR: if usable, 0 (§27.3.1.2).
pub(super) fn ldtr_system(c: &Context, f: &mut Findings) {
    require_ldtr(c, f, |s| !s.access.is_code_or_data(), "is no system segment", "S (bit 4) = 0, or unusable");
}

/// P of LDTR: if usable, 1 (§27.3.1.2).
pub(super) fn ldtr_present(c: &Context, f: &mut Findings) {
    require_ldtr(c, f, |s| s.access.present(), "is not present", "P (bit 7) = 1, or unusable");
}

/// Bits 11:8 of LDTR: if usable, 0 (§27.3.1.2).
pub(super) fn ldtr_reserved_low(c: &Context, f: &mut Findings) {
    require_ldtr(c, f, reserved_low_clear, RESERVED, "bits 11:8 = 0, or unusable");
}

/// G of LDTR: if usable, fits the limit (§27.3.1.2).
pub(super) fn ldtr_granularity(c: &Context, f: &mut Findings) {
    if let Some(s) = usable_ldtr(c).filter(|s| !s.granularity_fits()) {
        fail(f, &s, &[s.fields.limit, s.fields.access], GRANULARITY, GRANULARITY_EXPECTED);
    }
}

/// Bits 31:17 of LDTR: if usable, 0 (§27.3.1.2).
pub(super) fn ldtr_reserved_high(c: &Context, f: &mut Findings) {
    require_ldtr(c, f, reserved_high_clear, RESERVED, "bits 31:17 = 0, or unusable");
}
