//! The root file systems of the demonstration guests, as initramfs: L1's holds L2's kernel and
//! initrd as files.

use std::io::Write;

use crate::exec;

use super::cpio::Cpio;
use super::kmod::Resolved;

/// The first process.
const INIT: &str = include_str!("init.sh");
/// L1's command that boots L2.
const BOOT_L2: &str = include_str!("boot-l2.sh");
/// What interactive shells read first.
const PROFILE: &str = "PS1='\\h:\\w\\$ '\n";

/// How the initrd is packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitrdCompression {
    /// Not at all: the least work for a slow CPU.
    #[default]
    None,
    /// gzip.
    Gzip,
    /// LZ4 in its legacy frame, the one that Linux takes.
    Lz4,
}

/// The guest that an initrd is for.
#[derive(Debug)]
pub(super) enum Level<'a> {
    /// The outer one, and what it boots L2 with, if it can.
    L1(Option<&'a L2>),
    /// Its guest.
    L2,
}

/// What L1 boots L2 with.
#[derive(Debug)]
pub(super) struct L2 {
    /// The kernel.
    pub kernel: Vec<u8>,
    /// The packed initrd.
    pub initrd: Vec<u8>,
    /// The kernel command line.
    pub options: String,
}

/// What goes into the initrd.
#[derive(Debug)]
pub(super) struct Contents<'a> {
    /// Whose it is.
    pub level: Level<'a>,
    /// Kernel release, the name of the modules' directory.
    pub release: &'a str,
    /// Kernel modules.
    pub modules: &'a Resolved,
    /// The busybox program.
    pub busybox: &'a [u8],
    /// Names of its applets; empty if they are not known, and linked at boot.
    pub applets: &'a [String],
    /// The nestvmm program.
    pub nestvmm: Option<&'a [u8]>,
    /// More files: path, permissions and contents.
    pub extra: &'a [(String, u32, Vec<u8>)],
}

/// Makes the cpio archive.
pub(super) fn archive(contents: &Contents<'_>) -> Vec<u8> {
    let mut c = Cpio::default();
    if contents.nestvmm.is_some() {
        // First, so that it is found without unpacking everything.
        c.file(exec::MARK, 0o644, exec::MARK_TEXT);
    }
    for dir in [
        "bin",
        "dev",
        "etc",
        "lib/modules",
        "proc",
        "root",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr/bin",
        "usr/sbin",
    ] {
        c.dir(dir);
    }
    // The kernel opens it for the first process before anything is mounted.
    c.char_device("dev/console", 0o600, 5, 1);
    c.file("init", 0o755, INIT.as_bytes());
    c.file("bin/busybox", 0o755, contents.busybox);
    c.symlink("bin/sh", "busybox");
    for applet in contents.applets.iter().filter(|a| !matches!(a.as_str(), "sh" | "busybox" | "nestvmm")) {
        c.symlink(&format!("bin/{applet}"), "busybox");
    }
    if let Some(nestvmm) = contents.nestvmm {
        c.file("bin/nestvmm", 0o755, nestvmm);
    }
    if let Level::L1(Some(l2)) = &contents.level {
        c.file("bin/boot-l2", 0o755, BOOT_L2.as_bytes());
        c.file("boot/l2/linux", 0o644, &l2.kernel);
        c.file("boot/l2/initrd", 0o644, &l2.initrd);
        c.file("boot/l2/options", 0o644, format!("{}\n", l2.options).as_bytes());
    }
    c.file("etc/profile", 0o644, PROFILE.as_bytes());
    c.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    c.file("etc/group", 0o644, b"root:x:0:\ntty:x:5:\n");
    let hostname = if matches!(contents.level, Level::L2) { "l2\n" } else { "l1\n" };
    c.file("etc/hostname", 0o644, hostname.as_bytes());
    let base = format!("lib/modules/{}", contents.release);
    for module in contents.modules.modules.values() {
        c.file(&format!("{base}/{}", module.path), 0o644, &module.data);
    }
    c.file(&format!("{base}/modules.dep"), 0o644, contents.modules.modules_dep().as_bytes());
    for (path, mode, data) in contents.extra {
        c.file(path.trim_start_matches('/'), *mode, data);
    }
    c.finish()
}

/// Packs an archive.
pub(super) fn pack(archive: Vec<u8>, how: InitrdCompression) -> std::io::Result<Vec<u8>> {
    match how {
        InitrdCompression::None => Ok(archive),
        InitrdCompression::Gzip => {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            out.write_all(&archive)?;
            out.finish()
        }
        InitrdCompression::Lz4 => Ok(lz4_legacy(&archive)),
    }
}

/// LZ4's legacy frame: a magic number, then blocks of 8 MiB with their packed length.
fn lz4_legacy(data: &[u8]) -> Vec<u8> {
    const MAGIC: u32 = 0x184c_2102;
    const BLOCK: usize = 8 << 20;
    let mut out = MAGIC.to_le_bytes().to_vec();
    for block in data.chunks(BLOCK) {
        let packed = lz4_flex::block::compress(block);
        out.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        out.extend_from_slice(&packed);
    }
    out
}

#[cfg(test)]
mod tests {
    use machine::boot::{Compression, decompress};

    use super::*;

    #[test]
    fn packed_archives_unpack_to_the_same() {
        let archive: Vec<u8> = (0..9 << 20).map(|i: u32| (i >> 12) as u8 ^ i as u8).collect();
        for (how, format) in
            [(InitrdCompression::Gzip, Compression::Gzip), (InitrdCompression::Lz4, Compression::Lz4)]
        {
            let packed = pack(archive.clone(), how).unwrap();
            assert_eq!(Compression::detect(&packed), Some(format));
            assert!(packed.len() < archive.len() / 2);
            assert!(decompress(format, &packed, 16 << 20).unwrap() == archive, "{how:?}");
        }
        // The legacy frame is the only one that Linux unpacks.
        assert_eq!(pack(archive.clone(), InitrdCompression::Lz4).unwrap()[..4], [0x02, 0x21, 0x4c, 0x18]);
        assert_eq!(pack(archive.clone(), InitrdCompression::None).unwrap().len(), archive.len());
    }
}
