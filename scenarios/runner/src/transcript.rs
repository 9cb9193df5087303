//! Output that a thread collects while others wait for something in it.
//!
//! At most [`LIMIT`] bytes are kept: of a program that prints without end, the last ones.

use std::io::{ErrorKind, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// How many bytes are kept.
pub const LIMIT: usize = 8 << 20;

/// What a program has printed.
#[derive(Clone, Default)]
pub struct Transcript(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    /// How many bytes came before those that are kept.
    dropped: u64,
    ended: bool,
}

impl Collected {
    fn push(&mut self, new: &[u8]) {
        self.bytes.extend_from_slice(new);
        // Half at a time, so that not each read moves everything.
        if self.bytes.len() > LIMIT {
            let excess = self.bytes.len() - LIMIT / 2;
            self.bytes.drain(..excess);
            self.dropped += excess as u64;
        }
    }
}

/// Why a wait found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The time was over.
    Timeout,
    /// The output came to its end.
    Ended,
}

impl Transcript {
    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that collects what `source` gives until its end.
    pub fn collect(source: impl Read + Send + 'static) -> Self {
        let transcript = Self::default();
        let ours = transcript.clone();
        thread::spawn(move || {
            let mut source = source;
            let mut buf = [0; 4096];
            loop {
                let n = match source.read(&mut buf) {
                    Ok(n) => n,
                    Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                    // A terminal whose other end is closed gives an error at its end.
                    Err(_) => 0,
                };
                let mut collected = ours.lock();
                collected.push(buf.get(..n).unwrap_or_default());
                collected.ended = n == 0;
                ours.0.1.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        transcript
    }

    /// Waits until `found` finds something in what came after byte `from`, and says how many bytes of
    /// that are done with; gives what was found and the position behind.
    ///
    /// # Errors
    /// When the output ends, or `deadline` is there.
    pub fn wait<T>(
        &self,
        from: u64,
        deadline: Instant,
        mut found: impl FnMut(&[u8]) -> Option<(T, usize)>,
    ) -> Result<(T, u64), Missing> {
        let mut collected = self.lock();
        loop {
            let start = from.max(collected.dropped);
            let skipped = usize::try_from(start - collected.dropped).unwrap_or(usize::MAX);
            if let Some((t, used)) = collected.bytes.get(skipped..).and_then(&mut found) {
                return Ok((t, start + used as u64));
            }
            if collected.ended {
                return Err(Missing::Ended);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Missing::Timeout);
            }
            collected = self.0.1.wait_timeout(collected, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the output's end, at most until `deadline`.
    pub fn wait_end(&self, deadline: Instant) {
        let _ = self.wait(u64::MAX, deadline, |_| None::<((), usize)>);
    }

    /// What is kept, bytes that are no UTF-8 replaced.
    pub fn text(&self) -> String {
        let collected = self.lock();
        let text = String::from_utf8_lossy(&collected.bytes);
        match collected.dropped {
            0 => text.into_owned(),
            n => format!("[{n} bytes before this are not kept]\n{text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn of_endless_output_the_last_is_kept() {
        let long = std::io::repeat(b'x').take(3 * LIMIT as u64).chain(Cursor::new(b"the end"));
        let t = Transcript::collect(long);
        t.wait_end(soon());
        let (kept, dropped) = {
            let collected = t.lock();
            (collected.bytes.len(), collected.dropped)
        };
        assert!(kept <= LIMIT);
        let total = dropped + kept as u64;
        assert_eq!(total, 3 * LIMIT as u64 + 7);
        assert!(t.text().starts_with('[') && t.text().ends_with("the end"));
        // A position that is no longer kept stands for the first byte that is.
        let found = t.wait(5, soon(), |b| memchr::memmem::find(b, b"end").map(|at| ((), at + 3)));
        assert_eq!(found, Ok(((), total)));
        assert_eq!(t.wait(total, soon(), |_| None::<((), usize)>), Err(Missing::Ended));
    }

    #[test]
    fn a_wait_has_an_end() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let t = Transcript::collect(reader);
        assert_eq!(t.wait(0, Instant::now(), |_| None::<((), usize)>), Err(Missing::Timeout));
    }
}
