//! The images that tests boot. `nestvmm image build` makes them, once for each build of the program.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use crate::process::Launch;
use crate::program;

/// Enough for the downloads over a slow line.
const BUILD_LIMIT: Duration = Duration::from_secs(600);
/// Largest kernel or initrd, in bytes.
const FILE_LIMIT: u64 = 1 << 30;

/// Crypto modules whose self-tests check this program's vector, AES, SHA and carry-less
/// multiplication instructions against known answers.
pub const CRYPTO_MODULES: [&str; 12] = [
    "aesni_intel",
    "ghash_clmulni_intel",
    "sha1_ssse3",
    "sha256_ssse3",
    "sha512_ssse3",
    "crc32c_intel",
    "crc32_pclmul",
    "crct10dif_pclmul",
    "chacha_x86_64",
    "poly1305_x86_64",
    "serpent_avx2",
    "camellia_aesni_avx2",
];

/// A kernel of the distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The one for clouds, with few drivers.
    Cloud,
    /// The one for PCs.
    Generic,
}

impl Kernel {
    /// The package that depends on the current one.
    pub fn package(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Generic => "linux-image-amd64",
        }
    }

    /// What its release (`uname -r`) ends with.
    pub fn flavour(self) -> &'static str {
        match self {
            Self::Cloud => "-cloud-amd64",
            Self::Generic => "-amd64",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Generic => "generic",
        }
    }

    /// The disk image that `nestvmm image build` makes of it.
    pub fn image(self) -> &'static Path {
        static IMAGES: [OnceLock<PathBuf>; 2] = [OnceLock::new(), OnceLock::new()];
        let [cloud, generic] = &IMAGES;
        let cell = match self {
            Self::Cloud => cloud,
            Self::Generic => generic,
        };
        cell.get_or_init(|| {
            let path = dir().join(format!("{}.img", self.name()));
            make(&path, || {
                let mut build = Launch::new(["image", "build", "--force", "--l2", "off"])
                    .args(&["--kernel-package", self.package()]);
                for module in CRYPTO_MODULES {
                    build = build.arg("--module").arg(module);
                }
                build.path(&path).run(BUILD_LIMIT).expect_status(0);
            });
            path
        })
    }

    /// The image of an L1 with the cloud kernel that holds an L2 with this one.
    pub fn image_as_l2(self) -> &'static Path {
        static IMAGES: [OnceLock<PathBuf>; 2] = [OnceLock::new(), OnceLock::new()];
        let [cloud, generic] = &IMAGES;
        let (cell, options): (_, &[&str]) = match self {
            Self::Cloud => (cloud, &[]),
            Self::Generic => (generic, &["--l2-kernel-package", Self::Generic.package()]),
        };
        cell.get_or_init(|| {
            let path = dir().join(format!("l2-{}.img", self.name()));
            make(&path, || {
                let build = Launch::new(["image", "build", "--force"]).args(options);
                build.path(&path).run(BUILD_LIMIT).expect_status(0);
            });
            path
        })
    }

    /// The kernel file and the initrd that are in the image.
    pub fn files(self) -> (PathBuf, PathBuf) {
        let image = self.image();
        let kernel = dir().join(format!("{}.vmlinuz", self.name()));
        let initrd = dir().join(format!("{}.initrd", self.name()));
        make(&initrd, || {
            let source = machine::image::open(image, None, FILE_LIMIT).expect("the image opens");
            fs::write(&kernel, &source.kernel.data).expect("target is writable");
            let data = source.initrd.expect("the image has an initrd").data;
            fs::write(&initrd, data).expect("target is writable");
        });
        (kernel, initrd)
    }
}

/// Where they are kept.
fn dir() -> PathBuf {
    let dir = program::profile_dir().join("whole-program-tests");
    fs::create_dir_all(&dir).expect("target is writable");
    dir
}

/// Calls `build` unless `path` is newer than the program. Only one process does it at a time.
fn make(path: &Path, build: impl FnOnce()) {
    let lock = File::create(path.with_extension("lock")).expect("target is writable");
    lock.lock().expect("target is on a file system with locks");
    let modified = |p: &Path| p.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    if modified(path) <= modified(program::path()) {
        build();
    }
}
