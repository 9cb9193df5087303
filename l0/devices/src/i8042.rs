//! The 8042 keyboard controller at ports 0x60 and 0x64 with its two PS/2 ports, to which nothing is
//! connected (IBM PS/2 Technical Reference, "Keyboard and Auxiliary Device Controller").
//!
//! A byte sent to either port is answered at once with 0xFE and the time-out status bit, as a
//! controller answers for a missing device, so that drivers find out quickly.
//!
//! Not supported: keyboards and mice, scan-code translation (no codes to translate), gating of
//! address bit 20 (the output-port bit is only stored), controller RAM beyond the command byte.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::device::{EventSink, IrqLine, MachineEvent, PioDevice};

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_AUX: u8 = 1 << 5;
const STATUS_TIMEOUT: u8 = 1 << 6;

const CTR_KBD_INT: u8 = 1 << 0;
const CTR_AUX_INT: u8 = 1 << 1;
const CTR_SYSTEM: u8 = 1 << 2;
const CTR_KBD_DISABLE: u8 = 1 << 4;
const CTR_AUX_DISABLE: u8 = 1 << 5;

/// Output port: bit 0 not reset, bit 1 A20.
const OUTPUT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;

/// At most this many answers wait.
const QUEUE: usize = 16;

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Controller,
    /// The keyboard port has nothing connected.
    KeyboardTimeout,
    Aux,
    AuxTimeout,
}

/// The controller.
pub struct I8042 {
    events: Arc<dyn EventSink>,
    kbd_irq: IrqLine,
    aux_irq: IrqLine,
    command_byte: u8,
    output_port: u8,
    last_was_command: bool,
    /// A command that waits for its data byte.
    pending: Option<u8>,
    answers: VecDeque<(u8, Source)>,
}

impl I8042 {
    /// A controller with its ports' interrupt lines (IRQ 1 and 12).
    pub fn new(events: Arc<dyn EventSink>, kbd_irq: IrqLine, aux_irq: IrqLine) -> Self {
        Self {
            events,
            kbd_irq,
            aux_irq,
            command_byte: CTR_SYSTEM | CTR_KBD_DISABLE | CTR_AUX_DISABLE,
            output_port: OUTPUT_RESET | OUTPUT_A20,
            last_was_command: false,
            pending: None,
            answers: VecDeque::with_capacity(QUEUE),
        }
    }

    fn answer(&mut self, byte: u8, source: Source) {
        if self.answers.len() < QUEUE {
            self.answers.push_back((byte, source));
        }
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED | self.command_byte & STATUS_SYSTEM;
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        match self.answers.front() {
            None => {}
            Some((_, Source::Controller)) => status |= STATUS_OUTPUT_FULL,
            Some((_, Source::KeyboardTimeout)) => status |= STATUS_OUTPUT_FULL | STATUS_TIMEOUT,
            Some((_, Source::Aux)) => status |= STATUS_OUTPUT_FULL | STATUS_AUX,
            Some((_, Source::AuxTimeout)) => status |= STATUS_OUTPUT_FULL | STATUS_AUX | STATUS_TIMEOUT,
        }
        status
    }

    /// IRQ 1 and 12 follow the output buffer, where the command byte enables them.
    fn update_irqs(&self) {
        let front = self.answers.front().map(|(_, source)| *source);
        let aux = matches!(front, Some(Source::Aux | Source::AuxTimeout));
        let kbd = front.is_some() && !aux;
        self.kbd_irq.set(kbd && self.command_byte & CTR_KBD_INT != 0);
        self.aux_irq.set(aux && self.command_byte & CTR_AUX_INT != 0);
    }

    fn command(&mut self, command: u8) {
        self.pending = None;
        match command {
            0x20 => self.answer(self.command_byte, Source::Controller),
            // These take a data byte.
            0x60 | 0xd1..=0xd4 => self.pending = Some(command),
            0xa7 => self.command_byte |= CTR_AUX_DISABLE,
            0xa8 => self.command_byte &= !CTR_AUX_DISABLE,
            // Port tests: the lines are fine.
            0xa9 | 0xab => self.answer(0x00, Source::Controller),
            // Self-test passed.
            0xaa => {
                self.answers.clear();
                self.command_byte |= CTR_SYSTEM;
                self.answer(0x55, Source::Controller);
            }
            0xad => self.command_byte |= CTR_KBD_DISABLE,
            0xae => self.command_byte &= !CTR_KBD_DISABLE,
            // Input port: keyboard not inhibited.
            0xc0 => self.answer(0x80, Source::Controller),
            0xd0 => self.answer(self.output_port, Source::Controller),
            // 0xF0-0xFF pulse the output bits whose command bit is 0; bit 0 is the reset line.
            0xf0..=0xff if command & OUTPUT_RESET == 0 => self.events.signal(MachineEvent::Reset),
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        match self.pending.take() {
            Some(0x60) => self.command_byte = value & 0x7f,
            Some(0xd1) => {
                if value & OUTPUT_RESET == 0 {
                    self.events.signal(MachineEvent::Reset);
                }
                self.output_port = value | OUTPUT_RESET;
            }
            Some(0xd2) => self.answer(value, Source::Controller),
            Some(0xd3) => self.answer(value, Source::Aux),
            Some(0xd4) => self.answer(0xfe, Source::AuxTimeout),
            _ => self.answer(0xfe, Source::KeyboardTimeout),
        }
    }
}

impl PioDevice for I8042 {
    /// Offset 0 is port 0x60, offset 4 port 0x64.
    fn read(&mut self, offset: u16, _size: u8) -> u32 {
        match offset {
            0 => {
                let byte = self.answers.pop_front().map_or(0, |(byte, _)| byte);
                // The line falls with the buffer and rises again for the next byte.
                self.kbd_irq.set(false);
                self.aux_irq.set(false);
                self.update_irqs();
                byte.into()
            }
            4 => self.status().into(),
            _ => 0xff,
        }
    }

    fn write(&mut self, offset: u16, _size: u8, value: u32) {
        match offset {
            0 => {
                self.last_was_command = false;
                self.data(value as u8);
            }
            4 => {
                self.last_was_command = true;
                self.command(value as u8);
            }
            _ => return,
        }
        self.update_irqs();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{
        lock,
        testing::{EventLog, LineLog},
    };

    struct Bench {
        controller: I8042,
        events: Arc<EventLog>,
        line: Arc<LineLog>,
    }

    fn bench() -> Bench {
        let events = Arc::new(EventLog::default());
        let line = Arc::new(LineLog::default());
        let irq = |n| IrqLine::new(line.clone(), n);
        Bench { controller: I8042::new(events.clone(), irq(1), irq(12)), events, line }
    }

    impl Bench {
        fn command(&mut self, value: u8) {
            self.controller.write(4, 1, value.into());
        }
        fn data(&mut self, value: u8) {
            self.controller.write(0, 1, value.into());
        }
        fn status(&mut self) -> u8 {
            self.controller.read(4, 1) as u8
        }
        fn get(&mut self) -> u8 {
            self.controller.read(0, 1) as u8
        }
    }

    #[test]
    fn self_test_and_command_byte() {
        let mut b = bench();
        b.command(0xaa);
        assert_eq!(b.status() & STATUS_OUTPUT_FULL, 1);
        assert_eq!(b.get(), 0x55);
        assert_eq!(b.status() & STATUS_OUTPUT_FULL, 0);
        b.command(0x60);
        b.data(0x47);
        b.command(0x20);
        assert_eq!(b.get(), 0x47);
        b.command(0xad);
        b.command(0xa7);
        b.command(0x20);
        assert_eq!(b.get(), 0x77);
    }

    #[test]
    fn missing_devices_time_out_at_once() {
        let mut b = bench();
        b.data(0xf2);
        assert_eq!(b.status() & 0x61, STATUS_OUTPUT_FULL | STATUS_TIMEOUT);
        assert_eq!(b.get(), 0xfe);
        b.command(0xd4);
        b.data(0xf2);
        assert_eq!(b.status() & 0x61, STATUS_OUTPUT_FULL | STATUS_AUX | STATUS_TIMEOUT);
        assert_eq!(b.get(), 0xfe);
    }

    #[test]
    fn aux_loop_interrupts_on_irq_12() {
        let mut b = bench();
        b.command(0x60);
        b.data(CTR_AUX_INT | CTR_SYSTEM);
        b.command(0xd3);
        b.data(0xa5);
        assert!(b.line.level(12) && !b.line.level(1));
        assert_eq!(b.status() & STATUS_AUX, STATUS_AUX);
        assert_eq!(b.get(), 0xa5);
        assert!(!b.line.level(12));
    }

    #[test]
    fn reset_by_pulse_and_by_output_port() {
        let mut b = bench();
        b.command(0xff);
        assert!(lock(&b.events.0).is_empty());
        b.command(0xfe);
        b.command(0xd1);
        b.data(0x02);
        assert_eq!(*lock(&b.events.0), [MachineEvent::Reset, MachineEvent::Reset]);
        b.command(0xd0);
        assert_eq!(b.get(), OUTPUT_RESET | OUTPUT_A20);
    }

    #[test]
    fn answers_are_bounded() {
        let mut b = bench();
        (0..1000).for_each(|_| b.command(0x20));
        assert_eq!(b.controller.answers.len(), QUEUE);
    }
}
