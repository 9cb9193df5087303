//! The messages: a kind, a length of two bytes (low byte first), and that many bytes.
//!
//! The guest's side says [`FromGuest::Hello`] once its end of the port passes bytes unchanged. Then it
//! gets the command, and input as far as it has given credit for: the terminal layer in between would
//! lose what is more than its buffer holds.

use super::Outcome;

/// Version of this protocol.
pub const VERSION: u8 = 1;
/// How much input may be on its way to the command, in bytes. Linux's terminal layer holds 4095.
pub const WINDOW: usize = 2048;
/// Longest command, in bytes.
pub const COMMAND_MAX: usize = 60 << 10;
/// Most bytes of output in a message.
pub const CHUNK: usize = 4096;

/// Bytes of a message before its contents.
const HEADER: usize = 3;

/// What the guest's side says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromGuest {
    /// It is there, and speaks this version.
    Hello(u8),
    /// Standard output of the command.
    Output(Vec<u8>),
    /// Standard error of the command.
    Errors(Vec<u8>),
    /// So many bytes of input were taken.
    Credit(u16),
    /// The command ended.
    Ended(Outcome),
    /// The command could not be started.
    Failed(String),
}

/// What the host's side says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromHost {
    /// The command, for `sh -c`.
    Command(Vec<u8>),
    /// Input for it.
    Input(Vec<u8>),
    /// The end of the input.
    InputEnd,
}

/// What can be sent and received.
pub trait Message: Sized {
    /// Kind and contents.
    fn parts(&self) -> (u8, Vec<u8>);
    /// The reverse; `None` for what is no message of this direction.
    fn from_parts(kind: u8, contents: Vec<u8>) -> Option<Self>;

    /// The bytes to send. Contents that are too long are cut.
    fn encode(&self) -> Vec<u8> {
        let (kind, mut contents) = self.parts();
        contents.truncate(u16::MAX.into());
        let [low, high] = (contents.len() as u16).to_le_bytes();
        let mut bytes = vec![kind, low, high];
        bytes.append(&mut contents);
        bytes
    }
}

impl Message for FromGuest {
    fn parts(&self) -> (u8, Vec<u8>) {
        match self {
            Self::Hello(version) => (b'h', vec![*version]),
            Self::Output(data) => (b'o', data.clone()),
            Self::Errors(data) => (b'e', data.clone()),
            Self::Credit(bytes) => (b'c', bytes.to_le_bytes().to_vec()),
            Self::Ended(Outcome::Exited(status)) => (b'x', vec![*status]),
            Self::Ended(Outcome::Signal(signal)) => (b's', vec![*signal]),
            Self::Failed(why) => (b'f', why.clone().into_bytes()),
        }
    }

    fn from_parts(kind: u8, contents: Vec<u8>) -> Option<Self> {
        Some(match (kind, contents.as_slice()) {
            (b'h', [version]) => Self::Hello(*version),
            (b'o', _) => Self::Output(contents),
            (b'e', _) => Self::Errors(contents),
            (b'c', [low, high]) => Self::Credit(u16::from_le_bytes([*low, *high])),
            (b'x', [status]) => Self::Ended(Outcome::Exited(*status)),
            (b's', [signal]) => Self::Ended(Outcome::Signal(*signal)),
            (b'f', _) => Self::Failed(String::from_utf8_lossy(&contents).into_owned()),
            _ => return None,
        })
    }
}

impl Message for FromHost {
    fn parts(&self) -> (u8, Vec<u8>) {
        match self {
            Self::Command(command) => (b'C', command.clone()),
            Self::Input(data) => (b'I', data.clone()),
            Self::InputEnd => (b'E', Vec::new()),
        }
    }

    fn from_parts(kind: u8, contents: Vec<u8>) -> Option<Self> {
        Some(match kind {
            b'C' => Self::Command(contents),
            b'I' => Self::Input(contents),
            b'E' if contents.is_empty() => Self::InputEnd,
            _ => return None,
        })
    }
}

/// The other side does not speak the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Garbled;

/// Puts messages together from bytes as they come. Holds less than one message.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Takes bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message.
    ///
    /// # Errors
    /// [`Garbled`] when what came is no message.
    pub fn next<M: Message>(&mut self) -> Result<Option<M>, Garbled> {
        let Some(&[kind, low, high]) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let end = HEADER + usize::from(u16::from_le_bytes([low, high]));
        if self.buffer.len() < end {
            return Ok(None);
        }
        let contents = self.buffer.drain(..end).skip(HEADER).collect();
        M::from_parts(kind, contents).map(Some).ok_or(Garbled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_being_cut_in_pieces() {
        let messages = [
            FromGuest::Hello(VERSION),
            FromGuest::Output((0..=255).collect()),
            FromGuest::Errors(Vec::new()),
            FromGuest::Credit(0x1234),
            FromGuest::Failed("no sh".into()),
            FromGuest::Ended(Outcome::Exited(255)),
            FromGuest::Ended(Outcome::Signal(9)),
        ];
        let bytes: Vec<u8> = messages.iter().flat_map(Message::encode).collect();
        for size in [1, 2, 7, 1000] {
            let (mut decoder, mut found) = (Decoder::default(), Vec::new());
            for piece in bytes.chunks(size) {
                decoder.feed(piece);
                while let Some(m) = decoder.next::<FromGuest>().unwrap() {
                    found.push(m);
                }
            }
            assert_eq!(found, messages, "pieces of {size}");
        }
        for m in [FromHost::Command(b"a".to_vec()), FromHost::Input(vec![0; COMMAND_MAX]), FromHost::InputEnd]
        {
            let mut decoder = Decoder::default();
            decoder.feed(&m.encode());
            assert_eq!(decoder.next(), Ok(Some(m)));
        }
    }

    #[test]
    fn what_is_no_message_is_noticed() {
        for bytes in [b"Linux version".as_slice(), b"\0\0\0", b"x\0\0", b"h\x02\0ab"] {
            let mut decoder = Decoder::default();
            decoder.feed(bytes);
            decoder.feed(&[0; 1 << 16]);
            assert_eq!(decoder.next::<FromGuest>(), Err(Garbled), "{bytes:?}");
        }
    }
}
