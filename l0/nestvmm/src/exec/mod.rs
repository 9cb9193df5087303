//! `nestvmm run --exec`: a command in the guest, with its input, output and exit status.
//!
//! The two sides talk over the machine's second serial port, which is there for nothing else, so that
//! what the kernel and other programs print on the console stays apart. In the guest, the image's init
//! starts `nestvmm serve-exec` ([`guest`]); [`host`] is the other end, in the nestvmm that runs the
//! guest. Messages are those of [`protocol`].
//!
//! Not supported: a terminal for the command, signals to it, several commands.

pub mod guest;
pub mod host;
mod protocol;

/// A file in the initrd that says that its init knows `serve-exec`. It is the archive's first.
pub const MARK: &str = "etc/nestvmm-exec";
/// Its contents: the protocol's version.
pub const MARK_TEXT: &[u8] = b"1\n";
/// What the kernel command line says when the port is there: the port, for init.
pub const COMMAND_LINE_WORD: &str = "nestvmm_channel=ttyS1";
/// The status that `run --exec` ends with when there is none of the command's to give.
pub const NO_STATUS: u8 = 125;

/// How a command in the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By itself, with this status.
    Exited(u8),
    /// By this signal.
    Signal(u8),
}

impl Outcome {
    /// The exit status that stands for it: the command's own, or 128 and the signal's number, as a
    /// shell shows it.
    pub fn status(self) -> u8 {
        match self {
            Self::Exited(status) => status,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited {status}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}
