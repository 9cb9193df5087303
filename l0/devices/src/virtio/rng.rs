//! The virtio entropy device (Virtio 1.2 §5.4): random bytes of the host's kernel.
//!
//! Not supported: limits on how fast a guest may ask.

use rustix::rand::{GetRandomFlags, getrandom};

use super::{Backend, Chain, Handled};

const ID: u16 = 4;
/// Unclassified device.
const CLASS: u32 = 0x00_ff00;
const QUEUE_SIZE: u16 = 64;
/// Most bytes for one request; a device may give less than asked for.
const MAX_BYTES: u64 = 4096;

/// An entropy device.
#[derive(Debug, Default)]
pub struct Rng;

impl Backend for Rng {
    fn id(&self) -> u16 {
        ID
    }
    fn class(&self) -> u32 {
        CLASS
    }
    fn features(&self) -> u64 {
        0
    }
    fn queues(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn handle(&mut self, _queue: usize, chain: &mut Chain<'_>) -> Handled {
        let mut bytes = vec![0; chain.writable_len().min(MAX_BYTES) as usize];
        // The host's kernel gives as many as it likes, at least 256 at a time.
        let given = match getrandom(&mut bytes, GetRandomFlags::empty()) {
            Ok(n) => n,
            Err(e) => {
                tracing::warn!("no random bytes for the guest: {e}");
                0
            }
        };
        match chain.write(0, bytes.get(..given).unwrap_or_default()) {
            Ok(()) => Handled::Done(given as u32),
            Err(e) => e.into(),
        }
    }
}
