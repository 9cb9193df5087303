//! Physical region pages: where the data of a command is (NVM Express 1.4 §4.3).
//!
//! Not supported: pages other than 4 KiB.

use memory::BusAddress;

use super::command::{Failure, Status};
use super::{Access, PAGE};

/// Size of an entry of a list.
const ENTRY: u64 = 8;

/// The pieces of `len` bytes of data whose PRP entries are `prp`.
///
/// # Errors
/// [`Status::PRP_OFFSET_INVALID`] for an entry that is not aligned, [`Status::DATA_TRANSFER_ERROR`] for a list that can't be
/// read.
pub(super) fn pieces(
    access: &Access<'_>,
    prp: [u64; 2],
    len: u64,
) -> Result<Vec<(BusAddress, u64)>, Failure> {
    let [first, second] = prp;
    if !first.is_multiple_of(4) {
        return Err(Status::PRP_OFFSET_INVALID.into());
    }
    let here = len.min(PAGE - first % PAGE);
    let mut pieces = vec![(BusAddress(first), here)];
    let rest = len - here;
    if rest > PAGE {
        list(access, second, rest, &mut pieces)?;
    } else if rest > 0 {
        pieces.push((page(second)?, rest));
    }
    Ok(pieces)
}

/// A page's address.
fn page(entry: u64) -> Result<BusAddress, Failure> {
    if entry.is_multiple_of(PAGE) { Ok(BusAddress(entry)) } else { Err(Status::PRP_OFFSET_INVALID.into()) }
}

/// Most lists of a command: the largest transfer needs two, or three if the first begins late in its page.
const MAX_LISTS: usize = 8;

/// Follows lists from `at` for `left` bytes.
fn list(
    access: &Access<'_>,
    mut at: u64,
    mut left: u64,
    pieces: &mut Vec<(BusAddress, u64)>,
) -> Result<(), Failure> {
    for _ in 0..MAX_LISTS {
        if left == 0 {
            return Ok(());
        }
        if !at.is_multiple_of(ENTRY) {
            return Err(Status::PRP_OFFSET_INVALID.into());
        }
        // Up to the end of the list's page, of which the last entry leads on if there is more.
        let room = (PAGE - at % PAGE) / ENTRY;
        let wanted = left.div_ceil(PAGE);
        let mut bytes = vec![0; (room.min(wanted) * ENTRY) as usize];
        access.with_memory(|memory| memory.read(BusAddress(at), &mut bytes))?;
        let mut entries: Vec<u64> = bytes
            .chunks_exact(ENTRY as usize)
            .map(|b| b.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
            .collect();
        let next = if wanted > room { entries.pop() } else { None };
        for entry in entries {
            let here = left.min(PAGE);
            pieces.push((page(entry)?, here));
            left -= here;
        }
        at = next.unwrap_or(0);
    }
    // Lists that only lead on, perhaps in a circle.
    if left == 0 { Ok(()) } else { Err(Status::INVALID_FIELD.into()) }
}
