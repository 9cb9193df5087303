//! VMREAD and VMWRITE of L1 without an exit: a page that stands for the current VMCS.
//!
//! The page has the layout of a VMCS region ([`shadow_layout`](crate::shadow_layout)). An
//! engine with VMCS shadowing executes L1's VMREAD and VMWRITE against it (SDM Vol. 3C §25.10).
//! L0 takes the page's content over ([`load`]) before it looks at VMCS12, and brings the page up
//! to date ([`store`]) before L1 runs on:
//!
//! - at every VMX instruction of L1 that still exits: load, execute, store;
//! - when an exit of L2 has been reflected to L1: store.
//!
//! What L1 puts there in place of fields that do not exist goes into VMCS12 too, and means
//! nothing: only controls that are not offered would use it.
//!
//! When L1 has no current VMCS, VMREAD and VMWRITE must exit, so that they fail: [`store`] says
//! so.

use crate::capabilities::{Capabilities, misc};
use crate::fields::{FieldSet, FieldType};
use crate::state::VmxState;

/// Size of a VMREAD or VMWRITE bitmap in bytes (SDM Vol. 3C §25.6.15): a bit for each value
/// of encoding bits 14:0.
pub const BITMAP_SIZE: usize = 4096;

/// Takes the page's content into the current VMCS, if there is one.
pub fn load(state: &mut VmxState, page: &[u8]) {
    if let Some(vmcs) = state.current_mut() {
        vmcs.load_values(page);
    }
}

/// Writes the current VMCS to the page. False when there is none.
#[must_use = "without a current VMCS, VMREAD and VMWRITE must exit"]
pub fn store(state: &VmxState, page: &mut [u8]) -> bool {
    match state.current() {
        Some(vmcs) => {
            vmcs.store_values(page);
            true
        }
        None => false,
    }
}

/// The VMREAD bitmap for L1: a field that exists is read without an exit, whatever else
/// exits, and so fails as it should.
pub fn vmread_bitmap(caps: &Capabilities) -> Box<[u8; BITMAP_SIZE]> {
    bitmap(&caps.fields)
}

/// The VMWRITE bitmap for L1: as for VMREAD, except that read-only fields exit unless L1 may
/// write them.
pub fn vmwrite_bitmap(caps: &Capabilities) -> Box<[u8; BITMAP_SIZE]> {
    let any = caps.misc & misc::VMWRITE_ANY_FIELD != 0;
    bitmap(&FieldSet::filter(|f| caps.has_field(f) && (any || f.field_type() != FieldType::ReadOnly)))
}

/// All ones but for the encodings of `fields`, the high halves of 64-bit ones among them.
fn bitmap(fields: &FieldSet) -> Box<[u8; BITMAP_SIZE]> {
    let mut map = Box::new([0xff; BITMAP_SIZE]);
    let mut clear = |encoding: u32| {
        if let Some(byte) = map.get_mut(encoding as usize / 8) {
            *byte &= !(1 << (encoding % 8));
        }
    };
    for field in fields.iter() {
        clear(field.encoding());
        if field.width() == crate::fields::Width::Bits64 {
            clear(field.encoding() | 1);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capabilities::tests::full;
    use crate::fields::Field;
    use crate::testing::{Machine, VMCS_A};
    use crate::vmcs12::{self, REGION_SIZE};

    #[test]
    fn bitmaps_pass_exactly_the_encodings_of_fields() {
        let mut caps = full();
        caps.misc &= !misc::VMWRITE_ANY_FIELD;
        caps.fields.remove(Field::TscMultiplier);
        let (read, write) = (vmread_bitmap(&caps), vmwrite_bitmap(&caps));
        for encoding in 0..BITMAP_SIZE as u32 * 8 {
            let bit = |m: &[u8; BITMAP_SIZE]| m[encoding as usize / 8] >> (encoding % 8) & 1 != 0;
            let field = Field::from_encoding(encoding).map(|(f, _)| f).filter(|f| caps.has_field(*f));
            assert_eq!(bit(&read), field.is_none(), "{encoding:#x}");
            let writable = field.is_some_and(|f| f.field_type() != FieldType::ReadOnly);
            assert_eq!(bit(&write), !writable, "{encoding:#x}");
        }
    }

    #[test]
    fn the_page_stands_for_the_current_vmcs() {
        let mut m = Machine::long().in_root();
        let mut page = [0u8; REGION_SIZE];
        assert!(!store(&m.state, &mut page), "none is current");
        load(&mut m.state, &page);
        let mut m = Machine::long().with_current(VMCS_A);
        m.state.current_mut().unwrap().set(Field::GuestRip, 0x1234);
        assert!(store(&m.state, &mut page));
        let at = |f| vmcs12::offset(f)..vmcs12::offset(f) + 8;
        assert_eq!(page[at(Field::GuestRip)], 0x1234u64.to_le_bytes());
        page[at(Field::GuestRsp)].copy_from_slice(&7u64.to_le_bytes());
        page[at(Field::Vpid)].copy_from_slice(&u64::MAX.to_le_bytes());
        load(&mut m.state, &page);
        let vmcs = m.state.current().unwrap();
        assert_eq!(vmcs.get(Field::GuestRip), 0x1234);
        assert_eq!(vmcs.get(Field::GuestRsp), 7);
        assert_eq!(vmcs.get(Field::Vpid), 0xffff, "cut to its width");
    }
}
