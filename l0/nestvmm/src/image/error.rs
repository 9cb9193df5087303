//! What can go wrong while building or inspecting an image.

use std::io;
use std::path::PathBuf;

/// Why an image could not be built or inspected.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// This system has no apt.
    #[error(
        "can't get packages: {program} is not on this system; give the parts as files instead: --kernel-file VMLINUZ \
         --modules-dir /lib/modules/VERSION --busybox FILE (a statically linked busybox)"
    )]
    NoApt {
        /// The program that was not found.
        program: &'static str,
    },
    /// Apt does not know the package.
    #[error(
        "no package {package} in this system's package sources{detail}; choose another with --kernel-package"
    )]
    NoPackage {
        /// The package.
        package: String,
        /// What apt said.
        detail: String,
    },
    /// Apt failed.
    #[error(
        "{command} failed: {reason}; check the network and the package sources, or give the parts as files: \
         --kernel-file, --modules-dir, --busybox"
    )]
    Apt {
        /// The command.
        command: String,
        /// The last lines it printed.
        reason: String,
    },
    /// A downloaded package is not what its index says.
    #[error("package {package}: {reason}")]
    BadDownload {
        /// The package.
        package: String,
        /// What is wrong.
        reason: String,
    },
    /// A package can't be unpacked.
    #[error("{}: can't be unpacked: {reason}", path.display())]
    BadPackage {
        /// The package's file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A package lacks what it was fetched for.
    #[error("package {package} contains no {what}")]
    NotInPackage {
        /// The package.
        package: String,
        /// What was looked for.
        what: &'static str,
    },
    /// A kernel module can't be used.
    #[error("kernel module {module}: {reason}")]
    BadModule {
        /// The module's file.
        module: String,
        /// What is wrong.
        reason: String,
    },
    /// The program to put into the image is not a static executable.
    #[error("{}: {reason}; give a statically linked x86-64 program with {option}", path.display())]
    NotStatic {
        /// The program.
        path: PathBuf,
        /// What it is instead.
        reason: &'static str,
        /// The option that names it.
        option: &'static str,
    },
    /// A file or directory to read is not usable.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image's file name is taken.
    #[error("{}: already exists; remove it or give --force to replace it", path.display())]
    Exists {
        /// The image.
        path: PathBuf,
    },
    /// The image can't be written; what was there before is untouched.
    #[error("{}: can't write the image: {source}", path.display())]
    Write {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An option's value makes no sense.
    #[error("{0}")]
    BadOption(String),
    /// A file that is to be read as an image or kernel is not one.
    #[error(transparent)]
    Image(#[from] machine::image::ImageError),
    /// The kernel can't be used.
    #[error(transparent)]
    Kernel(#[from] machine::boot::BootError),
}
