//! The root complex: which function answers to a configuration access or a memory address, and the addresses
//! that firmware gives out at power-on.
//!
//! Not supported: see [`super`].

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use memory::dma::Requester;
use x86_spec::pci::Bdf;

use super::config::{COMMAND, COMMAND_MEMORY, ConfigSpace, Identity};
use super::endpoint::Endpoint;
use super::port::{Range, RootPort};
use super::{ECAM_BASE, ECAM_SIZE};
use crate::device::{PioDevice, lock};

/// Vendor 0x8086, device 0x0D57: the identity other virtual machine monitors use for a bare host bridge.
const BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x0d57,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
};

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Enable, bus, device and function, register number (a multiple of 4).
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// What firmware gives each port, of each kind of memory.
const PORT_WINDOW: u64 = 2 << 20;

/// The addresses that devices may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciWindows {
    /// Below 4 GiB.
    pub low: Range,
    /// Above RAM.
    pub high: Range,
}

impl PciWindows {
    /// From the end of the RAM that fits below to configuration space; and 64 GiB after the RAM that ends at
    /// `ram_end`.
    pub fn after_ram(ram_end: u64) -> Self {
        const HIGH: u64 = 64 << 30;
        let start = ram_end.max(1).next_multiple_of(HIGH);
        Self { low: 0xc000_0000..=ECAM_BASE - 1, high: start..=start + (HIGH - 1) }
    }
}

/// Something on the root bus.
enum Node {
    Bridge(Box<ConfigSpace>),
    Endpoint(Arc<Mutex<Endpoint>>),
    Port(Box<RootPort>),
}

/// A range of addresses and what it leads to.
struct Decode {
    first: u64,
    last: u64,
    endpoint: Arc<Mutex<Endpoint>>,
    bar: usize,
}

struct Tree {
    /// By device number.
    nodes: Vec<(u8, Node)>,
    /// The configuration address register.
    address: u32,
}

/// The root complex.
pub struct PciRoot {
    tree: Mutex<Tree>,
    decodes: RwLock<Vec<Decode>>,
    windows: PciWindows,
}

impl PciRoot {
    /// A root complex with only a host bridge.
    pub fn new(windows: PciWindows) -> Self {
        let bridge = Node::Bridge(Box::new(ConfigSpace::endpoint(&BRIDGE)));
        let tree = Tree { nodes: vec![(0, bridge)], address: 0 };
        Self { tree: Mutex::new(tree), decodes: RwLock::default(), windows }
    }

    /// The addresses that devices may have.
    pub fn windows(&self) -> &PciWindows {
        &self.windows
    }

    /// Puts `endpoint` on the root bus as device `device`.
    pub fn add(&self, device: u8, endpoint: Endpoint) {
        endpoint.requester().set(Bdf::new(0, device, 0));
        let endpoint = Arc::new(Mutex::new(endpoint));
        lock(&self.tree).nodes.push((device, Node::Endpoint(endpoint)));
    }

    /// Puts a root port with `endpoint` below it on the root bus as device `device`.
    pub fn add_behind_port(&self, device: u8, endpoint: Endpoint) {
        let port = RootPort::new(device, Arc::new(Mutex::new(endpoint)));
        lock(&self.tree).nodes.push((device, Node::Port(Box::new(port))));
    }

    /// Does what firmware does: numbers the buses, gives ports windows and BARs addresses, and has them answered to. No
    /// endpoint becomes a bus master.
    pub fn assign(&self) {
        let mut tree = lock(&self.tree);
        let mut low = *self.windows.low.start();
        let mut high = *self.windows.high.start();
        let mut bus = 0;
        for (device, node) in &mut tree.nodes {
            match node {
                Node::Bridge(_) => {}
                Node::Endpoint(endpoint) => {
                    assign_bars(&mut lock(endpoint), Bdf::new(0, *device, 0), &mut low, &mut high);
                }
                Node::Port(port) => {
                    bus += 1;
                    low = low.next_multiple_of(PORT_WINDOW);
                    high = high.next_multiple_of(PORT_WINDOW);
                    let (from, high_from) = (low, high);
                    assign_bars(&mut lock(port.child()), Bdf::new(bus, 0, 0), &mut low, &mut high);
                    low = low.max(from + 1).next_multiple_of(PORT_WINDOW);
                    high = high.max(high_from + 1).next_multiple_of(PORT_WINDOW);
                    port.assign(bus, &(from..=low - 1), &(high_from..=high - 1));
                }
            }
        }
        self.update(&tree);
    }

    /// Finds out anew which addresses lead where.
    fn update(&self, tree: &Tree) {
        let mut decodes = Vec::new();
        let mut push = |endpoint: &Arc<Mutex<Endpoint>>, forwards: &dyn Fn(u64, u64) -> bool| {
            for (bar, first, size) in lock(endpoint).decodes() {
                if let Some(last) = first.checked_add(size - 1).filter(|_| forwards(first, size)) {
                    decodes.push(Decode { first, last, endpoint: endpoint.clone(), bar });
                }
            }
        };
        for (_, node) in &tree.nodes {
            match node {
                Node::Bridge(_) => {}
                Node::Endpoint(endpoint) => push(endpoint, &|_, _| true),
                Node::Port(port) => push(port.child(), &|first, size| port.forwards(first, size)),
            }
        }
        *self.decodes.write().unwrap_or_else(PoisonError::into_inner) = decodes;
    }

    // ---- memory -------------------------------------------------------------------------

    /// The BAR at `address`: of several, the first.
    fn find(&self, address: u64) -> Option<(Arc<Mutex<Endpoint>>, usize, u64)> {
        let decodes = self.decodes.read().unwrap_or_else(PoisonError::into_inner);
        let decode = decodes.iter().find(|d| (d.first..=d.last).contains(&address))?;
        Some((decode.endpoint.clone(), decode.bar, address - decode.first))
    }

    /// A load of `size` (1, 2, 4 or 8) bytes from configuration space or a BAR; all ones where there is nothing.
    pub fn mmio_read(&self, address: u64, size: u8) -> u64 {
        if let Some((bdf, offset)) = ecam(address) {
            if size == 8 {
                let low = self.config_read(bdf, offset, 4);
                return u64::from(low) | u64::from(self.config_read(bdf, offset + 4, 4)) << 32;
            }
            return self.config_read(bdf, offset, size).into();
        }
        match self.find(address) {
            Some((endpoint, bar, offset)) => lock(&endpoint).read(bar, offset, size),
            None => u64::MAX,
        }
    }

    /// A store; dropped where there is nothing.
    pub fn mmio_write(&self, address: u64, size: u8, value: u64) {
        if let Some((bdf, offset)) = ecam(address) {
            self.config_write(bdf, offset, size.min(4), value as u32);
            if size == 8 {
                self.config_write(bdf, offset + 4, 4, (value >> 32) as u32);
            }
            return;
        }
        if let Some((endpoint, bar, offset)) = self.find(address) {
            lock(&endpoint).write(bar, offset, size, value);
        }
    }

    // ---- configuration ------------------------------------------------------------------

    /// Reads `size` (1, 2 or 4) bytes of a function's configuration space; all ones where there is none.
    pub fn config_read(&self, bdf: Bdf, offset: usize, size: u8) -> u32 {
        let mut tree = lock(&self.tree);
        match tree.find(bdf) {
            Some(Found::Bridge(config)) => config.read(offset, size),
            Some(Found::Endpoint(endpoint)) => lock(&endpoint).config_read(offset, size),
            Some(Found::Port(port)) => port.config_read(offset, size),
            None => u32::MAX,
        }
    }

    /// Writes `size` (1, 2 or 4) bytes of a function's configuration space.
    pub fn config_write(&self, bdf: Bdf, offset: usize, size: u8, value: u32) {
        let mut tree = lock(&self.tree);
        match tree.find(bdf) {
            Some(Found::Bridge(config)) => config.write(offset, size, value),
            Some(Found::Endpoint(endpoint)) => lock(&endpoint).config_write(bdf, offset, size, value),
            Some(Found::Port(port)) => port.config_write(offset, size, value),
            None => return,
        }
        self.update(&tree);
    }
}

/// What answers to a configuration access.
enum Found<'a> {
    Bridge(&'a mut ConfigSpace),
    Endpoint(Arc<Mutex<Endpoint>>),
    Port(&'a mut RootPort),
}

impl Tree {
    fn find(&mut self, bdf: Bdf) -> Option<Found<'_>> {
        if bdf.bus() != 0 {
            let below = self.nodes.iter().find_map(|(_, node)| match node {
                Node::Port(port) if port.secondary() == Some(bdf.bus()) => Some(port),
                _ => None,
            })?;
            let found = bdf.devfn() == 0 && below.link_is_up();
            return found.then(|| Found::Endpoint(below.child().clone()));
        }
        let (_, node) =
            self.nodes.iter_mut().find(|(device, _)| *device == bdf.device() && bdf.function() == 0)?;
        Some(match node {
            Node::Bridge(config) => Found::Bridge(config),
            Node::Endpoint(endpoint) => Found::Endpoint(endpoint.clone()),
            Node::Port(port) => Found::Port(port),
        })
    }
}

/// Function and offset of an address in ECAM (§7.2.2).
fn ecam(address: u64) -> Option<(Bdf, usize)> {
    let offset = address.checked_sub(ECAM_BASE).filter(|o| *o < ECAM_SIZE)?;
    Some((Bdf::from_requester_id((offset >> 12) as u16), (offset & 0xfff) as usize))
}

/// Gives the BARs of an endpoint addresses: prefetchable ones that can be high are.
fn assign_bars(endpoint: &mut Endpoint, bdf: Bdf, low: &mut u64, high: &mut u64) {
    endpoint.requester().set(bdf);
    let config = endpoint.config();
    let bars: Vec<_> = config.bars().collect();
    for (index, bar) in bars {
        let next = if bar.wide && bar.prefetchable { &mut *high } else { &mut *low };
        let address = next.next_multiple_of(bar.size);
        *next = address + bar.size;
        config.set_bar_address(index, address);
    }
    config.write(COMMAND, 2, COMMAND_MEMORY.into());
    endpoint.apply();
}

/// Configuration through ports. Offset 0 is port 0xCF8, offset 4 port 0xCFC.
pub struct PciPorts(pub Arc<PciRoot>);

impl PciPorts {
    /// The addressed register's function and offset; `None` when accesses are not enabled.
    fn target(&self, offset: u16) -> Option<(Bdf, usize)> {
        let address = lock(&self.0.tree).address;
        let bdf = Bdf::from_requester_id((address >> 8) as u16);
        let register = (address & 0xfc) as usize + usize::from(offset & 3);
        (address & ADDRESS_ENABLE != 0).then_some((bdf, register))
    }
}

impl PioDevice for PciPorts {
    fn read(&mut self, offset: u16, size: u8) -> u32 {
        match (offset, size) {
            (0, 4) => lock(&self.0.tree).address,
            (4..8, _) => {
                let target = self.target(offset);
                target.map_or(u32::MAX, |(bdf, register)| self.0.config_read(bdf, register, size))
            }
            _ => u32::MAX,
        }
    }

    fn write(&mut self, offset: u16, size: u8, value: u32) {
        match (offset, size) {
            (0, 4) => lock(&self.0.tree).address = value & ADDRESS_BITS,
            (4..8, _) => {
                if let Some((bdf, register)) = self.target(offset) {
                    self.0.config_write(bdf, register, size, value);
                }
            }
            _ => {}
        }
    }
}

/// A requester ID for a function that has no place yet.
pub fn new_requester() -> Arc<Requester> {
    Arc::new(Requester::new(Bdf::default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::Messages;
    use crate::pci::{Bar, EndpointConfig, MsixLayout, Registers, Signals};

    /// Registers that hold what was written to them; a reset empties them.
    #[derive(Default)]
    struct Scratch(std::collections::BTreeMap<(usize, u64), u32>);

    impl Registers for Scratch {
        fn read(&mut self, bar: usize, offset: u64, _: u8) -> u32 {
            self.0.get(&(bar, offset)).copied().unwrap_or(0)
        }
        fn write(&mut self, bar: usize, offset: u64, _: u8, value: u32) {
            self.0.insert((bar, offset), value);
        }
        fn reset(&mut self) {
            self.0.clear();
        }
    }

    /// A device with 16 KiB at BAR 0, MSI-X in its last page, and prefetchable 1 MiB at BAR 2.
    fn endpoint(behind_port: bool) -> Endpoint {
        let requester = new_requester();
        let sink = Arc::new(Messages::default());
        let signals = Arc::new(Signals::new(4, None, sink, requester.clone()));
        let identity = Identity {
            vendor: 0x1111,
            device: 0x2222,
            revision: 0,
            class: 0x01_0802,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        let config = EndpointConfig {
            identity,
            bars: vec![
                (0, Bar { size: 0x4000, prefetchable: false, wide: true }),
                (2, Bar { size: 1 << 20, prefetchable: true, wide: true }),
            ],
            msix: Some(MsixLayout { bar: 0, table: 0x3000, pending: 0x3800, vectors: 4 }),
            msi: true,
            behind_port,
            interrupt_line: None,
            vendor_capabilities: Vec::new(),
            window: false,
        };
        Endpoint::new(config, requester, signals, Box::new(Scratch::default()))
    }

    const ON_ROOT: Bdf = Bdf::new(0, 1, 0);
    const PORT: Bdf = Bdf::new(0, 2, 0);
    const BELOW: Bdf = Bdf::new(1, 0, 0);

    fn root() -> PciRoot {
        let root = PciRoot::new(PciWindows::after_ram(1 << 30));
        root.add(1, endpoint(false));
        root.add_behind_port(2, endpoint(true));
        root.assign();
        root
    }

    fn bar(root: &PciRoot, bdf: Bdf, index: usize) -> u64 {
        let at = 0x10 + index * 4;
        let low = u64::from(root.config_read(bdf, at, 4) & !0xf);
        low | u64::from(root.config_read(bdf, at + 4, 4)) << 32
    }

    #[test]
    fn ports_and_memory_show_the_same_configuration() {
        let root = Arc::new(root());
        let mut ports = PciPorts(root.clone());
        for (bdf, id) in [
            (Bdf::new(0, 0, 0), 0x0d57_8086),
            (ON_ROOT, 0x2222_1111),
            (PORT, 0x000c_1b36),
            (BELOW, 0x2222_1111),
            (Bdf::new(0, 3, 0), u32::MAX),
            (Bdf::new(0, 1, 1), u32::MAX),
            (Bdf::new(1, 1, 0), u32::MAX),
            (Bdf::new(2, 0, 0), u32::MAX),
        ] {
            ports.write(0, 4, 1 << 31 | u32::from(bdf.requester_id()) << 8);
            assert_eq!(ports.read(4, 4), id, "{bdf}");
            assert_eq!(ports.read(6, 2) as u16, (id >> 16) as u16);
            let ecam = ECAM_BASE + (u64::from(bdf.requester_id()) << 12);
            assert_eq!(root.mmio_read(ecam, 4) as u32, id);
            assert_eq!(root.mmio_read(ecam + 2, 1) as u8, (id >> 16) as u8);
        }
        // Without the enable bit there is nothing; the address register takes doublewords only.
        ports.write(0, 4, 0x800);
        assert_eq!((ports.read(0, 4), ports.read(4, 4)), (0x800, u32::MAX));
        ports.write(0, 1, 0xff);
        assert_eq!(ports.read(0, 4), 0x800);
        // A quadword is two doublewords.
        let ecam = ECAM_BASE + (1 << 15);
        assert_eq!(root.mmio_read(ecam + 8, 8) >> 8 & 0xff_ffff, 0x01_0802);
    }

    #[test]
    fn firmware_gives_everything_a_place_of_its_own() {
        let root = root();
        let windows = root.windows().clone();
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for bdf in [ON_ROOT, BELOW] {
            for (index, size, window) in [(0, 0x4000, &windows.low), (2, 1 << 20, &windows.high)] {
                let first = bar(&root, bdf, index);
                let last = first + size - 1;
                assert!(first.is_multiple_of(size) && window.contains(&first) && window.contains(&last));
                assert!(taken.iter().all(|(f, l)| last < *f || *l < first));
                taken.push((first, last));
                root.mmio_write(first + 8, 4, 0x1234_0000 + first);
            }
        }
        for (first, _) in taken {
            assert_eq!(root.mmio_read(first + 8, 4), (0x1234_0000 + first) & 0xffff_ffff, "{first:#x}");
        }
    }

    #[test]
    fn a_bar_can_be_moved_and_switched_off() {
        let root = root();
        let old = bar(&root, ON_ROOT, 0);
        root.mmio_write(old, 4, 77);
        let new = 0xd000_0000;
        root.config_write(ON_ROOT, 0x10, 4, new as u32);
        assert_eq!((root.mmio_read(old, 4), root.mmio_read(new, 4)), (u64::MAX, 77));
        // 64-bit: above 4 GiB.
        root.config_write(ON_ROOT, 0x14, 4, 0x12);
        assert_eq!(root.mmio_read(0x12_d000_0000, 4), 77);
        root.config_write(ON_ROOT, 0x04, 2, 0);
        assert_eq!(root.mmio_read(0x12_d000_0000, 4), u64::MAX);
        root.config_write(ON_ROOT, 0x04, 2, 2);
        assert_eq!(root.mmio_read(0x12_d000_0000, 4), 77);
        // In D3hot it does not answer (§5.3.1.4.1); the power capability is the first.
        root.config_write(ON_ROOT, 0x44, 2, 3);
        assert_eq!(root.mmio_read(0x12_d000_0000, 4), u64::MAX);
        root.config_write(ON_ROOT, 0x44, 2, 0);
        assert_eq!(root.mmio_read(0x12_d000_0000, 4), 77);
    }

    #[test]
    fn a_port_forwards_what_is_in_its_windows() {
        let root = root();
        let at = bar(&root, BELOW, 0);
        root.mmio_write(at, 4, 5);
        for (register, shut, open) in [
            // Memory base above limit; memory decoding off.
            (0x20, 0x0000_fff0, root.config_read(PORT, 0x20, 4)),
            (0x04, 0, root.config_read(PORT, 0x04, 2)),
        ] {
            root.config_write(PORT, register, 4, shut);
            assert_eq!(root.mmio_read(at, 4), u64::MAX, "{register:#x}");
            root.config_write(PORT, register, 4, open);
            assert_eq!(root.mmio_read(at, 4), 5);
        }
        // The bus gets another number: the device is found there, and nowhere else.
        root.config_write(PORT, 0x18, 4, 0x0007_0700);
        assert_eq!(root.config_read(BELOW, 0, 4), u32::MAX);
        assert_eq!(root.config_read(Bdf::new(7, 0, 0), 0, 4), 0x2222_1111);
        assert_eq!(root.mmio_read(at, 4), 5);
        // Secondary bus reset: while it lasts nobody answers, and then everything is as after power-up.
        root.config_write(PORT, 0x3e, 2, 0x40);
        assert_eq!(root.config_read(Bdf::new(7, 0, 0), 0, 4), u32::MAX);
        root.config_write(PORT, 0x3e, 2, 0);
        assert_eq!((bar(&root, Bdf::new(7, 0, 0), 0), root.config_read(Bdf::new(7, 0, 0), 4, 2)), (0, 0));
    }

    #[test]
    fn a_function_level_reset_is_one() {
        let root = root();
        let at = bar(&root, ON_ROOT, 0);
        root.mmio_write(at, 4, 5);
        root.mmio_write(at + 0x3000, 8, 0xfee0_0000);
        // The PCI Express capability is the second, at 0x48; its device control is 8 further on.
        assert_eq!(root.config_read(ON_ROOT, 0x48, 1), 0x10);
        root.config_write(ON_ROOT, 0x50, 2, 0x8000);
        assert_eq!((root.config_read(ON_ROOT, 4, 2), bar(&root, ON_ROOT, 0)), (0, 0));
        root.config_write(ON_ROOT, 0x10, 4, at as u32);
        root.config_write(ON_ROOT, 4, 2, 2);
        assert_eq!((root.mmio_read(at, 4), root.mmio_read(at + 0x3000, 8)), (0, 0));
        assert_eq!(root.mmio_read(at + 0x300c, 4), 1, "masked again");
    }

    #[test]
    fn a_system_can_keep_devices_apart() {
        // Access Control Services with everything that Linux asks for, at the start of the port's extended capabilities.
        let root = root();
        assert_eq!(root.config_read(PORT, 0x100, 4), 0x0001_000d);
        assert_eq!(root.config_read(PORT, 0x104, 2), 0x1f);
        root.config_write(PORT, 0x106, 2, 0xffff);
        assert_eq!(root.config_read(PORT, 0x106, 2), 0x1f);
    }
}
