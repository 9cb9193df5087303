//! The user's terminal: raw mode while a guest runs, and the escape keys.
//!
//! A process has one terminal, so what it looked like before is kept in one place that the
//! panic hook and signal handlers' threads can reach too.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::termios::{
    self, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios,
};

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

fn saved() -> std::sync::MutexGuard<'static, Option<Termios>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Restores the terminal when dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal on standard input into raw mode. `None` when there is none.
    ///
    /// # Errors
    /// What the host says when it refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !termios::isatty(stdin) {
            return Ok(None);
        }
        let before = termios::tcgetattr(stdin)?;
        *saved() = Some(before.clone());
        set_raw(&before)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
        saved().take();
    }
}

/// Every key goes to the guest, Ctrl-C too; output is still processed, so that messages
/// have their lines end right.
fn set_raw(before: &Termios) -> io::Result<()> {
    let mut t = before.clone();
    t.input_modes -= InputModes::IGNBRK
        | InputModes::BRKINT
        | InputModes::PARMRK
        | InputModes::ISTRIP
        | InputModes::INLCR
        | InputModes::IGNCR
        | InputModes::ICRNL
        | InputModes::IXON;
    t.output_modes |= OutputModes::OPOST;
    t.local_modes -=
        LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::IEXTEN | LocalModes::ISIG;
    t.special_codes[SpecialCodeIndex::VMIN] = 1;
    t.special_codes[SpecialCodeIndex::VTIME] = 0;
    Ok(termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &t)?)
}

/// Gives the terminal its modes from before raw mode back.
pub fn restore() {
    if let Some(t) = saved().as_ref() {
        // Nothing can be done when the terminal is gone.
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, t);
    }
}

/// Raw mode again, after [`restore`], if it was on.
pub fn resume() {
    if let Some(t) = saved().as_ref() {
        // Nothing can be done when the terminal is gone.
        let _ = set_raw(t);
    }
}

/// A key sequence that is for nestvmm and not for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// Ctrl-A x: quit.
    Quit,
    /// Ctrl-A h: show the keys.
    Help,
    /// Ctrl-A p: press the power button.
    PowerButton,
    /// Ctrl-A s: print exit statistics.
    Stats,
    /// Ctrl-A v: print VMCS01, VMCS12 and VMCS02.
    Vmcs,
}

/// The escape keys, for the user.
pub const KEYS: &str = "\n\
    Ctrl-A h      this help\n\
    Ctrl-A x      quit\n\
    Ctrl-A p      press the power button\n\
    Ctrl-A s      print exit statistics\n\
    Ctrl-A v      print VMCS01, VMCS12 and VMCS02\n\
    Ctrl-A Ctrl-A send Ctrl-A\n";

/// Ctrl-A.
const PREFIX: u8 = 1;

/// Tells the guest's input and escape keys apart.
#[derive(Debug, Default)]
pub struct EscapeParser {
    prefixed: bool,
}

/// What one byte of input means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Input for the guest.
    Guest(u8),
    /// For nestvmm.
    Escape(Escape),
    /// Part of an escape sequence, or one that means nothing.
    Nothing,
}

impl EscapeParser {
    /// Takes a byte of input.
    pub fn feed(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.prefixed) {
            if byte == PREFIX {
                self.prefixed = true;
                return Key::Nothing;
            }
            return Key::Guest(byte);
        }
        match byte {
            b'x' => Key::Escape(Escape::Quit),
            b'h' | b'?' => Key::Escape(Escape::Help),
            b'p' => Key::Escape(Escape::PowerButton),
            b's' => Key::Escape(Escape::Stats),
            b'v' => Key::Escape(Escape::Vmcs),
            PREFIX => Key::Guest(PREFIX),
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_keys() {
        let mut p = EscapeParser::default();
        let keys: Vec<Key> = b"a\x01\x01b\x01h\x01zc\x01x".iter().map(|b| p.feed(*b)).collect();
        use Key::{Escape as E, Guest, Nothing};
        assert_eq!(
            keys,
            [
                Guest(b'a'),
                Nothing,
                Guest(1),
                Guest(b'b'),
                Nothing,
                E(Escape::Help),
                Nothing,
                Nothing,
                Guest(b'c'),
                Nothing,
                E(Escape::Quit)
            ]
        );
    }
}
