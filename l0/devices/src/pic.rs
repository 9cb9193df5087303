//! The PC's two cascaded 8259A interrupt controllers (Intel 8259A datasheet) with the
//! edge/level control registers of the PIIX at 0x4D0 and 0x4D1.
//!
//! Not supported: buffered mode and MCS-80/85 (8080) vectoring, which no PC uses; the bits are accepted
//! and ignored.

/// Lines that are always edge-triggered: 0, 1, 2, 8 and 13 (82371AB datasheet, ELCR).
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];
/// The master's input that the slave drives.
const CASCADE: u8 = 2;

/// Where a chip is in its initialisation sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InitState {
    Ready,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug)]
struct Chip {
    irr: u8,
    isr: u8,
    imr: u8,
    /// Input levels, to find edges.
    lines: u8,
    elcr: u8,
    vector_base: u8,
    /// The input that has the lowest priority (7 unless rotated).
    lowest: u8,
    init: InitState,
    needs_icw4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_isr: bool,
    poll: bool,
}

impl Chip {
    fn new() -> Self {
        Self {
            irr: 0,
            isr: 0,
            imr: 0,
            lines: 0,
            elcr: 0,
            vector_base: 0,
            lowest: 7,
            init: InitState::Ready,
            needs_icw4: false,
            single: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            read_isr: false,
            poll: false,
        }
    }

    /// Rotates a mask so that bit 0 is the input with the highest priority.
    fn by_priority(&self, mask: u8) -> u8 {
        mask.rotate_right(u32::from(self.lowest) + 1)
    }

    /// The input with the highest priority among `mask`.
    fn highest(&self, mask: u8) -> Option<u8> {
        let rotated = self.by_priority(mask);
        (rotated != 0).then(|| (rotated.trailing_zeros() as u8 + self.lowest + 1) & 7)
    }

    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.lowest + 1) & 7
    }

    /// The input to be served now, if its priority is above what is in service.
    fn pending(&self, is_master: bool) -> Option<u8> {
        if self.init != InitState::Ready {
            return None;
        }
        let input = self.highest(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        // Special fully nested: the slave may interrupt again while it is in service.
        if self.special_fully_nested && is_master && input == CASCADE {
            in_service &= !(1 << CASCADE);
        }
        match self.highest(in_service) {
            Some(serving) if self.rank(input) >= self.rank(serving) => None,
            _ => Some(input),
        }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        if self.elcr & bit != 0 {
            if level { self.irr |= bit } else { self.irr &= !bit }
        } else if level && self.lines & bit == 0 {
            self.irr |= bit;
        } else if !level {
            // An edge request that goes away before INTA gives the spurious vector 7.
            self.irr &= !bit;
        }
        if level { self.lines |= bit } else { self.lines &= !bit }
    }

    /// INTA for `input`.
    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.lowest = input;
            }
        } else {
            self.isr |= bit;
        }
    }

    /// ICW1 begins initialisation.
    fn begin_init(&mut self, icw1: u8) {
        let (elcr, lines) = (self.elcr, self.lines);
        *self = Self { elcr, lines, irr: lines & elcr, ..Self::new() };
        self.init = InitState::Icw2;
        self.needs_icw4 = icw1 & 1 != 0;
        self.single = icw1 & 2 != 0;
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.begin_init(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 0x04 != 0 {
            self.poll = true;
        }
        match value & 3 {
            2 => self.read_isr = false,
            3 => self.read_isr = true,
            _ => {}
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            1 | 5 => {
                let mut candidates = self.isr;
                if self.special_mask {
                    candidates &= !self.imr;
                }
                if let Some(input) = self.highest(candidates) {
                    self.isr &= !(1 << input);
                    if value >> 5 == 5 {
                        self.lowest = input;
                    }
                }
            }
            3 => self.isr &= !(1 << level),
            7 => {
                self.isr &= !(1 << level);
                self.lowest = level;
            }
            6 => self.lowest = level,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            InitState::Ready => self.imr = value,
            InitState::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init = match (self.single, self.needs_icw4) {
                    (false, _) => InitState::Icw3,
                    (true, true) => InitState::Icw4,
                    (true, false) => InitState::Ready,
                };
            }
            InitState::Icw3 => {
                self.init = if self.needs_icw4 { InitState::Icw4 } else { InitState::Ready };
            }
            InitState::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.init = InitState::Ready;
            }
        }
    }

    fn read(&mut self, data: bool, is_master: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            // Poll command: as INTA, with the answer in the data read.
            return match self.pending(is_master) {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (data, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }
}

/// The pair of 8259As.
#[derive(Clone, Debug)]
pub struct DualPic {
    chips: [Chip; 2],
}

impl DualPic {
    /// Both chips as after power-up, not yet initialised. All inputs are masked, as firmware would leave
    /// them.
    pub fn new() -> Self {
        let mut chips = [Chip::new(), Chip::new()];
        for (chip, base) in chips.iter_mut().zip([0x08, 0x70]) {
            chip.imr = 0xff;
            chip.vector_base = base;
        }
        Self { chips }
    }

    /// Hardware reset; input levels stay.
    pub fn reset(&mut self) {
        let lines = [self.chips[0].lines, self.chips[1].lines];
        *self = Self::new();
        for (chip, lines) in self.chips.iter_mut().zip(lines) {
            chip.lines = lines;
        }
        self.cascade();
    }

    /// Drives ISA line `irq` (0–15, without 2).
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE | 16.. => return,
            0..8 => self.chips[0].set_line(irq, level),
            _ => self.chips[1].set_line(irq - 8, level),
        }
        self.cascade();
    }

    /// The slave's INT drives the master's input 2.
    fn cascade(&mut self) {
        let slave = self.chips[1].pending(false).is_some();
        self.chips[0].set_line(CASCADE, slave);
    }

    /// Whether INTR is asserted.
    pub fn intr(&self) -> bool {
        self.chips[0].pending(true).is_some()
    }

    /// The INTA cycles: the vector of the interrupt that is served. Vector 7 of a chip
    /// when the request has gone (spurious; 8259A datasheet, "Interrupt Sequence").
    pub fn acknowledge(&mut self) -> u8 {
        let [master, slave] = &mut self.chips;
        let Some(input) = master.pending(true) else {
            return master.vector_base | 7;
        };
        master.acknowledge(input);
        let vector = if input == CASCADE {
            match slave.pending(false) {
                Some(input) => {
                    slave.acknowledge(input);
                    slave.vector_base | input
                }
                None => slave.vector_base | 7,
            }
        } else {
            master.vector_base | input
        };
        // The slave's INT falls while INTA is answered, so a further request is a new edge.
        self.chips[0].set_line(CASCADE, false);
        self.cascade();
        vector
    }

    /// Reads port 0x20, 0x21, 0xA0, 0xA1, 0x4D0 or 0x4D1; `None` for others.
    pub fn read(&mut self, port: u16) -> Option<u8> {
        let value = match port {
            0x20 | 0x21 => self.chips[0].read(port & 1 != 0, true),
            0xa0 | 0xa1 => self.chips[1].read(port & 1 != 0, false),
            0x4d0 => self.chips[0].elcr,
            0x4d1 => self.chips[1].elcr,
            _ => return None,
        };
        self.cascade();
        Some(value)
    }

    /// Writes one of those ports; others are ignored.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.chips[0].write_command(value),
            0x21 => self.chips[0].write_data(value),
            0xa0 => self.chips[1].write_command(value),
            0xa1 => self.chips[1].write_data(value),
            0x4d0 => self.chips[0].elcr = value & ELCR_WRITABLE[0],
            0x4d1 => self.chips[1].elcr = value & ELCR_WRITABLE[1],
            _ => return,
        }
        self.cascade();
    }
}

impl Default for DualPic {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The initialisation that PC systems do: vectors 0x20 and 0x28, cascade on 2, all unmasked.
    fn initialised() -> DualPic {
        let mut pic = DualPic::new();
        for (port, icws) in [(0x20, [0x11, 0x20, 4, 1]), (0xa0, [0x11, 0x28, 2, 1])] {
            pic.write(port, icws[0]);
            icws[1..].iter().for_each(|icw| pic.write(port + 1, *icw));
            pic.write(port + 1, 0);
        }
        pic
    }

    #[test]
    fn masked_until_initialised() {
        let mut pic = DualPic::new();
        pic.set_irq(0, true);
        assert!(!pic.intr());
        assert_eq!(pic.read(0x21), Some(0xff));
        assert_eq!(pic.read(0x22), None);
    }

    #[test]
    fn fully_nested_priorities_and_non_specific_eoi() {
        let mut pic = initialised();
        pic.set_irq(5, true);
        pic.set_irq(3, true);
        assert_eq!(pic.acknowledge(), 0x23);
        // 5 is below 3, which is in service.
        assert!(!pic.intr());
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x21);
        pic.write(0x20, 0x20);
        assert!(!pic.intr());
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x25);
        // ISR by OCW3.
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), Some(1 << 5));
        pic.write(0x20, 0x0a);
        assert_eq!(pic.read(0x20), Some(0));
    }

    #[test]
    fn slave_interrupts_come_through_the_cascade() {
        let mut pic = initialised();
        pic.set_irq(8, true);
        assert!(pic.intr());
        assert_eq!(pic.acknowledge(), 0x28);
        pic.set_irq(12, true);
        assert!(!pic.intr());
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x2c);
    }

    #[test]
    fn an_edge_that_goes_away_is_spurious() {
        let mut pic = initialised();
        pic.set_irq(4, true);
        pic.set_irq(4, false);
        assert_eq!(pic.acknowledge(), 0x27);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), Some(0), "a spurious interrupt sets no ISR bit");
    }

    #[test]
    fn an_edge_interrupts_once_a_level_again() {
        let mut pic = initialised();
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(0x20, 0x65);
        assert!(!pic.intr());
        pic.set_irq(5, false);
        pic.write(0x4d0, 0xff);
        assert_eq!(pic.read(0x4d0), Some(0xf8), "lines 0-2 are always edges");
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(0x20, 0x65);
        assert!(pic.intr());
        pic.set_irq(5, false);
        assert!(!pic.intr());
    }

    #[test]
    fn the_mask_holds_requests_back() {
        let mut pic = initialised();
        pic.write(0x21, 0x10);
        pic.set_irq(4, true);
        assert!(!pic.intr());
        pic.write(0x21, 0);
        assert_eq!(pic.acknowledge(), 0x24);
    }

    #[test]
    fn rotation_changes_priorities() {
        let mut pic = initialised();
        // Lowest is 4, so 5 is highest.
        pic.write(0x20, 0xc4);
        pic.set_irq(0, true);
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x25);
        // Rotate on non-specific EOI: 5 becomes the lowest.
        pic.write(0x20, 0xa0);
        pic.set_irq(5, false);
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x20);
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let mut pic = DualPic::new();
        for value in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 3), (0x21, 0)] {
            pic.write(value.0, value.1);
        }
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x21);
        pic.set_irq(6, true);
        assert_eq!(pic.acknowledge(), 0x26);
    }

    #[test]
    fn poll_mode_answers_in_the_read() {
        let mut pic = initialised();
        pic.set_irq(6, true);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), Some(0x86));
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), Some(0));
    }

    #[test]
    fn special_mask_mode_lets_lower_priorities_in() {
        let mut pic = initialised();
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x21);
        pic.set_irq(6, true);
        assert!(!pic.intr());
        pic.write(0x20, 0x68);
        pic.write(0x21, 1 << 1);
        assert_eq!(pic.acknowledge(), 0x26);
    }
}
