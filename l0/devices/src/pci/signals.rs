//! How a function interrupts: MSI-X, MSI, or the INTA wire, whichever the system has chosen (PCI Express Base
//! Specification 6.0 §6.1, §7.7.1, §7.7.2).
//!
//! Not supported: more than one MSI message, MSI masking, steering tags, pins other than INTA.

use std::sync::{Arc, Mutex};

use memory::dma::{MessageSink, Requester};

use crate::device::{IrqLine, lock};

/// Size of an entry of the MSI-X table.
pub const ENTRY_SIZE: u64 = 16;
/// Most entries that a table may have.
pub const MAX_VECTORS: u16 = 2048;
/// Vector control: the entry is masked.
const ENTRY_MASKED: u32 = 1;

/// An interrupt wire that several functions share: asserted while one of them asserts it.
pub struct SharedWire {
    line: IrqLine,
    users: Mutex<u32>,
}

impl SharedWire {
    /// A wire into `line`.
    pub fn new(line: IrqLine) -> Self {
        Self { line, users: Mutex::new(0) }
    }

    /// One more function asserts the wire, or one less.
    fn change(&self, assert: bool) {
        let mut users = lock(&self.users);
        *users = if assert { users.saturating_add(1) } else { users.saturating_sub(1) };
        self.line.set(*users > 0);
    }
}

/// An entry of the MSI-X table.
#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

impl Entry {
    /// Entries are masked after a reset (§7.7.2.9).
    const RESET: Self = Self { address: 0, data: 0, control: ENTRY_MASKED, pending: false };
}

/// Message address and data of MSI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiState {
    /// MSI enable.
    pub enabled: bool,
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u16,
}

struct State {
    entries: Vec<Entry>,
    msix_enabled: bool,
    function_masked: bool,
    msi: MsiState,
    intx_disabled: bool,
    /// The device wants its wire asserted.
    intx_wanted: bool,
    /// It is.
    intx_asserted: bool,
}

/// The interrupts of one function; used by its registers and its worker.
pub struct Signals {
    state: Mutex<State>,
    wire: Option<Arc<SharedWire>>,
    sink: Arc<dyn MessageSink>,
    requester: Arc<Requester>,
}

impl Signals {
    /// `vectors` entries of MSI-X, and a wire.
    pub fn new(
        vectors: u16,
        wire: Option<Arc<SharedWire>>,
        sink: Arc<dyn MessageSink>,
        requester: Arc<Requester>,
    ) -> Self {
        let state = State {
            entries: vec![Entry::RESET; vectors.min(MAX_VECTORS).into()],
            msix_enabled: false,
            function_masked: false,
            msi: MsiState::default(),
            intx_disabled: false,
            intx_wanted: false,
            intx_asserted: false,
        };
        Self { state: Mutex::new(state), wire, sink, requester }
    }

    // ---- the device's side --------------------------------------------------------------

    /// Interrupt `vector`: sends its message, or keeps it pending while it is masked. Without MSI-X and MSI nothing
    /// happens: the wire is for [`Self::set_wire`].
    pub fn signal(&self, vector: u16) {
        let message = {
            let mut s = lock(&self.state);
            if s.msix_enabled {
                let masked = s.function_masked;
                let Some(entry) = s.entries.get_mut(usize::from(vector)) else { return };
                if masked || entry.control & ENTRY_MASKED != 0 {
                    entry.pending = true;
                    return;
                }
                (entry.address, entry.data)
            } else if s.msi.enabled {
                (s.msi.address, s.msi.data.into())
            } else {
                return;
            }
        };
        self.send(message);
    }

    /// Whether messages are in use instead of the wire.
    pub fn uses_messages(&self) -> bool {
        let s = lock(&self.state);
        s.msix_enabled || s.msi.enabled
    }

    /// The device wants its wire asserted, or not. It only is while neither MSI-X nor MSI is enabled.
    pub fn set_wire(&self, wanted: bool) {
        let mut s = lock(&self.state);
        s.intx_wanted = wanted;
        self.update_wire(&mut s);
    }

    fn update_wire(&self, s: &mut State) {
        let assert = s.intx_wanted && !s.intx_disabled && !s.msix_enabled && !s.msi.enabled;
        if assert != s.intx_asserted {
            s.intx_asserted = assert;
            if let Some(wire) = &self.wire {
                wire.change(assert);
            }
        }
    }

    fn send(&self, (address, data): (u64, u32)) {
        if self.requester.can_request() {
            self.sink.send(self.requester.get(), address, data);
        }
    }

    // ---- the configuration space's side -------------------------------------------------

    /// What the interrupt status bit shows: the device wants its wire, whether or not it may have it.
    pub fn wire_wanted(&self) -> bool {
        lock(&self.state).intx_wanted
    }

    /// The command register's interrupt disable bit.
    pub fn set_intx_disabled(&self, disabled: bool) {
        let mut s = lock(&self.state);
        s.intx_disabled = disabled;
        self.update_wire(&mut s);
    }

    /// What the MSI capability says.
    pub fn set_msi(&self, msi: MsiState) {
        let mut s = lock(&self.state);
        s.msi = msi;
        self.update_wire(&mut s);
    }

    /// MSI-X enable and function mask. What is no longer masked is sent.
    pub fn set_msix(&self, enabled: bool, function_masked: bool) {
        let messages = {
            let mut s = lock(&self.state);
            s.msix_enabled = enabled;
            s.function_masked = function_masked;
            self.update_wire(&mut s);
            let ready = enabled && !function_masked;
            let unmasked = |e: &&mut Entry| ready && e.pending && e.control & ENTRY_MASKED == 0;
            s.entries.iter_mut().filter(unmasked).map(take).collect::<Vec<_>>()
        };
        messages.into_iter().for_each(|m| self.send(m));
    }

    /// Reads the MSI-X table: 4 bytes at a multiple of 4.
    pub fn read_table(&self, offset: u64) -> u32 {
        let s = lock(&self.state);
        let Some(entry) = s.entries.get((offset / ENTRY_SIZE) as usize) else { return 0 };
        match offset % ENTRY_SIZE / 4 {
            0 => entry.address as u32,
            1 => (entry.address >> 32) as u32,
            2 => entry.data,
            _ => entry.control,
        }
    }

    /// Writes the MSI-X table: 4 bytes at a multiple of 4. An entry that is unmasked sends what it kept.
    pub fn write_table(&self, offset: u64, value: u32) {
        let message = {
            let mut s = lock(&self.state);
            let ready = s.msix_enabled && !s.function_masked;
            let Some(entry) = s.entries.get_mut((offset / ENTRY_SIZE) as usize) else { return };
            match offset % ENTRY_SIZE / 4 {
                // Bits 1:0 are zero (§7.7.2.6).
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                2 => entry.data = value,
                _ => entry.control = value & ENTRY_MASKED,
            }
            let send = ready && entry.pending && entry.control & ENTRY_MASKED == 0;
            send.then(|| take(entry))
        };
        if let Some(message) = message {
            self.send(message);
        }
    }

    /// Reads 32 of the pending bits: those of entries `8 * offset` and up.
    pub fn read_pending(&self, offset: u64) -> u32 {
        let s = lock(&self.state);
        let first = (offset as usize).saturating_mul(8);
        let entries = s.entries.iter().skip(first).take(32);
        entries.enumerate().fold(0, |bits, (i, e)| bits | u32::from(e.pending) << i)
    }

    /// As after power-up.
    pub fn reset(&self) {
        let mut s = lock(&self.state);
        s.entries.fill(Entry::RESET);
        s.msix_enabled = false;
        s.function_masked = false;
        s.msi = MsiState::default();
        s.intx_disabled = false;
        s.intx_wanted = false;
        self.update_wire(&mut s);
    }
}

fn take(entry: &mut Entry) -> (u64, u32) {
    entry.pending = false;
    (entry.address, entry.data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::testing::LineLog;
    use crate::pci::testing::Messages;
    use x86_spec::pci::Bdf;

    const BDF: Bdf = Bdf::new(0, 3, 0);

    fn signals() -> (Signals, Arc<Messages>, Arc<LineLog>) {
        let (sink, log) = (Arc::new(Messages::default()), Arc::new(LineLog::default()));
        let requester = Arc::new(Requester::new(BDF));
        requester.set_master(true);
        let wire = Arc::new(SharedWire::new(IrqLine::new(log.clone(), 16)));
        (Signals::new(3, Some(wire), sink.clone(), requester), sink, log)
    }

    fn program(s: &Signals, entry: u64, data: u32) {
        s.write_table(entry * 16, 0xfee0_1003);
        s.write_table(entry * 16 + 4, 0);
        s.write_table(entry * 16 + 8, data);
        s.write_table(entry * 16 + 12, 0);
    }

    #[test]
    fn a_masked_vector_is_kept_until_it_is_unmasked() {
        let (s, sink, _) = signals();
        program(&s, 1, 0x41);
        s.signal(1);
        assert_eq!(sink.take(), [], "MSI-X is off");
        s.set_msix(true, false);
        s.signal(1);
        assert_eq!(sink.take(), [(BDF, 0xfee0_1000, 0x41)]);
        s.write_table(16 + 12, u32::MAX);
        assert_eq!(s.read_table(16 + 12), 1);
        s.signal(1);
        s.signal(1);
        assert_eq!((sink.take(), s.read_pending(0)), (vec![], 0b010));
        s.write_table(16 + 12, 0);
        assert_eq!((sink.take().len(), s.read_pending(0)), (1, 0), "once, however often it was signalled");
        s.set_msix(true, true);
        s.signal(1);
        assert_eq!(sink.take(), []);
        s.set_msix(true, false);
        assert_eq!(sink.take().len(), 1);
        s.signal(3);
        assert_eq!(sink.take(), [], "no such entry");
        s.signal(0);
        assert_eq!(sink.take(), [], "entries are masked after a reset");
    }

    #[test]
    fn only_a_bus_master_sends() {
        let (s, sink, _) = signals();
        program(&s, 0, 0x41);
        s.set_msix(true, false);
        s.requester.set_master(false);
        s.signal(0);
        assert_eq!(sink.take(), []);
    }

    #[test]
    fn the_wire_is_quiet_while_messages_are_used() {
        let (s, sink, log) = signals();
        s.set_wire(true);
        assert!(log.level(16));
        s.set_msi(MsiState { enabled: true, address: 0xfee0_0000, data: 0x55 });
        assert!(!log.level(16));
        s.signal(2);
        assert_eq!(sink.take(), [(BDF, 0xfee0_0000, 0x55)]);
        s.set_msi(MsiState::default());
        assert!(log.level(16));
        s.set_intx_disabled(true);
        assert!(!log.level(16) && s.wire_wanted());
        s.set_intx_disabled(false);
        s.reset();
        assert!(!log.level(16) && !s.wire_wanted());
    }

    #[test]
    fn a_shared_wire_stays_asserted_for_the_last_function() {
        let log = Arc::new(LineLog::default());
        let wire = Arc::new(SharedWire::new(IrqLine::new(log.clone(), 17)));
        let make = || Signals::new(0, Some(wire.clone()), Arc::new(Messages::default()), Arc::default());
        let (a, b) = (make(), make());
        a.set_wire(true);
        b.set_wire(true);
        a.set_wire(false);
        assert!(log.level(17));
        b.set_wire(false);
        assert!(!log.level(17));
    }
}
