//! Who gets which part of RAM while a kernel is loaded, so that hostile files can't make
//! parts overwrite each other.

use memory::{L1Gpa, L1Ram};

use super::BootError;

/// What the real-mode interrupt table and BIOS data area take at the bottom of RAM.
pub(super) const LOW_RESERVED: u64 = 0x1000;
/// End of conventional memory: the extended BIOS data area would start here.
pub(super) const LOW_END: u64 = 0x9_fc00;
/// Where RAM that is free for kernels starts again after the legacy video and ROM area.
pub(super) const HIGH_START: u64 = 0x10_0000;
/// Loaders put nothing below 4 GiB from here on; firmware tables like to live there.
pub(super) const LOW_RAM_TOP: u64 = 0xbfff_0000;

#[derive(Debug)]
struct Used {
    start: u64,
    end: u64,
    what: String,
}

/// Keeps track of used ranges of RAM and writes to them.
#[derive(Debug)]
pub(super) struct Placement<'a> {
    ram: &'a L1Ram,
    used: Vec<Used>,
}

impl<'a> Placement<'a> {
    pub(super) fn new(ram: &'a L1Ram) -> Self {
        let area = |start, end, what: &str| Used { start, end, what: what.into() };
        let used = vec![
            area(0, LOW_RESERVED, "the BIOS data area"),
            area(LOW_END, HIGH_START, "the video and ROM area"),
        ];
        Self { ram, used }
    }

    pub(super) fn ram_mib(&self) -> u64 {
        self.ram.size() >> 20
    }

    pub(super) fn ram_size(&self) -> u64 {
        self.ram.size()
    }

    /// How many bytes above 1 MiB are taken.
    pub(super) fn used_high(&self) -> u64 {
        self.used.iter().filter(|u| u.start >= HIGH_START).map(|u| u.end.saturating_sub(u.start)).sum()
    }

    /// End of RAM below the hole under 4 GiB, and below [`LOW_RAM_TOP`].
    fn low_top(&self) -> u64 {
        self.ram.translate(L1Gpa(0)).map_or(0, |(_, room)| room.min(LOW_RAM_TOP))
    }

    fn conflict(&self, start: u64, end: u64) -> Option<&Used> {
        self.used.iter().find(|u| start < u.end && u.start < end)
    }

    fn is_ram(&self, start: u64, len: u64) -> bool {
        len == 0 || matches!(self.ram.translate(L1Gpa(start)), Some((_, room)) if room >= len)
    }

    fn no_room(&self, file: &str, what: &str, len: u64, detail: String) -> BootError {
        BootError::NoRoom { file: file.into(), what: what.into(), len, ram_mib: self.ram_mib(), detail }
    }

    /// Takes `start..start + len`.
    pub(super) fn reserve(&mut self, file: &str, what: &str, start: u64, len: u64) -> Result<(), BootError> {
        let end = start.checked_add(len).filter(|_| self.is_ram(start, len)).ok_or_else(|| {
            let detail = format!(" at {start:#x}, where it has to be");
            self.no_room(file, what, len, detail)
        })?;
        if let Some(u) = self.conflict(start, end) {
            let (file, what, other) = (file.into(), what.into(), u.what.clone());
            return Err(BootError::Overlap { file, what, start, end, other });
        }
        self.note(start, end, what);
        Ok(())
    }

    /// Takes a range that others own already (ACPI tables), without a check.
    pub(super) fn note(&mut self, start: u64, end: u64, what: &str) {
        if start < end {
            self.used.push(Used { start, end, what: what.into() });
        }
    }

    /// Takes the lowest free `len` bytes from `from` that end at or below `to`. `align` is a
    /// power of two.
    pub(super) fn alloc_up(
        &mut self,
        file: &str,
        what: &str,
        len: u64,
        align: u64,
        (from, to): (u64, u64),
    ) -> Result<u64, BootError> {
        let mut start = from.checked_next_multiple_of(align);
        while let Some((s, end)) = start.and_then(|s| Some((s, s.checked_add(len)?))) {
            if end > to || !self.is_ram(s, len) {
                break;
            }
            match self.conflict(s, end) {
                None => {
                    self.note(s, end, what);
                    return Ok(s);
                }
                Some(u) => start = u.end.checked_next_multiple_of(align),
            }
        }
        Err(self.no_room(file, what, len, format!(" between {from:#x} and {to:#x}")))
    }

    /// Takes the highest free `len` bytes between 1 MiB and `below`, under the hole
    /// below 4 GiB.
    pub(super) fn alloc_down(
        &mut self,
        file: &str,
        what: &str,
        len: u64,
        align: u64,
        below: u64,
    ) -> Result<u64, BootError> {
        let mut end = below.min(self.low_top());
        loop {
            let start = end.checked_sub(len).map(|s| s & !(align - 1)).filter(|s| *s >= HIGH_START);
            let Some(start) = start else {
                let kernel = self.used.iter().map(|u| u.end).filter(|e| *e > HIGH_START).max().unwrap_or(0);
                let detail = match kernel {
                    0 => String::new(),
                    k => format!(
                        " beside the kernel, which takes it up to {:#x} ({} MiB)",
                        k,
                        k.div_ceil(1 << 20)
                    ),
                };
                return Err(self.no_room(file, what, len, detail));
            };
            match self.conflict(start, start + len) {
                None => {
                    self.note(start, start + len, what);
                    return Ok(start);
                }
                Some(u) => end = u.start.min(end - 1),
            }
        }
    }

    /// Takes room in conventional memory and fills it with `data`.
    pub(super) fn put_low(
        &mut self,
        file: &str,
        what: &str,
        data: &[u8],
        align: u64,
    ) -> Result<u64, BootError> {
        let at = self.alloc_up(file, what, data.len() as u64, align, (LOW_RESERVED, LOW_END))?;
        self.write(file, at, data)?;
        Ok(at)
    }

    pub(super) fn write(&self, file: &str, at: u64, data: &[u8]) -> Result<(), BootError> {
        self.ram.write(L1Gpa(at), data).map_err(|source| BootError::Memory { file: file.into(), source })
    }

    pub(super) fn zero(&self, file: &str, at: u64, len: u64) -> Result<(), BootError> {
        let wrap = |source| BootError::Memory { file: file.into(), source };
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.ram.fill(L1Gpa(at), 0, len).map_err(wrap)
    }

    /// Takes `mem_len` bytes at `start`, fills them with `data` and zeroes the rest.
    pub(super) fn load(
        &mut self,
        file: &str,
        what: &str,
        start: u64,
        data: &[u8],
        mem_len: u64,
    ) -> Result<(), BootError> {
        let mem_len = mem_len.max(data.len() as u64);
        self.reserve(file, what, start, mem_len)?;
        self.write(file, start, data)?;
        self.zero(file, start + data.len() as u64, mem_len - data.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::ram;

    #[test]
    fn nothing_is_given_out_twice() {
        let ram = ram(4 << 20);
        let mut p = Placement::new(&ram);
        p.reserve("k", "kernel", 0x10_0000, 0x10_0000).unwrap();
        assert!(matches!(p.reserve("k", "more", 0x1f_ffff, 2), Err(BootError::Overlap { .. })));
        assert_eq!(p.alloc_up("k", "a", 0x1000, 0x1000, (0x10_0000, 0x40_0000)), Ok(0x20_0000));
        assert_eq!(p.alloc_down("k", "b", 0x1000, 0x1000, u64::MAX), Ok(0x3f_f000));
        assert_eq!(p.alloc_down("k", "c", 0x1000, 0x1000, u64::MAX), Ok(0x3f_e000));
        // 0x201000..0x3fe000 is what is left.
        assert!(matches!(p.alloc_down("k", "d", 0x1f_e000, 0x1000, u64::MAX), Err(BootError::NoRoom { .. })));
        assert_eq!(p.alloc_down("k", "e", 0x1f_d000, 0x1000, u64::MAX), Ok(0x20_1000));
    }

    #[test]
    fn ranges_that_wrap_or_leave_ram_are_refused() {
        let ram = ram(4 << 20);
        let mut p = Placement::new(&ram);
        for (start, len) in [(u64::MAX, 2), (0x3f_ffff, 2), (0x40_0000, 1), (0x20_0000, u64::MAX)] {
            assert!(matches!(p.reserve("k", "x", start, len), Err(BootError::NoRoom { .. })), "{start:#x}");
        }
        assert!(matches!(p.reserve("k", "x", 0x9_fc00, 1), Err(BootError::Overlap { .. })));
    }
}
