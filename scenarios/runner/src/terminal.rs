//! A pseudo-terminal and its modes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, Termios};

/// Opens a pseudo-terminal: the controlling end and the program's.
///
/// # Errors
/// When the host has none, or no more.
pub fn open() -> io::Result<(OwnedFd, OwnedFd)> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(name, flags, Mode::empty())?;
    Ok((master, slave))
}

/// The modes of a terminal, in a form that can be compared and shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modes {
    input: u32,
    output: u32,
    control: u32,
    local: u32,
    special: String,
}

impl Modes {
    /// Those of `terminal`.
    ///
    /// # Errors
    /// When it is no terminal.
    pub fn of(terminal: &impl AsFd) -> io::Result<Self> {
        let t: Termios = rustix::termios::tcgetattr(terminal)?;
        Ok(Self {
            input: t.input_modes.bits(),
            output: t.output_modes.bits(),
            control: t.control_modes.bits(),
            local: t.local_modes.bits(),
            special: format!("{:?}", t.special_codes),
        })
    }

    /// Whether typed characters are shown and lines can be edited: a terminal as a shell leaves it.
    pub fn is_cooked(&self) -> bool {
        let cooked = LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
        LocalModes::from_bits_retain(self.local).contains(cooked)
    }
}
