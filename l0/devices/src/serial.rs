//! A 16550A UART (National Semiconductor PC16550D datasheet) with a terminal at its other end.
//!
//! Written here because the superio crates' model has no FIFO control register, no trigger levels, no
//! priority of interrupt sources, and edges instead of a level on its interrupt line.
//!
//! The peer is patient: what is typed waits in a bounded queue until the guest is ready for it, that is, has
//! enabled the received-data interrupt or asserts RTS and OUT2. When it stops being ready, what it has not
//! read goes back into the queue. So input sent before or while a driver opens and closes the
//! port is not lost when the driver clears the FIFOs and reads the data register to settle them.
//!
//! Not supported: line speed (bytes move at once, the divisor is only stored), parity, framing and break
//! conditions, DMA modes.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;

use crate::clock::Clock;
use crate::device::{IrqLine, PioDevice, TimedDevice};

/// Depth of the receive FIFO.
const FIFO_DEPTH: usize = 16;
/// How much input waits for the guest at most.
pub const INPUT_QUEUE: usize = 4096;
/// Output is handed on at a newline, when this much waits, or after [`FLUSH_NS`].
const OUTPUT_BUFFER: usize = 512;
/// How long output waits at most.
const FLUSH_NS: u64 = 1_000_000;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_LINE: u8 = 0x06;
const IIR_RECEIVED: u8 = 0x04;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_TRANSMIT: u8 = 0x02;
const IIR_MODEM: u8 = 0x00;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMIT_EMPTY: u8 = 0x60;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// A 16550A.
pub struct Serial {
    clock: Arc<dyn Clock>,
    irq: IrqLine,
    out: Box<dyn Write + Send>,
    pending_out: Vec<u8>,
    flush_at: Option<u64>,

    input: VecDeque<u8>,
    fifo: VecDeque<u8>,
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Modem inputs in bits 7:4, their changes in 3:0.
    msr: u8,
    scratch: u8,
    overrun: bool,
    transmit_interrupt: bool,
}

impl Serial {
    /// A UART that interrupts through `irq` and sends to `out`.
    pub fn new(clock: Arc<dyn Clock>, irq: IrqLine, out: Box<dyn Write + Send>) -> Self {
        Self {
            clock,
            irq,
            out,
            pending_out: Vec::with_capacity(OUTPUT_BUFFER),
            flush_at: None,
            input: VecDeque::new(),
            fifo: VecDeque::with_capacity(FIFO_DEPTH),
            divisor: 12,
            ier: 0,
            fcr: 0,
            lcr: 3,
            mcr: 0,
            msr: MSR_CTS | MSR_DSR | MSR_DCD,
            scratch: 0,
            overrun: false,
            transmit_interrupt: false,
        }
    }

    /// Queues input for the guest; returns how many bytes were taken.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(INPUT_QUEUE.saturating_sub(self.input.len()));
        self.input.extend(bytes.iter().take(taken));
        self.receive();
        self.update_irq();
        taken
    }

    /// How many bytes of input can be queued now.
    pub fn input_space(&self) -> usize {
        INPUT_QUEUE.saturating_sub(self.input.len())
    }

    /// Hands waiting output on. Errors of the sink lose the output: a UART has nobody to tell.
    pub fn flush(&mut self) {
        self.flush_at = None;
        if self.pending_out.is_empty() {
            return;
        }
        let result = self.out.write_all(&self.pending_out).and_then(|()| self.out.flush());
        if let Err(error) = result {
            tracing::debug!(%error, "serial output lost");
        }
        self.pending_out.clear();
    }

    fn fifo_depth(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO_DEPTH } else { 1 }
    }

    fn trigger_level(&self) -> usize {
        match self.fcr >> 6 {
            _ if self.fcr & FCR_ENABLE == 0 => 1,
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    fn is_ready_for_input(&self) -> bool {
        let asserted = MCR_RTS | MCR_OUT2;
        self.ier & IER_RECEIVED != 0 || self.mcr & asserted == asserted
    }

    /// Moves queued input into the FIFO while the guest is ready for it, and back when it is not.
    fn receive(&mut self) {
        if self.mcr & MCR_LOOP != 0 {
            return;
        }
        if !self.is_ready_for_input() {
            while let Some(byte) = self.fifo.pop_back() {
                self.input.push_front(byte);
            }
            return;
        }
        while self.fifo.len() < self.fifo_depth()
            && let Some(byte) = self.input.pop_front()
        {
            self.fifo.push_back(byte);
        }
    }

    /// Modem control. Loopback disconnects the receiver: what it holds of one side is not shown to the other.
    fn write_mcr(&mut self, value: u8) {
        let entering = value & !self.mcr & MCR_LOOP != 0;
        let leaving = self.mcr & !value & MCR_LOOP != 0;
        if entering {
            while let Some(byte) = self.fifo.pop_back() {
                self.input.push_front(byte);
            }
        } else if leaving {
            self.fifo.clear();
        }
        self.mcr = value & 0x1f;
        self.update_modem();
    }

    fn transmit(&mut self, byte: u8) {
        if self.mcr & MCR_LOOP != 0 {
            if self.fifo.len() < self.fifo_depth() {
                self.fifo.push_back(byte);
            } else {
                self.overrun = true;
            }
        } else {
            self.pending_out.push(byte);
            if byte == b'\n' || self.pending_out.len() >= OUTPUT_BUFFER {
                self.flush();
            } else if self.flush_at.is_none() {
                self.flush_at = Some(self.clock.now_ns().saturating_add(FLUSH_NS));
            }
        }
        // The byte leaves at once, so the holding register is empty again.
        self.transmit_interrupt = true;
    }

    /// The modem inputs: of the terminal, or in loopback of MCR (PC16550D §8.7).
    fn modem_inputs(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        let pairs = [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)];
        pairs.iter().filter(|(output, _)| self.mcr & output != 0).fold(0, |acc, (_, input)| acc | input)
    }

    /// Recomputes MSR and its delta bits; RI's delta is of its trailing edge (PC16550D §8.8).
    fn update_modem(&mut self) {
        let inputs = self.modem_inputs();
        let changed = (self.msr ^ inputs) & 0xf0;
        let mut delta = changed >> 4;
        if inputs & MSR_RI != 0 {
            delta &= !(MSR_RI >> 4);
        }
        self.msr = inputs | self.msr & 0xf | delta;
    }

    /// The highest-priority interrupt source (PC16550D Table III).
    fn interrupt_source(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RECEIVED != 0 && self.fifo.len() >= self.trigger_level() {
            IIR_RECEIVED
        } else if self.ier & IER_RECEIVED != 0 && !self.fifo.is_empty() {
            IIR_TIMEOUT
        } else if self.ier & IER_TRANSMIT != 0 && self.transmit_interrupt {
            IIR_TRANSMIT
        } else if self.ier & IER_MODEM != 0 && self.msr & 0xf != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// On a PC, OUT2 gates the interrupt line; in loopback that output is inactive.
    fn update_irq(&mut self) {
        let gate = self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2;
        self.irq.set(gate && self.interrupt_source() != IIR_NONE);
    }

    fn read_register(&mut self, offset: u16) -> u8 {
        let dlab = self.lcr & LCR_DLAB != 0;
        match offset {
            0 if dlab => self.divisor as u8,
            1 if dlab => (self.divisor >> 8) as u8,
            0 => {
                let byte = self.fifo.pop_front().unwrap_or(0);
                self.receive();
                byte
            }
            1 => self.ier,
            2 => {
                let source = self.interrupt_source();
                if source == IIR_TRANSMIT {
                    self.transmit_interrupt = false;
                }
                source | if self.fcr & FCR_ENABLE != 0 { IIR_FIFOS } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let ready = if self.fifo.is_empty() { 0 } else { LSR_DATA_READY };
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                LSR_TRANSMIT_EMPTY | ready | overrun
            }
            6 => {
                let value = self.msr;
                self.msr &= 0xf0;
                value
            }
            _ => self.scratch,
        }
    }

    fn write_register(&mut self, offset: u16, value: u8) {
        let dlab = self.lcr & LCR_DLAB != 0;
        match offset {
            0 if dlab => self.divisor = self.divisor & 0xff00 | u16::from(value),
            1 if dlab => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            0 => self.transmit(value),
            1 => {
                // Enabling the transmit interrupt while the holding register is empty interrupts.
                if value & !self.ier & IER_TRANSMIT != 0 {
                    self.transmit_interrupt = true;
                }
                self.ier = value & 0xf;
            }
            2 => self.write_fcr(value),
            3 => self.lcr = value,
            4 => self.write_mcr(value),
            7 => self.scratch = value,
            // LSR and MSR are for reading.
            _ => {}
        }
        self.receive();
    }

    /// FIFO control: changing the enable bit, or the clear bit, empties the receive FIFO (PC16550D
    /// §8.5).
    fn write_fcr(&mut self, value: u8) {
        let toggled = (value ^ self.fcr) & FCR_ENABLE != 0;
        if toggled || value & FCR_CLEAR_RX != 0 {
            self.fifo.clear();
        }
        self.fcr = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
    }
}

impl PioDevice for Serial {
    fn read(&mut self, offset: u16, _size: u8) -> u32 {
        let value = self.read_register(offset);
        self.update_irq();
        value.into()
    }

    fn write(&mut self, offset: u16, _size: u8, value: u32) {
        self.write_register(offset, value as u8);
        self.update_irq();
    }
}

impl TimedDevice for Serial {
    fn tick(&mut self, now: u64) {
        if self.flush_at.is_some_and(|at| at <= now) {
            self.flush();
        }
    }

    fn next_deadline(&self) -> Option<u64> {
        self.flush_at
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::device::lock;
    use crate::device::testing::LineLog;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    struct Bench {
        uart: Serial,
        clock: Arc<ManualClock>,
        line: Arc<LineLog>,
        sink: Sink,
    }

    fn bench() -> Bench {
        let clock = Arc::new(ManualClock::default());
        let line = Arc::new(LineLog::default());
        let sink = Sink::default();
        let uart = Serial::new(clock.clone(), IrqLine::new(line.clone(), 4), Box::new(sink.clone()));
        Bench { uart, clock, line, sink }
    }

    impl Bench {
        fn get(&mut self, register: u16) -> u8 {
            self.uart.read(register, 1) as u8
        }
        fn set(&mut self, register: u16, value: u8) {
            self.uart.write(register, 1, value.into());
        }
        fn irq(&self) -> bool {
            self.line.level(4)
        }
        fn sent(&self) -> Vec<u8> {
            lock(&self.sink.0).clone()
        }
        /// FIFOs on with `trigger` bits, OUT2 and RTS on.
        fn open(&mut self, fcr: u8) {
            self.set(2, fcr);
            self.set(4, MCR_OUT2 | MCR_RTS | MCR_DTR);
        }
    }

    #[test]
    fn output_is_handed_on_by_line_and_by_time() {
        let mut b = bench();
        b"hi\nthere".iter().for_each(|byte| b.set(0, *byte));
        assert_eq!(b.sent(), b"hi\n");
        assert_eq!(b.uart.next_deadline(), Some(FLUSH_NS));
        b.clock.set_ns(FLUSH_NS);
        b.uart.tick(FLUSH_NS);
        assert_eq!((b.sent(), b.uart.next_deadline()), (b"hi\nthere".to_vec(), None));
        assert_eq!(b.get(5), 0x60);
    }

    #[test]
    fn waiting_output_is_bounded_and_survives_the_end() {
        let mut b = bench();
        (0..OUTPUT_BUFFER + 5).for_each(|_| b.set(0, b'x'));
        assert_eq!(b.sent().len(), OUTPUT_BUFFER);
        let sink = b.sink.clone();
        drop(b);
        assert_eq!(lock(&sink.0).len(), OUTPUT_BUFFER + 5);
    }

    #[test]
    fn divisor_latch() {
        let mut b = bench();
        b.set(3, 0x83);
        b.set(0, 0x34);
        b.set(1, 0x12);
        assert_eq!((b.get(0), b.get(1)), (0x34, 0x12));
        b.set(3, 0x03);
        assert_eq!((b.get(1), b.get(3)), (0, 3));
        assert!(b.sent().is_empty());
    }

    #[test]
    fn the_transmit_interrupt_is_cleared_by_reading_it() {
        // PC16550D Table III: THRE is reset by reading IIR (if it is the source) or writing THR.
        let mut b = bench();
        b.open(0);
        b.set(1, IER_TRANSMIT);
        assert!(b.irq());
        assert_eq!(b.get(2), IIR_TRANSMIT);
        assert!(!b.irq());
        assert_eq!(b.get(2), IIR_NONE);
        b.set(0, b'a');
        assert!(b.irq());
        // Disabling and enabling again interrupts anew.
        assert_eq!(b.get(2), IIR_TRANSMIT);
        b.set(1, 0);
        b.set(1, IER_TRANSMIT);
        assert!(b.irq());
    }

    #[test]
    fn received_data_waits_until_the_guest_is_ready() {
        let mut b = bench();
        assert_eq!(b.uart.push_input(b"ab"), 2);
        b.set(4, MCR_RTS);
        assert_eq!((b.get(5) & LSR_DATA_READY, b.get(0)), (0, 0));
        b.set(4, MCR_RTS | MCR_OUT2);
        assert_eq!(b.get(5) & LSR_DATA_READY, 1);
        assert_eq!((b.get(0), b.get(0), b.get(0)), (b'a', b'b', 0));
        assert_eq!(b.get(5) & LSR_DATA_READY, 0);
    }

    #[test]
    fn input_survives_closing_and_opening_the_port() {
        // What Linux does: interrupts off, modem lines off, FIFOs cleared, data register read.
        let mut b = bench();
        b.open(0x81);
        b.set(1, IER_RECEIVED);
        b.uart.push_input(b"reboot");
        assert_eq!(b.get(0), b'r');
        b.set(1, 0);
        b.set(4, 0);
        b.set(2, FCR_ENABLE | FCR_CLEAR_RX);
        assert_eq!((b.get(0), b.get(5) & LSR_DATA_READY), (0, 0));
        b.set(4, MCR_OUT2);
        b.set(1, IER_RECEIVED);
        assert_eq!([(); 5].map(|()| b.get(0)), *b"eboot");
    }

    #[test]
    fn loopback_does_not_mix_with_input() {
        let mut b = bench();
        b.open(1);
        b.uart.push_input(b"in");
        b.set(4, MCR_LOOP | MCR_RTS | MCR_OUT2);
        b.set(0, b'x');
        b.set(0, b'y');
        assert_eq!(b.get(0), b'x');
        b.set(4, MCR_RTS | MCR_OUT2);
        assert_eq!((b.get(0), b.get(0)), (b'i', b'n'));
    }

    #[test]
    fn trigger_level_and_time_out() {
        // PC16550D Table III: at the trigger level 0x04, below it after a pause 0x0C; IIR[7:6] are set in FIFO mode.
        let mut b = bench();
        b.open(0x81);
        b.set(1, IER_RECEIVED);
        b.uart.push_input(b"1234567");
        assert!(b.irq());
        assert_eq!(b.get(2), IIR_FIFOS | IIR_TIMEOUT);
        b.uart.push_input(b"8");
        assert_eq!(b.get(2), IIR_FIFOS | IIR_RECEIVED);
        (0..8).for_each(|_| assert_ne!(b.get(0), 0));
        assert!(!b.irq());
        assert_eq!(b.get(2), IIR_FIFOS | IIR_NONE);
    }

    #[test]
    fn input_is_bounded() {
        let mut b = bench();
        let chunk = [b'x'; 3000];
        assert_eq!(b.uart.push_input(&chunk), 3000);
        assert_eq!(b.uart.push_input(&chunk), INPUT_QUEUE - 3000);
        assert_eq!((b.uart.push_input(&chunk), b.uart.input_space()), (0, 0));
        b.open(1);
        assert_eq!(b.uart.input_space(), FIFO_DEPTH);
        let mut read = 0;
        while b.get(5) & LSR_DATA_READY != 0 {
            assert_eq!(b.get(0), b'x');
            read += 1;
        }
        assert_eq!(read, INPUT_QUEUE);
    }

    #[test]
    fn fifo_clear_empties_what_was_received() {
        let mut b = bench();
        b.open(1);
        b.uart.push_input(b"abc");
        b.set(2, FCR_ENABLE | FCR_CLEAR_RX);
        assert_eq!(b.get(5) & LSR_DATA_READY, 0);
    }

    #[test]
    fn loopback() {
        // PC16550D §8.7
        let mut b = bench();
        assert_eq!(b.get(6) & 0xf0, 0xb0);
        b.set(4, MCR_LOOP | MCR_RTS | MCR_OUT2);
        assert_eq!(b.get(6) & 0xf0, MSR_CTS | MSR_DCD);
        b.set(4, MCR_LOOP | MCR_DTR | MCR_OUT1);
        assert_eq!(b.get(6), MSR_DSR | MSR_RI | 0b1011);
        assert_eq!(b.get(6) & 0xf, 0, "reading clears the changes");
        b.set(0, b'z');
        assert!(b.sent().is_empty());
        assert_eq!((b.get(5) & LSR_DATA_READY, b.get(0)), (1, b'z'));
        // RI's change is reported at its trailing edge.
        b.set(4, MCR_LOOP | MCR_DTR);
        assert_eq!(b.get(6), MSR_DSR | 0b0100);
    }

    #[test]
    fn overrun_in_loopback() {
        let mut b = bench();
        b.set(4, MCR_LOOP);
        b.set(1, IER_LINE);
        b.set(0, 1);
        b.set(0, 2);
        assert_eq!(b.get(2), IIR_LINE);
        assert_eq!(b.get(5) & LSR_OVERRUN, LSR_OVERRUN);
        assert_eq!(b.get(5) & LSR_OVERRUN, 0);
        assert_eq!(b.get(0), 1);
    }

    #[test]
    fn out2_gates_the_line() {
        let mut b = bench();
        b.set(1, IER_TRANSMIT);
        assert!(!b.irq());
        b.set(4, MCR_OUT2);
        assert!(b.irq());
    }

    #[test]
    fn scratch_register() {
        let mut b = bench();
        b.set(7, 0xa5);
        assert_eq!(b.get(7), 0xa5);
    }
}
