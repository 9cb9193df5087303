//! Output on the first serial port, polled.

use core::fmt::{self, Write};

use super::cpu;

const COM1: u16 = 0x3f8;

/// The serial port.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            // Line status bit 5: the transmitter takes another byte.
            while cpu::inb(COM1 + 5) & 0x20 == 0 {}
            cpu::outb(COM1, byte);
        }
        Ok(())
    }
}

/// Prints formatted text.
macro_rules! print {
    ($($t:tt)*) => {{
        use core::fmt::Write;
        let _ = write!($crate::guest::console::Console, $($t)*);
    }};
}
/// Prints a line.
macro_rules! println {
    ($($t:tt)*) => {{ print!($($t)*); print!("\n"); }};
}
