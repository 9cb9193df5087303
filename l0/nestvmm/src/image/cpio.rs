//! Writing a cpio archive in the "newc" format that Linux unpacks into its initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Not supported: hard links, checksums, files of 4 GiB or more.

use std::collections::BTreeSet;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive in memory. All files belong to root and are as old as Unix, so that the same
/// contents make the same archive.
#[derive(Debug, Default)]
pub(super) struct Cpio {
    out: Vec<u8>,
    inode: u32,
    directories: BTreeSet<String>,
}

impl Cpio {
    /// Adds directory `path` and its parents, unless they are there.
    pub(super) fn dir(&mut self, path: &str) {
        let mut end = 0;
        while let Some(next) = path.get(end..).filter(|rest| !rest.is_empty()) {
            end += next.find('/').unwrap_or(next.len());
            let parent = path.get(..end).unwrap_or(path);
            if !parent.is_empty() && self.directories.insert(parent.to_owned()) {
                self.entry(parent, S_IFDIR | 0o755, (0, 0), &[]);
            }
            end += 1;
            if end > path.len() {
                break;
            }
        }
    }

    fn parent(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
    }

    /// Adds a regular file with the permissions `mode`.
    pub(super) fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.parent(path);
        self.entry(path, S_IFREG | mode, (0, 0), data);
    }

    /// Adds a symbolic link.
    pub(super) fn symlink(&mut self, path: &str, target: &str) {
        self.parent(path);
        self.entry(path, S_IFLNK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub(super) fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.parent(path);
        self.entry(path, S_IFCHR | mode, (major, minor), &[]);
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.pad(512);
        self.out
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), data: &[u8]) {
        self.inode += 1;
        let links = if mode & S_IFDIR != 0 && mode & S_IFREG == 0 { 2 } else { 1 };
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            data.len() as u32,
            0, // device of the file system
            0,
            major,
            minor,
            name.len() as u32 + 1,
            0, // checksum
        ];
        self.out.extend_from_slice(b"070701");
        for field in fields {
            self.out.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.out.extend_from_slice(name.as_bytes());
        self.out.push(0);
        self.pad(4);
        self.out.extend_from_slice(data);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        self.out.resize(self.out.len().next_multiple_of(to), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and contents of each entry, read by the format's description.
    fn read(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut at = 0;
        let mut entries = Vec::new();
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&archive[at + 6 + 8 * i..at + 14 + 8 * i]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = String::from_utf8(archive[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((name, mode as u32, archive[data..data + size].to_vec()));
            at = (data + size).next_multiple_of(4);
        }
    }

    #[test]
    fn entries_come_back_with_their_parents_first() {
        let mut c = Cpio::default();
        c.file("a/b/c", 0o644, b"hello");
        c.symlink("a/b/d", "c");
        c.char_device("dev/console", 0o600, 5, 1);
        c.dir("a/b");
        assert_eq!(
            read(&c.finish()),
            [
                ("a".into(), 0o040_755, vec![]),
                ("a/b".into(), 0o040_755, vec![]),
                ("a/b/c".into(), 0o100_644, b"hello".to_vec()),
                ("a/b/d".into(), 0o120_777, b"c".to_vec()),
                ("dev".into(), 0o040_755, vec![]),
                ("dev/console".into(), 0o020_600, vec![]),
            ]
        );
    }
}
