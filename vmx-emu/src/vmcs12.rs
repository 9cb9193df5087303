//! VMCS12: L1's VMCS, and its form in L1's memory (SDM Vol. 3C §25.2).
//!
//! While a VMCS is current its fields are cached in a [`Vmcs12`]; VMCLEAR, VMPTRLD of
//! another one and VMXOFF write it to its region. The layout of the region is ours, as the
//! SDM leaves it to the processor:
//!
//! | bytes | |
//! |---|---|
//! | 0–3 | revision identifier; bit 31: shadow-VMCS indicator. Software's: never written here |
//! | 4–7 | VMX-abort indicator. Written by a VMX abort alone |
//! | 8–15 | signature of this layout |
//! | 16–19 | launch state: 1 launched, anything else clear |
//! | 64 + 8·i | field with index i, little-endian, zero-extended |
//!
//! L1 can write anything there. Any content is accepted: fields are cut to their
//! width, and a region without the signature counts as one with all fields zero.

use engine::{DescriptorTable, Segment};
use memory::L1Gpa;
use x86_spec::segment::AccessRights;

use crate::fields::{Access, Field, GUEST_SEGMENTS, OperandSize, WIDTH_MASKS};
use crate::physical::L1Physical;

/// Size of a VMCS region in bytes.
pub const REGION_SIZE: usize = 4096;
/// Revision identifier of VMCS regions and of the VMXON region (IA32_VMX_BASIC bits 30:0).
/// Changes whenever the layout does.
pub const REVISION: u32 = 0x4e56_0001;
/// Bit 31 of the first dword: the region is a shadow VMCS (SDM Vol. 3C §25.2).
pub const SHADOW_INDICATOR: u32 = 1 << 31;
/// Where the VMX-abort indicator is.
pub const ABORT_INDICATOR_OFFSET: u64 = 4;

const SIGNATURE: u64 = u64::from_le_bytes(*b"VMCS12\0\x01");
const SIGNATURE_OFFSET: usize = 8;
const LAUNCH_STATE_OFFSET: usize = 16;
const VALUES_OFFSET: usize = 64;

/// Bytes of a region that the layout uses, from its start.
pub const USED: usize = VALUES_OFFSET + 8 * Field::COUNT;
const _: () = assert!(USED <= REGION_SIZE);

/// Offset of a field in the region.
pub const fn offset(field: Field) -> usize {
    VALUES_OFFSET + 8 * field.index()
}

/// Launch state (SDM Vol. 3C §25.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LaunchState {
    /// VMLAUNCH can enter it.
    #[default]
    Clear,
    /// VMRESUME can enter it.
    Launched,
}

/// L1's VMCS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vmcs12 {
    values: [u64; Field::COUNT],
    /// Launch state.
    pub launch_state: LaunchState,
    /// It is a shadow VMCS: VM entry with it fails.
    pub shadow: bool,
}

impl Default for Vmcs12 {
    /// All fields zero, clear, ordinary.
    fn default() -> Self {
        Self { values: [0; Field::COUNT], launch_state: LaunchState::Clear, shadow: false }
    }
}

fn bytes<const N: usize>(region: &[u8], at: usize) -> Option<[u8; N]> {
    region.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn put(region: &mut [u8], at: usize, value: &[u8]) {
    if let Some(to) = at.checked_add(value.len()).and_then(|end| region.get_mut(at..end)) {
        to.copy_from_slice(value);
    }
}

/// The values in a region, by index of the field.
fn stored_values(region: &[u8]) -> impl Iterator<Item = &[u8; 8]> {
    region.get(VALUES_OFFSET..).unwrap_or_default().as_chunks().0.iter()
}

fn stored_values_mut(region: &mut [u8]) -> impl Iterator<Item = &mut [u8; 8]> {
    region.get_mut(VALUES_OFFSET..).unwrap_or_default().as_chunks_mut().0.iter_mut()
}

impl Vmcs12 {
    /// The field's value, zero-extended.
    #[inline]
    pub const fn get(&self, field: Field) -> u64 {
        self.values[field.index()]
    }

    /// The low 32 bits of the field's value: all of a field that is no wider.
    #[inline]
    pub const fn get32(&self, field: Field) -> u32 {
        self.get(field) as u32
    }

    /// Sets the field, cutting `value` to its width.
    #[inline]
    pub const fn set(&mut self, field: Field, value: u64) {
        self.values[field.index()] = value & field.width().mask();
    }

    /// What VMREAD gives.
    pub const fn read(&self, field: Field, access: Access, size: OperandSize) -> u64 {
        field.read_part(access, size, self.get(field))
    }

    /// What VMWRITE does.
    pub const fn write(&mut self, field: Field, access: Access, size: OperandSize, source: u64) {
        self.set(field, field.write_part(access, size, self.get(field), source));
    }

    /// A guest segment register; `index` as in [`x86_spec::segment::seg`] (modulo 8).
    pub fn guest_segment(&self, index: usize) -> Segment {
        let f = GUEST_SEGMENTS[index & 7];
        Segment {
            base: self.get(f.base),
            limit: self.get32(f.limit),
            access: AccessRights(self.get32(f.access)),
            selector: self.get(f.selector) as u16,
        }
    }

    /// Sets a guest segment register; `index` as in [`x86_spec::segment::seg`] (modulo 8).
    pub fn set_guest_segment(&mut self, index: usize, segment: &Segment) {
        let f = GUEST_SEGMENTS[index & 7];
        self.set(f.base, segment.base);
        self.set(f.limit, segment.limit as u64);
        self.set(f.access, segment.access.0 as u64);
        self.set(f.selector, segment.selector as u64);
    }

    /// The guest's GDTR.
    pub fn guest_gdtr(&self) -> DescriptorTable {
        DescriptorTable { base: self.get(Field::GuestGdtrBase), limit: self.get32(Field::GuestGdtrLimit) }
    }

    /// The guest's IDTR.
    pub fn guest_idtr(&self) -> DescriptorTable {
        DescriptorTable { base: self.get(Field::GuestIdtrBase), limit: self.get32(Field::GuestIdtrLimit) }
    }

    /// From the content of a region. Anything is accepted; what is missing at the end of a
    /// short `region` is zero.
    pub fn from_region(region: &[u8]) -> Self {
        let mut vmcs = Self::default();
        if let Some(first) = bytes(region, 0) {
            vmcs.shadow = u32::from_le_bytes(first) & SHADOW_INDICATOR != 0;
        }
        if !has_signature(region) {
            return vmcs;
        }
        if bytes(region, LAUNCH_STATE_OFFSET) == Some(1u32.to_le_bytes()) {
            vmcs.launch_state = LaunchState::Launched;
        }
        vmcs.load_values(region);
        vmcs
    }

    /// Writes it to a region's content, except for the first eight bytes, which are
    /// software's and VMX abort's.
    pub fn to_region(&self, region: &mut [u8]) {
        put(region, SIGNATURE_OFFSET, &SIGNATURE.to_le_bytes());
        put_launch_state(region, self.launch_state);
        self.store_values(region);
    }

    /// Writes it to its region in L1's memory.
    pub(crate) fn write_region(&self, memory: &dyn L1Physical, pointer: L1Gpa) {
        let mut region = [0; USED];
        self.to_region(&mut region);
        memory.write(pointer.offset(SIGNATURE_OFFSET as u64), &region[SIGNATURE_OFFSET..]);
    }

    /// Copies all fields to a page with the layout of a region.
    pub fn store_values(&self, page: &mut [u8]) {
        for (stored, value) in stored_values_mut(page).zip(self.values) {
            *stored = value.to_le_bytes();
        }
    }

    /// Takes all fields from such a page, cut to their width. What is missing at the end of a
    /// short `page` stays as it is.
    pub fn load_values(&mut self, page: &[u8]) {
        for ((value, mask), stored) in self.values.iter_mut().zip(WIDTH_MASKS).zip(stored_values(page)) {
            *value = u64::from_le_bytes(*stored) & mask;
        }
    }
}

/// Whether a region's content has ever been initialised by VMCLEAR.
pub fn has_signature(region: &[u8]) -> bool {
    bytes(region, SIGNATURE_OFFSET) == Some(SIGNATURE.to_le_bytes())
}

/// Sets the launch state in a region's content.
pub fn put_launch_state(region: &mut [u8], state: LaunchState) {
    put(region, LAUNCH_STATE_OFFSET, &(state as u32).to_le_bytes());
}

/// What VMCLEAR does to the content of a region that is not cached: initialises it, fields
/// zero, if that has never been done, and sets the launch state to clear.
pub fn clear_region(region: &mut [u8]) {
    if has_signature(region) {
        put_launch_state(region, LaunchState::Clear);
    } else {
        Vmcs12::default().to_region(region);
    }
}

/// VMCLEAR of the region at `pointer`, which is not cached.
pub(crate) fn clear_in_memory(memory: &dyn L1Physical, pointer: L1Gpa) {
    let mut region = [0; USED];
    memory.read(pointer, &mut region);
    clear_region(&mut region);
    memory.write(pointer.offset(SIGNATURE_OFFSET as u64), &region[SIGNATURE_OFFSET..]);
}

/// A field of the VMCS whose region is at `pointer` and which is not cached.
pub(crate) fn read_in_memory(memory: &dyn L1Physical, pointer: L1Gpa, field: Field) -> u64 {
    if signature_in_memory(memory, pointer) {
        memory.read_u64(pointer.offset(offset(field) as u64)) & field.width().mask()
    } else {
        0
    }
}

/// Sets a field there; a region without the signature is initialised first.
pub(crate) fn write_in_memory(memory: &dyn L1Physical, pointer: L1Gpa, field: Field, value: u64) {
    if !signature_in_memory(memory, pointer) {
        clear_in_memory(memory, pointer);
    }
    let value = value & field.width().mask();
    memory.write(pointer.offset(offset(field) as u64), &value.to_le_bytes());
}

fn signature_in_memory(memory: &dyn L1Physical, pointer: L1Gpa) -> bool {
    memory.read_u64(pointer.offset(SIGNATURE_OFFSET as u64)) == SIGNATURE
}

/// Where a field is in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldLocation {
    /// Encoding for full access.
    pub encoding: u32,
    /// Offset in bytes.
    pub offset: u16,
    /// Width in bytes: 2, 4 or 8. The 8 bytes at `offset` are the field's: a write stores it
    /// zero-extended.
    pub width: u8,
}

const LAYOUT: [FieldLocation; Field::COUNT] = {
    let mut layout = [FieldLocation { encoding: 0, offset: 0, width: 0 }; Field::COUNT];
    let mut i = 0;
    while i < Field::COUNT {
        let f = Field::ALL[i];
        layout[i] =
            FieldLocation { encoding: f.encoding(), offset: offset(f) as u16, width: f.width().bytes() };
        i += 1;
    }
    layout
};

/// The layout of regions and of shadow-VMCS pages, for an engine that executes VMREAD and
/// VMWRITE against such a page (SDM Vol. 3C §25.10).
pub fn shadow_layout() -> &'static [FieldLocation] {
    static TABLE: [FieldLocation; Field::COUNT] = LAYOUT;
    &TABLE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vmcs12 {
        let mut v = Vmcs12::default();
        for (i, f) in Field::ALL.iter().enumerate() {
            v.set(*f, (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        v
    }

    #[test]
    fn values_are_cut_to_the_width() {
        let mut v = Vmcs12::default();
        v.set(Field::Vpid, 0x1_2345);
        assert_eq!(v.get(Field::Vpid), 0x2345);
        v.set(Field::PinControls, u64::MAX);
        assert_eq!(v.get(Field::PinControls), 0xffff_ffff);
    }

    #[test]
    fn software_and_abort_own_the_first_bytes() {
        let mut region = [0u8; REGION_SIZE];
        region[..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        sample().to_region(&mut region);
        assert_eq!(region[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn a_region_never_cleared_has_no_values() {
        let region = [0xff; REGION_SIZE];
        let v = Vmcs12::from_region(&region);
        assert!(v.shadow, "bit 31 of the first dword");
        assert_eq!(v, Vmcs12 { shadow: true, ..Vmcs12::default() });
    }

    #[test]
    fn clearing_a_region_keeps_fields() {
        let mut region = [0u8; REGION_SIZE];
        let launched = Vmcs12 { launch_state: LaunchState::Launched, ..sample() };
        launched.to_region(&mut region);
        assert_eq!(Vmcs12::from_region(&region), launched);
        clear_region(&mut region);
        assert_eq!(Vmcs12::from_region(&region), sample());
        let mut fresh = [0xa5; REGION_SIZE];
        fresh[3] = 0;
        clear_region(&mut fresh);
        assert_eq!(Vmcs12::from_region(&fresh), Vmcs12::default());
    }

    #[test]
    fn layout_is_where_the_region_has_it() {
        let mut region = [0u8; REGION_SIZE];
        sample().to_region(&mut region);
        for (f, l) in Field::ALL.iter().zip(shadow_layout()) {
            assert_eq!(l.encoding, f.encoding());
            let at = l.offset as usize;
            let v = u64::from_le_bytes(region[at..at + 8].try_into().unwrap());
            assert_eq!(v, sample().get(*f));
            assert_eq!(v >> 1 >> (8 * l.width as u32 - 1), 0);
        }
    }

    proptest! {
        #[test]
        fn any_content_is_accepted(mut region in proptest::collection::vec(any::<u8>(), 0..=REGION_SIZE), sign: bool) {
            if sign {
                put(&mut region, SIGNATURE_OFFSET, &SIGNATURE.to_le_bytes());
            }
            let v = Vmcs12::from_region(&region);
            for f in Field::ALL {
                prop_assert_eq!(v.get(*f) & !f.width().mask(), 0);
            }
            // And from there it survives a round trip.
            let mut whole = [0u8; REGION_SIZE];
            whole[3] = if v.shadow { 0x80 } else { 0 };
            v.to_region(&mut whole);
            prop_assert_eq!(Vmcs12::from_region(&whole), v);
        }
    }
}
